"""The distiller: keys and values of a teacher as a loss in anyone's training loop."""

from __future__ import annotations

from kvds.distiller.distiller import DistillerOutput, KVDistiller
from kvds.distiller.watched_forward import WatchedForward

__all__ = ["DistillerOutput", "KVDistiller", "WatchedForward"]
