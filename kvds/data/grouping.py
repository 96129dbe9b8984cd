"""Groups of samples that meet: those of like length in a step, and within a step in a micro-batch."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Mapping, Sequence

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


def deal_by_length(
    ids: Sequence[int], lengths: Mapping[int, int] | Sequence[int], size: int, *, packed: bool
) -> list[int]:
    """Deal the samples of one step out to its micro-batches, so that little is padding and no rank waits long.

    A loss is a sum over the step's tokens, divided once: which samples share a micro-batch changes it by rounding
    alone, and neither which samples make a step nor what one weighs.

    Args:
        ids: Of the step, as many as ``size`` times the micro-batches of all ranks; -1 fills up.
        lengths: Tokens of each sample, by its number.
        size: Samples of a micro-batch.
        packed: Samples share rows, so that what counts is the sum of a micro-batch's tokens: the longest sample left
            goes to the micro-batch that has the fewest. Otherwise it is the longest of them: the longest samples make
            the first micro-batches, the shortest the last, and those of ranks that compute at the same time are of like
            length.

    Returns:
        The same ids; ``size`` after ``size`` make a micro-batch.
    """
    longest_first = sorted(ids, key=lambda i: lengths[i] if i >= 0 else -1, reverse=True)
    if not packed:
        return longest_first
    batches: list[list[int]] = [[] for _ in range(len(ids) // size)]
    open_batches = [(0, number) for number in range(len(batches))]
    for i in longest_first:
        tokens, number = open_batches[0]
        batches[number].append(i)
        if len(batches[number]) == size:
            heapq.heappop(open_batches)
        else:
            heapq.heapreplace(open_batches, (tokens + (lengths[i] if i >= 0 else 0), number))
    return [i for batch in batches for i in batch]


def deal_to_rows(
    ids: Sequence[int], lengths: Mapping[int, int] | Sequence[int], capacity: int, ranks: int
) -> list[list[int]]:
    """Deal the samples of one step out to as few rows as hold them, equally many for each rank and of like length.

    Args:
        ids: Of the step; -1 is left out.
        lengths: Tokens of each sample, by its number; none over ``capacity``.
        capacity: Tokens of a row.
        ranks: Processes, each of which computes every ``ranks``-th row.

    Returns:
        A multiple of ``ranks`` rows, the longest first, so that those computed at the same time stand side by side and
        are of like length; a row is empty where there are fewer samples than rows.
    """
    longest_first = sorted((i for i in ids if i >= 0), key=lambda i: (-lengths[i], i))
    tokens = sum(lengths[i] for i in longest_first)
    for turns in itertools.count(max(1, -(-tokens // (capacity * ranks)))):
        rows: list[tuple[int, list[int]]] = [(0, []) for _ in range(turns * ranks)]
        emptiest = [(0, number) for number in range(len(rows))]
        for i in longest_first:
            filled, number = emptiest[0]
            rows[number] = filled + lengths[i], [*rows[number][1], i]
            heapq.heapreplace(emptiest, (filled + lengths[i], number))
        if max(filled for filled, _ in rows) <= capacity:
            return [row for _, row in sorted(rows, key=lambda row: -row[0])]
    raise AssertionError("counting ends nowhere")
