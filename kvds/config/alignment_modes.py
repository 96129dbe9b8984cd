"""Alignment modes: what is true of each, read by flags, rules, plan, commands and reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kvds.errors import listed


class Only(NamedTuple):
    """The values of a setting that have a meaning under a mode.

    Attributes:
        values: Those; the first is told first.
        why: No others do.
        unless: Another setting and the value of it under which any value has a meaning.
    """

    values: tuple[object, ...]
    why: str
    unless: tuple[str, object] | None = None


@dataclass(frozen=True, kw_only=True)
class AlignmentMode:
    """Facts of one alignment mode.

    Attributes:
        doc: What is matched, for ``--help``.
        aligned: Whether anything is; the one mode without has no aligner.
        reads: What it compares of the student: ``"kv"``, ``"attention"`` (queries, too) or ``"hidden"``, as
            :func:`kvds.kv.open_capture` takes it.
        teacher_reads: The same of the teacher.
        layer_map: What ``layer_map`` means where it is unset.
        parts: What ``kv_parts=auto`` means.
        grouped: Whether layers and heads can be cut into groups that draw only from each other.
        shares_dim: Whether ``map_proj_share_dim`` makes another aligner.
        fused: Whether its loss is the operation of :mod:`kvds.ops`, of which ``impl`` chooses the implementation.
        weighs: Whether positions may count by weights of their own.
        own_rows: Whether it relates the tokens of a row to each other, so that samples cannot share rows.
        only: Setting → what it may be under this mode; all else may be anything.
        own: Setting that has a meaning under this mode alone → its default, which it must keep under any other.
    """

    doc: str
    aligned: bool = True
    reads: str = "kv"
    teacher_reads: str = "kv"
    layer_map: str = "learned"
    parts: str = "kv"
    grouped: bool = False
    shares_dim: bool = False
    fused: bool = False
    weighs: bool = False
    own_rows: bool = False
    only: Mapping[str, Only] = field(default_factory=dict)
    own: Mapping[str, object] = field(default_factory=dict)

    @property
    def mapped(self) -> bool:
        """Whether there are dimension maps, which can be fitted before step 1."""
        return self.aligned and "map_start" not in self.only

    @property
    def takes_kv(self) -> bool:
        """Whether the teacher gives keys and values, which a cache holds, ranks that share its heads exchange, and a
        selection can score.
        """
        return self.teacher_reads == "kv"


# Values alone under a map: keys add work and no more (EVIDENCE.md).
ALIGNMENT_MODES: dict[str, AlignmentMode] = {
    "flat": AlignmentMode(
        doc="one linear map per layer over all its heads",
        layer_map="endpoint",
        parts="v",
        weighs=True,
        own={"source_layers_per_target": 1},
    ),
    "structured": AlignmentMode(
        doc="a layer map, a head map and a dimension map",
        parts="v",
        grouped=True,
        shares_dim=True,
        fused=True,
        weighs=True,
    ),
    "structural_kv": AlignmentMode(
        doc="cosine of K and V, and attention",
        reads="attention",
        layer_map="endpoint",
        own_rows=True,
        only={
            "direction": Only(("student_to_teacher",), "the teacher is the fixed side"),
            "kv_parts": Only(("auto", "kv"), "its attention needs keys, its cosine both"),
            "kv_loss": Only(("mse",), "its penalties are a cosine and a KL divergence"),
            "layer_map": Only(("endpoint", "last_aligned", None), "a query meets one teacher layer's keys"),
            "align_tokens": Only(("position",), "attention is given to tokens"),
        },
        own={"attention_loss_weight": 1.0},
    ),
    "relation": AlignmentMode(
        doc="no map, token-token relations are matched",
        own_rows=True,
        only={
            "direction": Only(("student_to_teacher",), "nothing is mapped: the teacher's relations are the target"),
            "aligner_update": Only(("trained",), "no map is there to be frozen"),
            "map_start": Only(("auto", "random"), "no map is there to be fitted"),
            "kv_loss": Only(
                ("mse",), "a softmax's loss is a KL divergence; or --relation_kind cosine", ("relation_kind", "cosine")
            ),
        },
        own={"relation_kind": "softmax", "relation_heads": None, "relation_units": "standard"},
    ),
    "hidden": AlignmentMode(
        doc="a control, hidden states in place of KV",
        reads="hidden",
        teacher_reads="hidden",
        shares_dim=True,
        only={
            "kv_parts": Only(("auto", "kv"), "hidden states are neither keys nor values"),
            "kv_rope": Only(("pre",), "hidden states are not rotated"),
        },
        own={"hidden_at": "layer"},
    ),
    "none": AlignmentMode(doc="nothing is matched", aligned=False),
}
"""Value of ``alignment_mode`` → its facts. :data:`kvds.align.ALIGNERS` has the aligner of each that has one."""


def modes_where(holds: Callable[[AlignmentMode], bool]) -> str:
    """Names of the modes with an aligner for which ``holds``, as a text: ``"flat and structured"``."""
    return listed([name for name, mode in ALIGNMENT_MODES.items() if mode.aligned and holds(mode)], "and")
