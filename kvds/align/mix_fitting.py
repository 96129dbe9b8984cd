"""Fit of the layer mix before the maps: which source layers explain each target layer, from sketched joint moments.

A map is linear and so is a mix, so that both can be fitted to moments between all source layers at once. To keep these
small, the rows of a layer are sketched: turned by one random orthonormal projection, the same for all layers, to so
many dimensions that layers × dimensions stay within ``SKETCH``. On them, map and mix are fitted by turns: the map in
closed form given the mix, the mix on the simplex given the map.

A mix is taken where it explains the half of the positions that it was not fitted to better than the mix before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvds.align.aligner import KVAligner
from kvds.align.aligner_part import AlignerPart
from kvds.align.fitting import CHUNK, FitPass, PartSums
from kvds.align.ridge import ridge_map

SKETCH = 1024  # source layers × dimensions of a sketched row
TARGET_SKETCH = 64
_STRENGTH = 1e-2  # λ while mixes are compared; the maps' own is chosen afterwards
_ROUNDS, _STEPS = 6, 200
FLOOR = 0.02  # of the weight is dealt out to all layers alike, so that each keeps a gradient


def orthonormal(width: int, dimensions: int, seed: int) -> Tensor:
    """``[width, dimensions]`` with orthonormal columns, fp64, the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, dimensions, generator=generator, dtype=torch.float64))[0]


def simplex_minimum(quadratic: Tensor, linear: Tensor, start: Tensor, steps: int = _STEPS) -> Tensor:
    """``argmin wᵀ Q w − 2 cᵀ w`` over weights that sum to 1, by exponentiated gradient from ``start``; where that is 0,
    it stays 0.

    Args:
        quadratic: ``[…, L, L]``.
        linear: ``[…, L]``.
        start: ``[…, L]``, rows that sum to 1.
        steps: Of the descent.
    """
    weights, seen = start, start > 0
    largest = [side.abs().flatten(linear.dim() - 1).max(-1, keepdim=True).values for side in (quadratic, linear)]
    rate = 1 / (2 * largest[0] + 2 * largest[1]).clamp_min(1e-300)
    for _ in range(steps):
        gradient = 2 * ((quadratic @ weights.unsqueeze(-1)).squeeze(-1) - linear)
        least = gradient.masked_fill(~seen, torch.inf).min(-1, keepdim=True).values
        weights = weights * torch.exp(-rate * (gradient - least).masked_fill(~seen, 0))
        weights = weights / weights.sum(-1, keepdim=True)
    return weights


class MixMoments(PartSums):
    """Sums over positions of the products between sketched rows of all source layers and of all target layers.

    Args:
        part: With a learned layer mix; read for its shapes and head mix.
        seed: Of the sketch.
    """

    def __init__(self, part: AlignerPart, seed: int = 0) -> None:
        super().__init__(part)
        self.maps, width_x, width_y = part.map_shape
        layers_x, layers_y = part.source_shape.num_hidden_layers, part.num_targets
        device = part.target_scale.device
        size_x, size_y = max(1, min(width_x, SKETCH // layers_x)), min(width_y, TARGET_SKETCH)
        self._sketch_x = orthonormal(width_x, size_x, seed).to(device)
        self._sketch_y = orthonormal(width_y, size_y, seed + 1).to(device)
        self.count = torch.zeros(2, dtype=torch.float64, device=device)
        self.x = self.count.new_zeros(2, self.maps, layers_x, size_x)
        self.y = self.count.new_zeros(2, self.maps, layers_y, size_y)
        self.xx = self.count.new_zeros(2, self.maps, layers_x * size_x, layers_x * size_x)
        self.xy = self.count.new_zeros(2, self.maps, layers_x * size_x, layers_y * size_y)
        self.yy = self.count.new_zeros(2, self.maps, layers_y)

    def add_states(self, source: Tensor, target: Tensor, halves: Tensor, weights: Tensor | None = None) -> None:
        """As of :class:`PartSums`."""
        weights = self.count.new_ones(len(halves)) if weights is None else weights.to(self.count)
        chunks = (source.split(CHUNK, 1), target.split(CHUNK, 1), halves.split(CHUNK), weights.split(CHUNK))
        for x, y, places, counts in zip(*chunks, strict=True):
            rows = self._part.layer_rows(x.double()), self._part.target_rows(y.double())
            self.add_rows(*rows, places, counts)

    def apply(self) -> None:
        """Write the mix into the part."""
        part = self._part
        if not all(bool(tensor.isfinite().all()) for tensor in self.tensors):
            return  # told of by the fit of the maps
        # On the CPU: thousands of small products.
        self.count, self.x, self.y, self.xx, self.xy, self.yy = (tensor.cpu() for tensor in self.tensors)
        start = part.layer_mix().cpu()
        assert part.projection is not None
        mix = fit_mix(self, start, start > 0, shared=part.projection.dim() == 2)
        part.set_layer_mix(mix.to(part.source_scale.device))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is summed over ranks."""
        return self.count, self.x, self.y, self.xx, self.xy, self.yy

    def add_rows(self, source: Tensor, target: Tensor, halves: Tensor, weights: Tensor | float = 1.0) -> None:
        """Add positions.

        Args:
            source: ``[L_x, maps, N, width]`` of each source layer, its heads mixed.
            target: ``[L_y, maps, N, width]``.
            halves: ``[N]``, 0 or 1.
            weights: ``[N]``, how much each counts.
        """
        x, y = source.double() @ self._sketch_x, target.double() @ self._sketch_y
        for half in (0, 1):
            kept = (halves == half).double() * weights
            self.count[half] += kept.sum()
            root = kept.sqrt()[:, None]
            left, right = (rows.mul(root).permute(1, 2, 0, 3) for rows in (x, y))  # [maps, N, L, k]
            self.x[half] += left.mul(root[..., None]).sum(1)
            self.y[half] += right.mul(root[..., None]).sum(1)
            self.yy[half] += right.square().sum((1, 3))
            left, right = left.flatten(2), right.flatten(2)
            self.xx[half] += left.mT @ left
            self.xy[half] += left.mT @ right

    def target_scale(self) -> Tensor:
        """``[L_y]`` root of what each target layer varies by, over all positions; 1 if by nothing."""
        varied = self.covariances([0, 1]).yy.sum(0)
        return torch.where(varied > 0, varied, torch.ones_like(varied)).sqrt()

    def covariances(self, halves: list[int], unit: Tensor | None = None) -> MixCovariances:
        """Of one half, or of both together, each channel around its mean; target layers in their ``unit`` ``[L_y]``."""
        if unit is None:
            unit = self.yy.new_ones(self.yy.shape[-1])
        count = self.count[halves].sum().clamp_min(1)
        x, y = (sums[halves].sum(0) / count for sums in (self.x, self.y))
        flat_x, flat_y = x.flatten(1), y.flatten(1)
        return MixCovariances(
            self.xx[halves].sum(0) / count - flat_x.unsqueeze(2) * flat_x.unsqueeze(1),
            (self.xy[halves].sum(0) / count - flat_x.unsqueeze(2) * flat_y.unsqueeze(1))
            / unit.repeat_interleave(y.shape[-1]),
            (self.yy[halves].sum(0) / count - y.square().sum(2)) / unit.square(),
        )


class MixCovariances(NamedTuple):
    """Covariances of sketched rows, by map, layer and dimension.

    Attributes:
        xx: ``[maps, L_x·k, L_x·k]``.
        xy: ``[maps, L_x·k, L_y·k_y]``.
        yy: ``[maps, L_y]`` sums of variances.
    """

    xx: Tensor
    xy: Tensor
    yy: Tensor


class MixFit:
    """Alternation of maps and mixes on one set of covariances.

    Args:
        covariances: As :meth:`MixMoments.covariances` has them.
        allowed: ``[L_y, L_x]`` bool: the source layers that a target layer may draw from.
        shared: Whether one map serves all layers and heads.
    """

    def __init__(self, covariances: MixCovariances, allowed: Tensor, *, shared: bool) -> None:
        self.allowed, self.shared, self.yy = allowed, shared, covariances.yy
        (maps, wide, _), (layers_y, layers_x) = covariances.xx.shape, allowed.shape
        self._size, size_y = wide // layers_x, covariances.xy.shape[2] // layers_y
        # Pairs of source layers in rows, so that a mix of all target layers is one product.
        xx = covariances.xx.view(maps, layers_x, self._size, layers_x, self._size)
        self._xx = xx.transpose(2, 3).reshape(maps, layers_x**2, self._size**2)
        xy = covariances.xy.view(maps, layers_x, self._size, layers_y, size_y)
        self._xy = xy.permute(0, 3, 1, 2, 4).reshape(maps, layers_y, layers_x, self._size * size_y)

    def mixed(self, mix: Tensor) -> tuple[Tensor, Tensor]:
        """``[maps, L_y, k, k]`` and ``[maps, L_y, k, k_y]``: the covariances of mixed source rows."""
        pairs = (mix[:, :, None] * mix[:, None, :]).flatten(1)  # [L_y, L_x²]
        xx = (pairs @ self._xx).unflatten(2, (self._size, self._size))
        xy = (mix[:, None] @ self._xy).squeeze(2)
        return xx, xy.unflatten(2, (self._size, -1))

    def maps(self, mix: Tensor) -> Tensor:
        """``[maps, L_y, k, k_y]`` maps of sketched rows, in closed form given the mix."""
        return self._solved(*self.mixed(mix))

    def _solved(self, xx: Tensor, xy: Tensor) -> Tensor:
        if not self.shared:
            return _each_map(xx, xy)
        # One map of rows in a unit of each layer's own, as the aligner has it.
        unit = xx.diagonal(dim1=2, dim2=3).mean((0, 2)).clamp_min(1e-300).sqrt()[:, None, None]
        one = _map((xx / unit.square()).sum((0, 1)), (xy / unit).sum((0, 1)))
        return (one / unit).expand_as(xy)

    def mixes(self, maps: Tensor, start: Tensor) -> Tensor:
        """``[L_y, L_x]`` weights given the maps, from ``start``."""
        layers = self.allowed.shape[1]
        gram = (maps @ maps.mT).flatten(2)  # [maps, L_y, k²]
        quadratic = (gram @ self._xx.mT).sum(0).view(-1, layers, layers)
        linear = (self._xy @ maps.flatten(2).unsqueeze(-1)).sum(0).squeeze(-1)
        return simplex_minimum(quadratic, linear, start)

    def single_layers(self) -> Tensor:
        """``[L_y, L_x]``: all weight on the layer that alone explains most, each target layer with a map of its own."""
        left = []
        for layer in range(self.allowed.shape[1]):
            only = torch.zeros(self.allowed.shape, dtype=self.yy.dtype)
            only[:, layer] = 1
            xx, xy = self.mixed(only)
            left.append(self._left(xx, xy, _each_map(xx, xy)))
        found = torch.stack(left, 1).masked_fill(~self.allowed, torch.inf)
        return with_floor(torch.zeros_like(found).scatter(1, found.argmin(1, keepdim=True), 1), self.allowed)

    def residuals(self, mix: Tensor, maps: Tensor) -> Tensor:
        """``[L_y]`` variance that the maps leave of these positions."""
        return self._left(*self.mixed(mix), maps)

    def _left(self, xx: Tensor, xy: Tensor, maps: Tensor) -> Tensor:
        return (self.yy + (maps * (xx @ maps - 2 * xy)).sum((2, 3))).sum(0)

    def alternate(self, start: Tensor) -> Tensor:
        """The mix after some rounds of maps and mixes by turns."""
        mix = start
        for _ in range(_ROUNDS):
            mix = self.mixes(self.maps(mix), with_floor(mix, self.allowed))
        return with_floor(mix, self.allowed)


def _map(xx: Tensor, xy: Tensor) -> Tensor:
    found = ridge_map(xx, xy, _STRENGTH)
    return torch.zeros_like(xy) if found is None else found


def _each_map(xx: Tensor, xy: Tensor) -> Tensor:
    """One after the other, see :func:`kvds.align.ridge.ridge_map`."""
    found = [_map(*pair) for pair in zip(xx.flatten(0, 1), xy.flatten(0, 1), strict=True)]
    return torch.stack(found).view_as(xy)


def with_floor(mix: Tensor, allowed: Tensor) -> Tensor:
    """``mix`` with ``FLOOR`` of the weight dealt out to all layers that are allowed."""
    even = allowed.to(mix) / allowed.sum(1, keepdim=True)
    return (1 - FLOOR) * mix + FLOOR * even


def fit_mix(moments: MixMoments, start: Tensor, allowed: Tensor, *, shared: bool) -> Tensor:
    """The layer mix of a part: of several starts the one that explains held-out positions best, or ``start`` itself.

    Args:
        moments: Reduced over ranks.
        start: ``[L_y, L_x]`` the mix as it is.
        allowed: ``[L_y, L_x]`` bool.
        shared: Whether one map serves all layers and heads: then all target layers take the same way.
    """
    start = start.double()
    if not bool((moments.count > 0).all()):
        return start
    unit = moments.target_scale()
    parts = [MixFit(moments.covariances(halves, unit), allowed, shared=shared) for halves in ([0], [1], [0, 1])]

    def candidates(fit: MixFit) -> list[Tensor]:
        return [start, fit.alternate(start), fit.alternate(fit.single_layers())]

    left = torch.zeros(3, len(start), dtype=torch.float64, device=start.device)
    for fitted, judge in ((parts[0], parts[1]), (parts[1], parts[0])):
        left = left + torch.stack([judge.residuals(mix, fitted.maps(mix)) for mix in candidates(fitted)])
    if shared:
        left = (left / parts[2].yy.sum(0).clamp_min(1e-300)).sum(1, keepdim=True).expand_as(left)
    best = left.argmin(0)
    return torch.stack(candidates(parts[2]))[best, torch.arange(len(best), device=best.device)]


class MixFitting(FitPass[MixMoments]):
    """First pass of a fit, where a learned layer mix is to be found: ``update`` per batch, ``reduce`` over ranks,
    ``apply`` once.

    Args:
        aligner: Whole (not sharded), on the device of the states.
    """

    def __init__(self, aligner: KVAligner) -> None:
        fitted = aligner.settings.map_start == "ridge"
        parts = {name: part for name, part in aligner.named_parts().items() if fitted and part.layer_logits is not None}
        super().__init__(aligner, {name: MixMoments(part) for name, part in parts.items()})

    @torch.no_grad()
    def apply(self) -> None:
        """Write the mixes into the aligner, where held-out positions speak for them."""
        for moments in self.parts.values():
            moments.apply()
