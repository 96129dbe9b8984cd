"""The module that turns keys and values of two models into a loss: a part for keys, a part for values."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import nn

from kvds.align.aligner_part import AlignerPart
from kvds.align.loss import PART_NAMES, AlignmentLoss, average_parts, parts_of
from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.alignment_rules import check_alignment
from kvds.config.settings import AlignmentSettings
from kvds.errors import InputError
from kvds.kv import KVShape, KVStates, Selection, States

log = logging.getLogger(__name__)


def aligner_settings(settings: AlignmentSettings) -> AlignmentSettings:
    """The alignment's section alone, with layer map, parts and start of the maps where they are left open."""
    mode = ALIGNMENT_MODES[settings.alignment_mode]
    parts = mode.parts if settings.kv_parts == "auto" else settings.kv_parts
    return replace(
        settings.alignment(), layer_map=settings.layer_map or mode.layer_map, kv_parts=parts,
        map_start=settings.chosen_map_start,
    )  # fmt: skip


class KVAligner(nn.Module):
    """Alignment of keys and of values, with maps of their own for each.

    It owns no parameters itself: each part uses its own inside its own ``forward``, where ZeRO-3 gathers them.

    Args:
        student: Its KV shape.
        teacher: Its KV shape.
        settings: As :func:`aligner_settings` has them.
        seed: Of the random start.

    Attributes:
        parts: ``"key"`` and ``"value"``, or one of them (:func:`kvds.align.loss.parts_of`).
        reads: What it compares of the student, as :func:`kvds.kv.open_capture` takes it.
        teacher_reads: The same of the teacher.

    Raises:
        InputError: settings that the two shapes cannot serve.
    """

    part_class: ClassVar[type[AlignerPart]]

    def __init__(self, student: KVShape, teacher: KVShape, settings: AlignmentSettings, seed: int = 0) -> None:
        super().__init__()
        self._check(student, teacher, settings)
        self.student_shape, self.teacher_shape, self.settings, self.seed = student, teacher, settings, seed
        mode = ALIGNMENT_MODES[settings.alignment_mode]
        self.reads, self.teacher_reads = mode.reads, mode.teacher_reads
        # Keys and values start from different maps, each the same on every rank.
        self.parts = nn.ModuleDict(
            {
                part: self.part_class(
                    self.seen_shape(student), self.seen_shape(teacher), settings, 2 * seed + PART_NAMES.index(part)
                )
                for part in self.part_names(settings)
            }
        )
        if settings.aligner_update == "frozen":
            self.requires_grad_(False)
        elif settings.direction == "teacher_to_student":
            _warn_of_collapse()

    def forward(self, student: States, teacher: States, selection: Selection) -> AlignmentLoss:
        """The distance between projected and given states, mean over the selected positions of this micro-batch.

        Args:
            student: Keys and values per layer, with a graph.
            teacher: Keys and values per layer; no gradient goes there.
            selection: Which positions count, the same for both.

        Raises:
            InputError: states of another shape than the configurations promise.
        """
        self.check_states(student, teacher)
        teacher = teacher.detach()
        places = [selection.index, selection.mask]
        if selection.weight is not None:
            places.append(selection.weight)
        return average_parts(
            {
                name: part(getattr(student, f"{name}s"), getattr(teacher, f"{name}s"), *places)
                for name, part in self.parts.items()
            }
        )

    @torch.no_grad()
    def try_out(self, dtype: torch.dtype, device: torch.device) -> None:
        """Run once on two tokens of zeros, so that an implementation that cannot serve these shapes says so now.

        Raises:
            InputError: it cannot.
        """

        def states(shape: KVShape) -> KVStates:
            zeros = torch.zeros(1, shape.num_key_value_heads, 2, shape.head_dim, dtype=dtype, device=device)
            layers = (zeros,) * shape.num_hidden_layers
            return KVStates(layers, layers)

        mask = torch.ones(1, 2, dtype=torch.bool, device=device)
        self(states(self.student_shape), states(self.teacher_shape), Selection(None, mask))

    def check_states(self, student: States, teacher: States) -> None:
        """Compare captured states with the shapes that the configurations promise.

        Raises:
            InputError: states of another shape.
        """
        student.check(self.seen_shape(self.student_shape), side="student")
        teacher.check(self.seen_shape(self.teacher_shape), side="teacher")

    def named_parts(self) -> dict[str, AlignerPart]:
        """The maps by the name of what they map."""
        return {name: cast(AlignerPart, part) for name, part in self.parts.items()}

    @classmethod
    def part_names(cls, settings: AlignmentSettings) -> tuple[str, ...]:
        """The parts, as the settings ask for them."""
        return parts_of(settings)

    @classmethod
    def parameter_count(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> int:
        """Numbers of all maps, of the aligner that the same arguments would build."""
        own, seen = aligner_settings(settings), (cls.seen_shape(student), cls.seen_shape(teacher))
        return len(cls.part_names(own)) * cls.part_class.parameter_count(*seen, own)

    @classmethod
    def flops_per_position(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings, slots: int) -> float:
        """FLOPs of all parts, see :meth:`AlignerPart.flops_per_position`."""
        own, seen = aligner_settings(settings), (cls.seen_shape(student), cls.seen_shape(teacher))
        return len(cls.part_names(own)) * cls.part_class.flops_per_position(*seen, own, slots)

    @classmethod
    def seen_shape(cls, shape: KVShape) -> KVShape:
        """The shape, per model, of what is compared: layers, heads and their dimension."""
        return shape

    @classmethod
    def map_widths(cls, student: KVShape, teacher: KVShape) -> tuple[int, int]:
        """Dimensions on the student's and on the teacher's side of a dimension map."""
        return student.head_dim, teacher.head_dim

    @classmethod
    def _check(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> None:
        check_alignment(settings)
        layers = min(student.num_hidden_layers, teacher.num_hidden_layers)
        if not 1 <= settings.layer_groups <= layers:
            raise InputError(
                f"layer_groups={settings.layer_groups}: expected 1 to {layers}, the smaller of the models' layer "
                f"counts ({student.num_hidden_layers} and {teacher.num_hidden_layers}), so that no group is empty"
            )
        heads = student.num_key_value_heads, teacher.num_key_value_heads
        if settings.head_groups < 1 or any(count % settings.head_groups for count in heads):
            raise InputError(
                f"head_groups={settings.head_groups}: expected a number that divides the KV heads of the student "
                f"({heads[0]}) and of the teacher ({heads[1]}); 1 = every head draws from all"
            )
        width_s, width_t = cls.map_widths(student, teacher)
        if width_t < width_s and settings.direction == "teacher_to_student":
            raise InputError(
                f"direction=teacher_to_student: a map from the teacher's {width_t} dimensions would confine the "
                f"student to as many of its {width_s}; expected a teacher at least as wide (or --direction "
                f"student_to_teacher)"
            )
        if width_t < width_s and settings.map_start == "pca":
            raise InputError(
                f"map_start=pca: the teacher's {width_t} dimensions have no {width_s} principal directions for the "
                f"student's; expected a teacher at least as wide (or --map_start procrustes, ridge or random)"
            )


@functools.cache
def _warn_of_collapse() -> None:
    log.warning(
        "direction=teacher_to_student with a trained map collapses: the KV loss falls while the student's keys and "
        "values shrink to nothing; watch kv/norm_ratio (or --direction student_to_teacher, or --aligner_update frozen)"
    )
