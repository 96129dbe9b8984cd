"""kvds: distil a language model through the keys and values of its attention, under DeepSpeed ZeRO-3."""

from kvds.distributed.deepspeed_import import defer_mlflow

__version__ = "0.1.0"

defer_mlflow()  # before any room imports DeepSpeed
