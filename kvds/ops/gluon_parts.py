"""What the Gluon kernels share: how states are addressed, register layouts, the residual's penalty, partial sums."""

from __future__ import annotations

from kvds.ops.gluon_names import barrier, fence_async_shared, gl, gluon

ROWS = gl.constexpr(64)
"""Rows of a tile: what one product of a group of four warps takes."""


@gluon.constexpr_function
def product_layout(columns):
    """Registers of a 64-row product of four warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def operand_layout(columns):
    """Registers of the left operand of such a product."""
    return gl.DotOperandLayout(0, product_layout(columns), 2)


@gluon.constexpr_function
def row_layout(dim):
    """Registers of rows on their way from or to memory: 16 bytes a thread, whole rows side by side."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def unpacking(element):
    """PTX that makes two 32-bit floats of a register that holds two of 16 bits."""
    kind = "bf16" if element == gl.bfloat16 else "f16"
    return f"{{.reg .b16 a, b; mov.b32 {{a, b}}, $2; cvt.f32.{kind} $0, a; cvt.f32.{kind} $1, b;}}"


SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
"""Tiles as products read them."""


@gluon.jit
def token_offset(rows, tokens, token):
    """Elements from the start of a (layer, head) row to a token, or to each of several."""
    batch = token // tokens.positions
    position = (token - batch * tokens.positions).to(gl.int64)
    if rows.index is not None:
        position = gl.load(rows.index + token)
    return batch.to(gl.int64) * rows.batch_stride + position * rows.token_stride


@gluon.jit
def is_kept(tokens, token):
    """Whether a token counts."""
    kept = token >= 0
    if tokens.mask is not None:
        kept = gl.load(tokens.mask + token)
    return kept


@gluon.jit
def places(rows, offset, E: gl.constexpr, COUNT: gl.constexpr, DIM: gl.constexpr):
    """Pointers ``[64, DIM]`` to a token's rows, and which rows there are. The table is read anew for every token: from
    the L1 cache it costs less than registers."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout(DIM)))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, row_layout(DIM)))
    start = gl.load(rows.table + row, mask=row < COUNT, other=0).to(gl.pointer_type(E)) + offset
    return gl.multiple_of(start, (16,)).expand_dims(1) + dim.expand_dims(0), row < COUNT


@gluon.jit
def store_token(rows, index, tokens, token, value, COUNT: gl.constexpr, DIM: gl.constexpr):
    """Write a gradient ``[64, DIM]``. A position that an index leaves out, or gives a hidden slot, keeps its zeros."""
    at, there = places(rows, token_offset(rows, tokens, token), value.dtype, COUNT, DIM)
    if index is not None:
        there = there & is_kept(tokens, token)
    gl.store(at, gl.convert_layout(value, row_layout(DIM)), mask=there.expand_dims(1))


@gluon.jit
def mixing_weights(maps, F: gl.constexpr, TRANSPOSED: gl.constexpr):
    """``c [64, 64]``, or ``cᵀ``, as a left operand: ``c[(i,j), (l,h)] = layer_mix[i,l] · head_mix[(i,)j,h]``."""
    OPERAND: gl.constexpr = operand_layout(64)
    first = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OPERAND)).expand_dims(1)
    second = gl.arange(0, ROWS, layout=gl.SliceLayout(0, OPERAND)).expand_dims(0)
    y = second if TRANSPOSED else first
    x = first if TRANSPOSED else second
    there = (y < F.rows_y) & (x < F.rows_x)
    layer, source_layer = y // F.heads_y, x // F.heads_x
    head_at = layer * maps.head_stride + y % F.heads_y * F.heads_x + x % F.heads_x
    layers = gl.load(maps.layer_mix + layer * F.layers_x + source_layer, mask=there, other=0).to(gl.float32)
    heads = gl.load(maps.head_mix + head_at, mask=there, other=0).to(gl.float32)
    return (layers * heads).to(F.element)


@gluon.jit
def store_projection(maps, w, F: gl.constexpr):
    """``dim_proj [D_x, D_y]`` in shared memory, for the products of all roles."""
    row = gl.arange(0, F.dim_x, layout=gl.SliceLayout(1, row_layout(F.dim_y))).expand_dims(1)
    dim = gl.arange(0, F.dim_y, layout=gl.SliceLayout(0, row_layout(F.dim_y))).expand_dims(0)
    w.store(gl.load(maps.dim_proj + row * F.dim_y + dim).to(F.element))
    fence_async_shared()
    barrier()


@gluon.jit
def packed_bias(maps, scratch, F: gl.constexpr):
    """``[64, D_y / 2]`` in the residual's registers, two neighbours in each: alone they would take one each. They come
    in pairs by way of ``scratch``, shared memory ``[64, D_y]`` that nobody uses yet."""
    bias = 0
    if maps.bias is not None:
        COLUMNS: gl.constexpr = F.dim_y
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout(COLUMNS))).expand_dims(1)
        dim = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, row_layout(COLUMNS))).expand_dims(0)
        scratch.store(gl.load(maps.bias + row * COLUMNS + dim, mask=row < F.rows_y, other=0).to(F.element))
        barrier()
        pairs = gl.reshape(scratch.load(product_layout(COLUMNS)), [ROWS, COLUMNS // 2, 2])
        low, high = gl.split(pairs)
        bias = gl.inline_asm_elementwise("mov.b32 $0, {$1, $2};", "=r,h,h", [low, high], gl.int32, is_pure=True, pack=1)
        barrier()
    return bias


@gluon.jit
def difference(projected, t, bias, maps, F: gl.constexpr):
    """``projected + bias − t``."""
    t = t.to(gl.float32)
    if maps.bias is not None:
        ASM: gl.constexpr = unpacking(F.element)
        # Not pure: moved out of the loop the unpacked bias would fill twice the registers.
        low, high = gl.inline_asm_elementwise(ASM, "=r,=r,r", [bias], (gl.float32, gl.float32), is_pure=False, pack=1)
        COLUMNS: gl.constexpr = F.dim_y
        wide = gl.reshape(gl.join(low, high), [ROWS, COLUMNS])
        t = t - gl.convert_layout(wide, product_layout(COLUMNS), assert_trivial=True)
    return projected - t


@gluon.jit
def inverse_scale(maps, F: gl.constexpr):
    """1 / scale of each row ``[64]``."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, product_layout(F.dim_y)))
    inverse = gl.full([ROWS], 1.0, gl.float32, layout=gl.SliceLayout(1, product_layout(F.dim_y)))
    if maps.scale is not None:
        inverse = 1 / gl.load(maps.scale + row // F.heads_y, mask=row < F.rows_y, other=1).to(gl.float32)
    return inverse


@gluon.jit
def penalty(apart, unit, F: gl.constexpr):
    """ρ(apart · unit) and its derivative with respect to ``apart``, for a ``unit`` per row; both 0 where that is."""
    unit = unit.expand_dims(1)
    r = apart * unit
    if F.loss == "mse":
        rho = r * r
        g = r * (2 * unit)
    elif F.loss == "l1":
        rho = gl.abs(r)
        g = gl.where(r > 0, unit, gl.where(r < 0, -unit, 0.0))
    else:
        slope = gl.minimum(gl.maximum(r, -1.0), 1.0)
        rho = slope * (r - slope * 0.5)
        g = slope * unit
    return rho, g


@gluon.jit
def layer_norm(tokens, F: gl.constexpr):
    """1 / (elements of one layer that count)."""
    counted = tokens.slots
    if tokens.valid is not None:
        counted = gl.maximum(gl.load(tokens.valid), 1)
    return 1 / (counted.to(gl.float32) * (F.heads_y * F.dim_y))


@gluon.jit
def gradient_norm(tokens, F: gl.constexpr):
    """What gradients are multiplied with: all but fp16's, which would lose them."""
    norm = 1.0
    if F.normalize:
        norm = layer_norm(tokens, F) / F.layers_y
    return norm


@gluon.jit
def store_sums(out, sums):
    """Write ``[rows, columns]`` of a program's sums."""
    row = gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, sums.type.layout)).expand_dims(1)
    column = gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, sums.type.layout)).expand_dims(0)
    gl.store(out + row * sums.shape[1] + column, sums)
