"""Comparing many methods at once: who is beaten by nobody, how sure that is, and whether two rankings agree."""

from collections.abc import Mapping, Sequence

import numpy as np


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names that no other beats, cheapest first. A point is (cost, quality): less of the one, more of the other.

    Another beats a point if it costs no more and is at least as good, and is better in one of the two. Equal points do
    not beat each other.

    Steps:
    1. Ask for every point whether any other beats it: cost <=, quality >=, and not both equal.
    2. Keep those that nobody beats; sort them by cost, then by quality.
    """

    def beaten(name: str) -> bool:
        cost, quality = points[name]
        return any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])


def resampled_means(scores: Sequence[Sequence[float]], draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Paired bootstrap: the methods' means in `draws` imagined repetitions of the experiment, (draws, methods).

    `scores` is (methods, seeds); in every column the methods shared a seed, and with it its data. So a repetition draws
    whole columns, with replacement: a seed that was hard for one was hard for all. Source: Efron 1979.

    Steps:
    1. np.random.default_rng(seed).integers gives the columns of every repetition at once, (draws, seeds).
    2. Take those columns of every method, (methods, draws, seeds), and the mean over seeds.
    3. Transpose.
    """
    scores = np.asarray(scores, dtype=float)
    seeds = scores.shape[1]
    columns = np.random.default_rng(seed).integers(seeds, size=(draws, seeds))
    return scores[:, columns].mean(axis=2).T


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation of two lists: 1 for the same order, -1 for the reverse, about 0 for no relation.

    Source: Spearman 1904. nan if all of `x` or all of `y` are equal: an order is missing then.

    Steps:
    1. Replace each number by its rank in its list. Equal numbers share the mean of the places that they take: count
       those below, and half of those that are equal, itself included.
    2. Centre both ranks; their product's sum, over the root of the product of the sums of squares.
    """
    ranks = []
    for values in (np.asarray(x, dtype=float), np.asarray(y, dtype=float)):
        below = (values[None, :] < values[:, None]).sum(axis=1)
        equal = (values[None, :] == values[:, None]).sum(axis=1)
        ranks.append(below + equal / 2)
    a, b = (each - each.mean() for each in ranks)
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else float("nan")


def front_heights(costs: Sequence[float], means: np.ndarray) -> np.ndarray:
    """The best quality that can be had for each cost or less; `means` is (..., methods), as the result."""
    order = np.argsort(costs, kind="stable")
    best = np.empty_like(means)
    best[..., order] = np.maximum.accumulate(means[..., order], axis=-1)
    for cost in set(costs):  # equal costs share the best of them
        same = np.flatnonzero(np.asarray(costs) == cost)
        best[..., same] = best[..., same].max(axis=-1, keepdims=True)
    return best


def stored_bits(share: float, facts: int, answers: int = 64) -> float:
    """Bits that a recall of `share` of the facts proves, those guessed right taken off; none below chance."""
    beyond = max(0.0, (share - 1 / answers) / (1 - 1 / answers))
    return float(np.log2(answers) * facts * beyond)
