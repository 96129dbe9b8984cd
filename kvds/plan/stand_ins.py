"""Stand-ins: they take the place of a run's modules on fake tensors, with its memory and without its data."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from kvds.align import AlignmentLoss
from kvds.align.loss import average_parts
from kvds.distillation.module import DistillationModule
from kvds.kv import KVStates, Selection
from kvds.models.compiled_layers import Pieces
from kvds.plan.live_memory import HostCopies


class _KeptGradients(torch.autograd.Function):
    """Holds what the fused operation holds: gradients of the trained side, computed on the way forward."""

    @staticmethod
    def forward(ctx: Any, workspace: int, *states: Tensor) -> Tensor:
        gradients = [torch.zeros_like(state) for state in states]
        torch.empty(workspace, dtype=torch.uint8, device=states[0].device)
        ctx.save_for_backward(*gradients)
        return states[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.saved_tensors


class FusedStandIn(nn.Module):
    """In place of the structured aligner, whose chunks depend on the data: the memory of its fused operation."""

    reads = "kv"

    def __init__(self, parts: tuple[str, ...], workspace: int) -> None:
        super().__init__()
        self._parts, self._workspace = parts, workspace

    def forward(self, student: KVStates, teacher: KVStates, selection: Selection) -> AlignmentLoss:
        """Zero, with the graph and the memory of the real one."""
        losses = {}
        for part in self._parts:
            loss = _KeptGradients.apply(self._workspace, *getattr(student, f"{part}s"))
            losses[part] = (loss, loss.detach())
        return average_parts(losses)


class PlannedModule(DistillationModule):
    """Where the run would keep activations in host memory, ``host`` counts them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.host = HostCopies()

    def _storage(self, ids: Tensor) -> contextlib.AbstractContextManager[Any]:
        return self.host.hooks() if self._offload_checkpoints else contextlib.nullcontext()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(kept) for kept in ctx.saved_tensors)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return torch.empty_like(query), torch.empty_like(key)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(gradient) for gradient in upstream), None, None


class _Rest(torch.autograd.Function):
    """Keeps what its matrix products read and made; all that is elementwise is computed again from these."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, attended: Tensor, inner: int, *weights: Tensor) -> Tensor:
        middle, normed = torch.empty_like(residual), torch.empty_like(residual)
        gate, up, product = (residual.new_empty(*residual.shape[:-1], inner) for _ in range(3))
        ctx.save_for_backward(attended, middle, normed, gate, up, product, *weights)
        return torch.empty_like(residual)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        attended, middle, _, gate, *rest = ctx.saved_tensors
        inner = [torch.empty_like(gate) for _ in range(2)]
        weights = [torch.empty_like(weight) for weight in rest[2:]]
        del inner
        return torch.empty_like(middle), torch.empty_like(attended), None, *weights


def _rest(residual: Tensor, attended: Tensor, out: Any, norm: Tensor, eps: float, *mlp: Any) -> Tensor:
    given = [weight for pair in (out, *mlp) for weight in pair if weight is not None]
    kept: Tensor = _Rest.apply(residual, attended, mlp[0][0].shape[0], norm, *given)
    return kept


COMPILED_PIECES = Pieces(lambda x, weight, eps: _Norm.apply(x, weight), _Rotation.apply, _rest)
"""What compiled layers keep for their backward pass, without what they compute."""
