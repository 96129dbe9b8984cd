"""Gradient watch: what the KV loss sends back at keys and values, against all else that arrives there."""

from __future__ import annotations

import torch
from torch import Tensor

from kvds.kv import Capture, Watched


class GradientWatch:
    """Compares what the KV loss sends back at the captured keys and values with what the task loss sends there.

    ``ratio = ‖∂ kv_weight·kv / ∂(K,V)‖ / ‖∂ rest / ∂(K,V)‖``, over all layers, without a second backward pass: hooks
    see the KV loss's own share on the tensors handed to the aligner, and all that arrives on the projections' outputs.
    What the KV loss of later layers sends back through the network counts with the rest: it arrives in one sum with the
    task's, so with more than one layer the ratio is that of the direct share to everything else.
    """

    def __init__(self) -> None:
        self._kv_squares: list[Tensor] = []
        self._rest_squares: list[Tensor] = []

    def attach(self, capture: Capture) -> None:
        """Hang hooks on what ``capture`` took; call between forward and backward."""
        for layer in capture.watched:
            self._watch(layer)

    def _watch(self, layer: Watched) -> None:
        # The view of the heads has a gradient of its own: the KV loss's alone. The projection's output sums both.
        received: list[Tensor] = []

        def on_kv(gradient: Tensor) -> None:
            received.append(gradient.float())
            self._kv_squares.append(received[-1].square().sum())

        def on_total(gradient: Tensor) -> None:
            rest = layer.heads(gradient).float()
            self._rest_squares.append((rest - received.pop() if received else rest).square().sum())

        layer.states.register_hook(on_kv)
        layer.output.register_hook(on_total)

    def squares(self) -> dict[str, Tensor]:
        """Both squared norms of the backward pass just run, as metrics whose sums over micro-batches and ranks give the
        ratio of the whole batch; empty where no gradient arrived.
        """
        if not self._rest_squares:
            return {}
        rest = torch.stack(self._rest_squares).sum()
        kv = torch.stack(self._kv_squares).sum() if self._kv_squares else torch.zeros_like(rest)
        return {"kv/gradient_squares_kv": kv, "kv/gradient_squares_rest": rest}

    def ratio(self) -> Tensor | None:
        """The ratio of the backward pass just run, or None where no KV gradient arrived."""
        if not self._kv_squares or not self._rest_squares:
            return None
        return (torch.stack(self._kv_squares).sum() / torch.stack(self._rest_squares).sum().clamp_min(1e-38)).sqrt()
