"""Observing tokens, and the attention that their queries pay: a few rows of it, never the whole matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ANSWER_SEGMENT = 3
"""The segment id of answer tokens, whose queries are ``rkv``'s observers (:class:`kvds.data.encoding.Segment`)."""


@dataclass(frozen=True)
class ObservingRows:
    """The positions whose queries say what is important, per row of a batch.

    Attributes:
        positions: ``[B, Q]`` int64, ascending; slots that do not count may repeat a position or hold any.
        mask: ``[B, Q]`` bool, True where the slot counts.
    """

    positions: Tensor
    mask: Tensor

    def at(self, tokens: int) -> Tensor:
        """``[B, tokens]`` bool: which positions observe."""
        found = torch.zeros(self.mask.shape[0], tokens, dtype=torch.int64, device=self.mask.device)
        # Integer sums are exact in any order; a slot that does not count adds nothing.
        return found.scatter_add(1, self.positions, self.mask.long()) > 0


def last_rows(candidates: Tensor, count: int) -> ObservingRows:
    """The last ``count`` candidates of each row.

    Args:
        candidates: ``[B, T]`` bool.
        count: Slots per row, at most T are made; known to the host, so that no device is asked.
    """
    slots = min(count, candidates.shape[1])
    from_end = candidates.flip(1).cumsum(1).flip(1)
    chosen = candidates & (from_end <= slots)
    # Chosen positions last, in order of time: a stable sort keeps it.
    positions = chosen.to(torch.uint8).sort(dim=1, stable=True).indices[:, candidates.shape[1] - slots :]
    return ObservingRows(positions, chosen.gather(1, positions))


class Rotation:
    """A model's rotary embedding at all positions and at the observing ones.

    Args:
        rotary: Function ``(q, k, cos, sin) -> (q, k)`` of the model.
        cos: ``[B or 1, T, head_dim]``.
        sin: As ``cos``.
        rows: ``[B, Q]`` int64 observing positions; None where all observe, or none.
    """

    def __init__(self, rotary: Callable[..., Any], cos: Tensor, sin: Tensor, rows: Tensor | None) -> None:
        self._rotary, self.at_all = rotary, (cos, sin)
        self._at_rows = self.at_all
        if rows is not None:
            cos, sin = (gather_rows(part.expand(rows.shape[0], -1, -1), rows) for part in (cos, sin))
            self._at_rows = cos, sin

    def queries(self, queries: Tensor) -> Tensor:
        """``[B, heads, Q, head_dim]`` at the observing positions, rotated."""
        return self._rotated(queries, *self._at_rows)

    def keys(self, keys: Tensor) -> Tensor:
        """``[B, heads, T, head_dim]``, rotated."""
        return self._rotated(keys, *self.at_all)

    def _rotated(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # The function rotates queries and keys alike; an empty query costs nothing.
        rotated: Tensor = self._rotary(torch.empty_like(states[:, :0]), states, cos, sin)[1]
        return rotated


def gather_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """``[B, T, width]`` at ``rows [B, Q]`` → ``[B, Q, width]``."""
    return tensor.gather(1, rows.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))


@dataclass(frozen=True)
class ObservedLayer:
    """What one attention layer, or several merged into one with more heads, compares at the observing tokens.

    Attributes:
        unrotated_queries: ``[B, num_attention_heads, Q, head_dim]`` rows of the observing tokens.
        unrotated_keys: ``[B, num_key_value_heads, T, head_dim]``.
        rotation: Of both; None where the model rotates nothing.
        scaling: What attention multiplies ``q · k`` by.
        sliding_window: A query sees itself and the ``sliding_window - 1`` positions before it; None = all before it.
        softcap: ``c`` of attention logits ``c · tanh(x / c)``; None = not capped.
    """

    unrotated_queries: Tensor
    unrotated_keys: Tensor
    rotation: Rotation | None
    scaling: float
    sliding_window: int | None
    softcap: float | None = None

    def queries(self) -> Tensor:
        """The query rows as attention compares them, in fp32 (fp64 stays)."""
        queries = self.unrotated_queries
        return _wide(queries if self.rotation is None else self.rotation.queries(queries))

    def keys(self) -> Tensor:
        """The keys as attention compares them, in fp32 (fp64 stays): computed when asked, so that memory is one's."""
        keys = self.unrotated_keys
        return _wide(keys if self.rotation is None else self.rotation.keys(keys))


def _wide(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(torch.float32, states.dtype))


def _alike(layer: ObservedLayer) -> tuple[int | None, float | None]:
    return layer.sliding_window, layer.softcap


def merged_layers(layers: Sequence[ObservedLayer], most_elements: int) -> Iterator[ObservedLayer]:
    """Runs of layers as one layer with more heads: a GPU does them at once, at most ``most_elements`` of keys each."""
    start = 0
    while start < len(layers):
        first = layers[start]
        stop = start + max(1, most_elements // max(1, first.unrotated_keys.numel()))
        run = []
        for layer in layers[start:stop]:
            if layer.rotation is not first.rotation or _alike(layer) != _alike(first):
                break
            run.append(layer)
        start += len(run)
        yield first if len(run) == 1 else ObservedLayer(
            torch.cat([layer.unrotated_queries * layer.scaling for layer in run], 1),
            torch.cat([layer.unrotated_keys for layer in run], 1),
            first.rotation, 1.0, first.sliding_window, first.softcap,
        )  # fmt: skip


@dataclass(frozen=True)
class Observed:
    """What a forward leaves for a selection that looks at keys and queries.

    Attributes:
        rows: The observing tokens; Q may be 0 where only keys are looked at.
        layers: One a layer.
    """

    rows: ObservingRows
    layers: tuple[ObservedLayer, ...]


def attention_rows(layer: ObservedLayer, keys: Tensor, rows: ObservingRows, real: Tensor) -> Tensor:
    """Attention probabilities of the observing queries, causal, within the sliding window, padding masked.

    Args:
        layer: One layer.
        keys: Its ``layer.keys()``.
        rows: The observing tokens.
        real: ``[B, T]`` bool, the tokens that can be attended to.

    Returns:
        ``[B, num_key_value_heads, query heads per KV head, Q, T]``; zero for slots that do not count.
    """
    batch, heads, tokens, dim = keys.shape
    queries = layer.queries().reshape(batch, heads, -1, dim)  # the heads of a group follow each other
    logits = (queries @ keys.transpose(2, 3) * layer.scaling).unflatten(2, (-1, rows.positions.shape[1]))
    if layer.softcap is not None:
        logits = layer.softcap * (logits / layer.softcap).tanh()
    key_position = torch.arange(tokens, device=keys.device)
    distance = rows.positions.unsqueeze(-1) - key_position  # [B, Q, T]
    visible = real.unsqueeze(1) & (distance >= 0)
    if layer.sliding_window is not None:
        visible &= distance < layer.sliding_window
    probabilities = logits.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    return probabilities.masked_fill(~rows.mask[:, None, None, :, None], 0.0)
