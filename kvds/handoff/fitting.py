"""The closed-form fit of a cache map: ridge regression, of the strength that explains held-out texts best.

Source channels are in units of their standard deviation, so that one strength means the same for all of them. Each
student layer has its own strength; it is chosen by what a map fitted to one half of the texts leaves of the other, both
ways, and the layer is then fitted to all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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


@dataclass(frozen=True)
class MapFit:
    """What a fit found, per part and student layer.

    Attributes:
        r2: Part → of held-out texts, the share of the student's variance that the map explains.
        strengths: Part → the λ chosen.
        rows: Tokens fitted to.
    """

    r2: dict[str, list[float]]
    strengths: dict[str, list[float]]
    rows: int

    @property
    def mean_r2(self) -> dict[str, float]:
        """Part → mean over layers."""
        return {part: sum(values) / len(values) for part, values in self.r2.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"r2": self.r2, "strengths": self.strengths, "rows": self.rows}


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
    found = MapFit({part: [] for part in KV_PARTS}, {part: [] for part in KV_PARTS}, sum(moments.rows))
    for part, groups in moments.groups.items():
        for group in groups:
            _fit_group(cache_map, part, group, strengths, found)
    return found


def _fit_group(cache_map: CacheMap, part: str, group: LayerGroup, strengths: tuple[float, ...], found: MapFit) -> None:
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
    # Of equally good ones the strongest: nothing speaks for more than it.
    best = len(strengths) - 1 - left.flip(0).argmin(0)
    r2 = 1 - left.gather(0, best[None])[0] / of_mean.clamp_min(1e-300)
    whole = group.moments(None, unit)
    for row in sorted(set(best.tolist())):
        weight = _solved(whole, strengths[row])
        for i, layer in enumerate(group.layers):
            if int(best[i]) == row:
                mine = weight[:, columns[i]] / unit[:, None]
                cache_map.weight(part)[layer] = mine.to(cache_map.weight(part))
                offset = whole.y[columns[i]] - (whole.x * unit) @ mine
                cache_map.bias(part)[layer] = offset.to(cache_map.bias(part))
    found.r2[part] += torch.where(of_mean > 0, r2, torch.zeros_like(r2)).tolist()
    found.strengths[part] += [strengths[row] for row in best.tolist()]


def _solved(moments: Moments, strength: float) -> Tensor:
    weight = ridge_map(moments.xx, moments.xy, strength)
    return torch.zeros_like(moments.xy) if weight is None else weight
