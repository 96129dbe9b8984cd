"""Depth maps between models of different layer counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvds.config.settings import AlignmentSettings
from kvds.kv import KVShape, group_slices

# Logit lost per layer of distance: the nearest layer starts with about 3/4 of the weight. Linear, not quadratic, so
# that a layer further off still has a gradient to be found by.
_SHARPNESS = 2.0


def endpoint_map(num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """For each student layer the teacher layer at the same relative depth: first on first, last on last, half up.

    Half up, not ``round()``: that goes to even, and so rounds one layer up and the next one down.
    """
    if num_student_layers == 1:
        return [num_teacher_layers - 1]
    span, steps = num_teacher_layers - 1, num_student_layers - 1
    return [(2 * i * span + steps) // (2 * steps) for i in range(num_student_layers)]


def last_aligned_map(num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """Layers counted from the top: the last student layer on the last teacher layer, and so on downwards."""
    return [max(0, num_teacher_layers - num_student_layers + i) for i in range(num_student_layers)]


HARD_MAPS = {"endpoint": endpoint_map, "last_aligned": last_aligned_map}


def nearest_layers(layer: int, count: int, of: int) -> range:
    """The ``count`` layers around ``layer``, of ``of`` in all; at an end those next to it, of an even number one more
    before it than behind.
    """
    first = min(max(0, layer - count // 2), of - count)
    return range(first, first + count)


class LayerPlan(NamedTuple):
    """Which layers meet.

    Attributes:
        pairs: ``(student layer, teacher layer)`` of a hard layer map; None with a learned one.
        blocks: Runs of target layers and the run of source layers that each draws from, one per layer group. With a
            hard map (where groups have nothing to cut) one: its pairs in order.
    """

    pairs: list[tuple[int, int]] | None
    blocks: list[tuple[slice, slice]]

    @classmethod
    def of(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> LayerPlan:
        """As ``layer_map`` and ``layer_groups`` say."""
        layers = student.num_hidden_layers, teacher.num_hidden_layers
        hard = HARD_MAPS.get(settings.layer_map or "learned")
        if hard is not None:
            pairs = list(enumerate(hard(*layers)))
            return cls(pairs, [(slice(0, len(pairs)), slice(0, len(pairs)))])
        sources, targets = layers if settings.direction == "student_to_teacher" else layers[::-1]
        groups = settings.layer_groups
        return cls(None, list(zip(group_slices(targets, groups), group_slices(sources, groups), strict=True)))

    @property
    def targets(self) -> int:
        """Layers that something is mapped to: a map each."""
        return self.blocks[-1][0].stop

    @property
    def logits(self) -> tuple[int, int]:
        """Shape of the learned weights, ``[targets, widest group]``; empty with a hard map."""
        return (self.targets, max(x.stop - x.start for _, x in self.blocks)) if self.pairs is None else (0, 0)

    @property
    def mixed(self) -> int:
        """Source layers that the targets are mixed from, counted for each target; 0 with a hard map."""
        return 0 if self.pairs is not None else sum((y.stop - y.start) * (x.stop - x.start) for y, x in self.blocks)


def near_diagonal_logits(num_targets: int, num_sources: int) -> Tensor:
    """``[num_targets, num_sources]`` logits whose softmax peaks at the source of the same relative depth."""
    # No linspace: loading a model makes transformers keep it on the CPU for good, also where all else is meta.
    depth = (num_sources - 1) / (num_targets - 1) if num_targets > 1 else 0.0
    position = torch.arange(num_targets) * depth + (num_sources - 1) * (num_targets == 1)
    return -_SHARPNESS * (position[:, None] - torch.arange(num_sources)).abs()
