"""Paired comparisons over seeds: differences with intervals, tests, effect size, and Holm's correction over a family.

Runs of one seed share data, order and initial weights, so that arms are compared seed by seed: what a seed does to both
cancels. Nothing here assumes that runs exist for every seed; pairs are formed from the seeds that both arms have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
_RESAMPLES = 10_000


@dataclass(frozen=True)
class PairedComparison:
    """How an arm differs from a reference over the seeds that both have.

    Attributes:
        seeds: Number of pairs n.
        difference: Mean of arm − reference.
        low: Lower end of the 95 % interval of the mean difference, percentile bootstrap over pairs.
        high: Its upper end.
        t_low: The same from Student's t.
        t_high: Its upper end.
        p_t: Two-sided paired t-test.
        p_wilcoxon: Two-sided Wilcoxon signed-rank test, exact up to 50 pairs without ties; with n pairs it cannot be
            below 2^(1 − n).
        cohen_d: Mean difference / standard deviation of the differences (d_z).
        better: Pairs in which the arm is higher.
    """

    seeds: int
    difference: float
    low: float
    high: float
    t_low: float
    t_high: float
    p_t: float
    p_wilcoxon: float
    cohen_d: float
    better: int


def compare_paired(arm: Mapping[int, float], reference: Mapping[int, float]) -> PairedComparison:
    """Compare two arms' results by seed; what needs more pairs than there are is NaN.

    Differences that are all equal have no spread: their interval is the difference itself; the t-test's p is 1 where
    they are 0 and 0 otherwise.

    Args:
        arm: Seed → result; NaN counts as missing.
        reference: The same.
    """
    seeds = [s for s in arm if s in reference and math.isfinite(arm[s]) and math.isfinite(reference[s])]
    differences = np.array([arm[seed] - reference[seed] for seed in seeds], dtype=np.float64)
    n = len(seeds)
    mean = float(differences.mean()) if n else math.nan
    better = int((differences > 0).sum())
    if n < 2:
        nan = math.nan
        return PairedComparison(n, mean, nan, nan, nan, nan, nan, nan, nan, better)
    deviation = float(differences.std(ddof=1))
    # Subtracting nearly equal numbers leaves rounding: a spread below it is none.
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        p, d = (1.0, 0.0) if abs(mean) <= 1e-12 else (0.0, math.copysign(math.inf, mean))
        low, high, t_low, t_high = mean, mean, mean, mean
    else:
        p, d = float(stats.ttest_1samp(differences, 0.0).pvalue), mean / deviation
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)
        t_low, t_high = mean - half, mean + half
        low, high = bootstrap_interval(differences)
    wilcoxon = float(stats.wilcoxon(differences).pvalue) if np.any(differences) else 1.0
    return PairedComparison(n, mean, low, high, t_low, t_high, p, wilcoxon, d, better)


def bootstrap_interval(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over resamples with replacement; the same for the same values."""
    data = np.asarray(values, dtype=np.float64)
    if len(data) < 2:
        return math.nan, math.nan
    draws = np.random.default_rng(seed).integers(len(data), size=(_RESAMPLES, len(data)))
    low, high = np.quantile(data[draws].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for the family they stand in, in their order; NaN stays and does not count.

    The k-th smallest of m is multiplied by m − k + 1, never below its predecessor and never above 1: the chance of any
    false finding in the family stays at the level.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    floor = 0.0
    for position, (p, i) in enumerate(order):
        floor = max(floor, min(1.0, p * (len(order) - position)))
        corrected[i] = floor
    return corrected


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation of the finite values; NaN where there are too few."""
    finite = [value for value in values if math.isfinite(value)]
    mean = float(np.mean(finite)) if finite else math.nan
    return mean, float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan
