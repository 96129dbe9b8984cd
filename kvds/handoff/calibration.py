"""Calibration: prompts that both models read, and the map that is fitted to what they compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kvds.data.encoding import EncodedSample
from kvds.errors import InputError
from kvds.handoff.cache_map import CacheMap, source_layers
from kvds.handoff.fitting import STRENGTHS, MapFit, fit_map
from kvds.handoff.moments import MapMoments
from kvds.handoff.reading import read_states
from kvds.handoff.use import refit_by_use
from kvds.kv import KVShape


def padded_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``[B, T]`` ids and their bool mask, padding before the rows."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


def batches_of(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Numbers of rows of like length, the longest first: memory that does not suffice is noticed at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


def fit_pair(
    teacher: nn.Module,
    student: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    layers: int | None = None,
    batch_size: int = 16,
    strengths: tuple[float, ...] = STRENGTHS,
    pad: int = 0,
    rows: Sequence[EncodedSample] | None = None,
) -> tuple[CacheMap, MapFit]:
    """Fit a map between two models on prompts; memory does not grow with their number.

    Args:
        teacher: In evaluation mode.
        student: Likewise, of the same tokenizer.
        prompts: Token ids, two or more; every second one judges what is fitted to the others, and the other way round.
        layers: Teacher layers that each student layer reads, those around its depth; None: all.
        batch_size: Prompts per forward.
        strengths: Of the ridge, to choose from.
        pad: Id that stands in for padding.
        rows: The same prompts with their answers: then that strength is taken with which the student answers half of
            them best, from a map of the other half. None: that which predicts the student's states best.

    Raises:
        InputError: nothing to fit to, or models that cannot be mapped.
    """
    if len(prompts) < 2 or not all(prompts):
        raise InputError(f"handoff: {len(prompts)} prompts; expected at least two, none empty (--rows 2 or more)")
    shapes = KVShape.from_config(teacher.config), KVShape.from_config(student.config)
    sources = source_layers(shapes[1].num_hidden_layers, shapes[0].num_hidden_layers, layers)
    places = [next(model.parameters()).device for model in (teacher, student)]
    cache_map = CacheMap(*shapes, sources).to(places[1])
    moments = MapMoments(cache_map, places[1])
    for numbers in batches_of(prompts, batch_size):
        ids, mask = padded_left([prompts[i] for i in numbers], pad, places[1])
        halves = torch.tensor([i % 2 for i in numbers], device=places[1])
        theirs = read_states(teacher, ids.to(places[0]), mask.to(places[0]))
        theirs = type(theirs)(*(tuple(layer.to(places[1]) for layer in part) for part in theirs))
        moments.update(theirs, read_states(student, ids, mask), mask, halves)
    fit = fit_map(cache_map, moments, strengths)
    if rows is None or len(strengths) == 1:
        return cache_map, fit
    return cache_map, refit_by_use(teacher, student, cache_map, moments, fit, rows, batch_size=batch_size, pad=pad)
