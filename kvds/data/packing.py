"""Packing: several samples in one row, without padding between them.

Each sample keeps its own positions, counted from 0, and sees itself alone: attention is causal within a sample and
blocked between samples. Losses, selections and segments stay those of the sample, wherever it lies.

Source: Krell et al., Efficient Sequence Packing without Cross-contamination (2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Length of a row at which attention costs about what all else does, in models of width 128 to 512. In wider ones that
# is longer than a row, and the choice hardly matters.
_ATTENTION_TOKENS = 1024
# Of any dtype, so that rows begin at multiples of 16 bytes, as a GPU's attention wants.
_ALIGNED_ELEMENTS = 8
_TENSORS = ("document_ids", "position_ids", "token_index", "token_mask", "bounds")


@dataclass(frozen=True)
class Packing:
    """Where the samples of a packed micro-batch lie.

    Attributes:
        document_ids: ``[B, T]`` int64, number of the sample that a token belongs to; -1 = padding.
        position_ids: ``[B, T]`` int64, position of a token within its sample.
        token_index: ``[N, S]`` int64, for each sample the flat positions in ``[B · T]`` of its tokens, in order; ``S``
            is the longest sample's length.
        token_mask: ``[N, S]`` bool, True where the sample has a token.
        bounds: ``[N' + 1]`` int32, where the samples of the flat ``[B · T]`` begin, in order, and the end; padding
            stands in samples of its own.
        samples_per_row: Most samples that share a row.
        longest: No sample has more tokens; the same for all batches of a run.
    """

    document_ids: Tensor
    position_ids: Tensor
    token_index: Tensor
    token_mask: Tensor
    bounds: Tensor
    samples_per_row: int
    longest: int

    def to(self, device: torch.device) -> Packing:
        """The same with its tensors on ``device``."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS})

    def pin_memory(self) -> Packing:
        """The same in host memory that a GPU can copy from while it computes."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    def attention_mask(self, implementation: str, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """``[B, 1, T, T]``: what is added to the attention logits, 0 where a token sees another.

        For attention that takes no bounds (:mod:`kvds.kv.row_attention`). Made once for all layers: of a bool mask
        torch's attention makes such a tensor in every layer, and on a GPU another one with rows that begin at multiples
        of 16 bytes, and keeps them for the backward pass.

        Args:
            implementation: ``"sdpa"`` (-inf where it does not see) or ``"eager"`` (the dtype's least number).
            dtype: Of the attention logits.
            window: A token sees itself and the ``window - 1`` before it; None = all before it.
        """
        tokens = self.document_ids.shape[1]
        same = self.document_ids[:, :, None] == self.document_ids[:, None, :]
        near = torch.ones(tokens, tokens, dtype=torch.bool, device=same.device).tril()
        if window is not None:
            near = near.triu(1 - window)
        sees = (same & near)[:, None]
        if implementation == "eager":
            hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=same.device)
            return torch.where(sees, hidden.new_zeros(()), hidden)
        width = -(-tokens // _ALIGNED_ELEMENTS) * _ALIGNED_ELEMENTS
        mask = torch.zeros(*sees.shape[:3], width, dtype=dtype, device=same.device)[..., :tokens]
        return mask.masked_fill_(~sees, -torch.inf)


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Deal samples out to rows of at most ``capacity`` tokens, so that rows come out nearly alike and cheap.

    Args:
        lengths: Tokens of each sample, none over ``capacity``.
        capacity: Tokens of a row.

    Returns:
        For each row its samples, ascending; the same for the same lengths. Of the row counts that do, the cheapest:
        tokens in all, padding counted, and what attention costs, which grows with the square of a row's length.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    best: tuple[float, list[list[int]]] | None = None
    fewest = max(1, -(-sum(lengths) // capacity))

    def cost(count: int, longest: float) -> float:
        return count * longest * (1 + longest / _ATTENTION_TOKENS)

    for count in range(fewest, max(fewest, len(lengths)) + 1):
        if best is not None and cost(count, max(lengths)) >= best[0] and count * max(lengths) >= sum(lengths):
            break  # a row is as long as the longest sample: from here on more rows cost more
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for i in order:  # the longest first, each into the emptiest row
            row = filled.index(min(filled))
            rows[row].append(i)
            filled[row] += lengths[i]
        found = cost(count, max(filled))
        if max(filled) <= capacity and (best is None or found < best[0]):
            best = found, [sorted(row) for row in rows]
    assert best is not None, "a sample is longer than a row"
    return best[1]


def place_samples(
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    width: Callable[[int], int] = lambda longest: longest,
    *,
    longest: int | None = None,
) -> tuple[Packing, list[tuple[int, int]]]:
    """The layout of samples dealt out to rows, and each sample's row and first column.

    Args:
        rows: For each row its samples in order; at least one row, which may be empty.
        lengths: Tokens of each sample.
        width: Tokens of the longest row, or sample → those that all are given.
        longest: No sample has more tokens; None: as many as the longest of these.
    """
    tokens = width(max(1, max(sum(lengths[i] for i in row) for row in rows)))
    document_ids = torch.full((len(rows), tokens), -1)
    position_ids = torch.zeros(len(rows), tokens, dtype=torch.int64)
    slots = width(max(lengths, default=1))
    longest = slots if longest is None else longest
    token_index = torch.zeros(max(1, len(lengths)), slots, dtype=torch.int64)
    token_mask = torch.zeros(max(1, len(lengths)), slots, dtype=torch.bool)
    places = [(0, 0)] * len(lengths)
    bounds = [0]
    for number, row in enumerate(rows):
        begin = 0
        for i in row:
            end = begin + lengths[i]
            document_ids[number, begin:end] = i
            position_ids[number, begin:end] = torch.arange(lengths[i])
            token_index[i, : lengths[i]] = torch.arange(number * tokens + begin, number * tokens + end)
            token_mask[i, : lengths[i]] = True
            places[i] = (number, begin)
            bounds.append(number * tokens + end)
            begin = end
        while begin < tokens:
            begin = min(tokens, begin + longest)
            bounds.append(number * tokens + begin)
    ends = torch.tensor(bounds, dtype=torch.int32)
    shared = max(1, *map(len, rows))
    return Packing(document_ids, position_ids, token_index, token_mask, ends, shared, longest), places
