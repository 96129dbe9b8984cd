"""The Triton implementation as differentiable functions: weights in, launches, gradients out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvds.ops.triton_kernels import scale_kernel
from kvds.ops.triton_launch import Call, Needs, StageSums, Weights, run_stages
from kvds.ops.triton_plan import Stage, plan_stages


def _mixes(stages: list[Stage], layer_mix: Tensor, head_mix: Tensor) -> list[Tensor | None]:
    """Mixing weights ``[1 or problems, rows_y, rows_x]`` of each stage."""
    found: list[Tensor | None] = []
    for stage in stages:
        heads = head_mix if head_mix.dim() == 3 else head_mix[None]  # [1 or L_y, H_y, H_x]
        if stage.kind == "dense":
            product = layer_mix[:, None, :, None] * heads[:, :, None, :]  # [L_y, H_y, L_x, H_x]
            found.append(product.reshape(1, stage.rows_y, stage.rows_x))
        elif stage.kind == "heads":
            found.append(layer_mix[None].contiguous())
        elif stage.kind == "layers":
            found.append((heads * layer_mix[:, None, None] if layer_mix.dim() == 1 else heads).contiguous())
        else:
            found.append(None)
    return found


def _rounded(mix: Tensor, dtype: torch.dtype, parts: int) -> Tensor:
    """``[P, parts, rows_y, rows_x]`` in ``dtype``: what is loaded as it will be multiplied needs no registers.

    Where states are mixed twice, layers before heads, the first weights stand in two parts, the second being what the
    first one's rounding left out: four roundings of 16 bits in a row would be too many.
    """
    high = mix.to(dtype)
    if parts == 1 or dtype.itemsize > 2:
        return high[:, None].contiguous()
    return torch.stack([high, (mix - high).to(dtype)], 1)


def _mix_gradients(
    stages: list[Stage], sums: list[StageSums], layer_mix: Tensor, head_mix: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``layer_mix`` and ``head_mix`` from those of the stages' mixing weights."""
    layer_grad = head_grad = None
    for stage, found in zip(stages, sums, strict=True):
        if found.mix is None:
            continue
        heads = head_mix if head_mix.dim() == 3 else head_mix[None]
        if stage.kind == "dense":
            grad = found.mix[0].view(stage.layers_y, stage.heads_y, stage.layers_x, stage.heads_x)
            layer_grad = (grad * heads[:, :, None, :]).sum((1, 3))
            head_grad = (grad * layer_mix[:, None, :, None]).sum(2)
        elif stage.kind == "heads":
            layer_grad = found.mix.sum(0)
        else:
            head_grad = found.mix
            if layer_mix.dim() == 1:
                layer_grad = (head_grad * heads).sum((1, 2))
                head_grad = head_grad * layer_mix[:, None, None]
    if head_grad is not None and head_mix.dim() == 2:
        head_grad = head_grad.sum(0)
    return layer_grad, head_grad


def _gradient_place(states: Sequence[Tensor], index: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One buffer for the gradients of all layers, in the memory order of the states; zeros where an index may skip."""
    batch, heads, tokens, dim = states[0].shape
    new = states[0].new_empty if index is None else states[0].new_zeros
    if states[0].stride(2) > states[0].stride(1):  # as captured: [B, T, H, D] in memory
        buffer = new((len(states), batch, tokens, heads, dim))
        return buffer, buffer.transpose(2, 3).unbind(0)
    buffer = new((len(states), batch, heads, tokens, dim))
    return buffer, buffer.unbind(0)


class _Problem:
    """The arguments of one call, and its passes."""

    def __init__(
        self,
        source: Sequence[Tensor],
        weights: Sequence[Tensor | None],  # layer_mix, head_mix, dim_proj, bias
        source_index: Tensor | None,
    ) -> None:
        self.source, self.source_index = source, source_index
        self.layer_mix, self.head_mix, self.dim_proj, self.bias = (None if w is None else w.detach() for w in weights)
        layer_mix, head_mix, dim_proj = self.layer_mix, self.head_mix, self.dim_proj
        assert layer_mix is not None and head_mix is not None and dim_proj is not None
        batch, heads_x, tokens, dim_x = source[0].shape
        self.batch, self.positions = batch, tokens if source_index is None else source_index.shape[1]
        self.layers_y = layer_mix.shape[0]
        self.heads, self.dims = (heads_x, head_mix.shape[-2]), (dim_x, dim_proj.shape[-1])
        self.stages = plan_stages(
            (len(source), self.layers_y), self.heads, self.dims,
            sparse=layer_mix.dim() == 1, head_mix_dim=head_mix.dim(), proj_dim=dim_proj.dim(),
        )  # fmt: skip
        self.dtype = source[0].dtype
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        bias = self.bias
        if self.stages[-1].kind == "rows" and dim_proj.dim() == 3:
            dim_proj = dim_proj[:, None].expand(-1, self.heads[1], -1, -1)  # one for each problem
        self.weights = Weights(
            [
                None if mix is None else _rounded(mix, self.dtype, 2 if stage.kind == "heads" else 1)
                for stage, mix in zip(
                    self.stages, _mixes(self.stages, layer_mix.to(self.wide), head_mix.to(self.wide)), strict=True
                )
            ],
            dim_proj.contiguous(),
            None if bias is None else bias.to(self.dtype).contiguous(),
        )

    def run(
        self,
        mode: str,
        target: Sequence[Tensor],
        target_index: Tensor | None,
        needs: Needs,
        mask: Tensor | None = None,
        scale: Tensor | None = None,
        loss: str = "mse",
    ) -> tuple[list[StageSums], tuple[Tensor, ...], tuple[Tensor, ...], list[Tensor], Tensor | None]:
        """Sums per stage, gradients of source and target, their buffers, and the factor they still lack."""
        valid = None if mask is None else mask.sum()
        elements = self.heads[1] * self.dims[1] if mode == "loss" else 1
        call = Call(
            self.dtype, self.batch * self.positions, self.positions, mask, valid, scale, loss, self.layers_y, elements
        )
        buffers: list[Tensor] = []
        source_grads: tuple[Tensor, ...] = ()
        target_grads: tuple[Tensor, ...] = ()
        if needs.source:
            buffer, source_grads = _gradient_place(self.source, self.source_index)
            buffers.append(buffer)
        if needs.target:
            buffer, target_grads = _gradient_place(target, target_index)
            buffers.append(buffer)
        sums = run_stages(
            self.stages, call, mode, self.dims, self.heads,
            (self.source, target, source_grads or None, target_grads or None),
            (self.source_index, target_index), self.weights, needs,
        )  # fmt: skip
        missing = None
        if self.dtype == torch.float16 and mode == "loss":
            # fp16 would lose gradients of a mean over many elements: they are kept unnormalised until backward.
            counted = (
                valid.clamp_min(1).float()
                if valid is not None
                else torch.ones((), device=self.source[0].device) * call.tokens
            )
            missing = 1 / (counted * (elements * self.layers_y))
        return sums, source_grads, target_grads, buffers, missing

    def weight_gradients(self, sums: list[StageSums], missing: Tensor | None) -> list[Tensor | None]:
        """Of layer_mix, head_mix, dim_proj and bias, in the accumulators' dtype."""
        assert self.layer_mix is not None and self.head_mix is not None and self.dim_proj is not None
        if missing is not None:
            # Stages before the last one saw unnormalised gradients.
            sums = [
                StageSums(None if s.mix is None else s.mix * missing, s.proj, s.bias, s.loss) for s in sums[:-1]
            ] + sums[-1:]
        layer_grad, head_grad = _mix_gradients(
            self.stages, sums, self.layer_mix.to(self.wide), self.head_mix.to(self.wide)
        )
        proj, bias = sums[-1].proj, sums[-1].bias
        if proj is not None:
            shape = self.dim_proj.shape
            proj = proj.sum(0) if len(shape) == 2 else proj.reshape(self.layers_y, -1, *shape[-2:])
            proj = proj.sum(1) if len(shape) == 3 else proj.reshape(shape)
        if bias is not None:
            bias = bias.reshape(self.layers_y, self.heads[1], self.dims[1])
        return [layer_grad, head_grad, proj, bias]


def _rescale(buffers: list[Tensor], factor: Tensor) -> None:
    for buffer in buffers:
        if buffer.numel():
            programs = min(triton.cdiv(buffer.numel(), 4096), 1024)
            scale_kernel[(programs,)](buffer, factor, buffer.numel(), BLOCK=4096)


def _needs(flags: Sequence[bool], layers_x: int) -> Needs:
    """From the flags of (layer_mix, head_mix, dim_proj, bias, *source, *target)."""
    return Needs(any(flags[4 : 4 + layers_x]), any(flags[4 + layers_x :]), flags[0] or flags[1], flags[2], flags[3])


class _Loss(torch.autograd.Function):
    """Forward computes loss and gradients in the same launches; backward multiplies them by what comes from above."""

    @staticmethod
    def forward(ctx: Any, settings: tuple, *tensors: Any) -> tuple[Tensor, Tensor]:
        layers_x = settings[0]
        needs = _needs(ctx.needs_input_grad[1:], layers_x)
        found, per_layer = _Loss.compute(settings, tensors, needs)
        ctx.settings, ctx.needs, ctx.found = settings, needs, found
        # Only a second backward pass through the same graph needs them.
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(per_layer)
        return per_layer.mean(), per_layer

    @staticmethod
    def compute(settings: tuple, tensors: Sequence[Any], needs: Needs) -> tuple[tuple, Tensor]:
        """Gradients (weights, states, buffers, missing factor) and losses per layer."""
        layers_x, source_index, target_index, mask, scale, loss = settings
        source, target = tensors[4 : 4 + layers_x], tensors[4 + layers_x :]
        problem = _Problem(source, tensors[:4], source_index)
        if problem.batch * problem.positions == 0:
            zeros = [None if t is None else torch.zeros_like(t) for t in tensors]
            return (zeros[:4], zeros[4:], [], None), source[0].new_zeros(problem.layers_y, dtype=problem.wide)
        sums, source_grads, target_grads, buffers, missing = problem.run(
            "loss", target, target_index, needs, mask, scale, loss
        )
        losses = sums[-1].loss
        assert losses is not None
        per_layer = losses.reshape(problem.layers_y, -1).sum(1)
        weights = problem.weight_gradients(sums, missing) if needs.any else [None] * 4
        states = (source_grads or (None,) * layers_x) + (target_grads or (None,) * len(target))
        return (weights, states, buffers, missing), per_layer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> Any:
        tensors = ctx.saved_tensors
        found, ctx.found = ctx.found, None
        if found is None:  # handed out already, scaled in place: compute again rather than keep a second copy
            found, _ = _Loss.compute(ctx.settings, tensors, ctx.needs)
        weights, states, buffers, missing = found
        _rescale(buffers, grad_output if missing is None else grad_output * missing)
        small = [
            None if g is None else (g * grad_output).to(t.dtype) for g, t in zip(weights, tensors[:4], strict=True)
        ]
        flags = ctx.needs_input_grad
        return None, *(g if flag else None for g, flag in zip((*small, *states), flags[1:], strict=True))


class _Projection(torch.autograd.Function):
    """The projection itself; the backward pass mixes and projects again rather than keep intermediates."""

    @staticmethod
    def forward(ctx: Any, source_index: Tensor | None, *tensors: Any) -> Tensor:
        problem = _Problem(tensors[4:], tensors[:4], source_index)
        out = tensors[4].new_empty(
            problem.layers_y, problem.batch, problem.heads[1], problem.positions, problem.dims[1]
        )
        if out.numel():
            problem.run("store", out.unbind(0), None, Needs())
        ctx.source_index = source_index
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        tensors = ctx.saved_tensors
        flags = ctx.needs_input_grad[1:]
        if grad_output.numel() == 0:
            return None, *(torch.zeros_like(t) if flag else None for t, flag in zip(tensors, flags, strict=True))
        grad_output = grad_output.contiguous()
        problem = _Problem(tensors[4:], tensors[:4], ctx.source_index)
        needs = _needs(flags, len(tensors) - 4)
        sums, states, _, _, _ = problem.run("given", grad_output.unbind(0), None, needs)
        weights = problem.weight_gradients(sums, None)
        small = [None if g is None else g.to(t.dtype) for g, t in zip(weights, tensors[:4], strict=True)]
        found = (*small, *(states or (None,) * (len(tensors) - 4)))
        return None, *(g if flag else None for g, flag in zip(found, flags, strict=True))


def _chosen(source: Sequence[Tensor], layer_mix: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """A sparse map given as int64 source layers becomes the chosen layers with weights of 1."""
    if layer_mix.is_floating_point():
        return source, layer_mix
    return [source[i] for i in layer_mix.tolist()], torch.ones_like(layer_mix, dtype=torch.float32)


def map_projection_triton(
    source: Sequence[Tensor],
    layer_mix: Tensor,
    head_mix: Tensor,
    dim_proj: Tensor,
    bias: Tensor | None,
    source_index: Tensor | None,
) -> Tensor:
    """``[L_y, B, H_y, M, D_y]``; arguments as in :func:`kvds.ops.map_projection`."""
    source, layer_mix = _chosen(source, layer_mix)
    index = None if source_index is None else source_index.contiguous()
    with torch.cuda.device_of(source[0]):
        return _Projection.apply(index, layer_mix, head_mix, dim_proj, bias, *source)


def map_projection_loss_triton(
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    layer_mix: Tensor,
    head_mix: Tensor,
    dim_proj: Tensor,
    bias: Tensor | None,
    source_index: Tensor | None,
    target_index: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    loss: str,
) -> tuple[Tensor, Tensor]:
    """Scalar and ``[L_y]``; arguments as in :func:`kvds.ops.map_projection_loss`."""
    source, layer_mix = _chosen(source, layer_mix)
    source_index, target_index, mask, scale = (
        None if t is None else t.contiguous() for t in (source_index, target_index, mask, scale)
    )
    settings = (len(source), source_index, target_index, mask, scale, loss)
    tensors = (layer_mix, head_mix, dim_proj, bias, *source, *target)
    if not torch.is_grad_enabled():  # evaluation: autograd would still say which inputs require a gradient
        tensors = tuple(None if t is None else t.detach() for t in tensors)
    with torch.cuda.device_of(source[0]):  # Triton launches on the current device
        return _Loss.apply(settings, *tensors)
