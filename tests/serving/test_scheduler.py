"""Who is served next: order of arrival, skipping without starving, and fair shares for a noisy tenant's neighbours.

The engine's own admission runs here, over an executor and a loader that only count: time is steps.
"""

import random
from collections import Counter

import pytest

from labs_lib.errors import LabsError
from labs_lib.serving.engine import PREFILL_TOKENS, Engine
from labs_lib.serving.layout import Layout
from labs_lib.serving.pool import KV_PAGE, Pool
from labs_lib.serving.scheduler import OUTPUT_WEIGHT, PROMPT_WEIGHT, Queue
from labs_lib.serving.tiers import HostAdapter
from labs_lib.serving.types import QueueFull, Request


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Counting:
    """An executor that takes one second for a forward pass and always says token 1."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.passes = clock, []

    def prefill(self, rows):
        return self._run("prefill", rows)

    def decode(self, rows):
        return self._run("decode", rows)

    def _run(self, what, rows):
        self.clock.now += 1
        self.passes.append((what, [row.id for row in rows]))
        return [1] * len(rows)

    def forget(self) -> None: ...

    def close(self) -> None: ...


class SlowLoader:
    """Adapters of one page that take `seconds` to load."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds, self.due = clock, seconds, {}

    def start(self, adapter: str) -> None:
        self.due[adapter] = self.clock() + self.seconds

    def finished(self):
        ready = [adapter for adapter, due in self.due.items() if due <= self.clock()]
        for adapter in ready:
            del self.due[adapter]
        return [(adapter, HostAdapter(adapter, 1, 1)) for adapter in ready]

    def close(self) -> None: ...


def bench(
    fairness: str = "fcfs",
    *,
    batch: int = 2,
    slots: int = 4,
    load: float = 0.0,
    kv_pages: int = 64,
    patience: float = 1e9,
    limit: int = 10_000,
    host: int = 1000,
) -> Engine:
    clock = Clock()
    pool = Pool(Layout((), 8, 4), slots, 1, kv_pages * KV_PAGE, device=None)
    return Engine.from_parts(
        Counting(clock),
        pool,
        SlowLoader(clock, load),
        max_tokens=10_000,
        vocabulary=10,
        max_batch=batch,
        host_bytes=host,
        queue=Queue(fairness, limit, patience),
        prefix_cache=False,
        clock=clock,
    )


class Run:
    """Drives an engine and notes when each request started and ended."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.results, self.started = engine, {}, []

    def send(self, tenant: str, tokens: int = 2, adapter: str | None = None, prompt: int = 1) -> int:
        request = Request([1] * prompt, tenant, adapter, max_tokens=tokens)
        return self.engine.submit(request, on_end=lambda result: self.results.__setitem__(result.id, result))

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            before = {sequence.id for sequence in self.engine.running}
            if not self.engine.step():
                self.engine.clock.now += 1  # only a load is under way
            self.started += [
                event.more["id"]
                for event in list(self.engine.ledger.events)
                if event.what == "admit" and event.more["id"] not in before | set(self.started)
            ]

    def finish(self, limit: int = 5000) -> None:
        while self.engine.running or self.engine.queue.waiting:
            self.step()
            limit -= 1
            assert limit, "no progress"


# -- first come, first served --------------------------------------------------------------------------------------


def test_requests_start_in_the_order_in_which_they_came():
    run = Run(bench(batch=1))
    ids = [run.send("t") for _ in range(5)]
    run.finish()
    assert run.started == ids


def test_a_row_that_ends_is_refilled_at_once():
    """Iteration-level batching: nobody waits for the longest of a batch."""
    run = Run(bench(batch=2))
    long, short, third = run.send("t", 10), run.send("t", 2), run.send("t", 2)
    run.step(2)  # prefill and decode: "short" has its two tokens
    assert short in run.results
    run.step()
    assert {sequence.id for sequence in run.engine.running} == {long} or third in run.results
    assert run.started == [long, short, third]


def test_a_request_whose_adapter_is_being_loaded_is_overtaken():
    run = Run(bench(load=5))
    cold, warm = run.send("cold", adapter="a"), run.send("warm")
    run.finish()
    assert run.started == [warm, cold]
    assert run.results[cold].timing.load >= 5
    assert run.results[warm].timing.load == 0


def test_a_request_without_a_slot_is_overtaken_by_one_that_has_one():
    run = Run(bench(slots=1, batch=4))
    first = run.send("a", 20, adapter="a")
    run.step(3)
    other, again = run.send("b", adapter="b"), run.send("a", adapter="a")
    run.step(2)
    assert run.started == [first, again]
    run.finish()
    assert run.started == [first, again, other]


def test_a_long_prompt_that_is_skipped_takes_no_room_in_the_prefill():
    run = Run(bench(batch=8, load=50, kv_pages=1000))
    run.send("cold", adapter="a", prompt=PREFILL_TOKENS)
    warm = [run.send("warm") for _ in range(5)]
    run.step()
    assert run.started == warm


def test_a_prefill_has_bounds():
    """Padding included: running sequences wait for it."""
    run = Run(bench(batch=8, kv_pages=10_000))
    ids = [run.send("t", 3, prompt=PREFILL_TOKENS // 2) for _ in range(3)]
    run.step()
    assert run.started == ids[:2]
    run.step()
    assert run.started == ids


def test_who_lacks_memory_is_not_overtaken():
    """Small requests would take each page that comes free, and a long one would never start."""
    run = Run(bench(kv_pages=4, batch=8))
    run.send("t", 40)  # three pages
    run.step()
    long = run.send("t", 60)
    small = run.send("t", 2)
    run.step(3)
    assert run.started[1:] == []
    run.finish()
    assert run.started[1:] == [long, small]


# -- patience ------------------------------------------------------------------------------------------------------


def hot_and_cold(patience: float) -> tuple[float, int]:
    """One slot, a tenant that keeps it busy with ever new requests, and another that needs it: how long it waits."""
    run = Run(bench(slots=1, batch=2, patience=patience))
    for tokens in (5, 8):  # so that one always runs when the other ends
        run.send("hot", tokens, adapter="hot")
    run.step(3)
    cold = run.send("cold", 2, adapter="cold")
    arrived = run.engine.clock()
    for _ in range(300):
        while len(run.engine.queue.waiting) < 4:
            run.send("hot", 8, adapter="hot")
        run.step()
        if cold in run.results:
            return run.engine.clock() - arrived, len(run.results)
    return float("inf"), len(run.results)


def test_without_patience_a_hot_tenant_starves_the_others():
    """The reason for the rule, and the proof that the next test can fail."""
    assert hot_and_cold(patience=1e9)[0] == float("inf")


def test_nobody_starves():
    waited, _ = hot_and_cold(patience=20)
    assert waited < 20 + 8 + 8 + 4  # patience, what ran then, its own work, and a few steps


@pytest.mark.parametrize("fairness", ["fcfs", "fair"])
def test_nobody_starves_when_the_host_tier_is_too_small(fairness):
    """Prefetches for others push the waiting adapter out of host memory again and again."""
    run = Run(bench(fairness, slots=1, batch=2, patience=20, load=2, host=1))
    for _ in range(2):
        run.send("hot", 8, adapter="hot")
    run.step(5)
    cold = run.send("cold", 2, adapter="cold")
    arrived = run.engine.clock()
    for i in range(600):
        while len(run.engine.queue.waiting) < 6:
            run.send("hot", 5, adapter="hot")
            run.send(f"crowd{i % 3}", 3, adapter=f"crowd{i % 3}")
        run.step()
        if cold in run.results:
            break
    assert cold in run.results
    assert run.results[cold].error is None
    assert run.engine.clock() - arrived < 200


# -- fair shares ---------------------------------------------------------------------------------------------------


def service(fairness: str, steps: int = 200) -> Counter:
    """Tokens each tenant got while all were backlogged; one sends ten times as many requests."""
    run = Run(bench(fairness, batch=4))
    for _ in range(200):
        for _ in range(10):
            run.send("noisy", 6)
        for tenant in ("quiet", "calm"):
            run.send(tenant, 6)
    run.step(steps)
    waiting = Counter(sequence.request.tenant for sequence in run.engine.queue.waiting.values())
    assert min(waiting[tenant] for tenant in ("noisy", "quiet", "calm")) > 0, "not backlogged any more"
    return Counter(
        {
            tenant: sum(
                len(result.tokens) for result in run.results.values() if result.request.tenant == tenant
            )
            for tenant in waiting
        }
    )


def test_a_noisy_tenant_gets_no_more_than_the_others():
    got = service("fair")
    assert (
        max(got.values()) - min(got.values()) <= 2 * 4 * 6
    )  # twice what a whole batch of requests can be apart


def test_first_come_first_served_gives_the_noisy_tenant_nearly_all():
    """The proof that the test above can fail."""
    got = service("fcfs")
    assert got["noisy"] > 7 * got["quiet"]


def test_long_prompts_are_paid_for():
    run = Run(bench("fair", batch=1, kv_pages=1000))
    for _ in range(60):
        run.send("long", 2, prompt=40)
        run.send("short", 2, prompt=4)
    run.step(60)
    ended = Counter(result.request.tenant for result in run.results.values())
    cost = {"long": 40 * PROMPT_WEIGHT + 2 * OUTPUT_WEIGHT, "short": 4 * PROMPT_WEIGHT + 2 * OUTPUT_WEIGHT}
    assert ended["short"] / ended["long"] == pytest.approx(cost["long"] / cost["short"], rel=0.25)


def test_counters_are_checked_after_each_admission_not_once_a_step():
    """Else a whole batch would go to whoever is behind by one token."""
    run = Run(bench("fair", batch=4))
    for tenant in ("a", "b"):
        for _ in range(8):
            run.send(tenant, 4, prompt=3)
    run.step()
    assert Counter(sequence.request.tenant for sequence in run.engine.running) == {"a": 2, "b": 2}


def test_idling_earns_no_credit():
    run = Run(bench("fair", batch=1))
    run.send("late", 2)
    run.finish()
    for _ in range(200):
        run.send("busy", 2)
    run.step(60)
    for _ in range(60):
        run.send("late", 2)
    before = len(run.results)
    run.step(40)
    ended = [result.request.tenant for result in list(run.results.values())[before:]]
    assert abs(ended.count("late") - ended.count("busy")) <= 2


def test_using_idle_capacity_is_no_debt():
    """Who had the server alone is not made to wait until a newcomer has caught up."""
    run = Run(bench("fair", batch=1))
    for _ in range(50):
        run.send("early", 2)
    run.finish()
    for _ in range(40):
        run.send("new", 2)
    for _ in range(40):
        run.send("early", 2)
    before = len(run.results)
    run.step(40)
    ended = [result.request.tenant for result in list(run.results.values())[before:]]
    assert abs(ended.count("new") - ended.count("early")) <= 2


def test_a_tenant_that_gave_up_holds_no_place():
    run = Run(bench("fair", batch=1))
    gone = [run.send("gone", 2) for _ in range(3)]
    for id in gone:
        run.engine.abort(id)
    run.send("here", 2)
    run.finish()
    assert [run.results[id].finish for id in gone] == ["abort"] * 3
    assert not run.engine.queue.counters.here


# -- bounds --------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_forgets_the_request():
    run = Run(bench(limit=2))
    run.send("a")
    run.send("b")
    with pytest.raises(QueueFull) as refused:
        run.send("c")
    assert refused.value.retry_after > 0
    assert "c" not in run.engine.queue.counters.here
    run.finish()
    run.send("c")
    run.finish()
    assert len(run.results) == 3


def test_an_unknown_order_is_refused():
    with pytest.raises(LabsError, match="fcfs"):
        Queue("lifo")


def test_the_queue_is_empty_when_all_is_over():
    run = Run(bench("fair", batch=3, slots=2))
    draw = random.Random(0)
    for _ in range(40):
        run.send(draw.choice("abc"), draw.randint(1, 5), adapter=draw.choice([None, "x", "y", "z"]))
    run.finish()
    assert not run.engine.queue.waiting
    assert not run.engine.queue.counters.here
    assert len(run.results) == 40
    assert all(result.error is None for result in run.results.values())


def test_closing_ends_what_still_waits_or_runs():
    run = Run(bench(batch=1))
    ids = [run.send("t", 50) for _ in range(2)]
    run.step(3)
    run.engine.close()
    assert [run.results[id].finish for id in ids] == ["abort"] * 2


# -- what the waiting was for --------------------------------------------------------------------------------------


def test_the_wait_is_told_apart_into_queue_load_and_prefill():
    run = Run(bench(batch=1, load=3))
    first = run.send("a", 10, adapter="x")
    run.finish()
    timing = run.results[first].timing
    assert (timing.queue, timing.load, timing.prefill) == (0, 3, 1)
    assert timing.ttft == 4


def test_waiting_for_a_row_is_queue_time_though_the_adapter_was_cold():
    """The load took three seconds; the batch was full for ten."""
    run = Run(bench(batch=1, load=3))
    run.send("a", 10)
    run.step()
    cold = run.send("b", 2, adapter="x")
    run.finish()
    timing = run.results[cold].timing
    assert timing.load == 3
    assert timing.queue >= 5
