"""Time ratios that survive a noisy machine: arms interleaved round by round, compared within the round.

On a shared machine the clock drifts by tens of percent between minutes, so a time by itself means little.
Within one round all arms see the same machine; the ratio of two of them, over many rounds, has a median and
an interval.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from labs_lib.measure.stats import Estimate, bootstrap_ci


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage is collected before, not while time is taken."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclass(frozen=True)
class TimeRatio:
    """`ratio` is the median over rounds of time(arm) / time(baseline); `seconds` is the arm's median of `samples`."""

    ratio: Estimate
    seconds: float
    baseline_seconds: float
    samples: tuple[float, ...] = field(default=(), repr=False)  # seconds of a call, one for each round

    def __str__(self) -> str:
        return f"{self.ratio} x ({self.seconds * 1e3:.3g} ms against {self.baseline_seconds * 1e3:.3g} ms)"


def time_ratio(
    arm: Callable[[], object],
    baseline: Callable[[], object],
    *,
    rounds: int = 15,
    warmup: int = 2,
    min_seconds: float = 0.005,
    level: float = 0.95,
) -> TimeRatio:
    """How many times slower `arm()` is than `baseline()`: median ratio over interleaved rounds."""
    arms = {"arm": arm, "baseline": baseline}
    return time_ratios(arms, "baseline", rounds=rounds, warmup=warmup, min_seconds=min_seconds, level=level)[
        "arm"
    ]


def time_ratios(
    arms: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    rounds: int = 15,
    warmup: int = 2,
    min_seconds: float = 0.005,
    level: float = 0.95,
) -> dict[str, TimeRatio]:
    """The same for several arms against the one named `baseline`.

    Each call is repeated inside a sample until the sample lasts `min_seconds`. Arms take their turns in
    another order every round (`turns`). CUDA work is waited for. With fewer
    than about 9 rounds the interval of a median is poor; with one there is none.
    """
    if baseline not in arms:
        raise ValueError(f"the baseline {baseline!r} is not among the arms {list(arms)}")
    calls = {}
    for name, function in arms.items():
        for _ in range(warmup):
            _sample(function, 1)
        once = max(_sample(function, 1), 1e-9)
        calls[name] = max(1, math.ceil(min_seconds / once))

    times: dict[str, list[float]] = {name: [] for name in arms}
    with no_collection():
        for round_ in range(rounds):
            for name in turns(list(arms), round_):
                times[name].append(_sample(arms[name], calls[name]) / calls[name])

    base = np.array(times[baseline])
    result = {}
    for name in arms:
        ratio = bootstrap_ci(np.array(times[name]) / base, np.median, level=level)
        middle, of = float(np.median(times[name])), float(np.median(base))
        result[name] = TimeRatio(ratio, middle, of, tuple(times[name]))
    return result


def turns(names: list[str], round_: int) -> list[str]:
    """The order of one round: each second one is the reverse of the one before, so that a drift inside rounds cancels.

    From pair to pair another arm comes first: one at an end runs twice in a row and finds its numbers in the caches.
    """
    first = round_ // 2 % len(names)
    order = names[first:] + names[:first]
    return order[::-1] if round_ % 2 else order


def _sample(function: Callable[[], object], calls: int) -> float:
    _synchronise()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronise()
    return time.perf_counter() - start


def _synchronise() -> None:
    import sys

    torch = sys.modules.get("torch")  # a function under test that uses CUDA has imported torch
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
