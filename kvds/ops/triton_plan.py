"""What the Triton kernel is asked to do for given shapes: stages, tiles, programs. Pure arithmetic; imports no triton.

With one ``dim_proj`` for all layers and heads and at most 64 (layer, head) rows on either side, one launch does
everything. Otherwise mixing and projection are launches of their own, over chunks of tokens: mix layers and heads, then
project and compare, then mix the gradients back.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from operator import methodcaller

import torch
from torch import Tensor

from kvds.ops.gradients import LossProblem, Wanted
from kvds.ops.kernel_arguments import Stage, Tile

log = logging.getLogger(__name__)

MAX_ROWS = 128
"""Rows (layers times heads of a problem) that one tile holds."""
MAX_FUSED_ROWS = 64
"""Rows up to which mixing and projecting fit one program's registers together."""
MAX_DIM = 128
"""head_dim above which a program's weight gradient does not fit its registers."""
TILE_ROWS = 64
"""Rows that a tile is filled up to with further tokens."""
WORKSPACE_BYTES = 40 * 2**20
"""Intermediates of one chunk of tokens, at least."""
WORKSPACE_SHARE = 0.024
"""And as a share of what the einsum holds, within a limit."""
MAX_WORKSPACE_BYTES = 256 * 2**20
MIN_TILES_PER_PROGRAM = 4
"""Below this a program's partial weight gradients cost more to write than its tiles to read."""


def _power_of_two(value: int) -> int:
    return max(16, 1 << (value - 1).bit_length())


@functools.cache
def plan_stages(
    layers: tuple[int, int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    *,
    sparse: bool,
    proj_dim: int,
    rows_alone: bool = False,
) -> tuple[Stage, ...]:
    """Launches from source to projection; the last one projects. Pairs are (source, target).

    ``rows_alone``: a kernel is there that projects row by row so fast that a ``dim_proj`` per layer is worth a launch
    of its own.
    """
    (layers_x, layers_y), (heads_x, heads_y) = layers, heads
    shared_proj = proj_dim == 2
    per_head = proj_dim == 4 or (rows_alone and proj_dim == 3)
    rows = max(layers_x * heads_x, layers_y * heads_y)
    dense = ("dense", 1, 1, layers_x, heads_x, layers_y, heads_y)
    by_layer = ("layers", layers_y, 1, 1, heads_x, 1, heads_y)
    by_head = ("heads", heads_x, heads_x, layers_x, 1, layers_y, 1)
    by_row = Stage("rows", layers_y * heads_y, heads_y, 1, 1, 1, 1, projects=True, shared_proj=False)
    if not sparse and shared_proj and rows <= MAX_FUSED_ROWS:
        return (Stage(*dense, projects=True, dims_first=dims[0] > dims[1]),)
    if not sparse and per_head and rows <= MAX_ROWS:
        return Stage(*dense, projects=False), by_row
    mix_layers = () if sparse else (Stage(*by_head, projects=False),)
    if not per_head and max(heads) <= MAX_FUSED_ROWS:
        return *mix_layers, Stage(*by_layer, projects=True, shared_proj=shared_proj)
    if shared_proj or not per_head:
        by_row = Stage("rows", by_row.problems, heads_y, 1, 1, 1, 1, projects=True, shared_proj=shared_proj)
    return *mix_layers, Stage(*by_layer, projects=False), by_row


@functools.cache
def choose_tile(stage: Stage, dims: tuple[int, int], itemsize: int, *, gradients: bool, hopper: bool = True) -> Tile:
    """Blocks for a launch of a stage; ``dims`` are those of its source and its target, ``itemsize`` bytes an element.

    ``gradients``: whether the launch sums any weight's gradient or writes a state's. ``hopper``: compute capability 9.0
    or later, whose products read shared memory and leave registers free.
    """
    if stage.in_columns:
        return _mixing_tile(stage, dims[0], itemsize, gradients=gradients)
    tokens = max(1, TILE_ROWS // max(stage.rows_x, stage.rows_y))
    block_x, block_y = _power_of_two(tokens * stage.rows_x), _power_of_two(tokens * stage.rows_y)
    block_dx, block_dy = _power_of_two(dims[0]), _power_of_two(dims[1])
    accumulators = block_y * block_x * stage.mixes + (block_dx + block_y) * block_dy * stage.projects
    # Measured on an H100. Eight warps hold the three weight gradients of a wide target without spills if they share
    # every product's columns, which they do where no product of a turn feeds another: hence delayed. The narrower sides
    # of the other direction, and launches without gradients, fit four warps, two programs side by side.
    both = stage.mixes and stage.projects
    delayed = hopper and gradients and itemsize == 2 and both and not stage.dims_first and accumulators > 16384
    # Before Hopper a product's operands stand in registers, too: four warps spill twenty times what eight do there, but
    # for a source narrower than its target, on its own.
    wide = stage.projects and (stage.mixes or dims[0] > dims[1])
    crowded = accumulators > 8192 and (itemsize > 2 or (gradients and wide and not hopper))
    num_warps = 8 if delayed or crowded else 4
    programs = 2 if num_warps == 4 else 1
    num_stages = 1
    if itemsize == 2 and not gradients:
        # Nothing but the projection's accumulator stands in registers: loads run ahead instead, or more programs do.
        programs, num_stages = (programs, 3) if stage.projects else (4, 1)
    elif itemsize == 2 and hopper and stage.mixes:
        num_stages = 2 if stage.dims_first or not stage.projects or (delayed and tokens > 1) else 1
    return Tile(tokens, block_x, block_y, block_dx, block_dy, num_warps, num_stages, programs, delayed)


def _mixing_tile(stage: Stage, dim: int, itemsize: int, *, gradients: bool) -> Tile:
    """Blocks where columns are (token, dimension): two tokens with 64 rows (measured on an H200), more with fewer."""
    block_x, block_y, block_dim = (_power_of_two(size) for size in (stage.rows_x, stage.rows_y, dim))
    tokens = max(1, 4 * TILE_ROWS // max(block_x, block_y) // itemsize)
    num_stages, programs = (2, 2) if gradients else (1, 4)
    return Tile(tokens, block_x, block_y, block_dim, block_dim, 4, num_stages if itemsize == 2 else 1, programs, False)


def count_splits(stage: Stage, tile: Tile, tokens: int, processors: int, *, sums: bool = True) -> int:
    """Programs per problem. ``sums``: whether each of them writes weight gradients."""
    tiles = -(-tokens // tile.tokens)
    wanted = max(1, processors * tile.programs // stage.problems)
    return max(1, min(wanted, -(-tiles // MIN_TILES_PER_PROGRAM) if sums else tiles))


def even_splits(rows: int, tiles: int, processors: int) -> int:
    """Programs per row, so that no multiprocessor waits long for the last of them: of up to 12, the fewest that come
    within 4 % of the best."""
    choices = range(1, max(2, min(12, tiles) + 1))
    busy = {n: rows * n / (-(-rows * n // processors) * processors) for n in choices}
    return next(n for n in choices if busy[n] >= max(busy.values()) - 0.04)


def chunk_tokens(
    stages: Sequence[Stage], layers_y: int, heads: tuple[int, int], dims: tuple[int, int], itemsize: int, tokens: int
) -> int:
    """Tokens per round of launches: all of them if there are no intermediates."""
    if len(stages) == 1:
        return max(1, tokens)
    per_token = layers_y * dims[0] * itemsize * sum(heads[s.kind != "heads"] for s in stages[:-1])
    einsum = tokens * layers_y * heads[1] * (18 * dims[1] + 6 * dims[0])  # bytes, as measured for 16-bit states
    limit = max(WORKSPACE_BYTES, min(MAX_WORKSPACE_BYTES, int(WORKSPACE_SHARE * einsum)))
    rounds = -(-tokens // max(64, limit // per_token))
    return max(1, min(tokens, -(-tokens // (64 * rounds)) * 64))


HOPPER_DIMS = {(64, 64), (64, 128), (128, 64)}
"""Of source and target: what the kernels for compute capability 9.0 have registers for."""


def why_plain(problem: LossProblem, wanted: Wanted, stages: Sequence[Stage], aligned: bool) -> str | None:
    """Why the plain kernels project and compare, and none of those for compute capability 9.0; None: one of those does.

    ``aligned``: whether all rows of all sides start at multiples of 16 bytes.
    """
    reason = why_not_hopper(problem, wanted)
    if reason is not None or stages[-1].kind == "rows":
        return reason if reason is not None or aligned else "rows of states start off multiples of 16 bytes"
    if len(stages) > 1 or stages[0].kind != "dense":
        return f"more than {MAX_FUSED_ROWS} rows (layers times heads) of one projection, or a sparse layer map"
    if stages[0].dims_first and wanted.source:
        return "the source, which is wider than its target, gets a gradient"  # for which registers would not do
    return None if aligned else "rows of states start off multiples of 16 bytes"


def why_not_hopper(problem: LossProblem, wanted: Wanted) -> str | None:
    """Why no kernel for compute capability 9.0 exactly can take a problem's states; None: they can be taken."""
    first = problem.source[0]
    if not wanted.any:
        return "nothing gets a gradient"  # then the plain ones are as fast
    if first.dtype.itemsize != 2:
        return f"states in {first.dtype}: expected bfloat16 or float16"
    if problem.dims not in HOPPER_DIMS:
        return f"head_dim {problem.dims[0]} to {problem.dims[1]}: expected 64 or 128, not both 128"
    if interpreting():
        return "kernels are interpreted"
    if capability(first.device) != (9, 0):
        return f"compute capability {'.'.join(map(str, capability(first.device)))}: expected 9.0"
    return None


@functools.cache
def tell_plain(reason: str) -> None:
    """Once for each reason, to who listens to the log."""
    log.info("kvds.ops: the plain Triton kernels take a call: %s", reason)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability; a stand-in under the interpreter, to which it is all the same."""
    return (9, 0) if interpreting() else torch.cuda.get_device_capability(device)


def _uniform(states: Sequence[Tensor]) -> bool:
    return states[0].stride()[3] == 1 and len(set(map(methodcaller("stride"), states))) == 1


@functools.cache
def _missing(device: torch.device, interpreted: bool) -> str | None:
    """What the machine lacks; asked once, since looking for a package costs as much as a launch."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'kvds[triton]')"
    if device.type != "cuda":
        return None if interpreted else f"the states are on {device}: expected a CUDA device"
    if capability(device) < (8, 0):
        return "expected a GPU of compute capability 8.0 or later"
    return None


def unsupported(
    source: Sequence[Tensor],
    target: Sequence[Tensor] | None,
    dims: tuple[int, int],
    heads: tuple[int, int],
    layers_y: int,
) -> str | None:
    """Why the kernel cannot take this input, or None."""
    first = source[0]
    missing = _missing(first.device, interpreting())
    if missing is not None:
        return missing
    if first.dtype not in (torch.bfloat16, torch.float16, torch.float32) and not interpreting():
        return f"states in {first.dtype}: expected bfloat16, float16 or float32"
    if max(dims) > MAX_DIM:
        return f"head_dim {max(dims)}: expected at most {MAX_DIM}"
    if max(len(source), layers_y) > MAX_ROWS or max(heads) > MAX_ROWS:
        return f"{max(len(source), layers_y)} layers, {max(heads)} heads: expected at most {MAX_ROWS} of each"
    if not all(_uniform(states) for states in (source, target) if states is not None):
        return "layers of different strides, or not contiguous along head_dim"
    if first.shape[0] * first.shape[2] >= 2**31:
        return "2^31 tokens or more"
    return None
