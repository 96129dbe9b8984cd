"""Attention that tokens receive: how much a model looks at each, summed up layer by layer during its forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvds.kv.attention_chunks import attention_chunks
from kvds.kv.capture import KVCapture
from kvds.kv.layer_captures import LayerCaptures
from kvds.kv.observed import ObservedLayer


class ReceivedAttention(LayerCaptures):
    """Context manager: after a forward without gradient, ``mass`` says how much attention each token received.

    ``mass[n, t] = mean over layers and query heads of Σ_q A[q, t]``, over the queries ``q`` of the token's own sample
    (itself among them): as many as the sample has tokens, in all. Early tokens are seen by more queries than late ones,
    and it stays so. As soon as a layer's queries and keys are there they are used and let go, some queries at a time.

    Args:
        backbone: As :class:`kvds.kv.KVCapture`'s model.
        real: ``[N, S]`` bool, tokens of each sample; padding neither asks nor receives.
        token_index: ``[N, S]`` int64, the flat positions of the samples' tokens in rows that they share; None: each
            has a row of its own.
    """

    def __init__(self, backbone: nn.Module, real: Tensor, token_index: Tensor | None = None) -> None:
        super().__init__(backbone, parts=("keys",), query_rows="all")
        self._real, self._token_index = real, token_index
        self._sums: list[Tensor] = []

    def take(self, capture: KVCapture) -> None:
        """As of :class:`kvds.kv.layer_captures.LayerCaptures`."""
        _ = capture.states  # reading them fills what is observed
        [observed] = capture.observed
        self._sums.append(self._received(observed))

    @property
    def mass(self) -> Tensor:
        """``[N, S]`` in fp32 at least; 0 for padding."""
        return torch.stack(self._sums).mean(0)

    def _received(self, layer: ObservedLayer) -> Tensor:
        if self._token_index is not None:
            # Rotated where the tokens lie, then brought to rows of their own.
            queries, keys = (self._unpacked(states) for states in (layer.queries(), layer.keys()))
            layer = ObservedLayer(queries, keys, None, layer.scaling, layer.sliding_window, layer.softcap)
        heads = layer.unrotated_queries.shape[1]
        total = None
        for _, weights in attention_chunks(layer, self._real):
            if total is None:
                total = weights.new_zeros(self._real.shape)
            total[:, : weights.shape[-1]] += weights.sum((1, 2, 3))
        assert total is not None
        return total / heads

    def _unpacked(self, states: Tensor) -> Tensor:
        """``[B, H, T, D]`` → ``[N, H, S, D]``."""
        assert self._token_index is not None
        return states.transpose(1, 2).flatten(0, 1)[self._token_index].transpose(1, 2)


def attention_weights(mass: Tensor, chosen: Tensor) -> Tensor:
    """``mass`` in units of its mean over the tokens of a sample that are chosen, 0 at all others: ``[N, S]``.

    So that a sample weighs as much as without weights. Where the chosen ones receive nothing at all each weighs 1.

    Args:
        mass: ``[N, S]``.
        chosen: ``[N, S]`` bool.
    """
    kept = mass * chosen
    total = kept.sum(1, keepdim=True)
    found = kept * chosen.sum(1, keepdim=True) / total.clamp_min(torch.finfo(mass.dtype).tiny)
    return torch.where(total > 0, found, chosen.to(mass.dtype))
