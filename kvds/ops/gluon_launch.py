"""Launches of the kernels for compute capability 9.0."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvds.ops.gluon_fused import fused_kernel
from kvds.ops.gluon_project import project_kernel
from kvds.ops.gradients import LossProblem, Wanted
from kvds.ops.kernel_arguments import FusedForm, Maps, ProjectForm, Sides, Weights
from kvds.ops.triton_kernels import fold_kernel
from kvds.ops.triton_launch import ELEMENTS, Call, Side, SidesOfStage, processors, sum_partials
from kvds.ops.triton_plan import Stage


def run_fused(
    problem: LossProblem, call: Call, wanted: Wanted, sides: list[Side | None]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Everything in one pass: gradients of the parameters, views of one tensor; that tensor; and losses per layer, then
    their mean and the factor that gradients lack in fp16."""
    source, target, source_grad, target_grad = sides
    assert source is not None and target is not None
    device = source.rows.table.device
    layers_x, layers_y = len(problem.source), len(problem.target)
    (heads_x, heads_y), (dim_x, dim_y) = problem.heads, problem.dims
    form = FusedForm(
        ELEMENTS[call.dtype], layers_x, heads_x, layers_y, heads_y, dim_x, dim_y, call.loss, call.normalize,
        source_grad is not None, target_grad is not None,
    )  # fmt: skip
    layer_mix, head_mix, dim_proj = (
        tensor.detach().contiguous() for tensor in (problem.layer_mix, problem.head_mix, problem.dim_proj)
    )
    bias, scale = (None if tensor is None else tensor.detach().contiguous() for tensor in (problem.bias, problem.scale))
    own_heads = head_mix.dim() == 3
    maps = Maps(layer_mix, head_mix, heads_y * heads_x * own_heads, dim_proj, bias, scale)
    programs = min(processors(device), call.tokens)
    partial = torch.empty(1, programs, form.size, dtype=torch.float32, device=device)
    rows = Sides(source.rows, target.rows, (source_grad or source).rows, (target_grad or target).rows)
    fused_kernel[(programs,)](
        rows, maps, call.tokens, call.positions, call.mask, call.valid, partial, programs, form, num_warps=4
    )
    mixing = layer_mix.numel(), head_mix.numel()
    flat = partial.new_empty(1, form.size + sum(mixing))
    sum_partials(partial, flat)
    losses = partial.new_empty(layers_y + 2)
    d_layer_mix, d_head_mix = flat[0, form.size :].split(mixing)
    fold_kernel[(layers_y + 1,)](
        flat, maps, call.tokens, call.valid, d_layer_mix, d_head_mix, losses, form,
        *(triton.next_power_of_2(n) for n in (heads_y, layers_x, heads_x)), own_heads, num_warps=4,
    )  # fmt: skip
    _, proj, bias_rows, _ = flat[0, : form.size].split(form.sizes)
    found = {
        "layer_mix": d_layer_mix.view(layer_mix.shape),
        "head_mix": d_head_mix.view(head_mix.shape),
        "dim_proj": proj.view(dim_x, dim_y),
        "bias": bias_rows[: form.rows_y * dim_y].view(layers_y, heads_y, dim_y),
    }
    return {name: gradient for name, gradient in found.items() if getattr(wanted, name)}, flat, losses


def _even_splits(rows: int, tiles: int, processors: int) -> int:
    """Programs per row, so that no multiprocessor waits long for the last of them: of up to 12, the fewest that come
    within 4 % of the best."""
    choices = range(1, max(2, min(12, tiles) + 1))
    busy = {n: rows * n / (-(-rows * n // processors) * processors) for n in choices}
    return next(n for n in choices if busy[n] >= max(busy.values()) - 0.04)


def launch_project(
    stage: Stage,
    dims: tuple[int, int],
    call: Call,
    sides: SidesOfStage,
    weights: Weights,
    token_range: tuple[int, int],
    partial: Tensor | None,
) -> tuple[Tensor, ProjectForm]:
    """As ``launch``, a stage in which each row has a projection; its gradients go over the source and to the target."""
    source, target, _, target_grad = sides
    first, last = token_range
    form = ProjectForm(
        ELEMENTS[call.dtype], call.layers_y, stage.head_problems, *dims, call.loss, call.normalize,
        target_grad is not None,
    )  # fmt: skip
    if partial is None:
        device = source.rows.table.device
        splits = _even_splits(stage.problems, -(-(last - first) // 64), processors(device))
        partial = torch.empty(stage.problems, splits, form.size, dtype=torch.float32, device=device)
    splits = partial.shape[1]
    rows = Sides(source.rows, target.rows, source.rows, (target_grad or target).rows)
    project_kernel[(stage.problems * splits,)](
        rows, weights, call.tokens, call.positions, call.mask, call.valid, partial, first, last, splits, form,
        num_warps=4,
    )  # fmt: skip
    return partial, form
