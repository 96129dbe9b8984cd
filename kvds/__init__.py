"""kvds: distil a language model through the keys and values of its attention, under DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
