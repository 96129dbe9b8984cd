"""The Triton implementation: the loss with its gradients for the autograd node, and the projection alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvds.ops.gradients import PARAMETERS, LossProblem, Result, Wanted
from kvds.ops.triton_launch import Call, count_kept, make_sides, rescale, run_stages, stages_of
from kvds.ops.triton_plan import fits_fused, for_hopper


def _gradient_place(states: Sequence[Tensor], index: Tensor | None, buffers: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of all layers in one of ``buffers``, in the memory order of the states; zeros where an index may
    skip."""
    batch, heads, tokens, dim = states[0].shape
    new = states[0].new_empty if index is None else states[0].new_zeros
    captured = states[0].stride(2) > states[0].stride(1)  # [B, T, H, D] in memory
    buffer = new((len(states), batch, *((tokens, heads) if captured else (heads, tokens)), dim))
    buffers.append(buffer)
    return (buffer.transpose(2, 3) if captured else buffer).unbind(0)


def _nothing(problem: LossProblem, wanted: Wanted) -> Result:
    """Of no tokens."""
    wide = torch.float64 if problem.source[0].dtype == torch.float64 else torch.float32
    per_layer = problem.source[0].new_zeros(len(problem.target), dtype=wide)
    parameters = {name: torch.zeros_like(getattr(problem, name)) for name in PARAMETERS if getattr(wanted, name)}
    source, target = (
        [torch.zeros_like(layer) for layer in states] if wants else None
        for states, wants in ((problem.source, wanted.source), (problem.target, wanted.target))
    )
    return Result(per_layer.sum(), per_layer, source, target, parameters)


def compute_triton(problem: LossProblem, wanted: Wanted) -> Result:
    """Losses and the wanted gradients, in one pass over the states where they take one launch."""
    if problem.tokens == 0:
        return _nothing(problem, wanted)
    source_index, target_index, mask = (
        None if tensor is None else tensor.contiguous()
        for tensor in (problem.source_index, problem.target_index, problem.mask)
    )
    problem = replace(problem, source_index=source_index, target_index=target_index, mask=mask)
    with torch.cuda.device_of(problem.source[0]):  # Triton launches on the current device
        valid = None if mask is None else count_kept(mask)
        call = Call(
            "loss", problem.source[0].dtype, problem.tokens, problem.positions, mask, valid, problem.loss,
            len(problem.target), problem.heads[1] * problem.dims[1],
        )  # fmt: skip
        buffers: list[Tensor] = []
        d_source = _gradient_place(problem.source, source_index, buffers) if wanted.source else None
        d_target = _gradient_place(problem.target, target_index, buffers) if wanted.target else None
        states = (problem.source, problem.target, d_source, d_target)
        project_rows = None
        if for_hopper(problem, wanted):
            from kvds.ops import gluon_launch  # Gluon is experimental: elsewhere nobody needs it

            project_rows = gluon_launch.launch_project
            if fits_fused(wanted, stages_of(problem)):
                sides = make_sides(states, (source_index, target_index) * 2)
                if all(side is None or side.aligned for side in sides):
                    parameters, flat, losses = gluon_launch.run_fused(problem, call, wanted, sides)
                    per_layer, loss, lacking = losses.split([len(problem.target), 1, 1])
                    missing = None if call.normalize else lacking[0]
                    return Result(
                        loss[0], per_layer, d_source, d_target, parameters, [*buffers, flat], missing, rescale
                    )
        parameters, per_layer = run_stages(problem, call, wanted, states, project_rows)
        assert per_layer is not None
        missing = None
        if not call.normalize and wanted.any:
            counted = per_layer.new_full((), call.tokens) if valid is None else valid.clamp_min(1).float()
            missing = 1 / (counted * (call.elements * call.layers_y))
    if parameters:
        flat = torch.cat([gradient.reshape(-1) for gradient in parameters.values()])
        parts = flat.split([gradient.numel() for gradient in parameters.values()])
        shaped = (part.view(getattr(problem, name).shape) for name, part in zip(parameters, parts, strict=True))
        parameters = dict(zip(parameters, shaped, strict=True))
        buffers.append(flat)
    return Result(per_layer.mean(), per_layer, d_source, d_target, parameters, buffers, missing, rescale)


class _Projection(torch.autograd.Function):
    """The projection itself; the backward pass mixes and projects again rather than keep intermediates."""

    @staticmethod
    def forward(ctx: Any, source_index: Tensor | None, *tensors: Any) -> Tensor:
        ctx.source_index = source_index
        ctx.save_for_backward(*tensors)
        layers, positions = len(tensors[0]), (tensors[4] if source_index is None else source_index[:, None]).shape[2]
        heads, dim = tensors[1].shape[-2], tensors[2].shape[-1]
        out = tensors[4].new_empty(layers, tensors[4].shape[0], heads, positions, dim)
        if out.numel():
            _pass("store", tensors, source_index, out, Wanted(), None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        tensors, flags = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if grad_output.numel() == 0:
            return None, *(torch.zeros_like(t) if flag else None for t, flag in zip(tensors, flags, strict=True))
        wanted = Wanted(any(flags[4:]), False, *flags[:4])
        place = _gradient_place(tensors[4:], ctx.source_index, []) if wanted.source else None
        parameters = _pass("given", tensors, ctx.source_index, grad_output.contiguous(), wanted, place)
        found = (*(parameters.get(name) for name in PARAMETERS), *(place or (None,) * (len(tensors) - 4)))
        return None, *(
            g.to(t.dtype) if flag and g is not None else None for g, t, flag in zip(found, tensors, flags, strict=True)
        )


def _pass(
    mode: str, tensors: Sequence[Any], source_index: Tensor | None, other: Tensor, wanted: Wanted, place: Any
) -> dict[str, Tensor]:
    """Project into ``other [L_y, B, H_y, M, D_y]``, or go back from it as the projection's gradient."""
    target = other.unbind(0)
    layer_mix, head_mix, dim_proj, bias, *source = tensors
    problem = LossProblem(
        tuple(source), target, layer_mix, head_mix, dim_proj, bias, source_index, None, None, None, "mse"
    )
    call = Call(mode, other.dtype, problem.tokens, problem.positions, None, None, "mse", len(target), 1)
    with torch.cuda.device_of(other):
        return run_stages(problem, call, wanted, (problem.source, target, place, None))[0]


def map_projection_triton(
    source: Sequence[Tensor],
    layer_mix: Tensor,
    head_mix: Tensor,
    dim_proj: Tensor,
    bias: Tensor | None,
    source_index: Tensor | None,
) -> Tensor:
    """``[L_y, B, H_y, M, D_y]``; arguments as in :func:`kvds.ops.map_projection`."""
    index = None if source_index is None else source_index.contiguous()
    return _Projection.apply(index, layer_mix, head_mix, dim_proj, bias, *source)
