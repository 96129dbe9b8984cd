"""Launches of the plain Triton kernels, and what kernels are given of the states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvds.ops.gradients import Wanted
from kvds.ops.kernel_arguments import Maps, Rows, Sides, Stage, StageForm, Weights
from kvds.ops.mix_kernels import mix_kernel, unmix_kernel
from kvds.ops.sum_kernels import count_kernel, scale_kernel, weights_kernel
from kvds.ops.triton_kernels import map_projection_kernel
from kvds.ops.triton_plan import capability, choose_tile, count_splits, interpreting
from kvds.ops.triton_sums import Left

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


class Side(NamedTuple):
    """Per-layer tensors as kernels see them. ``aligned``: whether every row starts at a multiple of 16 bytes;
    ``flat``: a workspace ``[layers][heads, tokens, dim]`` of the launch's own tokens."""

    rows: Rows
    aligned: bool
    flat: bool


class SidesOfStage(NamedTuple):
    """Source, target (or the output, or its gradient), and the places of their gradients."""

    source: Side
    target: Side
    source_grad: Side | None
    target_grad: Side | None

    @property
    def aligned(self) -> bool:
        """All of them."""
        return all(side is None or side.aligned for side in self)

    @property
    def arguments(self) -> Sides:
        """As kernels take them."""
        source, target, source_grad, target_grad = self
        return Sides(source.rows, target.rows, (source_grad or source).rows, (target_grad or target).rows)


@functools.lru_cache(maxsize=256)
def _table(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Addresses on a device: one copy. From step to step tensors come to lie where others lay: tables are kept, for the
    ``stream`` that filled them."""
    table = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def make_sides(groups: Sequence[Sequence[Tensor] | None], indexes: Sequence[Tensor | None]) -> list[Side | None]:
    """Address tables of several groups of per-layer tensors, one behind the other.

    Of a group each tensor is ``[B, H, T, D]``, or ``[H, T, D]`` if it is a workspace.
    """
    addresses: list[int] = []
    # Of each group: first and last address, strides of batch and token, whether all is aligned, flat.
    shapes: list[tuple[int, int, int, int, bool, bool] | None] = []
    for group in groups:
        if not group:
            shapes.append(None)
            continue
        first = group[0]
        flat, size, begin = first.dim() == 3, first.element_size(), len(addresses)
        batch, head, token, _ = (0, *first.stride()) if flat else first.stride()
        starts = list(map(Tensor.data_ptr, group))
        bits = functools.reduce(int.__or__, starts, (batch | head | token) * size)
        heads = [h * head * size for h in range(first.shape[-3])]
        addresses += [start + offset for start in starts for offset in heads]
        shapes.append((begin, len(addresses), batch, token, bits % 16 == 0, flat))
        if len(addresses) % 2:  # every table starts at a multiple of 16 bytes
            addresses.append(0)
    device = next(group[0].device for group in groups if group)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    table = _table(tuple(addresses), device, stream)
    return [
        None if shape is None else Side(Rows(table[shape[0] : shape[1]], index, *shape[2:4]), *shape[4:])
        for shape, index in zip(shapes, indexes, strict=True)
    ]


class Call(NamedTuple):
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


class Launch(NamedTuple):
    """A kernel that is ready to run over ranges of tokens, and what it leaves, or None.

    ``arguments(first, last)``: all of them. What ranges differ in, the kernel is not specialised on; sums that programs
    leave include those of the tokens before ``first``.
    """

    kernel: Any
    programs: int
    arguments: Callable[[int, int], tuple]
    num_warps: int
    left: Left | None


def run_rounds(launches: Sequence[Launch], tokens: int, chunk: int) -> None:
    """All of them over a chunk of tokens, then over the next one."""
    compiled: list[Any] = [None] * len(launches)
    for first in range(0, tokens, chunk):
        last = min(first + chunk, tokens)
        for k, (kernel, programs, arguments, num_warps, _) in enumerate(launches):
            grid = programs, 1, 1
            if compiled[k] is None:  # which finds the compiled kernel; the interpreter has none
                compiled[k] = kernel[grid](*arguments(first, last), num_warps=num_warps)
            else:
                compiled[k][grid](*arguments(first, last))


@functools.cache
def _form(
    stage: Stage, dims: tuple[int, int], dtype: torch.dtype, hopper: bool, *, any_gradient: bool,
    mode: str, loss: str, normalize: bool, source_grad: bool, target_grad: bool, mix_grad: bool, proj_grad: bool,
    bias_grad: bool, source_flat: bool, target_flat: bool, aligned: bool,
) -> StageForm:  # fmt: skip
    """What a stage's kernel is compiled for."""
    tile = choose_tile(stage, dims, dtype.itemsize, gradients=any_gradient, hopper=hopper)
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    blocks = vars(tile) | {"delayed": tile.delayed and mode == "loss"}
    return StageForm(
        **vars(stage), **blocks, element=ELEMENTS[dtype], wide=wide,
        dim_x=dims[0], dim_y=dims[1], mode=mode, loss=loss, normalize=normalize, source_grad=source_grad,
        target_grad=target_grad, mix_grad=mix_grad, proj_grad=proj_grad, bias_grad=bias_grad, source_flat=source_flat,
        target_flat=target_flat, aligned=aligned,
    )  # fmt: skip


def prepare_plain(
    stage: Stage,
    dims: tuple[int, int],
    call: Call,
    sides: SidesOfStage,
    weights: Weights,
    wanted: Wanted,
    tokens: int,
) -> Launch:
    """A stage by the plain kernels, for ranges of up to ``tokens``. Of ``wanted`` only maps' gradients count: for those
    of the states there are places or not."""
    device = sides.source.rows.table.device
    gradients = sides.source_grad is not None, sides.target_grad is not None
    form = _form(
        stage, dims, call.dtype, capability(device) >= (9, 0), any_gradient=wanted.any or any(gradients),
        mode=call.mode, loss=call.loss, normalize=call.normalize, source_grad=gradients[0], target_grad=gradients[1],
        mix_grad=wanted.mix, proj_grad=wanted.dim_proj, bias_grad=wanted.bias, source_flat=sides.source.flat,
        target_flat=sides.target.flat, aligned=sides.aligned,
    )  # fmt: skip
    splits = count_splits(stage, form, tokens, processors(device), sums=wanted.any)
    partial = left = None
    if form.size:
        partial = torch.empty((stage.problems, splits, form.size), dtype=call.wide, device=device)
        left = Left(partial, splits, form)
    rows, mask, positions = sides.arguments, call.mask, call.positions
    start: tuple
    end: tuple = splits, form
    if not stage.in_columns:
        start = rows, weights, call.tokens, positions, mask, call.valid, partial
        kernel, end = map_projection_kernel, (splits, call.elements, call.layers_y, form)
    elif call.mode == "store":
        kernel, start = mix_kernel, (rows, weights, positions, mask)
    else:
        kernel, start = unmix_kernel, (rows, weights, positions, mask, partial)
    return Launch(kernel, stage.problems * splits, lambda a, b: (*start, a, b, *end), form.num_warps, left)


def mixing_weights(stage: Stage, maps: Maps, sparse: bool, dtype: torch.dtype) -> tuple[Tensor, int]:
    """``[problems, parts, rows_y, rows_x]`` in the dtype in which states are multiplied, and the stride of problems."""
    problems = stage.problems if stage.kind == "layers" else 1
    parts = stage.parts(8 * dtype.itemsize)
    mix = torch.empty(problems, parts, stage.rows_y, stage.rows_x, dtype=dtype, device=maps.head_mix.device)
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    weights_kernel[(problems,)](maps, mix, stage, sparse, parts, wide, num_warps=4)
    return mix, 0 if problems == 1 else mix.stride(0)


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
