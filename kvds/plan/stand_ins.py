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
