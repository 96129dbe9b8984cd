"""From the keys and values of two models to a loss."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from kvds.align.flat import FlatAligner
from kvds.align.loss import AlignmentLoss
from kvds.align.structured import MapProjectionAligner
from kvds.kv import KVShape
from kvds.settings import AlignmentSettings

ALIGNERS: dict[str, type[nn.Module]] = {"flat": FlatAligner, "structured": MapProjectionAligner}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SeededSettings(AlignmentSettings):
    seed: int = 0


def build_aligner(student: KVShape, teacher: KVShape, settings: Any) -> nn.Module:
    """The aligner that ``settings.alignment_mode`` names.

    Args:
        student: Its KV shape.
        teacher: Its KV shape.
        settings: Fields of :class:`kvds.settings.AlignmentSettings`, and ``seed`` (a :class:`kvds.config.RunConfig`
            has them).

    Raises:
        InputError: settings that the two shapes cannot serve.
    """
    names = [field.name for field in dataclasses.fields(_SeededSettings)]
    own = _SeededSettings(**{name: getattr(settings, name) for name in names if hasattr(settings, name)})
    return ALIGNERS[own.alignment_mode](student, teacher, own)


def aligner_config_dict(aligner: nn.Module) -> dict[str, Any]:
    """What rebuilds the aligner: plain values, as ``map_aligner.pt`` holds them."""
    return {name: dataclasses.asdict(getattr(aligner, name)) for name in ("student_shape", "teacher_shape", "settings")}


def aligner_from_config_dict(config: dict[str, Any]) -> nn.Module:
    """The inverse of :func:`aligner_config_dict`; weights are loaded by the caller."""
    return build_aligner(
        KVShape(**config["student_shape"]), KVShape(**config["teacher_shape"]), _SeededSettings(**config["settings"])
    )


__all__ = [
    "AlignmentLoss",
    "FlatAligner",
    "MapProjectionAligner",
    "aligner_config_dict",
    "aligner_from_config_dict",
    "build_aligner",
]
