"""Depth maps between models of different layer counts."""

from __future__ import annotations

import torch
from torch import Tensor

# Logit lost per squared layer of distance: the mix starts at about 0.7 on the nearest layer.
_SHARPNESS = 2.0


def endpoint_map(num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """For each student layer the teacher layer at the same relative depth, first on first and last on last, half up.

    Half up, not to even: ``round()`` would name teacher layers 0, 2, 3 for 3 students of 4 and skip one at random.
    """
    if num_student_layers == 1:
        return [num_teacher_layers - 1]
    span, steps = num_teacher_layers - 1, num_student_layers - 1
    return [(2 * i * span + steps) // (2 * steps) for i in range(num_student_layers)]


def last_aligned_map(num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """Layers counted from the top: the last student layer on the last teacher layer, the one before on the one
    before.
    """
    return [max(0, num_teacher_layers - num_student_layers + i) for i in range(num_student_layers)]


HARD_MAPS = {"endpoint": endpoint_map, "last_aligned": last_aligned_map}


def near_diagonal_logits(num_target_layers: int, num_source_layers: int) -> Tensor:
    """``[L_y, L_x]`` logits whose softmax peaks at the source layer of the same relative depth."""
    target = (
        torch.linspace(0, num_source_layers - 1, num_target_layers)
        if num_target_layers > 1
        else torch.tensor([num_source_layers - 1.0])
    )
    distance = target[:, None] - torch.arange(num_source_layers)
    return -_SHARPNESS * distance.square()
