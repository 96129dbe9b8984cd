"""Attention of a whole layer, some queries at a time, so that no matrix of all tokens by all tokens is ever there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kvds.kv.observed import ObservedLayer, ObservingRows, attention_rows

_ELEMENTS = 2**24  # of probabilities that are there at once


def attention_chunks(
    layer: ObservedLayer, real: Tensor, *, elements: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """The attention probabilities of all tokens of a layer, a run of queries after the other.

    Args:
        layer: With the queries of every position.
        real: ``[B, T]`` bool, False = padding.
        elements: Most probabilities at a time, if one query has no more; None: 64 MB of them.

    Yields:
        Which positions ask, and ``[B, num_key_value_heads, query heads per KV head, asking, stop]`` in fp32 at least:
        what they pay to the positions before the last of them. Padding asks and gets nothing.
    """
    queries, keys = layer.queries(), layer.keys()
    plain = replace(layer, unrotated_keys=keys, rotation=None)
    batch, heads, tokens, _ = queries.shape
    positions = torch.arange(tokens, device=keys.device).expand(batch, -1)
    step = max(1, (_ELEMENTS if elements is None else elements) // max(1, batch * heads * tokens))
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        chunk = slice(start, stop)
        rows = ObservingRows(positions[:, chunk], real[:, chunk])
        asking = replace(plain, unrotated_queries=queries[:, :, chunk])
        yield chunk, attention_rows(asking, keys[:, :, :stop], rows, real[:, :stop])
