"""Fit of the layer mix before the maps: which source layers explain each target layer, from sketched joint moments.

A map is linear and so is a mix, so that both can be fitted to moments between all source layers at once. To keep these
small, the rows of a layer are sketched: turned by one random orthonormal projection, the same for all layers, to so
many dimensions that layers × dimensions stay within ``SKETCH``. On them, map and mix are fitted by turns: the map in
closed form given the mix, the mix on the simplex given the map.

A mix is taken where it explains the half of the positions that it was not fitted to better than the mix before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvds.align.aligner_part import AlignerPart
from kvds.align.ridge import ridge_map

SKETCH = 2048  # source layers × dimensions of a sketched row
TARGET_SKETCH = 64
_STRENGTH = 1e-2  # λ while mixes are compared; the maps' own is chosen afterwards
_ROUNDS, _STEPS = 6, 200
FLOOR = 0.02  # of the weight is dealt out to all layers alike, so that each keeps a gradient


def orthonormal(width: int, dimensions: int, seed: int) -> Tensor:
    """``[width, dimensions]`` with orthonormal columns, fp64, the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, dimensions, generator=generator, dtype=torch.float64))[0]


def simplex_minimum(quadratic: Tensor, linear: Tensor, start: Tensor, steps: int = _STEPS) -> Tensor:
    """``argmin wᵀ Q w − 2 cᵀ w`` over weights that sum to 1, by exponentiated gradient from ``start``."""
    weights = start
    rate = 1 / (2 * quadratic.abs().max() + 2 * linear.abs().max()).clamp_min(1e-300)
    for _ in range(steps):
        gradient = 2 * (quadratic @ weights - linear)
        weights = weights * torch.exp(-rate * (gradient - gradient.min()))
        weights = weights / weights.sum()
    return weights


class MixMoments:
    """Sums over positions of the products between sketched rows of all source layers and of all target layers.

    Args:
        part: With a learned layer mix; read for its shapes and head mix.
        seed: Of the sketch.
    """

    def __init__(self, part: AlignerPart, seed: int = 0) -> None:
        self._part = part
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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is summed over ranks."""
        return self.count, self.x, self.y, self.xx, self.xy, self.yy

    def add_rows(self, source: Tensor, target: Tensor, halves: Tensor) -> None:
        """Add positions.

        Args:
            source: ``[L_x, maps, N, width]`` of each source layer, its heads mixed.
            target: ``[L_y, maps, N, width]``.
            halves: ``[N]``, 0 or 1.
        """
        x, y = source.double() @ self._sketch_x, target.double() @ self._sketch_y
        for half in (0, 1):
            kept = (halves == half).double()[:, None]
            self.count[half] += kept.sum()
            left, right = (rows.mul(kept).permute(1, 2, 0, 3) for rows in (x, y))  # [maps, N, L, k]
            self.x[half] += left.sum(1)
            self.y[half] += right.sum(1)
            self.yy[half] += right.square().sum((1, 3))
            left, right = left.flatten(2), right.flatten(2)
            self.xx[half] += left.mT @ left
            self.xy[half] += left.mT @ right

    def covariances(self, halves: list[int]) -> MixCovariances:
        """Of one half, or of both together, each channel around its mean."""
        count = self.count[halves].sum().clamp_min(1)
        x, y = (sums[halves].sum(0) / count for sums in (self.x, self.y))
        flat_x, flat_y = x.flatten(1), y.flatten(1)
        return MixCovariances(
            self.xx[halves].sum(0) / count - flat_x.unsqueeze(2) * flat_x.unsqueeze(1),
            self.xy[halves].sum(0) / count - flat_x.unsqueeze(2) * flat_y.unsqueeze(1),
            self.yy[halves].sum(0) / count - y.square().sum(2),
        )


class MixCovariances:
    """Covariances of sketched rows, by map, layer and dimension.

    Args:
        xx: ``[maps, L_x·k, L_x·k]``.
        xy: ``[maps, L_x·k, L_y·k_y]``.
        yy: ``[maps, L_y]`` sums of variances.
    """

    def __init__(self, xx: Tensor, xy: Tensor, yy: Tensor) -> None:
        self.yy, self._flat = yy, (xx, xy)

    def of_layers(self, layers_x: int) -> tuple[Tensor, Tensor]:
        """``[maps, L_x, k, L_x, k]`` and ``[maps, L_x, k, L_y, k_y]``."""
        xx, xy = self._flat
        size = xx.shape[1] // layers_x
        return (
            xx.view(len(xx), layers_x, size, layers_x, size),
            xy.view(len(xy), layers_x, size, self.yy.shape[1], -1),
        )


class MixFit:
    """Alternation of maps and mixes on one set of covariances.

    Args:
        covariances: As :meth:`MixMoments.covariances` has them.
        allowed: ``[L_y, L_x]`` bool: the source layers that a target layer may draw from.
        shared: Whether one map serves all layers and heads.
    """

    def __init__(self, covariances: MixCovariances, allowed: Tensor, *, shared: bool) -> None:
        self.xx, self.xy = covariances.of_layers(allowed.shape[1])
        self.yy, self.allowed, self.shared = covariances.yy, allowed, shared

    def maps(self, mix: Tensor) -> list[list[Tensor]]:
        """``[L_y][maps]`` maps of sketched rows, in closed form given the mix."""
        pairs = [[self._mixed(mix[i], i, j) for j in range(len(self.xx))] for i in range(len(mix))]
        if not self.shared:
            return [[self._map(*pair) for pair in row] for row in pairs]
        # In a unit of each layer's own, so that no large layer speaks for all.
        every = [pair for row in pairs for pair in row]
        units = [xx.diagonal().mean().clamp_min(1e-300) for xx, _ in every]
        xx = sum((xx / unit for (xx, _), unit in zip(every, units, strict=True)), torch.zeros_like(every[0][0]))
        xy = sum((xy / unit for (_, xy), unit in zip(every, units, strict=True)), torch.zeros_like(every[0][1]))
        one = self._map(xx, xy)
        return [[one] * len(row) for row in pairs]

    def mixes(self, maps: list[list[Tensor]], start: Tensor) -> Tensor:
        """``[L_y, L_x]`` weights given the maps, from ``start``."""
        found = []
        for i, row in enumerate(maps):
            kept = self.allowed[i].nonzero().flatten()
            quadratic, linear = self._forms(i, row, kept)
            weights = torch.zeros_like(start[i])
            weights[kept] = simplex_minimum(quadratic, linear, start[i][kept] / start[i][kept].sum())
            found.append(weights)
        return torch.stack(found)

    def single_layers(self) -> Tensor:
        """``[L_y, L_x]``: all weight on the layer that alone explains most."""
        layers = self.allowed.shape[1]
        left = self.yy.new_full(self.allowed.shape, torch.inf)
        for layer in range(layers):
            only = torch.zeros_like(left)
            only[:, layer] = 1
            rest = self.residuals(only, MixFit.maps(_unshared(self), only))
            left[:, layer] = torch.where(self.allowed[:, layer], rest, left[:, layer])
        weights = torch.zeros_like(left).scatter(1, left.argmin(1, keepdim=True), 1)
        return with_floor(weights, self.allowed)

    def residuals(self, mix: Tensor, maps: list[list[Tensor]]) -> Tensor:
        """``[L_y]`` variance that the maps leave of these positions."""
        left = []
        for i, row in enumerate(maps):
            total = self.yy[:, i].sum()
            for j, weight in enumerate(row):
                xx, xy = self._mixed(mix[i], i, j)
                total = total + (weight * (xx @ weight - 2 * xy)).sum()
            left.append(total)
        return torch.stack(left)

    def alternate(self, start: Tensor) -> Tensor:
        """The mix after some rounds of maps and mixes by turns."""
        mix = start
        for _ in range(_ROUNDS):
            mix = self.mixes(self.maps(mix), with_floor(mix, self.allowed))
        return with_floor(mix, self.allowed)

    def _mixed(self, weights: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
        return (
            torch.einsum("l,lamb,m->ab", weights, self.xx[j], weights),
            torch.einsum("l,lab->ab", weights, self.xy[j, :, :, i]),
        )

    @staticmethod
    def _map(xx: Tensor, xy: Tensor) -> Tensor:
        found = ridge_map(xx, xy, _STRENGTH)
        return torch.zeros_like(xy) if found is None else found

    def _forms(self, i: int, row: list[Tensor], kept: Tensor) -> tuple[Tensor, Tensor]:
        quadratic, linear = self.yy.new_zeros(len(kept), len(kept)), self.yy.new_zeros(len(kept))
        for j, weight in enumerate(row):
            xx = self.xx[j][kept][:, :, kept]
            quadratic += torch.einsum("lamb,ab->lm", xx, weight @ weight.T)
            linear += torch.einsum("lab,ab->l", self.xy[j, kept][:, :, i], weight)
        return quadratic, linear


def _unshared(fit: MixFit) -> MixFit:
    other = object.__new__(MixFit)
    other.xx, other.xy, other.yy, other.allowed, other.shared = fit.xx, fit.xy, fit.yy, fit.allowed, False
    return other


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
    parts = [MixFit(moments.covariances(halves), allowed, shared=shared) for halves in ([0], [1], [0, 1])]

    def candidates(fit: MixFit) -> list[Tensor]:
        return [start, fit.alternate(start), fit.alternate(fit.single_layers())]

    left = torch.zeros(3, len(start), dtype=torch.float64, device=start.device)
    for fitted, judge in ((parts[0], parts[1]), (parts[1], parts[0])):
        left = left + torch.stack([judge.residuals(mix, fitted.maps(mix)) for mix in candidates(fitted)])
    if shared:
        left = (left / parts[2].yy.sum(0).clamp_min(1e-300)).sum(1, keepdim=True).expand_as(left)
    best = left.argmin(0)
    return torch.stack(candidates(parts[2]))[best, torch.arange(len(best), device=best.device)]
