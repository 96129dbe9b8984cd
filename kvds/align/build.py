"""The aligner that a configuration names, and back from an aligner to plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvds.align.aligner import KVAligner, aligner_settings
from kvds.align.flat import FlatAligner
from kvds.align.group import AlignerGroup, members_of
from kvds.align.hidden import HiddenAligner
from kvds.align.relation import RelationAligner
from kvds.align.structural_kv import StructuralKVLoss
from kvds.align.structured import MapProjectionAligner
from kvds.config.settings import AlignmentSettings
from kvds.errors import InputError, listed
from kvds.kv import KVShape

ALIGNERS: dict[str, type[KVAligner]] = {
    "flat": FlatAligner,
    "structured": MapProjectionAligner,
    "hidden": HiddenAligner,
    "relation": RelationAligner,
    "structural_kv": StructuralKVLoss,
}
"""Mode of :data:`kvds.config.alignment_modes.ALIGNMENT_MODES` → its aligner."""


def build_aligner(student: KVShape, teacher: KVShape, settings: AlignmentSettings, seed: int = 0) -> KVAligner:
    """The aligner that ``settings.alignment_mode`` names, with the same random start on every rank.

    Args:
        student: Its KV shape.
        teacher: Its KV shape.
        settings: The alignment's, or a run's, which hold them.
        seed: Of the random start.

    Raises:
        InputError: settings that the two shapes cannot serve.
    """
    mode = settings.alignment_mode
    if mode not in ALIGNERS:
        raise InputError(f"alignment_mode={mode}: expected {listed(list(ALIGNERS), 'or')} to build an aligner")
    return ALIGNERS[mode](student, teacher, aligner_settings(settings), seed)


def aligner_config_dict(aligner: KVAligner | AlignerGroup) -> dict[str, Any]:
    """What rebuilds the aligner: plain values, as ``map_aligner.pt`` holds them."""
    if isinstance(aligner, AlignerGroup):
        members = [aligner_config_dict(member) for _, member in members_of(aligner)]
        return {"members": members, "weights": list(aligner.weights)}
    return {
        "student_shape": dataclasses.asdict(aligner.student_shape),
        "teacher_shape": dataclasses.asdict(aligner.teacher_shape),
        "settings": {**dataclasses.asdict(aligner.settings), "seed": aligner.seed},
    }


def aligner_from_config_dict(config: dict[str, Any]) -> KVAligner | AlignerGroup:
    """The inverse of :func:`aligner_config_dict`; weights and statistics are loaded by the caller."""
    if "members" in config:
        members = [aligner_from_config_dict(member) for member in config["members"]]
        return AlignerGroup(members, config["weights"])  # type: ignore[arg-type]
    settings = dict(config["settings"])
    seed = settings.pop("seed", 0)
    return build_aligner(
        KVShape(**config["student_shape"]), KVShape(**config["teacher_shape"]), AlignmentSettings(**settings), seed
    )
