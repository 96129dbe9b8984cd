"""The fused kernel: one pass over source and target for the loss and every gradient (Gluon, compute capability 9.0).

For maps with one ``dim_proj``, at most 64 rows (layers times heads) on either side, and 16-bit states. A program walks
over tokens, with ``x [64, D_x]`` a token's source rows, ``t [64, D_y]`` its target rows, ``c [64, 64]`` the products
of layer and head weights and ``w`` the ``dim_proj``. Roles of four warps each work on different tokens at the same
time, on a ring of stages in shared memory:

* the *loader* copies ``x`` and ``t`` of tokens to come; what the mask hides becomes zeros;
* the *chain* goes through the products that wait for one another, to ``g``, the gradient of the projection (of two
  chains, where registers allow, each takes every other token and goes on to ``back``);
* the *reducer* goes back from there: it adds up gradients of the maps, writes those of the states, and frees the stage.

::

    mix first (D_x ≤ D_y)                         project first (D_x > D_y)
    first = c @ x                                 first = x @ w
    g = ρ'(first @ w + bias − t)                  g = ρ'(c @ first + bias − t)
    back = g @ wᵀ                                 back = cᵀ @ g
    d_c += back @ xᵀ   d_w += firstᵀ @ g          d_c += g @ firstᵀ   d_w += xᵀ @ back
    d_x = cᵀ @ back

All roles walk over the same tokens, hidden ones too, so that none waits for what another leaves out. Each program
writes partial sums of its own: sums have a fixed order.
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
)  # fmt: skip
from kvds.ops.gluon_parts import (
    ROWS,
    SHARED,
    difference,
    gradient_norm,
    inverse_scale,
    is_kept,
    layer_norm,
    mixing_weights,
    operand_layout,
    packed_bias,
    penalty,
    places,
    product_layout,
    row_layout,
    store_projection,
    store_sums,
    store_token,
    token_offset,
)  # fmt: skip
from kvds.ops.kernel_arguments import Tokens

STAGES = gl.constexpr(5)
"""Tokens in flight: what shared memory holds."""


class Ring(NamedTuple):
    """Shared memory of all stages, and the barriers by which roles hand a stage on."""

    x: Any
    t: Any
    first: Any
    back: Any
    loaded: Any
    chained: Any
    free: Any


@gluon.jit
def _ring(F: gl.constexpr):
    """An empty one."""
    X: gl.constexpr = F.dim_x
    Y: gl.constexpr = F.dim_y
    NARROW: gl.constexpr = min(F.dim_x, F.dim_y)
    x = gl.allocate_shared_memory(F.element, [STAGES, ROWS, X], SHARED)
    t = gl.allocate_shared_memory(F.element, [STAGES, ROWS, Y], SHARED)
    first = gl.allocate_shared_memory(F.element, [STAGES, ROWS, NARROW], SHARED)
    KEPT: gl.constexpr = 1 if F.mix_first else STAGES.value  # where the reducer itself makes it, it needs no stages
    back = gl.allocate_shared_memory(F.element, [KEPT, ROWS, NARROW], SHARED)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    chained = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(loaded.index(i), count=128)  # each thread of the loader
        mbarrier.init(chained.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    return Ring(x, t, first, back, loaded, chained, free)


@gluon.jit
def _loader(ring, sides, tokens, programs, F: gl.constexpr):
    turn = 0
    keep = is_kept(tokens, gl.program_id(0))
    for token in range(gl.program_id(0), tokens.slots, programs):
        stage = turn % STAGES
        keep_next = is_kept(tokens, gl.minimum(token + programs, tokens.slots - 1))
        x_at, x_there = places(sides.source, token_offset(sides.source, tokens, token), F.element, F.rows_x, F.dim_x)
        t_at, t_there = places(sides.target, token_offset(sides.target, tokens, token), F.element, F.rows_y, F.dim_y)
        mbarrier.wait(ring.free.index(stage), (turn // STAGES + 1) & 1)
        copy_async(ring.x.index(stage), x_at, mask=(x_there & keep).expand_dims(1))
        copy_async(ring.t.index(stage), t_at, mask=(t_there & keep).expand_dims(1))
        arrive_when_copied(ring.loaded.index(stage), increment_count=False)
        keep = keep_next
        turn += 1


@gluon.jit
def _wait_loaded(ring, turn):
    """Until the stage of a turn holds its token, in the products' eyes too."""
    mbarrier.wait(ring.loaded.index(turn % STAGES), turn // STAGES & 1)
    fence_async_shared()


@gluon.jit
def _hand_on(barriers, stage):
    """What all warps wrote to a stage is there for the next role's products."""
    fence_async_shared()
    barrier()
    mbarrier.arrive(barriers.index(stage), count=1)


@gluon.jit
def _mix_first_chain(ring, w, bias, maps, tokens, programs, out, F: gl.constexpr):
    """Also adds up d_bias, of which it has the summands in fp32."""
    X: gl.constexpr = product_layout(F.dim_x)
    Y: gl.constexpr = product_layout(F.dim_y)
    none_x = gl.full([ROWS, F.dim_x], 0.0, gl.float32, layout=X)
    none_y = gl.full([ROWS, F.dim_y], 0.0, gl.float32, layout=Y)
    c = mixing_weights(maps, F, False)
    inverse = inverse_scale(maps, F)
    losses = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, Y))
    d_bias = gl.full([ROWS, F.dim_y], 0.0, gl.float32, layout=Y)
    turn = 0
    for token in range(gl.program_id(0), tokens.slots, programs):
        stage = turn % STAGES
        unit = gl.where(is_kept(tokens, token), inverse, 0.0)
        _wait_loaded(ring, turn)
        mixed = mma(c, ring.x.index(stage), none_x, use_acc=False, is_async=True)
        mixed = mma_wait(0, deps=[mixed])
        low = mixed.to(F.element)
        ring.first.index(stage).store(low)
        projected = mma(gl.convert_layout(low, operand_layout(F.dim_y)), w, none_y, use_acc=False, is_async=True)
        t = ring.t.index(stage).load(Y)
        projected = mma_wait(0, deps=[projected])
        rho, g = penalty(difference(projected, t, bias, maps, F), unit, F)
        losses += gl.sum(rho, axis=1)
        d_bias += g
        ring.t.index(stage).store(g.to(F.element))
        _hand_on(ring.chained, stage)
        turn += 1
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, Y))
    gl.store(out + F.starts[3] + row, losses * layer_norm(tokens, F))
    store_sums(out + F.starts[2], d_bias * gradient_norm(tokens, F))


@gluon.jit
def _mix_first_reducer(ring, w, maps, tokens, sides, programs, out, F: gl.constexpr):
    X: gl.constexpr = product_layout(F.dim_x)
    norm = gradient_norm(tokens, F)
    c = mixing_weights(maps, F, True)
    none = gl.full([ROWS, F.dim_x], 0.0, gl.float32, layout=X)
    d_proj = gl.full([F.dim_x, F.dim_y], 0.0, gl.float32, layout=product_layout(F.dim_y))
    d_mix = gl.full([ROWS, ROWS], 0.0, gl.float32, layout=product_layout(64))
    turn = 0
    for token in range(gl.program_id(0), tokens.slots, programs):
        stage = turn % STAGES
        mbarrier.wait(ring.chained.index(stage), turn // STAGES & 1)
        g = ring.t.index(stage)
        back = mma(g, w.permute((1, 0)), none, use_acc=False, is_async=True)
        d_proj = mma(ring.first.index(stage).permute((1, 0)), g, d_proj, is_async=True)
        back = mma_wait(1, deps=[back])
        low = back.to(F.element)
        ring.back.index(0).store(low)
        fence_async_shared()
        barrier()
        d_x = mma(c, ring.back.index(0), none, use_acc=False, is_async=True)
        low = gl.convert_layout(low, operand_layout(64))
        d_mix = mma(low, ring.x.index(stage).permute((1, 0)), d_mix, is_async=True)
        if F.target_grad:
            low = (g.load(row_layout(F.dim_y)).to(gl.float32) * -norm).to(F.element)
            store_token(sides.target_grad, sides.target.index, tokens, token, low, F.rows_y, F.dim_y)
        d_x, d_proj, d_mix = mma_wait(0, deps=[d_x, d_proj, d_mix])
        barrier()
        mbarrier.arrive(ring.free.index(stage), count=1)
        if F.source_grad:
            low = (d_x * norm).to(F.element)
            store_token(sides.source_grad, sides.source.index, tokens, token, low, F.rows_x, F.dim_x)
        turn += 1
    store_sums(out, d_mix * norm)
    store_sums(out + F.starts[1], d_proj * norm)


@gluon.jit
def _project_first_chain(ring, w, scratch, maps, tokens, programs, out, FIRST: gl.constexpr, F: gl.constexpr):
    """One of two: takes every other token, from the ``FIRST``."""
    Y: gl.constexpr = product_layout(F.dim_y)
    none = gl.full([ROWS, F.dim_y], 0.0, gl.float32, layout=Y)
    c = mixing_weights(maps, F, False)
    c_back = mixing_weights(maps, F, True)
    bias = packed_bias(maps, scratch, F)
    inverse = inverse_scale(maps, F)
    losses = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, Y))
    turn = 0
    start = gl.program_id(0) + FIRST * programs
    for token in range(start, tokens.slots, 2 * programs):
        stage = (turn + FIRST) % STAGES
        unit = gl.where(is_kept(tokens, token), inverse, 0.0)
        _wait_loaded(ring, turn + FIRST)
        moved = mma(ring.x.index(stage), w, none, use_acc=False, is_async=True)
        t = ring.t.index(stage).load(Y)
        moved = mma_wait(0, deps=[moved])
        ring.first.index(stage).store(moved.to(F.element))
        fence_async_shared()
        barrier()
        projected = mma(c, ring.first.index(stage), none, use_acc=False, is_async=True)
        projected = mma_wait(0, deps=[projected])
        rho, g = penalty(difference(projected, t, bias, maps, F), unit, F)
        losses += gl.sum(rho, axis=1)
        ring.t.index(stage).store(g.to(F.element))
        fence_async_shared()
        barrier()
        back = mma(c_back, ring.t.index(stage), none, use_acc=False, is_async=True)
        back = mma_wait(0, deps=[back])
        ring.back.index(stage).store(back.to(F.element))
        _hand_on(ring.chained, stage)
        turn += 2
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, Y))
    gl.store(out + F.starts[3] + FIRST * 64 + row, losses * layer_norm(tokens, F))


@gluon.jit
def _project_first_reducer(ring, tokens, sides, programs, out, F: gl.constexpr):
    norm = gradient_norm(tokens, F)
    d_proj = gl.full([F.dim_x, F.dim_y], 0.0, gl.float32, layout=product_layout(F.dim_y))
    d_mix = gl.full([ROWS, ROWS], 0.0, gl.float32, layout=product_layout(64))
    d_bias = gl.full([ROWS, F.dim_y], 0.0, gl.float32, layout=row_layout(F.dim_y))
    turn = 0
    for token in range(gl.program_id(0), tokens.slots, programs):
        stage = turn % STAGES
        mbarrier.wait(ring.chained.index(stage), turn // STAGES & 1)
        d_proj = mma(ring.x.index(stage).permute((1, 0)), ring.back.index(stage), d_proj, is_async=True)
        d_mix = mma(ring.t.index(stage), ring.first.index(stage).permute((1, 0)), d_mix, is_async=True)
        g = ring.t.index(stage).load(row_layout(F.dim_y)).to(gl.float32)
        d_bias += g
        if F.target_grad:
            low = (g * -norm).to(F.element)
            store_token(sides.target_grad, sides.target.index, tokens, token, low, F.rows_y, F.dim_y)
        d_proj, d_mix = mma_wait(0, deps=[d_proj, d_mix])
        barrier()
        mbarrier.arrive(ring.free.index(stage), count=1)
        turn += 1
    store_sums(out, d_mix * norm)
    store_sums(out + F.starts[1], d_proj * norm)
    store_sums(out + F.starts[2], d_bias * norm)


@gluon.jit(do_not_specialize=["count", "positions", "programs"])
def fused_kernel(sides, maps, count, positions, mask, valid, partial, programs, F: gl.constexpr):
    """``partial [programs, F.size]``, and the states' gradients. One program per multiprocessor."""
    tokens = Tokens(count, positions, mask, valid)
    ring = _ring(F)
    X: gl.constexpr = F.dim_x
    Y: gl.constexpr = F.dim_y
    w = gl.allocate_shared_memory(F.element, [X, Y], SHARED)
    out = partial + gl.program_id(0).to(gl.int64) * F.size
    # Then warps of each role but the first, and their registers; the first has what they leave.
    if F.mix_first:
        bias = packed_bias(maps, w, F)
        store_projection(maps, w, F)
        gl.warp_specialize(
            [
                (_mix_first_chain, (ring, w, bias, maps, tokens, programs, out, F)),
                (_mix_first_reducer, (ring, w, maps, tokens, sides, programs, out, F)),
                (_loader, (ring, sides, tokens, programs, F)),
            ],
            [4, 4],
            [200, 56],
        )
    else:
        store_projection(maps, w, F)
        gl.warp_specialize(
            [
                (_project_first_chain, (ring, w, ring.first.index(0), maps, tokens, programs, out, 0, F)),
                (_project_first_chain, (ring, w, ring.first.index(1), maps, tokens, programs, out, 1, F)),
                (_project_first_reducer, (ring, tokens, sides, programs, out, F)),
                (_loader, (ring, sides, tokens, programs, F)),
            ],
            [4, 4, 4],
            [144, 168, 56],
        )
