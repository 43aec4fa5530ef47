"""Fronts, resampling and rank correlation, against their definitions and against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from labs_lib.measure.fronts import (
    front_heights,
    pareto_front,
    rank_correlation,
    resampled_means,
    stored_bits,
)


def test_front_keeps_what_nobody_beats_cheapest_first():
    points = {"dear": (9, 10), "cheap": (1, 2), "beaten": (5, 1), "middle": (4, 6), "dearer, same": (10, 10)}
    assert pareto_front(points) == ["cheap", "middle", "dear"]


def test_equal_points_stay_together():
    assert sorted(pareto_front({"a": (1, 2), "b": (1, 2), "c": (1, 1)})) == ["a", "b"]


def test_resampling_keeps_the_methods_paired():
    scores = np.random.default_rng(1).normal(size=(3, 6))
    scores[1] = scores[0] + 5  # always five more, in every repetition
    means = resampled_means(scores, 500)
    assert means.shape == (500, 3)
    assert np.allclose(means[:, 1] - means[:, 0], 5)
    assert means.std(axis=0)[0] == pytest.approx(scores[0].std() / math.sqrt(6), rel=0.15)
    assert np.array_equal(means, resampled_means(scores, 500))


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_scipys_with_ties(seed):
    x, y = np.random.default_rng(seed).integers(0, 5, size=(2, 12))
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_no_order_no_correlation():
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_front_heights_are_the_best_so_far():
    heights = front_heights([3, 1, 2, 2], np.array([[5.0, 1.0, 4.0, 2.0], [1.0, 7.0, 0.0, 0.0]]))
    assert heights.tolist() == [[5, 1, 4, 4], [7, 7, 7, 7]]


def test_bits_beyond_guessing():
    assert stored_bits(1, 512) == 3072
    assert stored_bits(1 / 64, 512) == stored_bits(0, 512) == 0
