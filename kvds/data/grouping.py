"""An order of samples in which those of one step are of like length."""

from __future__ import annotations

import random
from collections.abc import Sequence

# Steps among which samples are sorted: more would group better, and let fewer samples meet each other.
_STEPS = 50


def group_by_length(order: Sequence[int], lengths: Sequence[int], step_size: int, draw: random.Random) -> list[int]:
    """Sort ``order`` by length within stretches of 50 steps, then shuffle whole steps.

    Padding falls, while which samples meet still changes from epoch to epoch. The last step, which may be short, stays
    last.

    Args:
        order: Samples, shuffled.
        lengths: Tokens of each sample.
        step_size: Samples of one global step.
        draw: Shuffles the steps.
    """
    stretch = _STEPS * step_size
    ordered = [
        i
        for begin in range(0, len(order), stretch)
        for i in sorted(order[begin : begin + stretch], key=lambda i: -lengths[i])
    ]
    steps = [ordered[begin : begin + step_size] for begin in range(0, len(ordered), step_size)]
    last = [steps.pop()] if steps and len(steps[-1]) < step_size else []
    draw.shuffle(steps)
    return [i for step in steps + last for i in step]
