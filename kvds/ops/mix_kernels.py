"""Mixing of layers or heads as launches of their own, and the way back, where they do not fit beside the projection.

A problem's rows are its (layer, head) pairs; columns are (token, dimension) pairs of a tile of tokens, so that
``mixed [rows_y, columns] = c @ x [rows_x, columns]``, and back ``d_c += d_mixed @ xᵀ``, ``d_x = cᵀ @ d_mixed``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvds.ops.triton_kernels import add_sums, dot, dot_to, first_elements, kept, row_places, token_offsets


@triton.jit
def _weights(weights, problem, PART: tl.constexpr, F: tl.constexpr):
    """``c [BLOCK_Y, BLOCK_X]``; part 1 is what rounding took from part 0."""
    row_y = tl.arange(0, F.block_y)[:, None]
    row_x = tl.arange(0, F.block_x)[None, :]
    at = weights.mix + problem.to(tl.int64) * weights.mix_stride + (row_y + PART * F.rows_y) * F.rows_x + row_x
    return tl.load(at, mask=(row_y < F.rows_y) & (row_x < F.rows_x), other=0)


@triton.jit
def _columns(start, token_first, token_last, mask, F: tl.constexpr):
    """Of a tile, for each column: its token, its dimension, whether it is there, and whether it counts."""
    column = tl.arange(0, F.tokens * F.block_dx)
    token = start + column // F.block_dx
    dim = column % F.block_dx
    there = (token < token_last) & (dim < F.dim_x)
    return token, dim, there, kept(mask, token, there)


@triton.jit
def _tile(rows, places, inside, token, dim, token_first, token_last, positions, FLAT: tl.constexpr, F: tl.constexpr):
    """Pointers ``[BLOCK, columns]``."""
    at = token_offsets(rows, token, token_first, token_last, positions, FLAT) + dim
    if F.aligned:  # of positions that were read a tile ahead the compiler no longer knows it
        SIXTEEN_BYTES: tl.constexpr = 128 // F.element.primitive_bitwidth
        at = tl.max_contiguous(tl.multiple_of(at, SIXTEEN_BYTES), SIXTEEN_BYTES)
    return first_elements(rows, places, inside, F)[:, None] + at[None, :]


@triton.jit(do_not_specialize=["positions", "token_first", "token_last", "splits"])
def mix_kernel(sides, weights, positions, mask, token_first, token_last, splits, F: tl.constexpr):
    """From source to target: one problem, tiles ``split, split + splits, …``."""
    problem = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    row_x = tl.arange(0, F.block_x)
    row_y = tl.arange(0, F.block_y)
    places_x, places_y = row_places(row_x, row_y, problem, F)
    c = _weights(weights, problem, 0, F)
    if F.mix_parts == 2:
        c_rest = _weights(weights, problem, 1, F)
    inside_x = row_x < F.rows_x
    inside_y = row_y < F.rows_y
    tiles = (token_last - token_first + F.tokens - 1) // F.tokens
    for tile in tl.range(split, tiles, splits, num_stages=F.num_stages):
        token, dim, there, keep = _columns(token_first + tile * F.tokens, token_first, token_last, mask, F)
        x_at = _tile(sides.source, places_x, inside_x, token, dim, token_first, token_last, positions, F.source_flat, F)
        x = tl.load(x_at, mask=inside_x[:, None] & keep[None, :], other=0)
        mixed = dot(c, x, F)
        if F.mix_parts == 2:
            mixed = dot_to(c_rest, x, mixed, F)
        y_at = _tile(sides.target, places_y, inside_y, token, dim, token_first, token_last, positions, F.target_flat, F)
        tl.store(y_at, mixed.to(F.element), mask=inside_y[:, None] & there[None, :])


@triton.jit(do_not_specialize=["positions", "token_first", "token_last", "splits"])
def unmix_kernel(sides, weights, positions, mask, partial, token_first, token_last, splits, F: tl.constexpr):
    """From the target's gradient, which stands in its place, to the source's and to that of ``c``."""
    problem = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    row_x = tl.arange(0, F.block_x)
    row_y = tl.arange(0, F.block_y)
    places_x, places_y = row_places(row_x, row_y, problem, F)
    c = _weights(weights, problem, 0, F)
    if F.mix_parts == 2:
        c_rest = _weights(weights, problem, 1, F)
    inside_x = row_x < F.rows_x
    inside_y = row_y < F.rows_y
    d_mix = tl.full((F.block_y, F.block_x), 0, F.wide)
    tiles = (token_last - token_first + F.tokens - 1) // F.tokens
    for tile in tl.range(split, tiles, splits, num_stages=F.num_stages):
        token, dim, there, keep = _columns(token_first + tile * F.tokens, token_first, token_last, mask, F)
        y_at = _tile(sides.target, places_y, inside_y, token, dim, token_first, token_last, positions, F.target_flat, F)
        d_mixed = tl.load(y_at, mask=inside_y[:, None] & keep[None, :], other=0)
        if F.mix_grad:
            x_at = _tile(
                sides.source, places_x, inside_x, token, dim, token_first, token_last, positions, F.source_flat, F
            )
            x = tl.load(x_at, mask=inside_x[:, None] & keep[None, :], other=0)
            d_mix = dot_to(d_mixed, tl.trans(x), d_mix, F)
        if F.source_grad:
            d_x = dot(tl.trans(c), d_mixed, F)
            if F.mix_parts == 2:
                d_x = dot_to(tl.trans(c_rest), d_mixed, d_x, F)
            dx_at = _tile(
                sides.source_grad, places_x, inside_x, token, dim, token_first, token_last, positions, F.source_flat, F
            )
            store_x = keep if sides.source.index is not None else there
            tl.store(dx_at, d_x.to(F.element), mask=inside_x[:, None] & store_x[None, :])
    if F.mix_grad:
        out = partial + tl.program_id(0).to(tl.int64) * F.size
        add_sums(out, d_mix, token_first, F.block_y, F.block_x)
