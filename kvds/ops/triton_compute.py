"""The Triton implementation: the loss with its gradients for the autograd node, and the projection alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvds.ops.gradients import PARAMETERS, LossProblem, Result, Wanted
from kvds.ops.kernel_arguments import Maps, Stage, Weights
from kvds.ops.triton_launch import (
    Call,
    SidesOfStage,
    count_kept,
    make_sides,
    mixing_weights,
    prepare_plain,
    rescale,
    run_rounds,
)
from kvds.ops.triton_plan import chunk_tokens, plan_stages, tell_plain, why_not_hopper, why_plain
from kvds.ops.triton_sums import Left, sum_up


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


class _Done(NamedTuple):
    """What all stages over all tokens leave to be summed up, and the maps that folding needs."""

    left: list[Left | None]
    maps: Maps


def _maps(problem: LossProblem) -> Maps:
    """As kernels read them, in any dtype: rounding is theirs."""
    layer_mix, head_mix, dim_proj = (t.contiguous() for t in (problem.layer_mix, problem.head_mix, problem.dim_proj))
    bias, scale = (None if t is None else t.contiguous() for t in (problem.bias, problem.scale))
    return Maps(layer_mix, head_mix, 0 if head_mix.dim() == 2 else head_mix.stride(0), dim_proj, bias, scale)


def _weights(problem: LossProblem, maps: Maps, stages: Sequence[Stage]) -> list[Weights]:
    """Of each stage. The last one projects."""
    *mixing, final = stages
    dtype, dim_proj, bias = problem.source[0].dtype, maps.dim_proj, maps.bias
    found = [Weights(*mixing_weights(stage, maps, problem.sparse, dtype), None, 0, None, None) for stage in mixing]
    if final.kind == "rows" and dim_proj.dim() == 3:  # one for each problem
        dim_proj = dim_proj[:, None].expand(-1, problem.heads[1], -1, -1).contiguous()
    if bias is not None:
        bias = bias.to(dtype)  # every tile reads it
    mix, mix_stride = mixing_weights(final, maps, problem.sparse, dtype) if final.mixes else (None, 0)
    step = 0 if final.shared_proj else dim_proj.shape[-1] * dim_proj.shape[-2]
    return [*found, Weights(mix, mix_stride, dim_proj, step, bias, maps.scale)]


def _run_stages(problem: LossProblem, call: Call, wanted: Wanted, states: Sequence[Sequence[Tensor] | None]) -> _Done:
    """All stages over all tokens, in rounds of launches where there are intermediates.

    ``states``: source, target (or the output, or its gradient), and the places of their gradients.
    """
    dims, heads = problem.dims, problem.heads
    *mixing, final = stages = plan_stages(
        (len(problem.source), len(problem.target)), heads, dims, sparse=problem.sparse,
        proj_dim=problem.dim_proj.dim(), rows_alone=call.mode == "loss" and why_not_hopper(problem, wanted) is None,
    )  # fmt: skip
    like = problem.source[0]
    chunk = chunk_tokens(stages, call.layers_y, heads, dims, like.element_size(), call.tokens)
    spaces = [like.new_empty(call.layers_y, heads[stage.kind != "heads"], chunk, dims[0]) for stage in mixing]
    indexes = [problem.source_index, problem.target_index] * 2 + [None] * len(spaces)
    source, target, source_grad, target_grad, *between = make_sides([*states, *(s.unbind(0) for s in spaces)], indexes)
    assert source is not None and target is not None
    inputs: list = [source, *between]  # of each stage
    backward = call.mode != "store" and wanted.through_projection
    back = (inputs[-1] if mixing else source_grad) if backward else None
    sides = SidesOfStage(inputs[-1], target, back, target_grad)
    reason = why_plain(problem, wanted, stages, sides.aligned) if call.mode == "loss" else "a projection without loss"
    if reason is not None:
        tell_plain(reason)
    maps = _maps(problem)
    if reason is None and final.kind == "dense":
        from kvds.ops import gluon_launch  # Gluon is experimental: elsewhere nobody needs it

        launches = [gluon_launch.prepare_fused(final, dims, call, sides, maps)]
        run_rounds(launches, call.tokens, chunk)
        return _Done([launches[0].left], maps)
    weights = _weights(problem, maps, stages)
    if reason is None:
        from kvds.ops import gluon_launch

        project = gluon_launch.prepare_project(final, dims, call, sides, weights[-1], chunk)
    else:
        of_final = wanted if final.mixes else replace(wanted, layer_mix=False, head_mix=False)
        project = prepare_plain(final, dims, call, sides, weights[-1], of_final, chunk)
    ahead, back_again = [], []
    only_mix = Wanted(layer_mix=wanted.mix)
    for k, stage in enumerate(mixing):
        way, same = SidesOfStage(inputs[k], inputs[k + 1], None, None), (dims[0], dims[0])
        ahead.append(prepare_plain(stage, same, call._replace(mode="store"), way, weights[k], Wanted(), chunk))
        if backward:
            way = way._replace(source_grad=inputs[k] if k else source_grad)
            given = call._replace(mode="given")
            back_again.append(prepare_plain(stage, same, given, way, weights[k], only_mix, chunk))
    launches = [*ahead, project, *reversed(back_again)]
    run_rounds(launches, call.tokens, chunk)
    return _Done([*(launch.left for launch in back_again), project.left], maps)


def compute_triton(problem: LossProblem, wanted: Wanted) -> Result:
    """Losses and the wanted gradients, in one pass over the states where they take one launch."""
    if problem.tokens == 0:
        return _nothing(problem, wanted)
    indexes = problem.source_index, problem.target_index
    if not all(index is None or index.is_contiguous() for index in indexes):
        source_index, target_index = (None if index is None else index.contiguous() for index in indexes)
        problem = replace(problem, source_index=source_index, target_index=target_index)
    mask = None if problem.mask is None else problem.mask.contiguous()
    with torch.cuda.device_of(problem.source[0]):  # Triton launches on the current device
        valid = None if mask is None else count_kept(mask)
        call = Call(
            "loss", problem.source[0].dtype, problem.tokens, problem.positions, mask, valid, problem.loss,
            len(problem.target), problem.heads[1] * problem.dims[1],
        )  # fmt: skip
        buffers: list[Tensor] = []
        d_source = _gradient_place(problem.source, problem.source_index, buffers) if wanted.source else None
        d_target = _gradient_place(problem.target, problem.target_index, buffers) if wanted.target else None
        states = (problem.source, problem.target, d_source, d_target)
        left, maps = _run_stages(problem, call, wanted, states)
        sums = sum_up(left, problem, maps, wanted, valid, loss=True)
    assert sums.loss is not None and sums.per_layer is not None
    if sums.buffer is not None:
        buffers.append(sums.buffer)
    missing = None if call.normalize else sums.lacking
    return Result(sums.loss, sums.per_layer, d_source, d_target, sums.parameters, buffers, missing, rescale)


class _Projection(torch.autograd.Function):
    """The projection itself; the backward pass mixes and projects again rather than keep intermediates."""

    @staticmethod
    def forward(ctx: Any, source_index: Tensor | None, *tensors: Any) -> Tensor:
        ctx.source_index = source_index
        ctx.save_for_backward(*tensors)
        return _project(source_index, tensors)

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


def _project(source_index: Tensor | None, tensors: Sequence[Any]) -> Tensor:
    """``[L_y, B, H_y, M, D_y]`` of ``layer_mix, head_mix, dim_proj, bias, *source``."""
    layers, positions = len(tensors[0]), (tensors[4] if source_index is None else source_index[:, None]).shape[2]
    heads, dim = tensors[1].shape[-2], tensors[2].shape[-1]
    out = tensors[4].new_empty(layers, tensors[4].shape[0], heads, positions, dim)
    if out.numel():
        _pass("store", tensors, source_index, out, Wanted(), None)
    return out


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
        left, maps = _run_stages(problem, call, wanted, (problem.source, target, place, None))
        return sum_up(left, problem, maps, wanted, None, loss=False).parameters


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
    tensors = layer_mix, head_mix, dim_proj, bias, *source
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return _project(index, tensors)  # without the node, which costs the host as much as the launches
    return _Projection.apply(index, *tensors)
