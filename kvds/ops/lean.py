"""The operation in chunks of tokens: for training on a CPU, and for shapes that no kernel takes.

Per chunk: gather the positions, mix layers and heads, project, compare, and go the same way back, so that gradients
are computed on the way forward. Nothing of the size of the projected tensor ever exists. The FLOPs per token are the
oracle's; the passes over memory between the products are folded into them where ρ allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvds.ops.gradients import LossProblem, Result, Wanted
from kvds.ops.mixing import ChunkMixing
from kvds.ops.reference import penalty

# Elements of the widest intermediate of a chunk: cache-sized on a CPU, wide enough to fill a GPU there.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
# Below this many slots, samples share a chunk.
SHORT_SAMPLE = 64


@dataclass(frozen=True)
class Chunk:
    """Samples and slots that are worked on at once.

    Attributes:
        samples: Which of the batch, ``nb`` of them.
        source, target: Positions: a slice for all of them, or int64 ``[nb, n]``.
        keep: ``[nb·n]`` bool, or None = all count.
        weight: ``[nb·n]`` factors of their penalties, or None = 1.
        tokens: ``nb·n``.
    """

    samples: slice
    source: slice | Tensor
    target: slice | Tensor
    keep: Tensor | None
    weight: Tensor | None
    tokens: int


def _chunks(problem: LossProblem, size: int) -> Iterator[Chunk]:
    """At most ``size`` tokens each (or one short sample)."""
    batch, _, length, _ = problem.source[0].shape
    mask, indices, weight = problem.mask, (problem.source_index, problem.target_index), problem.weight
    slots = length if indices[0] is None else indices[0].shape[1]
    if slots == 0:
        return
    if mask is not None and not mask.is_cuda and slots >= SHORT_SAMPLE:
        # Reading the mask is free here: padding is left out, not multiplied by zero.
        for b in range(batch):
            valid = mask[b].nonzero()[:, 0]
            for part in valid.split(size):
                source, target = (part if i is None else i[b, part] for i in indices)
                factors = None if weight is None else weight[b, part]
                yield Chunk(slice(b, b + 1), source[None], target[None], None, factors, part.numel())
        return
    together = max(1, min(batch, size // slots))
    for b in range(0, batch, together):
        samples = slice(b, min(b + together, batch))
        for start in range(0, slots, size):
            part = slice(start, min(start + size, slots))
            source, target = (part if i is None else i[samples, part] for i in indices)
            keep = None if mask is None else mask[samples, part].reshape(-1)
            factors = None if weight is None else weight[samples, part].reshape(-1)
            yield Chunk(samples, source, target, keep, factors, (samples.stop - b) * (part.stop - start))


def _expanded(where: Tensor, like: Tensor) -> Tensor:
    """Positions ``[nb, n]`` as an index into dimension 2 of ``[nb, H, T, D]``."""
    return where[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def _gather(states: Sequence[Tensor], chunk: Chunk, where: slice | Tensor, out: Tensor, minus: Tensor | None) -> None:
    """``out [L, H, tokens, D]`` = the chunk of ``states`` less ``minus [L, H, 1, 1, D]``; 0 where it does not count."""
    for i, layer in enumerate(states):
        rows = layer.detach()[chunk.samples]
        if isinstance(where, slice):
            picked = rows[:, :, where]
        elif len(where) == 1:
            picked = rows[:, :, where[0]]
        else:
            picked = rows.gather(2, _expanded(where, rows))
        picked = picked.transpose(0, 1)
        into = out[i].view(picked.shape)
        if minus is None:
            into.copy_(picked)
        else:
            torch.sub(picked, minus[i], out=into)
    if chunk.keep is not None:
        out.masked_fill_(~chunk.keep[:, None], 0)


def _scatter(
    gradients: Sequence[Tensor], chunk: Chunk, where: slice | Tensor, values: Tensor, adds: bool = False
) -> None:
    """Put ``values [L, H, tokens, D]`` in place; positions, or with ``adds`` layers, that come twice add up."""
    for layer, rows in zip(gradients, values, strict=True):
        into = layer[chunk.samples]
        rows = rows.view(into.shape[1], into.shape[0], -1, into.shape[3]).transpose(0, 1).to(layer.dtype)
        if isinstance(where, Tensor):
            if len(where) == 1:
                into.index_add_(2, where[0], rows)
            else:
                into.scatter_add_(2, _expanded(where, into), rows)
        elif adds:
            into[:, :, where] += rows
        else:
            into[:, :, where] = rows


def _slope(residual: Tensor, loss: str) -> Tensor:
    """ρ'(residual) over ``residual`` itself, without the 2 of a square, which the caller's constant holds."""
    if loss == "l1":
        return residual.sign_()
    return residual.clamp_(-1, 1) if loss == "smooth_l1" else residual


def compute_lean(problem: LossProblem, wanted: Wanted) -> Result:
    """Losses and the wanted gradients in one pass over chunks of tokens. bf16 and fp16 are computed in fp32."""
    low = problem.source[0].dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if low else problem.source[0].dtype
    mixing = ChunkMixing(problem, dtype, wanted)
    layers_y, heads_y, heads_x = mixing.heads.shape
    target = problem.target
    read = problem.source_layers()
    source = [problem.source[i] for i in read]
    (batch, _, length, dim_x), dim_y = source[0].shape, target[0].shape[3]
    rows = layers_y * heads_y
    weight = problem.dim_proj.detach().to(dtype)
    shared = weight.dim() == 2
    if not shared:
        weight = weight.view(layers_y, -1, dim_x, dim_y).expand(-1, heads_y, -1, -1).reshape(rows, dim_x, dim_y)
    bias = None if problem.bias is None else problem.bias.detach().to(dtype)[:, :, None, None]

    slots = length if problem.source_index is None else problem.source_index.shape[1]
    valid = weight.new_full((), batch * slots) if problem.mask is None else problem.mask.sum().to(dtype)
    count = (valid * (heads_y * dim_y)).clamp_min(1)
    inverse = weight.new_ones(layers_y) if problem.scale is None else problem.scale.detach().to(dtype).reciprocal()
    # Residuals stay unscaled where ρ is homogeneous: the scale then enters one constant per layer.
    scaled = problem.loss == "smooth_l1" and problem.scale is not None
    slope_unit = {"mse": 2 * inverse.square(), "l1": inverse, "smooth_l1": inverse}[problem.loss] / (count * layers_y)
    loss_unit = {"mse": inverse.square(), "l1": inverse, "smooth_l1": torch.ones_like(inverse)}[problem.loss] / count
    per_layer_unit = slope_unit.view(-1, 1, 1, 1)
    back = weight if shared else (weight.view(layers_y, -1, dim_x, dim_y) * per_layer_unit).view(weight.shape)

    sizes = {
        "source": (len(source), heads_x, dim_x),
        "mixed": (layers_y, heads_y, dim_x),
        "residual": (layers_y, heads_y, dim_y),
    }
    if mixing.staged:
        sizes["between"] = (layers_y, heads_x, dim_x)
    widths = {name: layers * heads * dim for name, (layers, heads, dim) in sizes.items()}
    size = max(16, CHUNK_ELEMENTS.get(weight.device.type, 1 << 25) // max(widths.values()))
    memory = {name: weight.new_empty(width * min(size, batch * slots)) for name, width in widths.items()}

    sums = weight.new_zeros(layers_y)
    d_weight = torch.zeros_like(weight) if wanted.dim_proj else None
    d_bias = weight.new_zeros(layers_y, heads_y, dim_y) if wanted.bias else None
    d_source = [torch.zeros_like(layer, requires_grad=False) for layer in problem.source] if wanted.source else None
    d_target = [torch.zeros_like(layer, requires_grad=False) for layer in target] if wanted.target else None

    for chunk in _chunks(problem, size):
        n = chunk.tokens
        views = {name: memory[name][: widths[name] * n].view(*sizes[name][:2], n, sizes[name][2]) for name in sizes}
        x, mixed, residual, between = views["source"], views["mixed"], views["residual"], views.get("between")
        _gather(source, chunk, chunk.source, x, None)
        _gather(target, chunk, chunk.target, residual, bias)
        mixing.forward(x, between, mixed)
        flat_mixed, flat_residual = (mixed.view(-1, dim_x), residual.view(-1, dim_y))
        if shared:
            flat_residual.addmm_(flat_mixed, weight, beta=-1)
        else:
            flat_mixed, flat_residual = mixed.view(rows, n, dim_x), residual.view(rows, n, dim_y)
            flat_residual.baddbmm_(flat_mixed, weight, beta=-1)
        if scaled:
            residual.mul_(inverse.view(-1, 1, 1, 1))
        factors = None if chunk.weight is None else chunk.weight.to(dtype)[:, None]
        if factors is not None:
            sums += (penalty(residual, problem.loss) * factors).view(layers_y, -1).sum(1)
        elif problem.loss == "mse":
            sums += torch.linalg.vector_norm(residual.view(layers_y, -1), dim=1).square()
        else:
            sums += penalty(residual.view(layers_y, -1), problem.loss).sum(1)
        if not wanted.any:
            continue

        _slope(residual, problem.loss)
        if factors is not None:
            residual.mul_(factors)
        if shared:
            residual.mul_(per_layer_unit)
        if d_bias is not None:
            d_bias += residual.sum(2)
        if d_weight is not None:
            (d_weight.addmm_ if shared else d_weight.baddbmm_)(flat_mixed.mT, flat_residual)
        if wanted.through_projection:
            (torch.mm if shared else torch.bmm)(flat_residual, back.mT, out=flat_mixed)
            d_x = mixing.backward(x, between, mixed)
            if d_source is not None:
                _scatter([d_source[i] for i in read], chunk, chunk.source, d_x, adds=problem.sparse)
        if d_target is not None:
            residual.mul_(-1 if shared else -per_layer_unit)
            _scatter(d_target, chunk, chunk.target, residual)

    if not shared:  # the constant that the products above left to the end
        for gradient in (d_bias, d_weight):
            if gradient is not None:
                gradient.view(layers_y, -1).mul_(slope_unit[:, None])
    per_layer = sums * loss_unit
    gradients = mixing.gradients() | {"dim_proj": d_weight, "bias": d_bias}
    return Result(per_layer.mean(), per_layer, d_source, d_target, problem.fold(gradients))
