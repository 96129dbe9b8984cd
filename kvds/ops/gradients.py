"""Loss and gradients as one autograd node: the forward pass computes both, the backward pass only scales them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

PARAMETERS = ("layer_mix", "head_mix", "dim_proj", "bias")


@dataclass(frozen=True)
class LossProblem:
    """One call of the loss, validated.

    Shapes as in :func:`kvds.ops.map_projection_loss`. ``layer_mix`` is ``[L_y, L_x]``, or a
    vector for a sparse map: int64 source layers, or floating weights of a one-to-one map.
    """

    source: tuple[Tensor, ...]
    target: tuple[Tensor, ...]
    layer_mix: Tensor
    head_mix: Tensor
    dim_proj: Tensor
    bias: Tensor | None
    source_index: Tensor | None
    target_index: Tensor | None
    mask: Tensor | None
    scale: Tensor | None
    loss: str
    weight: Tensor | None = None

    @property
    def positions(self) -> int:
        """Slots of a sample."""
        return self.source[0].shape[2] if self.source_index is None else self.source_index.shape[1]

    @property
    def tokens(self) -> int:
        """Slots of all samples."""
        return self.source[0].shape[0] * self.positions

    @property
    def heads(self) -> tuple[int, int]:
        """Of source and target."""
        return self.head_mix.shape[-1], self.head_mix.shape[-2]

    @property
    def dims(self) -> tuple[int, int]:
        """Of source and target."""
        return self.dim_proj.shape[-2], self.dim_proj.shape[-1]

    @property
    def sparse(self) -> bool:
        """Whether every target layer names one source layer."""
        return self.layer_mix.dim() == 1

    def source_layers(self) -> list[int]:
        """The source layers read: by each target layer of a sparse map, in order of the source otherwise."""
        if self.layer_mix.is_floating_point():
            return list(range(len(self.source)))
        return self.layer_mix.tolist()

    def layer_heads(self, dtype: torch.dtype) -> Tensor:
        """Head weights per target layer ``[L_y, H_y, H_x]``, with the layer weights of a sparse map multiplied in."""
        heads = self.head_mix.detach().to(dtype)
        heads = heads.expand(len(self.target), *heads.shape[-2:])
        if self.sparse and self.layer_mix.is_floating_point():
            heads = heads * self.layer_mix.detach().to(dtype)[:, None, None]
        return heads.contiguous()

    def fold(self, gradients: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """Gradients of the expanded parameters, summed down to the parameters' own shapes.

        ``head_mix`` comes in as the gradient of :meth:`layer_heads`; that of a sparse map's weights follows from it.
        """
        gradients = dict(gradients)
        heads = gradients.get("head_mix")
        if heads is not None and self.sparse and self.layer_mix.is_floating_point():
            gradients["layer_mix"] = (heads * self.head_mix.detach().to(heads.dtype)).sum((1, 2))
            gradients["head_mix"] = heads * self.layer_mix.detach().to(heads.dtype)[:, None, None]
        folded = {}
        for name, gradient in gradients.items():
            parameter = getattr(self, name)
            if gradient is None or not _requires(parameter):
                continue
            if name == "head_mix" and parameter.dim() == 2:
                gradient = gradient.sum(0)
            elif name == "dim_proj" and gradient.numel() != parameter.numel():
                per_head = gradient.view(len(self.target), -1, *parameter.shape[-2:])
                gradient = per_head.sum((0, 1) if parameter.dim() == 2 else 1)
            folded[name] = gradient.reshape(parameter.shape)
        return folded

    def wanted(self) -> Wanted:
        """What needs a gradient, as autograd would have it here."""
        on = torch.is_grad_enabled()
        flags = {name: on and _requires(getattr(self, name)) for name in PARAMETERS}
        moves = attrgetter("requires_grad")
        return Wanted(on and any(map(moves, self.source)), on and any(map(moves, self.target)), **flags)


def _requires(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


@dataclass(frozen=True)
class Wanted:
    """The gradients to compute."""

    source: bool = False
    target: bool = False
    layer_mix: bool = False
    head_mix: bool = False
    dim_proj: bool = False
    bias: bool = False

    @property
    def mix(self) -> bool:
        """A gradient of either mixing weight."""
        return self.layer_mix or self.head_mix

    @property
    def through_projection(self) -> bool:
        """Anything below ``dim_proj``: needs the gradient of the mixed source."""
        return self.source or self.mix

    @property
    def any(self) -> bool:
        """At least one."""
        return self.through_projection or self.target or self.dim_proj or self.bias


def _multiply(buffers: Sequence[Tensor], factor: Tensor) -> None:
    for buffer in buffers:
        if buffer.is_cuda or factor.item() != 1:
            buffer.mul_(factor.to(buffer.dtype))


@dataclass
class Result:
    """Losses, and gradients for an upstream gradient of 1; ``None`` where not wanted.

    Attributes:
        loss, per_layer: Scalar and ``[L_y]``.
        source, target: Gradients of the states, per layer.
        parameters: Gradients of the parameters by name, in the dtype of the sums.
        buffers: The memory in which all gradients lie, each dense and from its first element on; None: their own.
        missing: What the gradients still lack: a factor that would have taken fp16 below its range. None: nothing.
        rescale: Multiplies buffers by a scalar on their device, in place.
    """

    loss: Tensor
    per_layer: Tensor
    source: Sequence[Tensor] | None = None
    target: Sequence[Tensor] | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: list[Tensor] | None = None
    missing: Tensor | None = None
    rescale: Callable[[Sequence[Tensor], Tensor], None] = _multiply


Compute = Callable[[LossProblem, Wanted], Result]


class _LossWithGradients(torch.autograd.Function):
    """Runs ``compute`` forward and hands its gradients over backward, times what comes from above."""

    @staticmethod
    def forward(
        ctx: Any, compute: Compute, problem: LossProblem, wanted: Wanted, *leaves: Tensor
    ) -> tuple[Tensor, Tensor]:
        result = compute(problem, wanted)
        gradients = [result.parameters[name] for name in PARAMETERS if getattr(wanted, name)]
        for states, computed in ((problem.source, result.source), (problem.target, result.target)):
            if computed is not None:
                gradients += [g for g, state in zip(computed, states, strict=True) if state.requires_grad]
        ctx.result, ctx.gradients, ctx.dtypes = result, gradients, [leaf.dtype for leaf in leaves]
        ctx.save_for_backward(*(gradients if result.buffers is None else result.buffers))  # a graph freed has none
        ctx.mark_non_differentiable(result.per_layer)
        ctx.set_materialize_grads(False)
        return result.loss, result.per_layer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        buffers, gradients, result = list(ctx.saved_tensors), ctx.gradients, ctx.result
        if upstream is None:
            return (None,) * (3 + len(gradients))
        # Private, and absent from a torch that dropped it: then every call pays for the copy.
        if getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)():
            # What is handed out must not change with a later call.
            copies = {b.untyped_storage().data_ptr(): b.clone() for b in buffers}
            buffers, gradients = list(copies.values()), [_again(g, copies) for g in gradients]
        else:  # scaled in place: no second copy exists
            ctx.gradients = ctx.result = None
        filled = [buffer for buffer in buffers if buffer.numel()]
        if filled:
            result.rescale(filled, upstream if result.missing is None else upstream * result.missing)
        return (
            None,
            None,
            None,
            *(g if g.dtype == dtype else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)),
        )


def _again(gradient: Tensor, copies: dict[int, Tensor]) -> Tensor:
    """The same view of a copy."""
    copy = copies[gradient.untyped_storage().data_ptr()]
    return copy.as_strided(gradient.shape, gradient.stride(), gradient.storage_offset())


def loss_with_gradients(compute: Compute, problem: LossProblem) -> tuple[Tensor, Tensor]:
    """``compute`` as a differentiable function: the scalar loss with a graph, the losses per layer without."""
    wanted = problem.wanted()
    if not wanted.any:
        result = compute(problem, wanted)
        return result.loss, result.per_layer
    parameters = [getattr(problem, name) for name in PARAMETERS if getattr(wanted, name)]
    states = [state for state in (*problem.source, *problem.target) if state.requires_grad]
    loss, per_layer = _LossWithGradients.apply(compute, problem, wanted, *parameters, *states)
    return loss, per_layer
