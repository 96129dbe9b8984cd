"""The aligner that a configuration names, and back from an aligner to plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvds.align.aligner import KVAligner
from kvds.align.flat import FlatAligner
from kvds.align.group import AlignerGroup, members_of
from kvds.align.hidden import HiddenAligner
from kvds.align.layer_map import default_layer_map
from kvds.align.loss import default_parts
from kvds.align.relation import RelationAligner
from kvds.align.structural_kv import StructuralKVLoss
from kvds.align.structured import MapProjectionAligner
from kvds.config.settings import AlignmentSettings
from kvds.errors import InputError
from kvds.kv import KVShape

ALIGNERS: dict[str, type[KVAligner]] = {
    "flat": FlatAligner,
    "structured": MapProjectionAligner,
    "hidden": HiddenAligner,
    "relation": RelationAligner,
    "structural_kv": StructuralKVLoss,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SeededSettings(AlignmentSettings):
    seed: int = 0


def build_aligner(student: KVShape, teacher: KVShape, settings: Any) -> KVAligner:
    """The aligner that ``settings.alignment_mode`` names, with the same random start on every rank.

    Args:
        student: Its KV shape.
        teacher: Its KV shape.
        settings: Fields of :class:`kvds.config.AlignmentSettings`, and ``seed``, as a run's configuration has them.

    Raises:
        InputError: settings that the two shapes cannot serve.
    """
    names = [field.name for field in dataclasses.fields(_SeededSettings)]
    own = _SeededSettings(**{name: getattr(settings, name) for name in names if hasattr(settings, name)})
    if own.alignment_mode not in ALIGNERS:
        raise InputError(f"alignment_mode={own.alignment_mode}: expected {' or '.join(ALIGNERS)} to build an aligner")
    if own.layer_map is None:
        own = dataclasses.replace(own, layer_map=default_layer_map(own.alignment_mode))
    if own.kv_parts == "auto":
        own = dataclasses.replace(own, kv_parts=default_parts(own.alignment_mode))
    return ALIGNERS[own.alignment_mode](student, teacher, own)


def what_is_read(alignment_mode: str) -> str:
    """What the mode compares of the teacher, as :func:`kvds.kv.open_capture` takes it; ``"kv"`` where nothing is."""
    return ALIGNERS.get(alignment_mode, KVAligner).teacher_reads


def aligner_config_dict(aligner: KVAligner | AlignerGroup) -> dict[str, Any]:
    """What rebuilds the aligner: plain values, as ``map_aligner.pt`` holds them."""
    if isinstance(aligner, AlignerGroup):
        members = [aligner_config_dict(member) for _, member in members_of(aligner)]
        return {"members": members, "weights": list(aligner.weights)}
    return {name: dataclasses.asdict(getattr(aligner, name)) for name in ("student_shape", "teacher_shape", "settings")}


def aligner_from_config_dict(config: dict[str, Any]) -> KVAligner | AlignerGroup:
    """The inverse of :func:`aligner_config_dict`; weights and statistics are loaded by the caller."""
    if "members" in config:
        members = [aligner_from_config_dict(member) for member in config["members"]]
        return AlignerGroup(members, config["weights"])  # type: ignore[arg-type]
    return build_aligner(
        KVShape(**config["student_shape"]), KVShape(**config["teacher_shape"]), _SeededSettings(**config["settings"])
    )
