"""Which tokens observe, and the attention that their queries pay: a few rows of it, never the whole matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ANSWER_SEGMENT = 3
"""The segment id of answer tokens, whose queries are ``rkv``'s observers (:class:`kvds.data.batches.Segment`)."""


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


@dataclass(frozen=True)
class ObservedLayer:
    """What one attention layer compares at the observing tokens.

    Attributes:
        queries: ``[B, num_attention_heads, Q, head_dim]`` rows of the observing tokens, rotated as attention uses them.
        unrotated_keys: ``[B, num_key_value_heads, T, head_dim]``.
        rotate: Rotates the keys; None where the model rotates nothing.
        scaling: What attention multiplies ``q · k`` by.
        sliding_window: A query sees itself and the ``sliding_window - 1`` positions before it; None = all before it.
    """

    queries: Tensor
    unrotated_keys: Tensor
    rotate: Callable[[Tensor], Tensor] | None
    scaling: float
    sliding_window: int | None

    def keys(self) -> Tensor:
        """The keys as attention compares them, in fp32 (fp64 stays): computed when asked, one layer at a time."""
        keys = self.unrotated_keys if self.rotate is None else self.rotate(self.unrotated_keys)
        return keys.to(torch.promote_types(torch.float32, keys.dtype))


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
    queries = layer.queries.to(keys.dtype).reshape(batch, heads, -1, dim)  # the heads of a group follow each other
    logits = (queries @ keys.transpose(2, 3) * layer.scaling).unflatten(2, (-1, rows.positions.shape[1]))
    key_position = torch.arange(tokens, device=keys.device)
    distance = rows.positions.unsqueeze(-1) - key_position  # [B, Q, T]
    visible = real.unsqueeze(1) & (distance >= 0)
    if layer.sliding_window is not None:
        visible &= distance < layer.sliding_window
    probabilities = logits.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    return probabilities.masked_fill(~rows.mask[:, None, None, :, None], 0.0)
