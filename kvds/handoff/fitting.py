"""The closed-form fit of a cache map: ridge regression, of the strength that predicts held-out texts best.

Source channels are in units of their standard deviation, so that one strength means the same for all of them. Each
student layer has its own strength; it is chosen by what a map fitted to one half of the texts leaves of the other, both
ways, and the layer is then fitted to all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvds.align.ridge import Moments, ridge_map
from kvds.errors import InputError
from kvds.handoff.cache_map import CacheMap
from kvds.handoff.moments import LayerGroup, MapMoments, of_layer
from kvds.kv.states import KV_PARTS

STRENGTHS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""λ in units of the source's mean variance per channel."""

Strengths = dict[str, list[float]]
"""Part → λ of each student layer."""


@dataclass(frozen=True)
class MapFit:
    """What a fit found, per part and student layer.

    Attributes:
        r2: Part → of held-out texts, the share of the student's variance that the map explains.
        strengths: Part → the λ chosen.
        rows: Tokens fitted to.
        tried: The λ that there were to choose from.
        explained: Part → per layer ``r2`` with each of ``tried``.
        used: Candidate → nats per token of held-out answers that were written from it; empty where prediction chose.
    """

    r2: dict[str, list[float]]
    strengths: Strengths
    rows: int
    tried: tuple[float, ...] = ()
    explained: dict[str, list[list[float]]] = field(default_factory=dict)
    used: dict[str, float] = field(default_factory=dict)

    @property
    def mean_r2(self) -> dict[str, float]:
        """Part → mean over layers."""
        return {part: sum(values) / len(values) for part, values in self.r2.items()}

    @property
    def by_use(self) -> list[str]:
        """Candidates of ``used``, the one that serves best first, the predicted one of equals; last those that give no
        finite number.
        """
        return sorted(self.used, key=lambda name: self.used[name] if math.isfinite(self.used[name]) else math.inf)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        found = {"r2": self.r2, "strengths": self.strengths, "rows": self.rows}
        return found | ({"used": self.used} if self.used else {})


@torch.no_grad()
def fit_map(
    cache_map: CacheMap,
    moments: MapMoments,
    strengths: tuple[float, ...] = STRENGTHS,
    *,
    remedy: str = "--rows 2 or more",
) -> MapFit:
    """Write the fitted weights into ``cache_map``.

    Args:
        cache_map: Of the shapes that the moments were taken for.
        moments: Of all rows.
        strengths: To choose from.
        remedy: For messages: what gives more texts.

    Raises:
        InputError: fewer than two texts were added, or a strength is none.
    """
    if bad := [strength for strength in strengths if not 0 < strength < math.inf]:
        raise InputError(f"--ridge {bad[0]}: expected strengths above 0, such as 1e-4")
    if not strengths or 0 in moments.rows:
        raise InputError(
            f"handoff: {sum(moments.rows)} tokens to fit a map to, {min(moments.rows)} of them to judge it by; "
            f"expected at least two prompts, which texts alone do not have ({remedy})"
        )
    explained = {
        part: [layer for group in groups for layer in _explained(group, strengths)]
        for part, groups in moments.groups.items()
    }
    chosen = {part: [_best(layer) for layer in layers] for part, layers in explained.items()}
    r2 = {part: [layer[i] for layer, i in zip(explained[part], chosen[part], strict=True)] for part in KV_PARTS}
    taken = {part: [strengths[i] for i in numbers] for part, numbers in chosen.items()}
    write_fit(cache_map, moments, taken, half=None)
    return MapFit(r2, taken, sum(moments.rows), tuple(strengths), explained)


def _best(r2: list[float]) -> int:
    """Of equally good ones the strongest: nothing speaks for more than it."""
    return max(range(len(r2)), key=lambda i: (r2[i], i))


def _explained(group: LayerGroup, strengths: tuple[float, ...]) -> list[list[float]]:
    """For each layer, R² with each strength of the half that its map was not fitted to, both ways."""
    unit = group.deviation
    halves = [group.moments(half, unit) for half in (0, 1)]
    columns = [slice(i * group.width, (i + 1) * group.width) for i in range(len(group.layers))]
    left = unit.new_zeros(len(strengths), len(columns))
    of_mean = unit.new_zeros(len(columns))
    for trained, judged in (halves, halves[::-1]):
        of_mean += torch.stack([of_layer(judged, place).residual(None, of_layer(trained, place)) for place in columns])
        for row, strength in enumerate(strengths):
            weight = _solved(trained, strength)
            for i, place in enumerate(columns):
                left[row, i] += of_layer(judged, place).residual(weight[:, place], of_layer(trained, place))
    r2 = torch.where(of_mean > 0, 1 - left / of_mean.clamp_min(1e-300), 0.0)
    return r2.T.tolist()


@torch.no_grad()
def write_fit(cache_map: CacheMap, moments: MapMoments, strengths: Strengths, *, half: int | None) -> None:
    """Write the weights that solve the regression of one half of the texts, or of all, with given strengths.

    Args:
        cache_map: Written to.
        moments: Of the texts.
        strengths: Of each layer.
        half: 0 or 1; None: all texts.
    """
    for part, groups in moments.groups.items():
        for group in groups:
            unit = group.deviation
            sums = group.moments(half, unit)
            wanted = [strengths[part][layer] for layer in group.layers]
            for strength in sorted(set(wanted)):
                weight = _solved(sums, strength)
                for place, layer in enumerate(group.layers):
                    if wanted[place] == strength:
                        columns = slice(place * group.width, (place + 1) * group.width)
                        mine = weight[:, columns] / unit[:, None]
                        cache_map.weight(part)[layer] = mine.to(cache_map.weight(part))
                        offset = sums.y[columns] - (sums.x * unit) @ mine
                        cache_map.bias(part)[layer] = offset.to(cache_map.bias(part))


def _solved(moments: Moments, strength: float) -> Tensor:
    weight = ridge_map(moments.xx, moments.xy, strength)
    return torch.zeros_like(moments.xy) if weight is None else weight
