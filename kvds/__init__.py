"""kvds: distil a language model through the keys and values of its attention, under DeepSpeed ZeRO-3.

``from kvds import KVDistiller, AlignmentSettings`` brings the losses into a training loop of one's own.
"""

from __future__ import annotations

from kvds.distributed.deepspeed_import import defer_mlflow

__version__ = "0.1.0"

_ROOMS = {"AlignmentSettings": "kvds.config.settings", "KVDistiller": "kvds.distiller"}

defer_mlflow()  # before any room imports DeepSpeed


def __getattr__(name: str) -> object:
    """Public names, imported when they are asked for: ``import kvds`` alone brings neither torch nor transformers."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ROOMS[name]), name)
