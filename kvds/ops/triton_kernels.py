"""The plain Triton kernel: a stage's projection, loss and gradients.

A stage's kernel works on tiles of rows. A *problem* is a set of source layers and heads that is mixed into a set of
target layers and heads; its rows are (token, layer, head). With ``x [BLOCK_X, D_x]`` the source rows of a tile,
``c [BLOCK_Y, BLOCK_X]`` the mixing weights (block diagonal over the tokens of the tile) and ``w [D_x, D_y]``,
everything is a chain of small matrix products that stay on the chip::

    projected = (c @ x) @ w + bias          or, with dims_first,  c @ (x @ w) + bias
    g   = ρ'((projected - t) / scale) / scale
    d_w = (c @ x)ᵀ @ g      d_x = cᵀ @ (g @ wᵀ)      d_c = (g @ wᵀ) @ xᵀ      d_bias = g

A program walks over tiles of one problem and keeps d_c, d_w, d_bias and the loss in fp32 registers; it writes them
once, as its own partial result, so that sums have a fixed order. Arguments are the tuples of kernel_arguments.py;
``F``, a StageForm, says what a kernel is compiled for.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, F: tl.constexpr):
    """``a @ b``."""
    return tl.dot(a, b, input_precision=F.precision, out_dtype=F.wide)


@triton.jit
def dot_to(a, b, sums, F: tl.constexpr):
    """``sums + a @ b``."""
    return tl.dot(a, b, sums, input_precision=F.precision, out_dtype=F.wide)


@triton.jit
def row_places(row_x, row_y, problem, F: tl.constexpr):
    """Where a problem's rows stand among all layers and heads of their sides."""
    member_x = row_x % F.rows_x
    member_y = row_y % F.rows_y
    layer_x = problem // F.head_problems * F.layers_x + member_x // F.heads_x
    layer_y = problem // F.head_problems * F.layers_y + member_y // F.heads_y
    head_problem = problem % F.head_problems
    place_x = layer_x * (F.heads_x * F.head_problems) + head_problem * F.heads_x + member_x % F.heads_x
    place_y = layer_y * (F.heads_y * F.head_problems) + head_problem * F.heads_y + member_y % F.heads_y
    return place_x, place_y


@triton.jit
def first_elements(rows, place, inside, F: tl.constexpr):
    """Pointers ``[BLOCK]`` to where rows start. The addresses are read again for every tile: from the L1 cache they
    cost less than registers."""
    pointer = tl.load(rows.table + place, mask=inside, other=0).to(tl.pointer_type(F.element))
    if F.aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def token_offsets(rows, token, token_first, token_last, positions, FLAT: tl.constexpr):
    """Elements from there to tokens. FLAT: a workspace that holds only the tokens of this launch."""
    if FLAT:
        offset = (token - token_first).to(tl.int64) * rows.token_stride
    else:
        batch = token // positions
        if rows.index is not None:
            position = tl.load(rows.index + token, mask=(token >= token_first) & (token < token_last), other=0)
        else:
            position = (token - batch * positions).to(tl.int64)
        offset = batch.to(tl.int64) * rows.batch_stride + position * rows.token_stride
    return offset


@triton.jit
def kept(mask, token, there):
    """Which tokens count, of those that are there."""
    keep = there
    if mask is not None:
        keep = there & (tl.load(mask + token, mask=there, other=0) != 0)
    return keep


@triton.jit
def _elements(rows, place, inside, offset, F: tl.constexpr):
    """Pointers ``[BLOCK]`` to tokens' first elements."""
    pointer = first_elements(rows, place, inside, F) + offset
    if F.aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _tile_tokens(start, token_first, token_last, row, inside, mask, ROWS: tl.constexpr, F: tl.constexpr):
    """For the rows of the tile that begins at ``start``: their token (one for all where a tile holds one), which rows
    are there, and which count."""
    if F.tokens == 1:
        token = start
        there = (start >= token_first) & (start < token_last)
        present = row < tl.where(there, ROWS, 0)
        keep = present
        if mask is not None:
            counts = tl.load(mask + start, mask=there, other=0) != 0
            keep = row < tl.where(counts, ROWS, 0)
    else:
        token = start + row // ROWS
        present = inside & (token >= token_first) & (token < token_last)
        keep = kept(mask, token, present)
    return token, present, keep


@triton.jit
def _mixing_weights(weights, problem, F: tl.constexpr):
    """``c [BLOCK_Y, BLOCK_X]``: a block for each token of a tile."""
    row_y = tl.arange(0, F.block_y)[:, None]
    row_x = tl.arange(0, F.block_x)[None, :]
    inside = (row_y < F.tokens * F.rows_y) & (row_x < F.tokens * F.rows_x)
    same_token = row_y // F.rows_y == row_x // F.rows_x
    at = row_y % F.rows_y * F.rows_x + row_x % F.rows_x
    return tl.load(weights.mix + problem.to(tl.int64) * weights.mix_stride + at, mask=inside & same_token, other=0)


@triton.jit
def _projecting_weights(weights, problem, F: tl.constexpr):
    """``w [BLOCK_DX, BLOCK_DY]``."""
    dim_x = tl.arange(0, F.block_dx)[:, None]
    dim_y = tl.arange(0, F.block_dy)[None, :]
    at = problem.to(tl.int64) * weights.proj_stride + dim_x * F.dim_y + dim_y
    return tl.load(weights.dim_proj + at, mask=(dim_x < F.dim_x) & (dim_y < F.dim_y), other=0).to(F.element)


@triton.jit
def _penalty(projected, t, keep, inverse, SCALED: tl.constexpr, F: tl.constexpr):
    """ρ of the residual, and its derivative with respect to ``projected``."""
    r = projected - t.to(F.wide)
    if SCALED:
        r = r * inverse
    r = tl.where(keep[:, None], r, 0.0)
    if F.loss == "mse":
        rho = r * r
        g = 2 * r
    elif F.loss == "l1":
        rho = tl.abs(r)
        g = tl.where(r > 0, 1.0, tl.where(r < 0, -1.0, 0.0)).to(F.wide)
    else:
        g = tl.minimum(tl.maximum(r, -1.0), 1.0)
        rho = g * (r - g * 0.5)
    if SCALED:
        g = g * inverse
    return rho, g


@triton.jit
def add_sums(out, sums, token_first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Add ``[ROWS, COLUMNS]`` to a program's sums of the tokens before ``token_first``, if there are any."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    at = out + row * COLUMNS + column
    tl.store(at, sums + tl.load(at, mask=row // ROWS + column * 0 < token_first, other=0))  # row // ROWS is 0


@triton.jit
def _norms(count, valid, elements, layers, F: tl.constexpr):
    """1 / (elements of one layer that count), in the widest type at hand, and what gradients are multiplied with."""
    counted = count
    if valid is not None:
        counted = tl.maximum(tl.load(valid), 1)
    layer_norm = 1 / (counted.to(F.wide) * elements.to(F.wide))
    norm = 1.0
    if F.mode == "loss" and F.normalize:
        norm = layer_norm / layers.to(F.wide)
    return layer_norm, norm


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, WANTED: tl.constexpr, F: tl.constexpr):
    """Sums to begin with; a scalar where they are not wanted."""
    if WANTED:
        sums = tl.full((ROWS, COLUMNS), 0, F.wide)
    else:
        sums = 0
    return sums


@triton.jit
def _inner(c, x, w, F: tl.constexpr):
    """The first product: ``x @ w [BLOCK_X, BLOCK_DY]`` or, without dims_first, ``c @ x [BLOCK_Y, BLOCK_DX]``."""
    if F.dims_first:
        inner = dot(x, w, F).to(F.element)
    elif F.mixes:
        inner = dot(c, x, F).to(F.element)
    else:
        inner = x
    return inner


@triton.jit
def _projected(c, inner, w, weights, place_y, inside_y, dim_y, columns_y, F: tl.constexpr):
    """The second product, and the bias. That is where the accumulators start: it has no registers of its own."""
    if weights.bias is not None:
        bias_at = weights.bias + (place_y * F.dim_y)[:, None] + dim_y
        start_at = tl.load(bias_at, mask=inside_y[:, None] & columns_y, other=0).to(F.wide)
    else:
        start_at = tl.full((F.block_y, F.block_dy), 0, F.wide)
    if F.dims_first:
        projected = dot_to(c, inner, start_at, F)
    elif F.projects:
        projected = dot_to(inner, w, start_at, F)
    else:
        projected = inner.to(F.wide)
    return projected


@triton.jit
def _back(x, inner, g, c, w, d_mix, d_proj, F: tl.constexpr):
    """From the projection's gradient ``g`` to d_mix, d_proj and d_x (a scalar where nobody wants it)."""
    d_x = 0.0
    if F.dims_first:
        if F.mix_grad:
            d_mix = dot_to(g, tl.trans(inner), d_mix, F)
        if F.source_grad or F.proj_grad:
            d_moved = dot(tl.trans(c), g, F).to(F.element)  # [BX, BDY]
            if F.proj_grad:
                d_proj = dot_to(tl.trans(x), d_moved, d_proj, F)
            if F.source_grad:
                d_x = dot(d_moved, tl.trans(w), F)
    else:
        if F.proj_grad:
            d_proj = dot_to(tl.trans(inner), g, d_proj, F)
        if F.source_grad or F.mix_grad:
            d_low = g
            if F.projects:
                d_mixed = dot(g, tl.trans(w), F)  # [BY, BDX]
                d_low = d_mixed.to(F.element)
            if F.mix_grad:
                d_mix = dot_to(d_low, tl.trans(x), d_mix, F)
            if F.source_grad:
                if F.mixes:
                    d_x = dot(tl.trans(c), d_low, F)
                else:
                    d_x = d_mixed
    return d_mix, d_proj, d_x


@triton.jit
def _store_rows(
    rows, place, inside, token, token_first, token_last, positions, value, mask, FLAT: tl.constexpr, F: tl.constexpr
):
    """Write a tile ``[BLOCK, columns]`` of a gradient."""
    at = token_offsets(rows, token, token_first, token_last, positions, FLAT)
    start = _elements(rows, place, inside, at, F)
    dim = tl.arange(0, value.shape[1])[None, :]
    tl.store(start[:, None] + dim, value, mask=mask)


@triton.jit
def _store_sums(out, d_mix, d_proj, d_bias, losses, norm, layer_norm, token_first, F: tl.constexpr):
    """A program's sums, with those of the tokens before."""
    if F.mix_grad:
        add_sums(out, d_mix * norm, token_first, F.block_y, F.block_x)
    if F.proj_grad:
        add_sums(out + F.starts[1], d_proj * norm, token_first, F.block_dx, F.block_dy)
    if F.bias_grad:
        add_sums(out + F.starts[2], d_bias * norm, token_first, F.block_y, F.block_dy)
    if F.mode == "loss":
        row = tl.arange(0, F.block_y)
        at = out + F.starts[3] + row
        tl.store(at, losses * layer_norm + tl.load(at, mask=row // F.block_y < token_first, other=0))


@triton.jit(do_not_specialize=["count", "positions", "token_first", "token_last", "splits", "elements", "layers"])
def map_projection_kernel(
    sides, weights, count, positions, mask, valid, partial,
    token_first, token_last, splits, elements, layers, F: tl.constexpr,
):  # fmt: skip
    """One problem, tiles ``split, split + splits, …``."""
    problem = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    row_x = tl.arange(0, F.block_x)
    row_y = tl.arange(0, F.block_y)
    dim_x = tl.arange(0, F.block_dx)[None, :]
    dim_y = tl.arange(0, F.block_dy)[None, :]
    inside_x = row_x < F.tokens * F.rows_x
    inside_y = row_y < F.tokens * F.rows_y
    columns_x = dim_x < F.dim_x
    columns_y = dim_y < F.dim_y
    place_x, place_y = row_places(row_x, row_y, problem, F)

    c = 0
    w = 0
    if F.mixes:
        c = _mixing_weights(weights, problem, F)
    if F.projects:
        w = _projecting_weights(weights, problem, F)
    inverse = 1.0
    SCALED: tl.constexpr = weights.scale is not None and F.mode == "loss"
    if SCALED:
        inverse = (
            1 / tl.load(weights.scale + place_y // (F.heads_y * F.head_problems), mask=inside_y, other=1).to(F.wide)
        )[:, None]
    layer_norm, norm = _norms(count, valid, elements, layers, F)
    d_mix = _zeros(F.block_y, F.block_x, F.mix_grad, F)
    d_proj = _zeros(F.block_dx, F.block_dy, F.proj_grad, F)
    d_bias = _zeros(F.block_y, F.block_dy, F.bias_grad, F)
    losses = tl.full((F.block_y,), 0, F.wide)
    if F.delayed:
        # A tile's gradients are computed beside the next tile's residual. Products that feed no other within a turn
        # share out their columns among eight warps, which otherwise would repeat each other.
        x_before = tl.full((F.block_x, F.block_dx), 0, F.element)
        inner_before = tl.full((F.block_y, F.block_dx), 0, F.element)
        g_before = tl.full((F.block_y, F.block_dy), 0, F.element)

    tiles = (token_last - token_first + F.tokens - 1) // F.tokens
    for tile in tl.range(split, tiles + splits if F.delayed else tiles, splits, num_stages=F.num_stages):
        start = token_first + tile * F.tokens
        token_x, present_x, keep_x = _tile_tokens(start, token_first, token_last, row_x, inside_x, mask, F.rows_x, F)
        token_y, present_y, keep_y = _tile_tokens(start, token_first, token_last, row_y, inside_y, mask, F.rows_y, F)
        x_at = token_offsets(sides.source, token_x, token_first, token_last, positions, F.source_flat)
        y_at = token_offsets(sides.target, token_y, token_first, token_last, positions, F.target_flat)
        x_rows = _elements(sides.source, place_x, inside_x, x_at, F)
        x = tl.load(x_rows[:, None] + dim_x, mask=keep_x[:, None] & columns_x, other=0)  # [BX, BDX]
        y_rows = _elements(sides.target, place_y, inside_y, y_at, F)
        if F.mode != "store":
            t = tl.load(y_rows[:, None] + dim_y, mask=keep_y[:, None] & columns_y, other=0)  # [BY, BDY]
        inner = _inner(c, x, w, F)
        if F.mode != "given":
            projected = _projected(c, inner, w, weights, place_y, inside_y, dim_y, columns_y, F)
        if F.mode == "store":
            tl.store(y_rows[:, None] + dim_y, projected.to(F.element), mask=present_y[:, None] & columns_y)
        elif F.mode == "given":
            g_low = t
            if F.bias_grad:
                d_bias += t.to(F.wide)
        else:
            rho, g = _penalty(projected, t, keep_y, inverse, SCALED, F)
            losses += tl.sum(rho, axis=1)
            g_low = g.to(F.element)
            if F.bias_grad:
                d_bias += g
            if F.target_grad:
                store_y = keep_y if sides.target.index is not None else present_y
                _store_rows(
                    sides.target_grad, place_y, inside_y, token_y, token_first, token_last, positions,
                    (-g * norm).to(F.element), store_y[:, None] & columns_y, F.target_flat, F,
                )  # fmt: skip
        if F.delayed:
            # What is worked on from here on is the tile before.
            x, x_before = x_before, x
            inner, inner_before = inner_before, inner
            g_low, g_before = g_before, g_low
            token_x, present_x, keep_x = _tile_tokens(
                start - splits * F.tokens, token_first, token_last, row_x, inside_x, mask, F.rows_x, F
            )
        if F.mode != "store":
            d_mix, d_proj, d_x = _back(x, inner, g_low, c, w, d_mix, d_proj, F)
        if F.source_grad:
            store_x = keep_x if sides.source.index is not None else present_x
            _store_rows(
                sides.source_grad, place_x, inside_x, token_x, token_first, token_last, positions,
                (d_x * norm).to(F.element), store_x[:, None] & columns_x, F.source_flat, F,
            )  # fmt: skip

    if F.size > 0:
        out = partial + tl.program_id(0).to(tl.int64) * F.size
        _store_sums(out, d_mix, d_proj, d_bias, losses, norm, layer_norm, token_first, F)
