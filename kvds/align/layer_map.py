"""Depth maps between models of different layer counts."""

from __future__ import annotations

import torch
from torch import Tensor

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


def default_layer_map(alignment_mode: str) -> str:
    """What ``layer_map`` means where it is unset."""
    return "endpoint" if alignment_mode in ("flat", "structural_kv") else "learned"


def near_diagonal_logits(num_targets: int, num_sources: int) -> Tensor:
    """``[num_targets, num_sources]`` logits whose softmax peaks at the source of the same relative depth."""
    # No linspace: loading a model makes transformers keep it on the CPU for good, also where all else is meta.
    depth = (num_sources - 1) / (num_targets - 1) if num_targets > 1 else 0.0
    position = torch.arange(num_targets) * depth + (num_sources - 1) * (num_targets == 1)
    return -_SHARPNESS * (position[:, None] - torch.arange(num_sources)).abs()
