"""A control: each row gets the keys and values of another row of its batch, so that only their content is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from kvds.kv.pool import Poolable


def shuffled_states(states: Poolable, attention_mask: Tensor, real: Tensor) -> Poolable:
    """Exchange keys and values (or hidden states) between the rows of a batch.

    Rows are put in order of length, and each takes those of the next (the longest those of the shortest): partners are
    of the same length where there is such a row. Where they are not, token t of n reads the partner's token at the same
    relative position, ``⌊t · n_partner / n⌋``, so that every real token faces a real one. A row without any
    other has no partner: it gets zeros, which must count nowhere (:class:`kvds.teacher.token_selection.TokenChoice`).

    Args:
        states: Keys and values, or hidden states: per layer ``[B, H, T, D]``.
        attention_mask: ``[B, T]``, 1 = real token, padding on the right.
        real: ``[B]`` bool; False = a row of padding, which takes part in nothing.
    """
    lengths = attention_mask.sum(1)
    # Rows of padding go behind all others and keep to themselves.
    order = torch.argsort(torch.where(real, lengths, lengths.new_tensor(torch.iinfo(lengths.dtype).max)), stable=True)
    place = torch.arange(len(order), device=order.device)
    count = real.sum()
    following = torch.where(place < count, (place + 1) % count.clamp_min(1), place)
    partner = torch.empty_like(order).scatter_(0, order, order[following])  # [B]
    positions = torch.arange(attention_mask.shape[1], device=order.device)
    own, other = lengths.unsqueeze(1), lengths[partner].unsqueeze(1)
    index = torch.where(positions < own, positions * other // own, positions)  # [B, T]

    def exchanged(layer: Tensor) -> Tensor:
        other = layer[partner].gather(2, index[:, None, :, None].expand(-1, layer.shape[1], -1, layer.shape[3]))
        return other.masked_fill(count < 2, 0.0)

    return type(states)(*(tuple(map(exchanged, layers)) for layers in states))
