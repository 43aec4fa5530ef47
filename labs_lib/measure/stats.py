"""Statistics for few seeds: intervals, paired differences, equivalence, rank correlation, steps to a loss.

Every function that estimates returns an `Estimate`: a value with its interval. With one seed there is no
interval; the estimate then says so with infinite ends instead of failing, so that a quick run passes through
the same code. scipy does the mathematics; this file fixes the conventions.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval at `level`, from `n` independent units (seeds, questions)."""

    value: float
    lo: float
    hi: float
    n: int
    level: float = 0.95
    method: str = ""

    @property
    def ci(self) -> tuple[float, float]:
        return (self.lo, self.hi)

    def scaled(self, factor: float) -> "Estimate":
        """The same estimate in another unit, for instance `scaled(100)` for percentage points."""
        lo, hi = sorted((self.lo * factor, self.hi * factor))
        return replace(self, value=self.value * factor, lo=lo, hi=hi)

    def __str__(self) -> str:
        if not math.isfinite(self.lo) or not math.isfinite(self.hi):
            return f"{self.value:.4g} (n = {self.n}: no interval)"
        return f"{self.value:.4g} [{self.lo:.4g}, {self.hi:.4g}]"


def _vector(values: Sequence[float], name: str = "values") -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty list of numbers, got shape {array.shape}")
    return array


def _no_interval(value: float, n: int, level: float, method: str) -> Estimate:
    return Estimate(float(value), -math.inf, math.inf, n, level, method)


def bootstrap_ci(
    values: Sequence[float],
    statistic: Callable = np.mean,
    *,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Estimate:
    """Bootstrap interval of any statistic of one sample (BCa; percentile where BCa is undefined).

    For many units (questions, steps). With fewer than about 15 it is too narrow: use `mean_ci` for seeds.
    `statistic` must accept `axis=`, as numpy's do. Source: Efron (1987), through scipy.stats.bootstrap.
    """
    from scipy import stats

    x = _vector(values)
    value = float(statistic(x, axis=-1))
    if x.size < 2:
        return _no_interval(value, x.size, level, "bootstrap")
    if np.all(x == x[0]):
        return Estimate(value, value, value, x.size, level, "bootstrap (all values equal)")
    for method in ("BCa", "percentile"):
        rng = np.random.default_rng(seed)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # BCa undefined: percentile follows
            ci = stats.bootstrap(
                (x,),
                statistic,
                n_resamples=resamples,
                confidence_level=level,
                method=method,
                rng=rng,
                batch=1000,
            ).confidence_interval
        if np.isfinite(ci.low) and np.isfinite(ci.high):
            break
    return Estimate(value, float(ci.low), float(ci.high), x.size, level, f"bootstrap, {method}")


def mean_ci(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Student's t interval of a mean: the one to use for a handful of seeds."""
    from scipy import stats

    x = _vector(values)
    value = float(x.mean())
    if x.size < 2:
        return _no_interval(value, x.size, level, "t")
    half = stats.t.ppf((1 + level) / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size)
    return Estimate(value, value - half, value + half, x.size, level, "t")


#: One number per run: in an order that two of them share, or by the seed of the run.
Runs = Sequence[float] | Mapping[int, float]


def paired_difference(a: Runs, b: Runs, *, level: float = 0.95) -> Estimate:
    """Mean of `a - b` with its t interval; `a[i]` and `b[i]` share a seed, so its noise cancels.

    Of two mappings by seed those seeds count that both have.
    """
    return mean_ci(_paired(a, b), level=level)


def _paired(a: Runs, b: Runs) -> np.ndarray:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        shared = sorted(a.keys() & b.keys())
        a, b = ([runs[seed] for seed in shared] for runs in (a, b))
    x, y = _vector(a, "a"), _vector(b, "b")
    if x.size != y.size:
        raise ValueError(f"paired values need equal lengths, got {x.size} and {y.size}")
    return x - y


def wilson_ci(successes: int, n: int, *, level: float = 0.95) -> Estimate:
    """Wilson's score interval for a share of `n` trials; sound even at shares of 0 and 1."""
    from scipy import stats

    if n == 0:
        return _no_interval(math.nan, 0, level, "wilson")
    ci = stats.binomtest(int(successes), int(n)).proportion_ci(confidence_level=level, method="wilson")
    return Estimate(successes / n, float(ci.low), float(ci.high), int(n), level, "wilson")


@dataclass(frozen=True)
class Equivalence:
    """Outcome of two one-sided tests: `difference` has the interval that decides (90 % at alpha = 0.05)."""

    difference: Estimate
    margin: float
    p: float
    alpha: float = 0.05

    @property
    def equivalent(self) -> bool:
        return self.p < self.alpha

    def __str__(self) -> str:
        word = "equivalent" if self.equivalent else "not shown to be equivalent"
        return f"{word} within +-{self.margin:g}: difference {self.difference}, p = {self.p:.3g}"


def paired_tost(a: Runs, b: Runs, margin: float, *, alpha: float = 0.05) -> Equivalence:
    """Are paired `a` and `b` equal up to `margin`? Two one-sided paired t tests (Schuirmann, 1987).

    The null hypothesis is that they differ by the margin or more, so failing to reject proves nothing. It
    rejects at `alpha` exactly when the `1 - 2 alpha` interval of the difference lies inside +-margin. One
    pair gives p = nan.
    """
    from scipy import stats

    if margin <= 0:
        raise ValueError(f"margin must be positive, got {margin}")
    d = _paired(a, b)
    difference = mean_ci(d, level=1 - 2 * alpha)
    if d.size < 2:
        return Equivalence(difference, margin, math.nan, alpha)
    if np.all(d == d[0]):  # no spread at all: t is infinite, the answer is plain
        return Equivalence(difference, margin, 0.0 if abs(d[0]) < margin else 1.0, alpha)
    above = stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(d, margin, alternative="less").pvalue
    return Equivalence(difference, margin, float(max(above, below)), alpha)


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its two-sided permutation p value."""

    rho: float
    p: float
    n: int


def spearman(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> Correlation:
    """Spearman's rank correlation; p from permutations, exact up to 7 points, since samples here are tiny.

    Note its floor: with 4 points the smallest possible two-sided p is 2/24 = 0.083, so four models show a
    trend at most.
    """
    from scipy import stats

    a, b = _vector(x, "x"), _vector(y, "y")
    if a.size != b.size:
        raise ValueError(f"x and y need equal lengths, got {a.size} and {b.size}")
    if a.size < 3 or np.all(a == a[0]) or np.all(b == b[0]):
        return Correlation(math.nan, math.nan, a.size)

    ranks = stats.rankdata(b) - (b.size + 1) / 2  # centred, so that their product is the covariance

    def statistic(order, axis):
        return (order * ranks).sum(axis=axis) / math.sqrt(
            (order**2).sum(axis=axis).flat[0] * (ranks**2).sum()
        )

    result = stats.permutation_test(
        (stats.rankdata(a) - (a.size + 1) / 2,),
        statistic,
        permutation_type="pairings",
        n_resamples=5040 if a.size <= 7 else 9999,
        rng=np.random.default_rng(seed),
        vectorized=True,
    )
    return Correlation(float(result.statistic), float(result.pvalue), a.size)


def smooth(losses: Sequence[float], weight: float = 0.9) -> np.ndarray:
    """Exponential moving average with bias correction, as in Adam: unbiased from the first step on."""
    x = _vector(losses, "losses")
    average, out = 0.0, np.empty_like(x)
    for i, loss in enumerate(x):
        average = weight * average + (1 - weight) * loss
        out[i] = average / (1 - weight ** (i + 1))
    return out


def steps_to_threshold(losses: Sequence[float], threshold: float, *, weight: float = 0.9) -> int | None:
    """Steps until the smoothed loss first reaches `threshold`, counted from 1; None if it never does.

    Compare methods by this count, each at its own best learning rate. A None is an answer, not a missing
    value: report how many seeds never got there beside the ratio of those that did.
    """
    reached = np.flatnonzero(smooth(losses, weight) <= threshold)
    return int(reached[0]) + 1 if reached.size else None
