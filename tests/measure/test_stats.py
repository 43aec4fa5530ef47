"""Statistics against closed forms and scipy, and their behaviour with a single seed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from labs_lib.measure import (
    Estimate,
    bootstrap_ci,
    mean_ci,
    paired_difference,
    paired_tost,
    spearman,
    steps_to_threshold,
    wilson_ci,
)
from labs_lib.measure.stats import smooth

moderate = st.floats(-1e3, 1e3)


def test_mean_ci_is_the_t_interval():
    # by hand: mean 3, s = sqrt(2.5), t(0.975, 4) = 2.776445
    estimate = mean_ci([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (estimate.value, estimate.n) == (3, 5)
    assert estimate.ci == pytest.approx((3 - half, 3 + half), abs=1e-5)
    wider, narrower = mean_ci([1, 2, 3, 4, 5], level=0.99), mean_ci([1, 2, 3, 4, 5], level=0.9)
    assert wider.lo < estimate.lo < narrower.lo


def test_t_interval_covers_as_often_as_it_says():
    """Five seeds: the t interval covers 95 %, the bootstrap much less; that is why seeds use the first."""
    draws = np.random.default_rng(0).normal(size=(400, 5))
    by_t = np.mean([e.lo <= 0 <= e.hi for e in map(mean_ci, draws)])
    by_bootstrap = np.mean([e.lo <= 0 <= e.hi for e in (bootstrap_ci(d, resamples=300) for d in draws)])
    assert 0.92 < by_t < 0.98
    assert by_bootstrap < 0.92


def test_bootstrap_agrees_with_the_normal_interval_for_many_values():
    x = np.random.default_rng(1).normal(10, 2, size=400)
    estimate = bootstrap_ci(x)
    half = 1.96 * x.std(ddof=1) / 20
    assert estimate.ci == pytest.approx((x.mean() - half, x.mean() + half), abs=0.03)
    assert bootstrap_ci(x) == estimate, "seeded"
    assert bootstrap_ci(x, seed=1) != estimate


def test_bootstrap_of_another_statistic_and_of_constants():
    x = [1.0, 2.0, 3.0, 4.0, 100.0]
    estimate = bootstrap_ci(x, np.median)
    assert estimate.value == 3 and 1 <= estimate.lo <= 3 <= estimate.hi <= 100
    assert bootstrap_ci([2.0] * 5).ci == (2, 2)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=12))
def test_bootstrap_never_gives_nan(values):
    estimate = bootstrap_ci(values, resamples=200)
    assert 0 <= estimate.lo <= estimate.value <= estimate.hi <= 1


@pytest.mark.parametrize("function", [mean_ci, bootstrap_ci])
def test_one_seed_has_no_interval(function):
    estimate = function([0.4])
    assert estimate.value == 0.4 and estimate.ci == (-math.inf, math.inf)
    assert "no interval" in str(estimate)


@pytest.mark.parametrize("function", [mean_ci, bootstrap_ci])
@pytest.mark.parametrize("bad", [[], [[1.0, 2.0]]])
def test_what_is_no_sample_is_refused(function, bad):
    with pytest.raises(ValueError, match="non-empty list"):
        function(bad)


def test_pairing_removes_the_seeds_noise():
    seeds = np.array([10.0, -20.0, 5.0, 40.0])
    estimate = paired_difference(seeds + 1, seeds)
    assert estimate.ci == pytest.approx((1, 1))
    with pytest.raises(ValueError, match="equal lengths"):
        paired_difference([1, 2], [1, 2, 3])


def test_runs_by_seed_are_paired_over_the_seeds_that_both_have():
    """Twenty seeds of one arm and five of another, in any order."""
    many = {seed: 10.0 * seed for seed in range(20, 0, -1)}
    few = {3: 29.0, 1: 8.0, 2: 19.0, 99: 0.0}
    assert paired_difference(many, few) == paired_difference([10, 20, 30], [8, 19, 29])
    assert paired_tost(many, few, 5) == paired_tost([10, 20, 30], [8, 19, 29], 5)


def test_wilson_against_its_formula():
    # 8 of 10 at z = 1.959964, by hand
    z, n, p = 1.959964, 10, 0.8
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert wilson_ci(8, 10).ci == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert wilson_ci(64, 64).hi == 1 and wilson_ci(64, 64).lo == pytest.approx(0.9434, abs=1e-3)
    assert wilson_ci(0, 10).lo == 0 and wilson_ci(0, 10).hi > 0.2
    assert math.isnan(wilson_ci(0, 0).value)


@given(st.lists(moderate, min_size=3, max_size=10), st.floats(0.1, 100))
def test_tost_is_the_interval_inside_the_margin(differences, margin):
    tost = paired_tost(differences, [0] * len(differences), margin)
    inside = -margin < tost.difference.lo and tost.difference.hi < margin
    if min(abs(abs(tost.difference.lo) - margin), abs(abs(tost.difference.hi) - margin)) > 1e-6 * margin:
        assert tost.equivalent == inside


def test_tost_against_scipy():
    a, b = [5.1, 4.9, 5.3, 5.0, 5.2, 4.8, 5.1, 5.05], [5.0, 5.0, 5.1, 5.1, 5.0, 4.9, 5.2, 5.0]
    margin = 0.3
    above = scipy_stats.ttest_rel(np.add(a, margin), b, alternative="greater").pvalue
    below = scipy_stats.ttest_rel(np.subtract(a, margin), b, alternative="less").pvalue
    tost = paired_tost(a, b, margin)
    assert tost.p == pytest.approx(max(above, below))
    assert tost.equivalent and tost.difference.level == 0.9
    assert not paired_tost(a, b, 0.01).equivalent
    assert "not shown" in str(paired_tost(a, b, 0.01))


def test_tost_at_its_ends():
    assert paired_tost([1.0, 1.0], [0.5, 0.5], margin=1).equivalent, "no spread at all"
    assert not paired_tost([1.0, 1.0], [0.0, 0.0], margin=1).equivalent, (
        "a difference of the margin is not inside"
    )
    alone = paired_tost([1.0], [1.0], margin=1)
    assert math.isnan(alone.p) and not alone.equivalent
    with pytest.raises(ValueError, match="margin"):
        paired_tost([1, 2], [1, 2], margin=0)


def test_spearman():
    rising = spearman([64, 128, 256, 512], [1, 4, 5, 90])
    assert rising.rho == pytest.approx(1) and rising.n == 4
    assert rising.p == pytest.approx(2 / math.factorial(4)), "the smallest p that four points can give"
    assert spearman([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]).rho == pytest.approx(-1)
    x, y = [3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]
    assert spearman(x, y).rho == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    long = np.random.default_rng(0).normal(size=(2, 30))
    assert spearman(*long).p == pytest.approx(scipy_stats.spearmanr(*long).pvalue, abs=0.02)
    assert math.isnan(spearman([1, 2], [1, 2]).rho)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]).rho)
    with pytest.raises(ValueError, match="equal lengths"):
        spearman([1, 2, 3], [1, 2])


@given(st.floats(-10, 10), st.integers(1, 50), st.floats(0, 0.99))
def test_smoothing_a_constant_leaves_it(value, n, weight):
    assert smooth([value] * n, weight) == pytest.approx([value] * n)


def test_steps_to_threshold():
    falling = [4.0, 3.0, 2.0, 1.0, 0.5]
    assert steps_to_threshold(falling, 2.0, weight=0) == 3
    assert steps_to_threshold(falling, 2.0, weight=0.5) == 4, "the smoothed curve lags"
    assert steps_to_threshold(falling, 0.1) is None
    assert steps_to_threshold(falling, 4.0) == 1
    spike = [4.0, 4.0, 0.0, 4.0, 4.0]
    assert steps_to_threshold(spike, 1.0) is None, "one lucky batch does not count"


def test_estimate_scales_and_prints():
    estimate = Estimate(0.5, 0.4, 0.6, 10)
    assert estimate.scaled(100).ci == (40, 60)
    assert estimate.scaled(-1).ci == (-0.6, -0.4)
    assert str(estimate) == "0.5 [0.4, 0.6]"
