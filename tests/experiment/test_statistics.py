"""Paired statistics against values computed by hand or by another way."""

import math

import numpy as np
import pytest

from kvds.experiment.statistics import bootstrap_interval, compare_paired, holm, mean_and_deviation


def test_paired_comparison_by_hand():
    # Differences 1, 2, 3: mean 2, standard deviation 1, t = 2 / (1 / sqrt 3) = 3.4641 with 2 degrees of freedom.
    result = compare_paired({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert (result.seeds, result.difference, result.cohen_d, result.better) == (3, 2.0, 2.0, 3)
    # With 2 degrees of freedom P(|T| > t) = 1 − t / sqrt(t² + 2).
    t = 2 * math.sqrt(3)
    assert result.p_t == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-9)
    # The 97.5 % quantile with 2 degrees of freedom: u sqrt(2 / (1 − u²)), u = 0.95.
    quantile = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    assert (result.t_low, result.t_high) == pytest.approx((2 - quantile / math.sqrt(3), 2 + quantile / math.sqrt(3)))
    # All three signs equal: 2 of the 8 equally likely patterns are as extreme.
    assert result.p_wilcoxon == pytest.approx(0.25)
    # The mean of three draws with replacement is 1 or 3 with chance 1/27 > 2.5 % each.
    assert (result.low, result.high) == pytest.approx((1.0, 3.0))


def test_wilcoxon_by_counting_sign_patterns():
    # Signed ranks −1, +2, +3, +4, +5 (W = 1): of 32 patterns {} and {1} have a sum of at most 1, twice for two sides.
    arm = dict(enumerate([-0.1, 0.2, 0.3, 0.4, 0.5]))
    assert compare_paired(arm, dict.fromkeys(range(5), 0.0)).p_wilcoxon == pytest.approx(4 / 32)


def test_pairs_are_the_seeds_that_both_have():
    result = compare_paired({0: 1.0, 1: 5.0, 2: math.nan, 3: 2.0}, {1: 4.0, 2: 0.0, 3: 0.0, 9: 7.0})
    assert (result.seeds, result.difference) == (2, 1.5)
    alone = compare_paired({0: 3.0}, {0: 1.0})
    assert (alone.seeds, alone.difference) == (1, 2.0) and math.isnan(alone.p_t) and math.isnan(alone.low)
    assert compare_paired({0: 1.0}, {1: 1.0}).seeds == 0


def test_no_spread():
    same = compare_paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert (same.p_t, same.p_wilcoxon, same.cohen_d, same.low, same.high) == (1.0, 1.0, 0.0, 0.0, 0.0)
    shifted = compare_paired({0: 1.1, 1: 2.1, 2: 3.1}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert shifted.p_t == 0.0 and shifted.cohen_d == math.inf


def test_bootstrap_interval_is_that_of_the_mean_and_repeatable():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=200)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap_interval(values) == (low, high)
    assert all(map(math.isnan, bootstrap_interval([1.0])))


def test_holm_by_hand():
    # Sorted .01 · 4, .02 · 3, .03 · 2, .04 · 1 = .04, .06, .06, .04 → never below the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    corrected = holm([0.6, math.nan, 0.7])
    assert corrected[0] == 1.0 and math.isnan(corrected[1]) and corrected[2] == 1.0
    assert holm([]) == []


def test_mean_and_deviation_leave_out_what_is_missing():
    assert mean_and_deviation([1.0, math.nan, 3.0]) == pytest.approx((2.0, math.sqrt(2)))
    mean, deviation = mean_and_deviation([5.0])
    assert mean == 5.0 and math.isnan(deviation)
    assert all(map(math.isnan, mean_and_deviation([])))
