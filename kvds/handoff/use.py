"""Use of a cache map: the cross entropy of answers that the student writes from it, and the strength with the least.

How well a map predicts keys and values says little of what a student makes of them. So maps of every strength, and the
one whose layers each have the strength that predicts them best, are fitted to one half of the texts; with the other
half the student answers. What is best there is fitted to all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvds.data.batches import TokenBatch, collate
from kvds.data.encoding import EncodedSample
from kvds.handoff.cache_map import CacheMap
from kvds.handoff.continuation import Continuation, continue_from
from kvds.handoff.fitting import MapFit, Strengths, write_fit
from kvds.handoff.moments import MapMoments
from kvds.handoff.reading import read_states
from kvds.kv import KVStates
from kvds.kv.states import KV_PARTS
from kvds.models.own_logits import head_of, is_plain_head

JUDGED = 128
"""Rows of the other half that are answered, at most."""


def mapped_prompts(teacher: nn.Module, cache_map: CacheMap, batch: TokenBatch, row: Continuation) -> KVStates:
    """What the teacher's states of a batch's prompts become, of the cache's slots, in the map's dtype."""
    return _mapped(cache_map, _read(teacher, batch), row)


def _read(teacher: nn.Module, batch: TokenBatch) -> KVStates:
    place = next(teacher.parameters()).device
    return read_states(teacher, batch.input_ids.to(place), batch.attention_mask.bool().to(place))


def _mapped(cache_map: CacheMap, states: KVStates, row: Continuation) -> KVStates:
    wanted = next(cache_map.parameters())
    return row.prompt_states(cache_map(KVStates(*(tuple(layer.to(wanted) for layer in part) for part in states))))


def answers_cross_entropy(
    student: nn.Module, head: Callable[[Tensor], Tensor], mapped: KVStates, row: Continuation, input_ids: Tensor,
    *, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Of the tokens that count, from a cache of ``mapped``, in fp32; gradients reach ``mapped``.

    Args:
        student: In evaluation mode.
        head: Of it, from hidden states to logits.
        mapped: Of the cache's slots, in any dtype.
        row: Of the batch.
        input_ids: ``[B, T]`` of the batch.
        reduction: As of :func:`torch.nn.functional.cross_entropy`.
    """
    dtype = next(student.parameters()).dtype
    states = KVStates(*(tuple(layer.to(dtype) for layer in part) for part in mapped))
    hidden = continue_from(student, states, row, input_ids).flatten(0, 1)
    return F.cross_entropy(head(hidden[row.labelled.index]).float(), row.labelled.target, reduction=reduction)


@torch.no_grad()
def answer_losses(
    teacher: nn.Module, student: nn.Module, maps: Sequence[CacheMap], rows: Sequence[EncodedSample], *,
    batch_size: int = 16, pad: int = 0,
) -> list[float]:  # fmt: skip
    """Nats per token of the answers of ``rows``, for each map; the teacher reads each prompt once."""
    device = next(student.parameters()).device
    head = head_of(student, plain=is_plain_head(student))
    sums, tokens = torch.zeros(len(maps), dtype=torch.float64, device=device), 0
    for begin in range(0, len(rows), batch_size):
        some = list(rows[begin : begin + batch_size])
        batch = collate(some, [sample.example for sample in some], pad, 1.0, 1.0)
        row, batch = Continuation.from_batch(batch).to(device), batch.to(device)
        states = _read(teacher, batch)
        for number, cache_map in enumerate(maps):
            mapped = _mapped(cache_map, states, row)
            sums[number] += answers_cross_entropy(student, head, mapped, row, batch.input_ids, reduction="sum")
        tokens += len(row.labelled.target)
    return [float(total) / max(1, tokens) for total in sums]


def refit_by_use(
    teacher: nn.Module,
    student: nn.Module,
    cache_map: CacheMap,
    moments: MapMoments,
    fit: MapFit,
    rows: Sequence[EncodedSample],
    **batches: Any,
) -> MapFit:
    """Fit ``cache_map`` again with the strength whose map serves the student best.

    Args:
        teacher: In evaluation mode.
        student: Likewise.
        cache_map: Fitted with the strengths of ``fit``; written to.
        moments: Of the prompts of ``rows``, of which every second one is the other half.
        fit: From :func:`kvds.handoff.fitting.fit_map`.
        rows: With answers; those that the moments are of, in their order.
        **batches: As of :func:`answer_losses`.

    Returns:
        ``fit`` with the strengths taken, what they explain, and what each candidate cost.
    """
    layers = cache_map.student.num_hidden_layers
    choices: dict[str, Strengths] = {"best predicted": fit.strengths}
    choices |= {f"{strength:g}": dict.fromkeys(KV_PARTS, [strength] * layers) for strength in fit.tried}
    maps = []
    for strengths in choices.values():
        maps.append(copy.deepcopy(cache_map))
        write_fit(maps[-1], moments, strengths, half=0)
    losses = answer_losses(teacher, student, maps, rows[1::2][:JUDGED], **batches)
    fit = replace(fit, used=dict(zip(choices, losses, strict=True)))
    strengths = choices[fit.by_use[0]]
    write_fit(cache_map, moments, strengths, half=None)
    explained = {
        part: [fit.explained[part][layer][fit.tried.index(s)] for layer, s in enumerate(strengths[part])]
        for part in KV_PARTS
    }
    return replace(fit, strengths=strengths, r2=explained)
