"""Small Triton kernels around the large ones: tokens that count, sums of partial results, their folding, rescaling."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weights_kernel(maps, out, S: tl.constexpr, SPARSE: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """``out [problems, PARTS, rows_y, rows_x]``: products of layer and head weights, with which a Stage ``S`` mixes. A
    second part is what rounding took from the first. SPARSE: layers are weighted by a vector."""
    problem = tl.program_id(0)
    row_y = tl.arange(0, triton.next_power_of_2(S.rows_y))[:, None]
    row_x = tl.arange(0, triton.next_power_of_2(S.rows_x))[None, :]
    there = (row_y < S.rows_y) & (row_x < S.rows_x)
    layer = problem * S.layers_y + row_y // S.heads_y
    if S.kind == "heads":
        c = tl.load(maps.layer_mix + row_y * S.layers_x + row_x, mask=there, other=0).to(WIDE)
    else:
        at = layer * maps.head_stride + row_y % S.heads_y * S.heads_x + row_x % S.heads_x
        c = tl.load(maps.head_mix + at, mask=there, other=0).to(WIDE)
        if SPARSE:
            c *= tl.load(maps.layer_mix + layer, mask=row_y < S.rows_y, other=0).to(WIDE)
        elif S.kind == "dense":
            c *= tl.load(maps.layer_mix + layer * S.layers_x + row_x // S.heads_x, mask=there, other=0).to(WIDE)
    place = out + (problem * PARTS * S.rows_y + row_y) * S.rows_x + row_x
    rounded = c.to(out.dtype.element_ty)
    tl.store(place, rounded, mask=there)
    if PARTS == 2:
        tl.store(place + S.rows_y * S.rows_x, (c - rounded.to(WIDE)).to(out.dtype.element_ty), mask=there)


@triton.jit
def _distance(index, AXES: tl.constexpr):
    """How many problems, and how many elements, a place in a row-major array over axes is away from the first one.

    Fields of an Axis by their places: their names Triton 3.6 does not know here."""
    problems = index * 0
    elements = index * 0
    for k in tl.static_range(len(AXES)):
        step = index % AXES[len(AXES) - 1 - k][0]
        index = index // AXES[len(AXES) - 1 - k][0]
        problems += step * AXES[len(AXES) - 1 - k][1]
        elements += step * AXES[len(AXES) - 1 - k][2]
    return problems, elements


@triton.jit
def _sum(partial, splits, out, block, SUMS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """A block of array K, in a fixed order."""
    S: tl.constexpr = SUMS[K]
    AXES: tl.constexpr = S.axes
    OVER: tl.constexpr = S.over
    place = block * BLOCK + tl.arange(0, BLOCK)
    problem, element = _distance(place, AXES)
    terms = splits * S.terms
    total = tl.zeros((ROWS, BLOCK), partial.dtype.element_ty)
    for start in tl.range(0, terms, ROWS):
        term = start + tl.arange(0, ROWS)
        further, beside = _distance(term // splits, OVER)
        program = (problem[None, :] + further[:, None]) * splits + (term % splits)[:, None]
        at = program.to(tl.int64) * S.size + (S.start + element)[None, :] + beside[:, None]
        there = (term < terms)[:, None] & (place < S.count)[None, :]
        total += tl.load(partial + at, mask=there, other=0)
    tl.store(out + S.at + place, tl.sum(total, axis=0), mask=place < S.count)


@triton.jit(do_not_specialize=["splits_0", "splits_1", "splits_2"])
def sum_kernel(
    partials, splits_0, splits_1, splits_2, out, SUMS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Every array of ``SUMS`` out of the sums that each program of up to three launches left in ``partials[stage]
    [problems, splits, size]``. A program for each block of each array."""
    program = tl.program_id(0)
    first = 0
    for k in tl.static_range(len(SUMS)):
        splits = splits_0 if SUMS[k].stage == 0 else (splits_1 if SUMS[k].stage == 1 else splits_2)
        if (program >= first) & (program < first + (SUMS[k].count + BLOCK - 1) // BLOCK):
            _sum(partials[SUMS[k].stage], splits, out, program - first, SUMS, k, BLOCK, ROWS)
        first += (SUMS[k].count + BLOCK - 1) // BLOCK


@triton.jit
def scale_kernel(buffers, sizes, factor, BLOCK: tl.constexpr):
    """``buffer *= factor`` in place, of each; a factor of 1, known only on the device, costs no traffic."""
    by = tl.load(factor)
    if by != 1:
        program = tl.program_id(0).to(tl.int64)
        for k in tl.static_range(len(buffers)):
            for start in tl.range(program * BLOCK, sizes[k], tl.num_programs(0) * BLOCK):
                at = start + tl.arange(0, BLOCK)
                value = tl.load(buffers[k] + at, mask=at < sizes[k])
                tl.store(buffers[k] + at, (value * by).to(buffers[k].dtype.element_ty), mask=at < sizes[k])


@triton.jit(do_not_specialize=["size"])
def count_kernel(mask, count, size, BLOCK: tl.constexpr):
    """How many of ``size`` are True: one program, which is done before a sum of several launches would begin."""
    total = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(mask + at, mask=at < size, other=0).to(tl.int32)
    tl.store(count, tl.sum(total, 0).to(tl.int64))


@triton.jit(do_not_specialize=["count"])
def fold_kernel(
    sums, maps, count, valid, losses, loss, F: tl.constexpr,
    HEADS: tl.constexpr, LAYERS: tl.constexpr, SOURCE_HEADS: tl.constexpr,
):  # fmt: skip
    """From arrays of ``sums`` (see FoldForm): gradients of both mixing weights, to their places there, and losses, per
    layer with 1 / (elements that count), which gradients that are not normalised lack, in ``losses [L_y + 1]``, their
    mean in ``loss``.

    Program i takes target layer i; one more takes what all layers share. HEADS, LAYERS, SOURCE_HEADS: H_y, L_x, H_x
    rounded up to powers of two.
    """
    WIDE: tl.constexpr = sums.dtype.element_ty
    layer = tl.program_id(0)
    if F.d_mix is not None:
        j = tl.arange(0, HEADS)[:, None, None]
        source_layer = tl.arange(0, LAYERS)[None, :, None]
        h = tl.arange(0, SOURCE_HEADS)[None, None, :]
        there = (j < F.heads_y) & (source_layer < F.layers_x) & (h < F.heads_x)
        of_layer: tl.constexpr = F.heads_y * F.layers_x * F.heads_x
        d_mix_at = sums + F.d_mix + (j * F.layers_x + source_layer) * F.heads_x + h  # of layer 0
        head_at = j * F.heads_x + h
        head_there = (j < F.heads_y) & (h < F.heads_x)
        weight_at = maps.layer_mix + source_layer
        if layer < F.layers_y:
            d_mix = tl.load(d_mix_at + layer * of_layer, mask=there, other=0)
            heads = tl.load(maps.head_mix + layer * maps.head_stride + head_at, mask=head_there, other=0).to(WIDE)
            at = layer * F.layers_x + tl.arange(0, LAYERS)
            d_layers = tl.sum(tl.sum(d_mix * heads, 2), 0)
            tl.store(sums + F.layer_mix + at, d_layers, mask=tl.arange(0, LAYERS) < F.layers_x)
            if F.own_heads:
                weight = tl.load(weight_at + layer * F.layers_x, mask=source_layer < F.layers_x, other=0).to(WIDE)
                d_heads = tl.sum(d_mix * weight, 1, keep_dims=True)
                tl.store(sums + F.head_mix + layer * (F.heads_y * F.heads_x) + head_at, d_heads, mask=head_there)
        elif not F.own_heads:
            d_all = tl.full((HEADS, LAYERS, SOURCE_HEADS), 0, WIDE)
            for i in range(F.layers_y):
                weight = tl.load(weight_at + i * F.layers_x, mask=source_layer < F.layers_x, other=0).to(WIDE)
                d_all += tl.load(d_mix_at + i * of_layer, mask=there, other=0) * weight
            tl.store(sums + F.head_mix + head_at, tl.sum(d_all, 1, keep_dims=True), mask=head_there)
    if F.losses is not None:
        if layer < F.layers_y:
            tl.store(losses + layer, tl.load(sums + F.losses + layer))
        else:
            counted = count
            if valid is not None:
                counted = tl.maximum(tl.load(valid), 1)
            total = tl.load(sums + F.losses)
            for i in range(1, F.layers_y):
                total += tl.load(sums + F.losses + i)
            tl.store(loss, total / F.layers_y)
            tl.store(losses + F.layers_y, 1 / (counted.to(WIDE) * (F.elements * F.layers_y)))
