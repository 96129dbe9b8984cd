"""Loss and gradients as one autograd node: the forward pass computes both, the backward pass only scales them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
        """Gradients of the expanded parameters, summed down to the parameters' own shapes and dtypes.

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
            folded[name] = gradient.reshape(parameter.shape).to(parameter.dtype)
        return folded

    def wanted(self) -> Wanted:
        """What needs a gradient, as autograd would have it here."""
        on = torch.is_grad_enabled()
        flags = {name: on and _requires(getattr(self, name)) for name in PARAMETERS}
        return Wanted(on and any(map(_requires, self.source)), on and any(map(_requires, self.target)), **flags)


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


@dataclass
class Result:
    """Losses, and gradients for an upstream gradient of 1; ``None`` where not wanted."""

    loss: Tensor
    per_layer: Tensor
    source: Sequence[Tensor] | None = None
    target: Sequence[Tensor] | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)


Compute = Callable[[LossProblem, Wanted], Result]


class _LossWithGradients(torch.autograd.Function):
    """Runs ``compute`` forward and hands its gradients over backward."""

    @staticmethod
    def forward(
        ctx: Any, compute: Compute, problem: LossProblem, wanted: Wanted, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        result = compute(problem, wanted)
        gradients: list[Tensor | None] = [result.parameters.get(name) for name in PARAMETERS]
        for states, computed in ((problem.source, result.source), (problem.target, result.target)):
            gradients.extend(computed if computed is not None else [None] * len(states))
        ctx.present = [g is not None for g in gradients]
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        ctx.mark_non_differentiable(result.per_layer)
        return result.loss, result.per_layer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        scaled = iter(_scaled(saved, upstream))
        gradients = [next(scaled) if present else None for present in ctx.present]
        needs = ctx.needs_input_grad[3:]
        return (None, None, None, *(g if need else None for g, need in zip(gradients, needs, strict=True)))


def _scaled(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """``gradients`` times ``upstream``; in place when nobody can ask for them again, so that no second copy exists."""
    # Private, and absent from a torch that dropped it: then every call pays for the copy.
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
    if keep_graph:  # copies, whatever the factor: what was handed out must not change with a later call
        return [g * upstream.to(g.dtype) for g in gradients]
    if not upstream.is_cuda and upstream.item() == 1:
        return gradients
    for gradient in gradients:
        gradient.mul_(upstream.to(gradient.dtype))
    return gradients


def loss_with_gradients(compute: Compute, problem: LossProblem) -> tuple[Tensor, Tensor]:
    """``compute`` as a differentiable function: the scalar loss with a graph, the losses per layer without."""
    wanted = problem.wanted()
    if not wanted.any:
        result = compute(problem, wanted)
        return result.loss, result.per_layer
    parameters = [getattr(problem, name) for name in PARAMETERS]
    loss, per_layer = _LossWithGradients.apply(compute, problem, wanted, *parameters, *problem.source, *problem.target)
    return loss, per_layer
