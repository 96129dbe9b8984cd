"""The projecting stage where each (layer, head) row has a ``dim_proj`` of its own (Gluon, compute capability 9.0).

The states come mixed from a workspace ``m [rows, tokens, D_x]`` and their gradient goes back in its place. A program
takes one target row and walks over tiles of 64 tokens: ``m [64, D_x]``, ``t [64, D_y]``, ``w [D_x, D_y]``. Roles of
four warps each, on a ring of stages in shared memory:

* the *loader* copies ``m`` and ``t``;
* two *chains* make ``g = ρ'(m @ w + bias − t)`` over ``t``: each 64 of 128 columns, or, of 64, every other tile;
* the *reducer* adds up ``d_w = mᵀ @ g`` and writes ``d_m = g @ wᵀ``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvds.ops.gluon_names import (
    arrive_when_copied,
    barrier,
    copy_async,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    mma,
    mma_wait,
)
from kvds.ops.gluon_parts import (
    ROWS,
    SHARED,
    gradient_norm,
    layer_norm,
    penalty,
    product_layout,
    row_layout,
    token_offset,
)
from kvds.ops.kernel_arguments import Tokens

STAGES = gl.constexpr(4)
"""Tiles in flight."""


class Ring(NamedTuple):
    """Shared memory of all stages, ``t`` and ``w`` in halves of 64 columns, and the barriers that hand a stage on."""

    m: Any
    t: Any
    w: Any
    loaded: Any
    chained: Any
    free: Any


class Row(NamedTuple):
    """What a program works on: its row of the workspace, of the target and of the target's gradient; tiles ``split,
    split + splits, …`` of tokens ``first`` to ``last``."""

    m: Any
    t: Any
    t_grad: Any
    split: Any
    splits: Any
    tiles: Any
    first: Any
    last: Any


@gluon.jit
def _tile_tokens(row, tile, LAYOUT: gl.constexpr):
    """Its tokens, and which are there; those beyond the last one read it again."""
    token = row.first + tile * 64 + gl.arange(0, ROWS, layout=LAYOUT)
    return gl.minimum(token, row.last - 1), token < row.last


@gluon.jit
def _kept(tokens, token, there):
    """Which count."""
    if tokens.mask is not None:
        there = there & gl.load(tokens.mask + token)
    return there


@gluon.jit
def _add(at, sums, row):
    """To the program's sums of the tokens before ``first``, if there are any."""
    gl.store(at, sums + gl.load(at, mask=row.first > 0, other=0))


@gluon.jit
def _loader(ring, row, sides, tokens, F: gl.constexpr):
    X: gl.constexpr = row_layout(F.dim_x)
    HALF: gl.constexpr = row_layout(64)
    HALVES: gl.constexpr = F.dim_y // 64
    local = gl.arange(0, ROWS, layout=gl.SliceLayout(1, X)).expand_dims(1)
    dim = gl.arange(0, F.dim_x, layout=gl.SliceLayout(0, X)).expand_dims(0)
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, HALF)).expand_dims(0)
    turn = 0
    for tile in range(row.split, row.tiles, row.splits):
        stage = turn % STAGES
        at = row.m + tile.to(gl.int64) * (64 * F.dim_x) + local * F.dim_x + dim
        token, there = _tile_tokens(row, tile, gl.SliceLayout(1, HALF))
        start = gl.multiple_of(row.t + token_offset(sides.target, tokens, token), (16,)).expand_dims(1) + column
        keep = _kept(tokens, token, there).expand_dims(1)
        mbarrier.wait(ring.free.index(stage), (turn // STAGES + 1) & 1)
        copy_async(ring.m.index(stage), at, mask=row.first + tile * 64 + local < row.last)
        for half in gl.static_range(HALVES):
            copy_async(ring.t.index(stage * HALVES + half), start + half * 64, mask=keep)
        arrive_when_copied(ring.loaded.index(stage), increment_count=False)
        turn += 1


@gluon.jit
def _chain(ring, row, sides, weights, tokens, problem, out, J: gl.constexpr, F: gl.constexpr):
    """``J``: which of the two."""
    Y: gl.constexpr = product_layout(64)
    HALVES: gl.constexpr = F.dim_y // 64
    HALF: gl.constexpr = J if HALVES == 2 else 0  # of the columns
    TURNS: gl.constexpr = 1 if HALVES == 2 else 2  # of which one is this role's
    SKIP: gl.constexpr = 0 if HALVES == 2 else J
    norm = gradient_norm(tokens, F)
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, Y))
    bias = gl.full([64], 0.0, gl.float32, layout=gl.SliceLayout(0, Y))
    if weights.bias is not None:
        bias = gl.load(weights.bias + problem * F.dim_y + HALF * 64 + column).to(gl.float32)
    inverse = 1.0
    if weights.scale is not None:
        inverse = 1 / gl.load(weights.scale + problem // F.heads_y).to(gl.float32)
    none = gl.full([ROWS, 64], 0.0, gl.float32, layout=Y)
    losses = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, Y))
    d_bias = gl.full([ROWS, 64], 0.0, gl.float32, layout=Y)
    turn = SKIP
    start = row.split + SKIP * row.splits
    token, there = _tile_tokens(row, start, gl.SliceLayout(1, Y))
    keep = _kept(tokens, token, there)
    for tile in range(start, row.tiles, TURNS * row.splits):
        stage = turn % STAGES
        unit = gl.where(keep, inverse, 0.0)
        mbarrier.wait(ring.loaded.index(stage), turn // STAGES & 1)
        fence_async_shared()
        projected = mma(ring.m.index(stage), ring.w.index(HALF), none, use_acc=False, is_async=True)
        # A turn ahead, and right after a fence: the next one would wait for it.
        token, there = _tile_tokens(row, tile + TURNS * row.splits, gl.SliceLayout(1, Y))
        keep = _kept(tokens, token, there)
        t = ring.t.index(stage * HALVES + HALF).load(Y)
        projected = mma_wait(0, deps=[projected])
        rho, g = penalty(projected + (bias.expand_dims(0) - t.to(gl.float32)), unit, F)
        losses += gl.sum(rho, axis=1)
        d_bias += g
        ring.t.index(stage * HALVES + HALF).store(g.to(F.element))
        fence_async_shared()
        barrier()
        mbarrier.arrive(ring.chained.index(stage), count=1)
        if F.target_grad:
            low = gl.convert_layout((g * -norm).to(F.element), row_layout(64))
            own, stored = _tile_tokens(row, tile, gl.SliceLayout(1, row_layout(64)))
            if sides.target.index is not None:
                stored = _kept(tokens, own, stored)
            at = gl.multiple_of(row.t_grad + token_offset(sides.target_grad, tokens, own), (16,))
            place = gl.arange(0, 64, layout=gl.SliceLayout(0, row_layout(64))) + HALF * 64
            gl.store(at.expand_dims(1) + place.expand_dims(0), low, mask=stored.expand_dims(1))
        turn += TURNS
    line = gl.arange(0, ROWS, layout=gl.SliceLayout(1, Y))
    _add(out + F.starts[2] + J * 64 + line, losses * layer_norm(tokens, F), row)
    _add(out + F.starts[1] + J * 64 + column, gl.sum(d_bias, axis=0) * norm, row)


@gluon.jit
def _reducer(ring, row, tokens, out, F: gl.constexpr):
    X: gl.constexpr = product_layout(F.dim_x)
    Y: gl.constexpr = product_layout(64)
    HALVES: gl.constexpr = F.dim_y // 64
    norm = gradient_norm(tokens, F)
    none = gl.full([ROWS, F.dim_x], 0.0, gl.float32, layout=X)
    d_low = gl.full([F.dim_x, 64], 0.0, gl.float32, layout=Y)
    d_high = gl.full([F.dim_x, 64], 0.0, gl.float32, layout=Y)
    local = gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout(F.dim_x))).expand_dims(1)
    dim = gl.arange(0, F.dim_x, layout=gl.SliceLayout(0, row_layout(F.dim_x))).expand_dims(0)
    turn = 0
    for tile in range(row.split, row.tiles, row.splits):
        stage = turn % STAGES
        mbarrier.wait(ring.chained.index(stage), turn // STAGES & 1)
        m = ring.m.index(stage).permute((1, 0))
        g = ring.t.index(stage * HALVES)
        d_m = mma(g, ring.w.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
        if HALVES == 2:
            d_m = mma(ring.t.index(stage * 2 + 1), ring.w.index(1).permute((1, 0)), d_m, is_async=True)
            d_high = mma(m, ring.t.index(stage * 2 + 1), d_high, is_async=True)
        d_low = mma(m, g, d_low, is_async=True)
        if HALVES == 2:
            d_m, d_low, d_high = mma_wait(0, deps=[d_m, d_low, d_high])
        else:
            d_m, d_low = mma_wait(0, deps=[d_m, d_low])
        barrier()
        mbarrier.arrive(ring.free.index(stage), count=1)
        at = row.m + tile.to(gl.int64) * (64 * F.dim_x) + local * F.dim_x + dim
        low = gl.convert_layout((d_m * norm).to(F.element), row_layout(F.dim_x))
        gl.store(at, low, mask=row.first + tile * 64 + local < row.last)
        turn += 1
    line = gl.arange(0, F.dim_x, layout=gl.SliceLayout(1, Y)).expand_dims(1)
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, Y)).expand_dims(0)
    _add(out + line * F.dim_y + column, d_low * norm, row)
    if HALVES == 2:
        _add(out + line * F.dim_y + column + 64, d_high * norm, row)


@gluon.jit
def _ring(w, F: gl.constexpr):
    """An empty one, and ``w`` in it."""
    X: gl.constexpr = F.dim_x
    HALVES: gl.constexpr = F.dim_y // 64
    CHAINED: gl.constexpr = F.dim_y // 64  # chains that have their part of a tile
    m = gl.allocate_shared_memory(F.element, [STAGES, ROWS, X], SHARED)
    t = gl.allocate_shared_memory(F.element, [STAGES.value * HALVES, ROWS, 64], SHARED)
    halves = gl.allocate_shared_memory(F.element, [HALVES, X, 64], SHARED)
    line = gl.arange(0, F.dim_x, layout=gl.SliceLayout(1, row_layout(64))).expand_dims(1)
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, row_layout(64))).expand_dims(0)
    for half in gl.static_range(HALVES):
        halves.index(half).store(gl.load(w + line * F.dim_y + half * 64 + column).to(F.element))
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    chained = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(loaded.index(i), count=128)
        mbarrier.init(chained.index(i), count=CHAINED)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    barrier()
    return Ring(m, t, halves, loaded, chained, free)


@gluon.jit(do_not_specialize=["count", "positions", "first", "last", "splits"])
def project_kernel(
    sides, weights, count, positions, mask, valid, partial, first, last, splits, F: gl.constexpr
):  # fmt: skip
    """``partial [rows · splits, F.size]``, and gradients of workspace and target, for tokens ``first`` to ``last``."""
    tokens = Tokens(count, positions, mask, valid)
    problem = gl.program_id(0) // splits
    ring = _ring(weights.dim_proj + problem.to(gl.int64) * weights.proj_stride, F)
    kind: gl.constexpr = gl.pointer_type(F.element)
    row = Row(
        gl.multiple_of(gl.load(sides.source.table + problem).to(kind), 16),
        gl.multiple_of(gl.load(sides.target.table + problem).to(kind), 16),
        gl.multiple_of(gl.load(sides.target_grad.table + problem).to(kind), 16),
        gl.program_id(0) % splits,
        splits,
        (last - first + 63) // 64,
        first,
        last,
    )
    out = partial + gl.program_id(0).to(gl.int64) * F.size
    gl.warp_specialize(
        [
            (_chain, (ring, row, sides, weights, tokens, problem, out, 0, F)),
            (_chain, (ring, row, sides, weights, tokens, problem, out, 1, F)),
            (_reducer, (ring, row, tokens, out, F)),
            (_loader, (ring, row, sides, tokens, F)),
        ],
        [4, 4, 4],
        [144, 168, 56],
    )
