"""Disk, host, device: what leaves first, what never leaves, and what a failed or late load does to others."""

import itertools
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labs_lib.errors import LabsError
from labs_lib.serving.kv import KVCache
from labs_lib.serving.layout import Layout
from labs_lib.serving.pool import Pool
from labs_lib.serving.tiers import HostAdapter, ThreadLoader, Tiers
from labs_lib.serving.types import Refused

WIDTH, RANKS, BYTES = 64, 4, 100


class HandLoader:
    """A loader whose loads end when and in which order the test says."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.done: list[tuple[str, HostAdapter | Exception]] = []

    def start(self, adapter: str) -> None:
        self.started.append(adapter)

    def end(self, adapter: str, pages: int = 2, nbytes: int = BYTES, error: Exception | None = None) -> None:
        self.done.append(
            (adapter, error or HostAdapter(adapter, pages, nbytes, values=torch.ones(pages, WIDTH)))
        )

    def finished(self):
        done, self.done = self.done, []
        return done

    def close(self) -> None:
        pass


class Bench:
    """Tiers with everything around them by hand: loader, clock and a record of events."""

    def __init__(self, slots: int = 2, host: int = 3, policy: str = "separate", kv_tokens: int = 16) -> None:
        self.loader, self.now, self.events = HandLoader(), 0.0, []
        self.pool = Pool(Layout((), WIDTH, 4), slots, RANKS, kv_tokens, policy)
        self.tiers = Tiers(self.pool, self.loader, host * BYTES, self.clock, self.watch)

    def clock(self) -> float:
        self.now += 1
        return self.now

    def watch(self, what, adapter, tenant, **more) -> None:
        self.events.append((what, adapter, tenant))

    def load(self, *adapters: str, tenant: str = "t") -> None:
        """Bring adapters into host memory."""
        for adapter in adapters:
            self.tiers.prefetch(adapter, tenant)
            self.loader.end(adapter)
        self.tiers.poll()

    def use(self, adapter: str, tenant: str = "t"):
        """A short request: acquire and release."""
        slot = self.tiers.acquire(adapter, tenant)
        if slot is not None:
            self.tiers.release(slot)
        return slot

    @property
    def resident(self) -> set[str]:
        return {slot.adapter for slot in self.pool.resident}


# -- disk to host --------------------------------------------------------------------------------------------------


def test_an_adapter_is_there_only_after_its_load_was_polled():
    bench = Bench()
    bench.tiers.prefetch("a")
    assert bench.tiers.acquire("a", "t") is None
    bench.loader.end("a")
    assert bench.tiers.acquire("a", "t") is None
    bench.tiers.poll()
    assert bench.tiers.acquire("a", "t").adapter == "a"


def test_one_load_however_many_ask():
    bench = Bench()
    for _ in range(3):
        bench.tiers.prefetch("a")
    bench.loader.end("a")
    bench.tiers.poll()
    bench.tiers.prefetch("a")
    bench.use("a")
    bench.tiers.host.clear()
    bench.tiers.prefetch("a")  # on the device already
    assert bench.loader.started == ["a"]


def test_loads_may_end_in_any_order():
    bench = Bench()
    for name in "abc":
        bench.tiers.prefetch(name, tenant=f"tenant of {name}")
    for name in "cab":
        bench.loader.end(name)
        bench.tiers.poll()
    assert list(bench.tiers.host) == ["c", "a", "b"]
    assert not bench.tiers.loading
    assert [event for event in bench.events if event[0] == "host"] == [
        ("host", name, f"tenant of {name}") for name in "cab"
    ]


def test_the_host_tier_keeps_its_budget_and_drops_the_least_recently_used():
    bench = Bench(host=3)
    bench.load("a", "b", "c")
    bench.use("a")  # touched: now "b" is the oldest
    bench.load("d")
    assert set(bench.tiers.host) == {"a", "c", "d"}
    assert bench.tiers.host_used == 3 * BYTES
    assert ("drop", "b", "t") in bench.events


def test_a_big_adapter_pushes_out_as_many_as_it_needs():
    bench = Bench(host=3)
    bench.load("a", "b", "c")
    bench.tiers.prefetch("d")
    bench.loader.end("d", nbytes=2 * BYTES)
    bench.tiers.poll()
    assert set(bench.tiers.host) == {"c", "d"}


def test_an_adapter_larger_than_the_host_tier_is_refused_and_drops_nobody():
    bench = Bench(host=1)
    bench.load("a")
    bench.tiers.prefetch("b")
    bench.loader.end("b", nbytes=BYTES + 1)
    bench.tiers.poll()
    assert isinstance(bench.tiers.failed["b"], Refused)
    assert "--host-mb" in str(bench.tiers.failed["b"])
    assert set(bench.tiers.host) == {"a"}


def test_an_adapter_larger_than_a_slot_is_refused():
    bench = Bench()
    bench.tiers.prefetch("a")
    bench.loader.end("a", pages=RANKS + 1)
    bench.tiers.poll()
    assert f"--max-rank {RANKS + 1}" in str(bench.tiers.failed["a"])


def test_pinned_adapters_are_not_dropped():
    bench = Bench(host=2)
    bench.load("a", "b")
    bench.tiers.pinned.add("a")
    bench.load("c", "d")
    assert set(bench.tiers.host) == {"a", "d"}


def test_the_newest_load_is_kept_even_if_pinned_ones_fill_the_budget():
    """Else the request that waits for it would load it for ever."""
    bench = Bench(host=2)
    bench.load("a", "b")
    bench.tiers.pinned |= {"a", "b"}
    bench.load("c")
    assert set(bench.tiers.host) == {"a", "b", "c"}
    bench.load("d")  # and the excess goes with the next load
    assert set(bench.tiers.host) == {"a", "b", "d"}


def test_what_is_dropped_from_the_host_stays_on_the_device():
    bench = Bench(host=1)
    bench.load("a")
    slot = bench.use("a")
    bench.load("b")
    assert "a" not in bench.tiers.host
    assert bench.tiers.acquire("a", "t") is slot


# -- failures ------------------------------------------------------------------------------------------------------


def test_a_failed_load_is_told_once_and_can_be_tried_again():
    bench = Bench()
    bench.tiers.prefetch("a", "t")
    bench.loader.end("a", error=Refused("no such file"))
    bench.tiers.poll()
    assert str(bench.tiers.failed.pop("a", None)) == "no such file"
    assert bench.tiers.failed.pop("a", None) is None
    assert not bench.tiers.loading
    bench.load("a")  # the file has been mended
    assert bench.use("a").adapter == "a"


def test_asking_again_forgets_the_old_failure():
    bench = Bench()
    bench.tiers.prefetch("a")
    bench.loader.end("a", error=OSError("disk"))
    bench.tiers.poll()
    bench.tiers.prefetch("a")
    assert "a" not in bench.tiers.failed
    assert bench.loader.started == ["a", "a"]


def test_a_failure_says_for_whom_and_leaves_the_others():
    bench = Bench()
    for name in "ab":
        bench.tiers.prefetch(name, tenant=name)
    bench.loader.end("a", error=ValueError("damaged"))
    bench.loader.end("b")
    bench.tiers.poll()
    assert ("failed", "a", "a") in bench.events
    assert set(bench.tiers.host) == {"b"}


# -- host to device ------------------------------------------------------------------------------------------------


def test_the_base_needs_no_load_and_counts_no_references():
    bench = Bench()
    slot = bench.tiers.acquire(None, "t")
    assert slot.number == slot.refs == 0
    bench.tiers.release(slot)
    assert slot.refs == 0


def test_the_least_recently_released_idle_adapter_makes_room():
    bench = Bench(slots=2)
    bench.load("a", "b", "c")
    bench.use("a")
    bench.use("b")
    bench.use("a")
    bench.use("c", tenant="hungry")
    assert bench.resident == {"a", "c"}
    assert ("evict", "b", "hungry") in bench.events


def test_use_counts_from_the_release_not_from_the_start():
    bench = Bench(slots=2)
    bench.load("a", "b", "c")
    long = bench.tiers.acquire("a", "t")
    bench.use("b")
    bench.tiers.release(long)  # "a" started first and was used last
    bench.use("c")
    assert bench.resident == {"a", "c"}


def test_what_a_running_request_holds_is_not_evicted():
    bench = Bench(slots=2)
    bench.load("a", "b", "c")
    held = [bench.tiers.acquire(name, "t") for name in "ab"]
    assert bench.tiers.acquire("c", "t") is None
    bench.tiers.release(held[0])
    assert bench.tiers.acquire("c", "t") is not None
    assert bench.resident == {"b", "c"}


def test_two_requests_hold_an_adapter_twice():
    bench = Bench(slots=1)
    bench.load("a", "b")
    first, second = bench.tiers.acquire("a", "t"), bench.tiers.acquire("a", "t")
    assert first is second
    bench.tiers.release(first)
    assert bench.tiers.acquire("b", "t") is None
    bench.tiers.release(second)
    assert bench.tiers.acquire("b", "t") is not None


def test_pinned_adapters_stay_on_the_device():
    bench = Bench(slots=2)
    bench.load("a", "b", "c")
    bench.tiers.pinned.add("a")
    bench.use("a")
    bench.use("b")
    bench.use("c")
    assert bench.resident == {"a", "c"}
    bench.tiers.pinned.add("c")
    assert bench.tiers.acquire("b", "t") is None


def test_an_acquire_that_fails_holds_nothing_and_evicts_nobody_in_vain():
    bench = Bench(slots=1)
    bench.load("a", "b")
    slot = bench.tiers.acquire("a", "t")
    assert bench.tiers.acquire("b", "t") is None
    assert slot.refs == 1
    assert bench.resident == {"a"}
    assert not [event for event in bench.events if event[0] == "evict"]


def test_a_unified_pool_evicts_as_many_as_the_rank_needs():
    bench = Bench(slots=1, policy="unified", kv_tokens=1)  # five pages
    for name, pages in (("a", 2), ("b", 2), ("c", 4)):
        bench.tiers.prefetch(name)
        bench.loader.end(name, pages=pages)
    bench.tiers.poll()
    for name in "abc":
        bench.use(name)
    assert bench.resident == {"c"}


def test_a_unified_pool_evicts_nobody_for_an_adapter_that_would_not_fit_even_then():
    bench = Bench(slots=1, policy="unified", kv_tokens=1)  # five pages
    for name, pages in (("a", 2), ("b", 2), ("c", 4)):
        bench.tiers.prefetch(name)
        bench.loader.end(name, pages=pages)
    bench.tiers.poll()
    bench.use("a")
    busy = bench.tiers.acquire("b", "t")
    assert bench.tiers.acquire("c", "t") is None
    assert bench.resident == {"a", "b"}
    bench.tiers.release(busy)
    assert bench.tiers.acquire("c", "t") is not None


def test_prompt_pages_nobody_reads_make_room_before_an_adapter_does():
    bench = Bench(slots=1, policy="unified", kv_tokens=64)
    kv = KVCache(bench.pool)
    bench.tiers.prompts = kv
    bench.load("a", "b")
    bench.use("a")
    size = bench.pool.tokens_per_page
    prompt = list(range(bench.pool.kv_free * size))
    reservation = kv.reserve("a", prompt, len(prompt), 0.0)
    kv.share("a", prompt, reservation, 0.0)
    kv.release(reservation)
    assert bench.pool.kv_free == 0
    assert bench.use("b") is not None
    assert bench.resident == {"a", "b"}


# -- unload --------------------------------------------------------------------------------------------------------


def test_unload_removes_an_adapter_from_both_tiers_and_unpins_it():
    bench = Bench()
    bench.load("a")
    bench.tiers.pinned.add("a")
    bench.use("a")
    bench.tiers.unload("a")
    assert not bench.resident | set(bench.tiers.host) | bench.tiers.pinned
    assert bench.pool.adapters.data.count_nonzero() == 0
    bench.tiers.unload("a")  # again: nothing to do


def test_unload_while_in_use_is_refused_and_changes_nothing():
    bench = Bench()
    bench.load("a")
    slot = bench.tiers.acquire("a", "t")
    with pytest.raises(LabsError, match="1 running"):
        bench.tiers.unload("a")
    assert bench.resident == {"a"}
    assert "a" in bench.tiers.host
    bench.tiers.release(slot)
    bench.tiers.unload("a")
    assert not bench.resident


# -- anything in any order -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["prefetch", "end", "fail", "acquire", "release", "unload", "pin"]),
            st.integers(0, 5),
        ),
        max_size=60,
    ),
    slots=st.integers(1, 3),
    host=st.integers(1, 4),
    policy=st.sampled_from(["separate", "unified"]),
)
def test_the_books_balance_whatever_happens(steps, slots, host, policy):
    bench = Bench(slots, host, policy)
    held = []
    for what, which in steps:
        name = "abcdef"[which]
        if what == "prefetch":
            bench.tiers.prefetch(name)
        elif what in ("end", "fail") and bench.tiers.loading:
            name = list(bench.tiers.loading)[which % len(bench.tiers.loading)]
            error = ValueError("damaged") if what == "fail" else None
            bench.loader.end(name, pages=1 + which % RANKS, error=error)
            bench.tiers.poll()
        elif what == "acquire":
            slot = bench.tiers.acquire(name, "t")
            if slot is not None:
                assert slot.adapter == name
                held.append((name, slot, slot.generation))
        elif what == "release" and held:
            bench.tiers.release(held.pop(which % len(held))[1])
        elif what == "unload":
            if any(name == other for other, _, _ in held):
                with pytest.raises(LabsError):
                    bench.tiers.unload(name)
            else:
                bench.tiers.unload(name)
        elif what == "pin" and len(bench.tiers.pinned) < slots - 1:
            bench.tiers.pinned.add(name)
        for name, slot, generation in held:
            assert (slot.adapter, slot.generation) == (name, generation)
        for slot in bench.pool.resident:
            assert slot.refs == sum(slot is other for _, other, _ in held)
        pinned = sum(bench.tiers.host[name].nbytes for name in bench.tiers.pinned & set(bench.tiers.host))
        assert bench.tiers.host_used <= max(host * BYTES, pinned + BYTES)


# -- the real loader -----------------------------------------------------------------------------------------------


def wait_for(loader: ThreadLoader, count: int) -> list:
    found = []
    for _ in range(2000):
        found += loader.finished()
        if len(found) >= count:
            break
        time.sleep(0.005)
    return found


def test_the_thread_loader_returns_results_and_errors():
    def read(adapter):
        if adapter == "bad":
            raise ValueError("damaged")
        return HostAdapter(adapter, 1, 1)

    loader = ThreadLoader(read)
    for name in ("a", "bad", "b"):
        loader.start(name)
    found = dict(wait_for(loader, 3))
    assert found["a"].adapter == "a"
    assert str(found["bad"]) == "damaged"
    assert found["b"].adapter == "b"
    assert loader.finished() == []
    loader.close()


def test_the_thread_loader_does_not_hold_up_its_caller():
    gate = threading.Event()
    counter = itertools.count()

    def read(adapter):
        gate.wait(10)
        next(counter)
        return HostAdapter(adapter, 1, 1)

    loader = ThreadLoader(read)
    loader.start("a")
    assert loader.finished() == []
    gate.set()
    assert [name for name, _ in wait_for(loader, 1)] == ["a"]
    loader.close()
