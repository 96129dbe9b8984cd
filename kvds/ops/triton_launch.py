"""Launches of the plain Triton kernels: address tables, arguments, and the walk through the stages of a plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvds.ops.gradients import LossProblem, Wanted
from kvds.ops.kernel_arguments import ProjectForm, Rows, Sides, StageForm, Weights
from kvds.ops.mix_kernels import mix_kernel, unmix_kernel
from kvds.ops.triton_kernels import count_kernel, map_projection_kernel, scale_kernel, sum_partials_kernel
from kvds.ops.triton_plan import (
    Stage,
    Tile,
    capability,
    choose_tile,
    chunk_tokens,
    count_splits,
    interpreting,
    plan_stages,
)

ELEMENTS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a stand-in under the interpreter, where programs run one after the other."""
    return 2 if interpreting() else torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Side:
    """Per-layer tensors as kernels see them. ``aligned``: whether every row starts at a multiple of 16 bytes;
    ``flat``: a workspace ``[layers][heads, tokens, dim]`` of the launch's own tokens."""

    rows: Rows
    aligned: bool
    flat: bool = False


SidesOfStage = tuple[Side, Side, Side | None, Side | None]
"""Source, target (or the output, or its gradient), and the places of their gradients."""


def make_sides(groups: Sequence[Sequence[Tensor] | None], indexes: Sequence[Tensor | None]) -> list[Side | None]:
    """Address tables of several groups of per-layer tensors, with one copy to the device.

    Of a group each tensor is ``[B, H, T, D]``, or ``[H, T, D]`` if it is a workspace.
    """
    addresses: list[int] = []
    shapes = []  # of each group: first and last address, strides of batch and token, whether all is aligned, flat
    for group in groups:
        if not group:
            continue
        flat, size, begin = group[0].dim() == 3, group[0].element_size(), len(addresses)
        batch, head, token, _ = (0, *group[0].stride()) if flat else group[0].stride()
        heads = [h * head * size for h in range(group[0].shape[-3])]
        bits = (batch | head | token) * size
        for layer in group:
            start = layer.data_ptr()
            bits |= start
            addresses += [start + offset for offset in heads]
        shapes.append((begin, len(addresses), batch, token, bits % 16 == 0, flat))
        if len(addresses) % 2:  # every table starts at a multiple of 16 bytes
            addresses.append(0)
    device = next(group[0].device for group in groups if group)
    cuda = device.type == "cuda"
    table = torch.tensor(addresses, dtype=torch.int64, pin_memory=cuda)
    if cuda:
        table = table.to(device, non_blocking=True)
    made = iter(shapes)
    sides: list[Side | None] = []
    for group, index in zip(groups, indexes, strict=True):
        if not group:
            sides.append(None)
            continue
        begin, end, batch, token, aligned, flat = next(made)
        sides.append(Side(Rows(table[begin:end], index, batch, token), aligned, flat))
    return sides


@dataclass(frozen=True)
class Call:
    """What all launches of one pass share.

    Attributes:
        mode: ``loss``, ``store`` or ``given`` (see StageForm).
        dtype: Of the states.
        tokens: B·M.
        positions: M.
        mask: ``[B, M]`` contiguous bool or None.
        valid: int64 scalar on the device, how many it leaves, or None.
        loss: Its name.
        layers_y, elements: Target layers, and H_y·D_y: what means are taken over.
    """

    mode: str
    dtype: torch.dtype
    tokens: int
    positions: int
    mask: Tensor | None
    valid: Tensor | None
    loss: str
    layers_y: int
    elements: int

    @property
    def wide(self) -> torch.dtype:
        """Accumulators."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def normalize(self) -> bool:
        """Whether gradients come out as those of a mean. In fp16 they would be lost: they lack the factor until the
        backward pass, where a loss scale makes up for it."""
        return self.dtype != torch.float16


def _form(
    stage: Stage, tile: Tile, dims: tuple[int, int], call: Call, sides: SidesOfStage, weights: Weights, wanted: Wanted
) -> StageForm:
    """What a stage's kernel is compiled for."""
    source, target, source_grad, target_grad = sides
    return StageForm(
        element=ELEMENTS[call.dtype], wide=ELEMENTS[call.wide],
        precision="ieee" if call.dtype == torch.float32 else "tf32", head_problems=stage.head_problems,
        layers_x=stage.layers_x, heads_x=stage.heads_x, layers_y=stage.layers_y, heads_y=stage.heads_y,
        dim_x=dims[0], dim_y=dims[1], tokens=tile.tokens, block_x=tile.block_x, block_y=tile.block_y,
        block_dx=tile.block_dim_x, block_dy=tile.block_dim_y,
        mix_parts=0 if weights.mix is None else weights.mix.shape[1], projects=stage.projects,
        in_columns=stage.in_columns,
        dims_first=stage.dims_first, delayed=tile.delayed and call.mode == "loss", mode=call.mode, loss=call.loss,
        normalize=call.normalize, source_grad=source_grad is not None, target_grad=target_grad is not None,
        mix_grad=wanted.mix, proj_grad=wanted.dim_proj, bias_grad=wanted.bias, source_flat=source.flat,
        target_flat=target.flat, aligned=all(side is None or side.aligned for side in sides), stages=tile.num_stages,
    )  # fmt: skip


def launch(
    stage: Stage,
    dims: tuple[int, int],
    call: Call,
    sides: SidesOfStage,
    weights: Weights,
    wanted: Wanted,
    token_range: tuple[int, int],
    partial: Tensor | None = None,
) -> tuple[Tensor, StageForm]:
    """Run one stage over a range of tokens; returns each program's sums ``[problems, splits, form.size]``, with those
    of the tokens before, in ``partial``, added."""
    source, target, source_grad, target_grad = sides
    device = source.rows.table.device
    gradients = wanted.any or source_grad is not None or target_grad is not None
    tile = choose_tile(stage, dims, call.dtype.itemsize, gradients=gradients, hopper=capability(device) >= (9, 0))
    form = _form(stage, tile, dims, call, sides, weights, wanted)
    if partial is None:
        splits = count_splits(stage, tile, token_range[1] - token_range[0], processors(device))
        partial = torch.empty((stage.problems, splits, form.size), dtype=call.wide, device=device)
    splits = partial.shape[1]
    programs = stage.problems * splits
    rows = Sides(source.rows, target.rows, (source_grad or source).rows, (target_grad or target).rows)
    if not stage.in_columns:
        map_projection_kernel[(programs,)](
            rows, weights, call.tokens, call.positions, call.mask, call.valid, partial,
            *token_range, splits, call.elements, call.layers_y, form, num_warps=tile.num_warps,
        )  # fmt: skip
    elif call.mode == "store":
        mix_kernel[(programs,)](
            rows, weights, call.positions, call.mask, *token_range, splits, form, num_warps=tile.num_warps
        )
    else:
        unmix_kernel[(programs,)](
            rows, weights, call.positions, call.mask, partial, *token_range, splits, form, num_warps=tile.num_warps
        )
    return partial, form


def sum_partials(partial: Tensor, out: Tensor | None = None) -> Tensor:
    """``[problems, splits, size]`` to ``[problems, size]``, or into ``out``."""
    problems, splits, size = partial.shape
    if out is None:
        if splits == 1 or not size:
            return partial[:, 0]
        out = partial.new_empty(problems, size)
    block, rows = (128, 16) if splits > 16 else (512, 4)
    sum_partials_kernel[(problems, triton.cdiv(size, block))](
        partial, out, splits, SIZE=size, BLOCK=block, ROWS=rows, num_warps=4
    )
    return out


def count_kept(mask: Tensor) -> Tensor:
    """How many a mask leaves, int64, on its device."""
    count = torch.empty((), dtype=torch.int64, device=mask.device)
    count_kernel[(1,)](mask, count, mask.numel(), BLOCK=8192, num_warps=8)
    return count


def rescale(buffers: Sequence[Tensor], factor: Tensor) -> None:
    """``buffer *= factor`` for each of them, in one launch, without traffic where the factor is 1."""
    sizes = tuple(buffer.numel() for buffer in buffers)
    programs = max(1, min(triton.cdiv(max(sizes), 4096), 1024))
    scale_kernel[(programs,)](tuple(buffers), sizes, factor, BLOCK=4096)


@dataclass(frozen=True)
class StageSums:
    """Sums over all tokens, per problem: ``mix [P, R_y, R_x]``, ``proj [P, D_x, D_y]``, ``bias [P, R_y, D_y]``,
    ``loss [P, R_y]``, in fp32. None: not wanted."""

    mix: Tensor | None = None
    proj: Tensor | None = None
    bias: Tensor | None = None
    loss: Tensor | None = None


def _unpack(partial: Tensor | None, form: StageForm | ProjectForm | None) -> StageSums:
    """Out of their padding; a tile of several tokens has a block of d_mix for each on the diagonal."""
    if partial is None or form is None:
        return StageSums()
    sums = sum_partials(partial)
    if isinstance(form, ProjectForm):
        proj, bias, loss = sums.split(form.sizes, dim=1)
        bias = bias.view(len(sums), -1, form.dim_y).sum(1, keepdim=True)  # of two chains
        return StageSums(None, proj.view(-1, form.dim_x, form.dim_y), bias, loss.sum(1, keepdim=True))
    mix, proj, bias, loss = sums.split(form.sizes, dim=1)
    tokens, rows_y, rows_x = form.tokens, form.rows_y, form.rows_x

    def rows(part: Tensor, columns: int) -> Tensor:
        part = part.view(len(sums), form.block_y, -1)[:, : tokens * rows_y, :columns]
        return part if tokens == 1 else part.unflatten(1, (tokens, rows_y)).sum(1)

    def diagonal(part: Tensor) -> Tensor:
        square = part.view(len(sums), form.block_y, form.block_x)
        if tokens == 1 or form.in_columns:
            return square[:, :rows_y, :rows_x]
        square = square[:, : tokens * rows_y, : tokens * rows_x]
        blocks = square.unflatten(2, (tokens, rows_x)).unflatten(1, (tokens, rows_y))
        return blocks.diagonal(dim1=1, dim2=3).sum(-1)

    return StageSums(
        diagonal(mix) if form.mix_grad else None,
        proj.view(-1, form.block_dx, form.block_dy)[:, : form.dim_x, : form.dim_y] if form.proj_grad else None,
        rows(bias, form.dim_y) if form.bias_grad else None,
        rows(loss, 1)[..., 0] if form.mode == "loss" else None,
    )


def stages_of(problem: LossProblem, rows_alone: bool = False) -> list[Stage]:
    """The plan for a problem."""
    return plan_stages(
        (len(problem.source), len(problem.target)), problem.heads, problem.dims,
        sparse=problem.sparse, head_mix_dim=problem.head_mix.dim(), proj_dim=problem.dim_proj.dim(),
        rows_alone=rows_alone,
    )  # fmt: skip


def _stage_weights(stages: list[Stage], problem: LossProblem, wide: torch.dtype) -> list[Weights]:
    """What each stage is given. Mixing weights come in the dtype in which they are multiplied. Where states are mixed
    twice, layers before heads, the first weights stand in two parts, the second being what the first one's rounding
    left out: four roundings of 16 bits in a row would be too many."""
    dtype = problem.source[0].dtype
    layer_mix, heads = problem.layer_mix.detach().to(wide), problem.layer_heads(wide)
    dim_proj = problem.dim_proj.detach()
    if stages[-1].kind == "rows" and dim_proj.dim() == 3:
        dim_proj = dim_proj[:, None].expand(-1, problem.heads[1], -1, -1)  # one for each problem
    bias = None if problem.bias is None else problem.bias.detach().to(dtype).contiguous()
    scale = None if problem.scale is None else problem.scale.detach().contiguous()
    found = []
    for stage in stages:
        mix = None
        if stage.kind == "dense":
            product = layer_mix[:, None, :, None] * heads[:, :, None, :]  # [L_y, H_y, L_x, H_x]
            mix = product.reshape(1, 1, stage.rows_y, stage.rows_x).to(dtype)
        elif stage.kind == "heads":
            high = layer_mix.to(dtype)
            parts = [high] if dtype.itemsize > 2 else [high, (layer_mix - high).to(dtype)]
            mix = torch.stack(parts)[None]
        elif stage.kind == "layers":
            mix = heads[:, None].to(dtype).contiguous()
        stride = 0 if mix is None or len(mix) == 1 else mix.stride(0)
        if stage.projects:
            step = 0 if stage.shared_proj else dim_proj.shape[-1] * dim_proj.shape[-2]
            found.append(Weights(mix, stride, dim_proj.contiguous(), step, bias, scale))
        else:
            found.append(Weights(mix, stride, None, 0, None, None))
    return found


def _gradients(stages: list[Stage], sums: list[StageSums], problem: LossProblem) -> dict[str, Tensor]:
    """Of the parameters, from those of the stages' weights."""
    found: dict[str, Tensor | None] = {"dim_proj": sums[-1].proj, "bias": sums[-1].bias}
    for stage, part in zip(stages, sums, strict=True):
        if part.mix is None:
            continue
        if stage.kind == "dense":
            mix = part.mix[0].unflatten(1, (stage.layers_x, stage.heads_x)).unflatten(0, (stage.layers_y, -1))
            found["layer_mix"] = (mix * problem.layer_heads(mix.dtype)[:, :, None, :]).sum((1, 3))
            found["head_mix"] = (mix * problem.layer_mix.detach().to(mix.dtype)[:, None, :, None]).sum(2)
        else:
            found["layer_mix" if stage.kind == "heads" else "head_mix"] = (
                part.mix.sum(0) if stage.kind == "heads" else part.mix
            )
    return problem.fold(found)


def run_stages(
    problem: LossProblem,
    call: Call,
    wanted: Wanted,
    states: Sequence[Sequence[Tensor] | None],
    project_rows: Callable[..., tuple[Tensor, ProjectForm]] | None = None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """All stages over all tokens: gradients of the parameters, and losses per layer in mode ``loss``.

    ``states``: source, target (or the output, or its gradient), and the places of their gradients. ``project_rows``:
    launches the last stage where each row has a projection of its own; None: the plain kernel does.
    """
    dims, heads = problem.dims, problem.heads
    *mixing, final = stages = stages_of(problem, rows_alone=project_rows is not None)
    weights = _stage_weights(stages, problem, call.wide)
    like = problem.source[0]
    chunk = chunk_tokens(stages, call.layers_y, heads, dims, like.element_size(), call.tokens)
    spaces = [like.new_empty(call.layers_y, heads[stage.kind != "heads"], chunk, dims[0]) for stage in mixing]
    indexes = [problem.source_index, problem.target_index] * 2
    groups = [*states, *(space.unbind(0) for space in spaces)]
    source, target, source_grad, target_grad, *between = make_sides(groups, [*indexes, *(None for _ in spaces)])
    assert source is not None and target is not None
    inputs: list = [source, *between]  # of each stage
    outputs: list = [*between, target]
    backward = call.mode != "store" and wanted.through_projection
    only_mix = Wanted(layer_mix=wanted.mix)
    last_wanted = replace(wanted, source=False, target=False)
    if not final.mixes:
        last_wanted = replace(last_wanted, layer_mix=False, head_mix=False)
    if final.kind != "rows" or not all(side is None or side.aligned for side in (target, target_grad)):
        project_rows = None
    sides: SidesOfStage
    partials: list[Tensor | None] = [None] * len(stages)
    forms: list[StageForm | ProjectForm | None] = [None] * len(stages)
    last = len(stages) - 1
    for first in range(0, call.tokens, chunk):
        tokens = (first, min(first + chunk, call.tokens))
        for k, stage in enumerate(mixing):
            sides = (inputs[k], outputs[k], None, None)
            launch(stage, (dims[0],) * 2, replace(call, mode="store"), sides, weights[k], Wanted(), tokens, None)
        back = (inputs[last] if mixing else source_grad) if backward else None
        sides = (inputs[last], target, back, target_grad)
        if project_rows is not None:
            partials[last], forms[last] = project_rows(final, dims, call, sides, weights[last], tokens, partials[last])
        else:
            partials[last], forms[last] = launch(
                final, dims, call, sides, weights[last], last_wanted, tokens, partials[last]
            )
        for k in reversed(range(last if backward else 0)):
            sides = (inputs[k], outputs[k], inputs[k] if k else source_grad, None)
            given = replace(call, mode="given")
            partials[k], forms[k] = launch(
                mixing[k], (dims[0],) * 2, given, sides, weights[k], only_mix, tokens, partials[k]
            )
    sums = [_unpack(partial, form) for partial, form in zip(partials, forms, strict=True)]
    loss = sums[-1].loss
    return _gradients(stages, sums, problem), None if loss is None else loss.reshape(call.layers_y, -1).sum(1)
