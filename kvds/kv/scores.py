"""Scores: how much a token is worth keeping, from a model's keys and the attention of observing tokens to them.

Every score is computed per layer and KV head, each sample on its own, and averaged over both, since one selection
serves all layers and heads. Layers are taken a few at a time: memory stays that of a few.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kvds.kv.observed import Observed, ObservedLayer, ObservingRows, attention_rows, merged_layers

SNAPKV_KERNEL = 5
RKV_KERNEL = 7
NEAR_DUPLICATE = 0.5
"""R-KV's threshold: keys with a larger cosine similarity are near-duplicates."""
_PAIR_ROWS = 128  # rows of the matrix of pairs that are alive at a time
# Keys that are scored at once: on a GPU some layers in one go, so that starting kernels costs little; on the CPU layer
# by layer, which stay in its cache.
_GPU_ELEMENTS = 2**24


def _unit(keys: Tensor, real: Tensor) -> Tensor:
    """Keys of length 1, those of padding zero."""
    return F.normalize(keys, dim=-1, eps=1e-12).masked_fill(~real[:, None, :, None], 0.0)


def _mean_over_queries(attention: Tensor, rows: ObservingRows) -> Tensor:
    """``[B, H, Q, T]`` → ``[B, H, T]``; zero where no token observes."""
    return attention.sum(2) / rows.mask.sum(1).clamp_min(1)[:, None, None]


def importance(attention: Tensor, rows: ObservingRows) -> Tensor:
    """``I_i = mean_q max_g A[g, q, i]``: ``[B, H, G, Q, T]`` → ``[B, H, T]``.

    Source: KaVa, arXiv 2510.02312, section 3 (queries of the answer).
    """
    return _mean_over_queries(attention.amax(2), rows)


def redundancy(unit_keys: Tensor, real: Tensor) -> Tensor:
    """``R = softmax_i( mean_j cos(k_i, k_j) )``, a key's similarity to itself left out: ``[B, H, T]``.

    ``Σ_j cos(k_i, k_j) = k̂_i · Σ_j k̂_j``, so that no pair is ever formed.

    Source: R-KV, arXiv 2505.24133, section 3; KaVa, arXiv 2510.02312, section 3.
    """
    total = (unit_keys * unit_keys.sum(2, keepdim=True)).sum(-1) - unit_keys.square().sum(-1)
    return _softmax_of_mean(total, real)


def redundancy_sparing_latest(unit_keys: Tensor, real: Tensor) -> Tensor:
    """As :func:`redundancy`, but each key's latest near-duplicate is not counted against: ``[B, H, T]``.

    For each key i the latest j with ``cos(k_i, k_j) > 0.5`` has that one similarity set to 0, so that of a run of
    repetitions the most recent is kept. Pairs are formed 128 rows at a time.

    Source: R-KV, arXiv 2505.24133, section 3.
    """
    tokens = unit_keys.shape[2]
    position = torch.arange(tokens, device=unit_keys.device)
    total = torch.zeros_like(unit_keys[..., 0])
    columns = unit_keys.transpose(2, 3)
    for start in range(0, tokens, _PAIR_ROWS):
        own = position[start : start + _PAIR_ROWS]
        similarity = unit_keys[:, :, start : start + _PAIR_ROWS] @ columns  # [B, H, rows, T]
        similarity.diagonal(start, 2, 3).zero_()
        latest = torch.where(similarity > NEAR_DUPLICATE, position, -1).amax(-1)
        spared = torch.where(latest < 0, own, latest)  # one without near-duplicates spares itself, which is 0 already
        total += similarity.scatter_(3, spared.unsqueeze(-1), 0.0).sum(2)
    return _softmax_of_mean(total, real)


def _softmax_of_mean(total: Tensor, real: Tensor) -> Tensor:
    mean = total / real.sum(1).clamp_min(1)[:, None, None]
    # A row of padding alone has no softmax: its zeros are never read.
    return mean.masked_fill(~real[:, None], -torch.inf).softmax(-1).masked_fill(~real[:, None], 0.0)


def _rkv(layer: ObservedLayer, rows: ObservingRows, real: Tensor, weight: float) -> Tensor:
    keys = layer.keys()
    attention = attention_rows(layer, keys, rows, real)
    return weight * importance(attention, rows) - (1 - weight) * redundancy(_unit(keys, real), real)


def _rkv_window(layer: ObservedLayer, rows: ObservingRows, real: Tensor, weight: float) -> Tensor:
    """``λ·mean_q maxpool(max_g A[g, q]) − (1−λ)·R``, with attention over the whole row, as R-KV's paper writes it.

    Not what its published code computes: that takes the maximum over the group of the logits, a softmax over the past
    alone, the mean over queries, and the pool last. The two keep 56 to 67 % of the same tokens.
    """
    keys = layer.keys()
    attention = attention_rows(layer, keys, rows, real).amax(2)  # [B, H, Q, T]
    past = attention.masked_fill(rows.at(real.shape[1])[:, None, None], 0.0)
    pooled = F.max_pool1d(past.flatten(0, 1), RKV_KERNEL, 1, RKV_KERNEL // 2).view_as(past)
    spared = redundancy_sparing_latest(_unit(keys, real), real)
    return weight * _mean_over_queries(pooled, rows) - (1 - weight) * spared


def _snapkv(layer: ObservedLayer, rows: ObservingRows, real: Tensor, weight: float) -> Tensor:
    attention = attention_rows(layer, layer.keys(), rows, real).mean(2)
    past = _mean_over_queries(attention, rows).masked_fill(rows.at(real.shape[1])[:, None], 0.0)
    return F.avg_pool1d(past, SNAPKV_KERNEL, 1, SNAPKV_KERNEL // 2)


def _keydiff(layer: ObservedLayer, rows: ObservingRows, real: Tensor, weight: float) -> Tensor:
    unit = _unit(layer.keys(), real)
    anchor = F.normalize(unit.sum(2, keepdim=True), dim=-1, eps=1e-12)
    return -(unit * anchor).sum(-1)


SCORES: dict[str, Callable[[ObservedLayer, ObservingRows, Tensor, float], Tensor]] = {
    "snapkv": _snapkv,
    "keydiff": _keydiff,
    "rkv": _rkv,
    "rkv_window": _rkv_window,
}


@torch.no_grad()
def token_scores(method: str, observed: Observed, real: Tensor, *, rkv_lambda: float) -> Tensor:
    """``[B, T]`` scores of real tokens, larger is kept first; what padding holds means nothing.

    * ``rkv``: ``λ·I − (1−λ)·R`` with :func:`importance` and :func:`redundancy`;
    * ``rkv_window``: the same with the last tokens as observers, attention max-pooled over 7 neighbours and
      :func:`redundancy_sparing_latest` (the paper's equations, not its published code: see there);
    * ``snapkv``: mean attention of the last tokens, averaged over 5 neighbours;
    * ``keydiff``: ``−cos(k_i, mean_j k̂_j)``.

    What the two window methods' observers pay to each other is set to 0 before the pooling, as they are kept anyway.

    Args:
        method: A key of ``SCORES``.
        observed: Query rows and keys of all layers.
        real: ``[B, T]`` bool, tokens that are no padding.
        rkv_lambda: λ, from 0 (redundancy alone) to 1 (importance alone).

    Source: SnapKV, arXiv 2404.14469; KeyDiff, arXiv 2504.15364; R-KV, arXiv 2505.24133; KaVa, arXiv 2510.02312.
    """
    score = SCORES[method]
    most = _GPU_ELEMENTS if real.device.type == "cuda" else 0
    runs = [score(layer, observed.rows, real, rkv_lambda) for layer in merged_layers(observed.layers, most)]
    return torch.cat(runs, 1).mean(1)
