"""Attention that tokens receive: how much a model looks at each, summed up layer by layer during its forward."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kvds.kv.attention_chunks import attention_chunks
from kvds.kv.capture import KVCapture
from kvds.kv.families import attention_modules
from kvds.kv.observed import ObservedLayer


class ReceivedAttention:
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
        self._backbone, self._real, self._token_index = backbone, real, token_index
        self._attentions = attention_modules(backbone)
        self._sums: list[Tensor] = []
        self._stack = ExitStack()

    def __enter__(self) -> ReceivedAttention:
        for layer, attention in enumerate(self._attentions):
            capture = KVCapture(self._backbone, layers=[layer], parts=("keys",), query_rows="all")
            own = ExitStack()
            own.enter_context(capture)

            def add(*_: Any, capture: KVCapture = capture, own: ExitStack = own) -> None:
                capture.states  # noqa: B018  # reads off what the hooks have caught
                [observed] = capture.observed
                self._sums.append(self._received(observed))
                own.close()

            handle = attention.register_forward_hook(add)
            own.callback(handle.remove)
            self._stack.push(own)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        # A layer that did not run is told of by its capture.
        self._stack.__exit__(exc_type, *rest)  # type: ignore[arg-type]

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
