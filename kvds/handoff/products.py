"""Products of a cache map: for each student layer one, of the teacher layers that it reads side by side.

The fused operation weighs heads and layers by numbers and projects the mixture; a cache map gives each of the ``S ·
H_t`` heads that a student layer reads a matrix of its own. The two are the same where what a layer reads stands in one
head of at most 128 dimensions, and what it gets in another: then one launch maps all layers. Beyond that it would take
``S · H_t · D_t / 128`` launches, each of which writes all results, to be read again and added: for Qwen2 1.5B → 0.5B
with 4 source layers 8, and 307 KB per token (bf16, keys and values) where 41 have to be moved.

There the layers are laid side by side once, so that what a student layer reads is a view of them, and layers whose
views move on evenly are one batched product: 193 KB, of which 98 are views that overlap. What bounds it is work, not
bytes: 12.6 MFLOP for 41 KB are 307 per byte, and an H200 has about 200. Only with one or two source layers can bytes be
the bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvds.errors import InputError
from kvds.ops import map_projection
from kvds.ops.map_projection import IMPLEMENTATIONS
from kvds.ops.triton_plan import MAX_DIM, unsupported

BATCHED = "batched"


class Run(NamedTuple):
    """Student layers ``begin`` to ``end``, each of which reads from ``step`` teacher layers later on than the last."""

    begin: int
    end: int
    step: int


def even_runs(sources: Sequence[Sequence[int]]) -> Iterator[Run]:
    """The longest runs from the first layer on."""
    begin = 0
    while begin < len(sources):
        end = begin + 1
        step = max(0, sources[end][0] - sources[begin][0]) if end < len(sources) else 0
        while end < len(sources) and sources[end][0] == sources[end - 1][0] + step:
            end += 1
        yield Run(begin, end, step)
        begin = end


def map_layers(
    layers: Sequence[Tensor],
    sources: Sequence[Sequence[int]],
    weight: Tensor,
    bias: Tensor,
    heads: int,
    *,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Keys or values through the products of a map; arguments as the attributes of :class:`CacheMap`.

    Args:
        layers: Per teacher layer ``[B, H_t, T, D_t]``.
        sources: For each student layer the teacher layers that it reads, equally many.
        weight: ``[L_s, S · H_t · D_t, H_s · D_s]``, rounded to the dtype of the layers.
        bias: ``[L_s, H_s · D_s]``.
        heads: ``H_s``.
        impl: ``"auto"``: the fused operation on a GPU where its kernel takes 16-bit states of this shape, else batched
            products; ``"batched"``; or an implementation of :func:`kvds.ops.map_projection`.

    Returns:
        Per student layer ``[B, H_s, T, D_s]``.

    Raises:
        InputError: an unknown ``impl``, or ``"triton"`` for what it cannot take.
    """
    if impl not in ("auto", BATCHED, *IMPLEMENTATIONS):
        raise InputError(f"impl={impl}: expected auto, {BATCHED}, or one of {', '.join(IMPLEMENTATIONS)}")
    rows = [heads_side_by_side(layer) for layer in layers]
    weight, bias = weight.to(rows[0].dtype), bias.to(rows[0].dtype)
    joined = _Joined.of(rows, sources)
    if joined is not None:
        views = [joined.columns(some[0], some[-1]) for some in sources]
    else:
        views = [rows[some[0]] if len(some) == 1 else torch.cat([rows[i] for i in some], -1) for some in sources]
    if impl == BATCHED or (impl == "auto" and not _fits_the_kernel(views, bias.shape[1])):
        if joined is not None:
            mapped = joined.mapped(sources, weight, bias)
        else:
            mapped = [F.linear(view, weight[i].T, bias[i]) for i, view in enumerate(views)]
    else:
        ones = weight.new_ones(len(sources))
        source = [view.unsqueeze(1) for view in views]
        out = map_projection(source, ones, ones[:1, None], weight, bias=bias[:, None], impl=impl)
        mapped = [layer.squeeze(1) for layer in out.unbind(0)]
    return tuple(layer.unflatten(-1, (heads, -1)).transpose(1, 2) for layer in mapped)


def heads_side_by_side(layer: Tensor) -> Tensor:
    """``[B, H, T, D]`` → ``[B, T, H · D]``; of captured states a view."""
    return layer.transpose(1, 2).flatten(2)


def _fits_the_kernel(views: Sequence[Tensor], width: int) -> bool:
    """Whether all layers are one launch of the fused operation's forward."""
    first = views[0]
    if not first.is_cuda or first.dtype.itemsize != 2 or max(first.shape[-1], width) > MAX_DIM:
        return False
    source = [view.unsqueeze(1) for view in views]
    return unsupported(source, None, (first.shape[-1], width), (1, 1), len(views)) is None


class _Joined(NamedTuple):
    """Teacher layers side by side from layer ``first`` on, ``[B, T, layers · width]``."""

    rows: Tensor
    first: int
    width: int

    @classmethod
    def of(cls, rows: Sequence[Tensor], sources: Sequence[Sequence[int]]) -> _Joined | None:
        """Those that are read; None where each is read alone, as it lies, or where some do not stand side by side."""
        apart = any(list(some) != list(range(some[0], some[0] + len(some))) for some in sources)
        if len(sources[0]) == 1 or apart:
            return None
        first, last = min(some[0] for some in sources), max(some[-1] for some in sources)
        return cls(torch.cat(list(rows[first : last + 1]), -1), first, rows[0].shape[-1])

    def columns(self, begin: int, last: int) -> Tensor:
        """Of layers ``begin`` to ``last``, a view."""
        return self.rows[..., (begin - self.first) * self.width : (last + 1 - self.first) * self.width]

    def mapped(self, sources: Sequence[Sequence[int]], weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Per student layer ``[B, T, w_s]``, a product per run."""
        found: list[Tensor] = []
        for begin, end, step in even_runs(sources):
            if end - begin == 1:
                found.append(
                    F.linear(self.columns(sources[begin][0], sources[begin][-1]), weight[begin].T, bias[begin])
                )
                continue
            flat = self.columns(sources[begin][0], sources[end - 1][-1]).flatten(0, 1)  # [N, columns]
            size = len(sources[begin]) * self.width
            views = (
                flat.unfold(1, size, step * self.width).transpose(0, 1) if step else flat.expand(end - begin, -1, -1)
            )
            out = torch.baddbmm(bias[begin:end, None], views, weight[begin:end])  # [layers, N, w_s]
            found += [layer.unflatten(0, self.rows.shape[:2]) for layer in out.unbind(0)]
        return found
