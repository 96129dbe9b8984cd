"""Launches of the Triton kernels: address tables, arguments, and the walk through the stages of a plan."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvds.ops.triton_kernels import map_projection_kernel, sum_partials_kernel
from kvds.ops.triton_plan import Stage, Tile, choose_tile, chunk_tokens, count_splits, interpreting, plan_stages

ELEMENTS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    source: bool = False
    target: bool = False
    mix: bool = False
    proj: bool = False
    bias: bool = False

    @property
    def any(self) -> bool:
        """At least one."""
        return self.source or self.target or self.mix or self.proj or self.bias


@dataclass(frozen=True)
class Side:
    """Per-layer tensors as the kernel sees them.

    Attributes:
        table: int64 ``[layers · heads]`` on the device: where each (layer, head) starts.
        strides: Of batch and token, in elements.
        aligned: Whether every row starts at a multiple of 16 bytes.
        index: ``[B, M]`` positions, contiguous, or None.
        flat: A workspace ``[layers][heads, tokens, dim]`` of the launch's own tokens.
    """

    table: Tensor
    strides: tuple[int, int]
    aligned: bool
    index: Tensor | None = None
    flat: bool = False


@dataclass(frozen=True)
class Weights:
    """Mixing weights per stage ``[1 or problems, parts, rows_y, rows_x]``, of which the sum over the parts counts; then
    ``dim_proj`` and ``bias``, all contiguous."""

    mixes: list[Tensor | None]
    proj: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class StageSums:
    """Sums over all tokens, per problem: ``mix [P, R_y, R_x]``, ``proj [P, D_x, D_y]``, ``bias [P, R_y, D_y]``,
    ``loss [P, R_y]``, in fp32."""

    mix: Tensor | None
    proj: Tensor | None
    bias: Tensor | None
    loss: Tensor | None


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a stand-in under the interpreter, where programs run one after the other."""
    return 2 if interpreting() else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a GPU's compute capability is 9.0 or later; so under the interpreter, to which it is all the same."""
    return interpreting() or torch.cuda.get_device_capability(device) >= (9, 0)


def make_sides(groups: Sequence[Sequence[Tensor] | None], indexes: Sequence[Tensor | None]) -> list[Side | None]:
    """Address tables of several groups of per-layer tensors, with one copy.

    Of a group each tensor is ``[B, H, T, D]``, or ``[H, T, D]`` if it is a workspace.
    """
    parts: list[Tensor] = []
    layouts: list[tuple[int, int, int, int, bool]] = []
    device, place = None, 0
    for group in groups:
        if group is None:
            layouts.append((0, 0, 0, 0, True))
            continue
        first = group[0]
        device = first.device
        heads, size = first.shape[-3], first.element_size()
        batch, head, token, _ = first.stride() if first.dim() == 4 else (0, *first.stride())
        starts = [layer.data_ptr() for layer in group]
        # An address of each layer and head: layers in rows, the heads' offsets added.
        part = (torch.tensor(starts)[:, None] + torch.arange(heads) * (head * size)).view(-1)
        aligned = all(a % 16 == 0 for a in starts) and all(s * size % 16 == 0 for s in (batch, head, token))
        layouts.append((place, place + part.numel(), batch, token, aligned))
        odd = part.numel() % 2  # every table starts at a multiple of 16 bytes
        parts += [part, part[:1]] if odd else [part]
        place += part.numel() + odd
    table = torch.cat(parts)
    if device is not None and device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    sides: list[Side | None] = []
    for group, index, (start, end, batch, token, aligned) in zip(groups, indexes, layouts, strict=True):
        if group is None:
            sides.append(None)
        else:
            sides.append(Side(table[start:end], (batch, token), aligned, index, group[0].dim() == 3))
    return sides


def _pick_diagonal(sums: Tensor, problems: int, tile: Tile, stage: Stage) -> Tensor:
    """``[P, BLOCK_Y·BLOCK_X]`` with one block per token on the diagonal to ``[P, rows_y, rows_x]``."""
    rows_y, rows_x = stage.rows_y, stage.rows_x
    square = sums.view(problems, tile.block_y, tile.block_x)[:, : tile.tokens * rows_y, : tile.tokens * rows_x]
    if tile.tokens == 1:
        return square
    blocks = square.unflatten(2, (tile.tokens, rows_x)).unflatten(1, (tile.tokens, rows_y))
    return blocks.diagonal(dim1=1, dim2=3).sum(-1)


def _pick_rows(sums: Tensor, problems: int, tile: Tile, stage: Stage, columns: int, used: int) -> Tensor:
    """``[P, BLOCK_Y·columns]``, tokens outside members, to ``[P, rows_y, used]``."""
    rows = sums.view(problems, tile.block_y, columns)[:, : tile.tokens * stage.rows_y, :used]
    return rows if tile.tokens == 1 else rows.unflatten(1, (tile.tokens, stage.rows_y)).sum(1)


@dataclass(frozen=True)
class Call:
    """What all launches of one pass share.

    Attributes:
        dtype: Of the states.
        tokens: B·M.
        positions: M.
        mask: ``[B, M]`` contiguous bool or None.
        valid: int64 scalar on the device, how many it leaves, or None.
        scale: ``[L_y]`` contiguous or None.
        loss: Its name.
        layers_y, elements: Target layers, and H_y·D_y: what means are taken over.
    """

    dtype: torch.dtype
    tokens: int
    positions: int
    mask: Tensor | None
    valid: Tensor | None
    scale: Tensor | None
    loss: str
    layers_y: int
    elements: int

    @property
    def wide(self) -> torch.dtype:
        """Accumulators."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def launch(
    stage: Stage,
    dims: tuple[int, int],
    call: Call,
    mode: str,
    sides: tuple[Side, Side, Side | None, Side | None],
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: Needs,
    token_range: tuple[int, int],
    sums: Tensor | None = None,
) -> tuple[Tensor | None, Tile]:
    """Run one stage over a range of tokens; returns the flat sums per problem (added to ``sums`` if given)."""
    source, target, source_grad, target_grad = sides
    mix, proj, bias = weights
    gradients = needs.any or source_grad is not None or target_grad is not None
    device = source.table.device
    tile = choose_tile(stage, dims, call.dtype.itemsize, gradients=gradients, hopper=is_hopper(device))
    splits = count_splits(stage, tile, token_range[1] - token_range[0], processors(device))
    size = (
        tile.block_y * tile.block_x * needs.mix
        + tile.block_dim_x * tile.block_dim_y * needs.proj
        + tile.block_y * tile.block_dim_y * needs.bias
        + tile.block_y * (mode == "loss")
    )
    partial = torch.empty((stage.problems * splits, size) if size else (1,), dtype=call.wide, device=device)
    none = source.table
    dx, dy = source_grad or source, target_grad or target
    map_projection_kernel[(stage.problems * splits,)](
        source.table, target.table, dx.table, dy.table,
        none if mix is None else mix, none if proj is None else proj, none if bias is None else bias,
        none if call.scale is None else call.scale, none if call.mask is None else call.mask,
        none if call.valid is None else call.valid,
        none if source.index is None else source.index, none if target.index is None else target.index, partial,
        *token_range, call.positions, splits, call.tokens, call.elements, call.layers_y,
        *source.strides, *target.strides, *dx.strides, *dy.strides,
        0 if mix is None or mix.shape[0] == 1 else mix.stride(0),
        0 if proj is None or stage.shared_proj else proj.shape[-1] * proj.shape[-2],
        ELEMENT=ELEMENTS[call.dtype], WIDE=ELEMENTS[call.wide],
        PRECISION="ieee" if call.dtype == torch.float32 else "tf32",
        HEAD_PROBLEMS=stage.head_problems, LAYERS_X=stage.layers_x, HEADS_X=stage.heads_x,
        LAYERS_Y=stage.layers_y, HEADS_Y=stage.heads_y,
        DIM_X=dims[0], DIM_Y=dims[1], TOKENS=tile.tokens,
        BLOCK_X=tile.block_x, BLOCK_Y=tile.block_y, BLOCK_DX=tile.block_dim_x, BLOCK_DY=tile.block_dim_y,
        HAS_MIX=mix is not None, MIX_PARTS=0 if mix is None else mix.shape[1],
        HAS_PROJ=proj is not None, HAS_BIAS=bias is not None,
        HAS_SCALE=call.scale is not None and mode == "loss", HAS_MASK=call.mask is not None,
        DIMS_FIRST=stage.dims_first, DELAYED=tile.delayed and mode == "loss",
        MODE=mode, LOSS=call.loss, NORMALIZE=call.dtype != torch.float16,
        SOURCE_GRAD=source_grad is not None, TARGET_GRAD=target_grad is not None,
        MIX_GRAD=needs.mix, PROJ_GRAD=needs.proj, BIAS_GRAD=needs.bias,
        SOURCE_INDEXED=source.index is not None, TARGET_INDEXED=target.index is not None,
        SOURCE_FLAT=source.flat, TARGET_FLAT=target.flat,
        ALIGNED=all(side is None or side.aligned for side in sides), STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )  # fmt: skip
    if not size:
        return None, tile
    accumulate = sums is not None
    if sums is None:
        sums = torch.empty((stage.problems, size), dtype=call.wide, device=device)
    sum_partials_kernel[(stage.problems, triton.cdiv(size, 128))](
        partial, sums, splits, SIZE=size, BLOCK=128, ROWS=16, ACCUMULATE=accumulate, num_warps=4
    )
    return sums, tile


def _unpack(
    sums: Tensor | None, tile: Tile, stage: Stage, dims: tuple[int, int], needs: Needs, has_loss: bool
) -> StageSums:
    if sums is None:
        return StageSums(None, None, None, None)
    problems = stage.problems
    sizes = (
        tile.block_y * tile.block_x * needs.mix,
        tile.block_dim_x * tile.block_dim_y * needs.proj,
        tile.block_y * tile.block_dim_y * needs.bias,
        tile.block_y * has_loss,
    )
    mix, proj, bias, loss = sums.split(sizes, dim=1)
    return StageSums(
        _pick_diagonal(mix, problems, tile, stage) if needs.mix else None,
        proj.view(problems, tile.block_dim_x, tile.block_dim_y)[:, : dims[0], : dims[1]] if needs.proj else None,
        _pick_rows(bias, problems, tile, stage, tile.block_dim_y, dims[1]) if needs.bias else None,
        _pick_rows(loss, problems, tile, stage, 1, 1)[..., 0] if has_loss else None,
    )


def run_stages(
    stages: list[Stage],
    call: Call,
    mode: str,
    dims: tuple[int, int],
    heads: tuple[int, int],
    states: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor] | None, Sequence[Tensor] | None],
    indexes: tuple[Tensor | None, Tensor | None],
    weights: Weights,
    needs: Needs,
) -> list[StageSums]:
    """All stages over all tokens.

    ``states``: source, target (or the output, or its gradient), and the places of their gradients.
    """
    *mixing, final = stages
    dim_x = dims[0]
    like = states[0][0]
    chunk = chunk_tokens(stages, call.layers_y, heads, dim_x, like.element_size(), call.tokens)
    workspaces = [
        like.new_empty(call.layers_y, heads[stage.kind != "heads"], chunk, dim_x).unbind(0) for stage in mixing
    ]
    groups = [*states, *workspaces]
    sides = make_sides(groups, [*indexes, *indexes, *(None for _ in workspaces)])
    source, target, source_grad, target_grad, *spaces = sides
    assert source is not None and target is not None
    below = needs.source or needs.mix
    totals: list[Tensor | None] = [None] * len(stages)
    tiles: list[Tile | None] = [None] * len(stages)
    wanted = [Needs(mix=needs.mix) for _ in mixing]
    wanted.append(replace(needs, mix=needs.mix and final.mixes))
    for first in range(0, call.tokens, chunk):
        tokens = (first, min(first + chunk, call.tokens))
        inputs = [source]
        for k, stage in enumerate(mixing):
            space = spaces[k]
            assert space is not None
            launch(
                stage,
                (dim_x, dim_x),
                call,
                "store",
                (inputs[k], space, None, None),
                (weights.mixes[k], None, None),
                Needs(),
                tokens,
            )
            inputs.append(space)
        back = inputs[-1] if mixing else source_grad
        if mode == "store" or not (below if mixing else needs.source):
            back = None
        totals[-1], tiles[-1] = launch(
            final, dims, call, mode, (inputs[-1], target, back, target_grad),
            (weights.mixes[-1], weights.proj, weights.bias), wanted[-1], tokens, totals[-1],
        )  # fmt: skip
        if mode == "store" or not below:
            continue
        for k in range(len(mixing) - 1, -1, -1):
            back = source_grad if k == 0 else inputs[k]
            space = spaces[k]
            assert space is not None
            totals[k], tiles[k] = launch(
                mixing[k], (dim_x, dim_x), call, "given", (inputs[k], space, back, None),
                (weights.mixes[k], None, None), wanted[k], tokens, totals[k],
            )  # fmt: skip
    found = []
    for k, stage in enumerate(stages):
        own_dims = dims if stage is final else (dim_x, dim_x)
        tile = tiles[k]
        found.append(
            StageSums(None, None, None, None)
            if tile is None
            else _unpack(totals[k], tile, stage, own_dims, wanted[k], mode == "loss" and stage is final)
        )
    return found


__all__ = ["Call", "Needs", "Weights", "plan_stages", "run_stages"]
