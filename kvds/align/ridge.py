"""Ridge regression from moments: a dimension map in closed form, of the strength that explains held-out rows best.

The rows come in two halves. Maps of every strength are fitted to one and judged on the other, both ways; "no map",
which predicts the mean, is one of the strengths. The strength that leaves least is then fitted to all rows. What a map
is reported to explain is what it explained of the half that it had not seen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvds.errors import InputError

# λ in units of the source's mean variance per channel; infinity is no map at all.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, math.inf)
# A map that explains less of held-out rows is not told from chance, and a weight that makes up for its small gradient
# would be large.
_LEAST_R2 = 0.01
_ATTEMPTS = 12  # each with ten times the jitter of the one before


class Moments(NamedTuple):
    """Means and covariances of source rows ``x`` and target rows ``y``, in fp64.

    Attributes:
        number: Of rows, a scalar.
        x: ``[D_x]`` mean.
        y: ``[D_y]`` mean.
        xx: ``[D_x, D_x]`` covariance.
        xy: ``[D_x, D_y]`` covariance.
        yy: Sum of the targets' variances, a scalar.
    """

    number: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    def residual(self, weight: Tensor | None, trained: Moments) -> Tensor:
        """``Σ ‖(y − mean_y) − (x − mean_x) W‖²`` of these rows around the means of ``trained``; None: no map."""
        shift_x, shift_y = self.x - trained.x, self.y - trained.y
        left = self.yy + shift_y.square().sum()
        if weight is not None:
            xx, xy = self.xx + torch.outer(shift_x, shift_x), self.xy + torch.outer(shift_x, shift_y)
            left = left + (weight * (xx @ weight - 2 * xy)).sum()
        return self.number * left


def ridge_map(xx: Tensor, xy: Tensor, strength: float) -> Tensor | None:
    """``(xx + λ v I)⁻¹ xy`` with ``v`` the mean of ``xx``'s diagonal; None where nothing is to be mapped.

    One matrix at a time, by Cholesky: batched LU fails in MKL with more than one thread. Where rounding has left
    ``xx`` too far from positive definite, λ grows.

    Args:
        xx: ``[D_x, D_x]`` covariance, fp64.
        xy: ``[D_x, D_y]`` covariance, fp64.
        strength: λ; infinity is no map.

    Raises:
        InputError: no λ makes it definite.
    """
    if math.isinf(strength) or not xx.any():
        return None
    variance = xx.diagonal().mean()
    for attempt in range(_ATTEMPTS):
        regular = xx.clone()
        regular.diagonal().add_(strength * 10**attempt * variance)
        factor, fault = torch.linalg.cholesky_ex(regular)
        if fault == 0 and factor.isfinite().all():
            return torch.cholesky_solve(xy, factor)
    raise InputError(
        f"map_start=ridge: the covariance of what a map is applied to ({xx.shape[0]} dimensions, mean variance "
        f"{variance.item():.3g}) has no Cholesky factor; expected states of a finite spread (more "
        "--calibration_batches, or --map_start random)"
    )


def pooled(moments: list[Moments]) -> tuple[Tensor, Tensor]:
    """Means of ``xx`` and of ``xy`` over the uses of one map, each around its own mean."""
    total_xx, total_xy = torch.zeros_like(moments[0].xx), torch.zeros_like(moments[0].xy)
    for each in moments:
        total_xx += each.xx
        total_xy += each.xy
    return total_xx / len(moments), total_xy / len(moments)


def held_out_residuals(halves: tuple[list[Moments], list[Moments]], strengths: tuple[float, ...]) -> Tensor:
    """``[strengths, uses]`` sums of what maps fitted to one half leave of the other, both ways together."""
    left = halves[0][0].xx.new_zeros(len(strengths), len(halves[0]))
    for trained, judged in (halves, halves[::-1]):
        xx, xy = pooled(trained)
        for row, strength in enumerate(strengths):
            weight = ridge_map(xx, xy, strength)
            for use, (one, other) in enumerate(zip(trained, judged, strict=True)):
                left[row, use] += other.residual(weight, one)
    return left


def fit_ridge(
    whole: list[Moments], halves: tuple[list[Moments], list[Moments]], *, may_be_none: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """One map for all its uses.

    Args:
        whole: Moments of all rows, one for each use of the map.
        halves: The same of each half.
        may_be_none: Whether predicting the mean is a choice, made where no map is clearly better; the map is zero then.

    Returns:
        The map ``[D_x, D_y]``, and for each use the squares that it leaves of held-out rows and those that the mean
        leaves, ``[uses]`` each.
    """
    judged = all(half[0].number > 0 for half in halves)
    left = held_out_residuals(halves, STRENGTHS) if judged else whole[0].xx.new_zeros(len(STRENGTHS), len(whole))
    # Of equally good ones the strongest: nothing speaks for more than it.
    totals = left[:-1].sum(1)
    best = len(totals) - 1 - int(totals.flip(0).argmin())
    if may_be_none and not totals[best] < (1 - _LEAST_R2) * left[-1].sum():
        best = len(STRENGTHS) - 1
    weight = ridge_map(*pooled(whole), STRENGTHS[best])
    return torch.zeros_like(whole[0].xy) if weight is None else weight, left[best], left[-1]
