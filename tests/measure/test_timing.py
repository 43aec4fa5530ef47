"""The harness' logic, without asserting a time: order, counts, synthetic clocks."""

import pytest

from labs_lib.measure import time_ratio, time_ratios, timing


class Clock:
    """A machine whose speed drifts; each call of an arm takes its cost times the present slowness."""

    def __init__(self, drift=0.0):
        self.now, self.drift = 0.0, drift
        self.calls = []

    def arm(self, name, cost):
        def call():
            self.calls.append(name)
            self.now += cost * (1 + self.drift * len(self.calls))

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_ratio_is_found_on_a_machine_that_slows_down(clock):
    clock.drift = 0.01
    result = time_ratio(clock.arm("a", 2.0), clock.arm("b", 1.0), rounds=16)
    assert result.ratio.value == pytest.approx(2, rel=0.01)
    assert result.ratio.lo <= 2 <= result.ratio.hi
    assert result.ratio.n == 16


def test_arms_are_interleaved_and_their_order_reversed(clock):
    time_ratios({n: clock.arm(n, 1.0) for n in "abc"}, "a", rounds=2, warmup=1)
    assert "".join(clock.calls[-6:]) == "abccba"


@pytest.mark.parametrize("names", ["ab", "abc", "abcde"])
def test_every_arm_is_as_often_first_as_last(names):
    """An arm at an end of a round runs twice in a row and finds its numbers in the caches: each of them gets that."""
    rounds = [timing.turns(list(names), each) for each in range(2 * len(names))]
    assert all(sorted(order) == list(names) for order in rounds)
    assert sorted(order[0] for order in rounds) == sorted(order[-1] for order in rounds) == sorted(2 * names)
    assert all(later == earlier[::-1] for earlier, later in zip(rounds[::2], rounds[1::2], strict=True))


def test_short_functions_are_repeated(clock):
    result = time_ratio(clock.arm("a", 0.001), clock.arm("b", 0.01), rounds=3, warmup=0, min_seconds=0.0099)
    assert result.ratio.value == pytest.approx(0.1)
    assert result.seconds == pytest.approx(0.001)
    assert clock.calls.count("a") == 1 + 3 * 10, "one to find out, then ten per round"
    assert clock.calls.count("b") == 1 + 3


def test_several_arms_share_one_baseline(clock):
    arms = {"base": clock.arm("base", 1.0), "lora": clock.arm("lora", 1.1), "dora": clock.arm("dora", 1.9)}
    results = time_ratios(arms, "base", rounds=5)
    assert {name: round(r.ratio.value, 3) for name, r in results.items()} == {
        "base": 1,
        "lora": 1.1,
        "dora": 1.9,
    }
    assert "x (" in str(results["dora"])
    with pytest.raises(ValueError, match="baseline"):
        time_ratios(arms, "full")


def test_garbage_collection_is_switched_back_on(clock):
    import gc

    def broken():
        raise RuntimeError("arm failed")

    with pytest.raises(RuntimeError):
        time_ratio(broken, clock.arm("b", 1.0))
    assert gc.isenabled()


def test_for_real():
    import torch

    small, large = torch.randn(16, 16), torch.randn(256, 256)
    result = time_ratio(lambda: large @ large, lambda: small @ small, rounds=3, min_seconds=1e-4)
    assert result.seconds > 0 and result.baseline_seconds > 0 and result.ratio.value > 0
