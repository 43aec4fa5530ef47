"""The twin decides as the engine does, its costs are found again by the fit, and its clock alone makes time."""

import math

import numpy as np
import pytest

from labs_lib.errors import LabsError
from labs_lib.serving import twin as twins
from labs_lib.serving.adapter import preflight
from labs_lib.serving.engine import Engine
from labs_lib.serving.layout import Layout
from labs_lib.serving.replay import replay
from labs_lib.serving.tiers import HostAdapter
from labs_lib.serving.twin import DECODE, LOAD, PREFILL, STEP, Costs, VirtualClock, VirtualLoader
from labs_lib.serving.types import Request
from labs_lib.serving.workload import closed, poisson, uniform, zipf

from .conftest import VOCABULARY, small_model

FREE = Costs(*(dict.fromkeys(units, 0.0) for units in (PREFILL, DECODE, STEP, LOAD)))


def costs(**changes: dict) -> Costs:
    """Costs of zero but for those given: costs(decode={"call": 1})."""
    parts = {name: dict(getattr(FREE, name)) for name in ("prefill", "decode", "step", "load")}
    for name, units in changes.items():
        parts[name] |= units
    return Costs(**parts)


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout.of(small_model())


class AtNextPoll:
    """A loader without a thread: what is asked for is there at the next step, in the engine as in the twin."""

    def __init__(self, read) -> None:
        self._read, self._asked = read, []

    def start(self, adapter: str) -> None:
        self._asked.append(adapter)

    def finished(self):
        asked, self._asked = self._asked, []
        return [(adapter, self._read(adapter)) for adapter in asked]

    def close(self) -> None:
        pass


def locked(engine: Engine, clock: VirtualClock, jobs) -> list[tuple]:
    """Submit each job before its step, one second per step; what the ledger saw."""
    left = sorted(jobs, key=lambda job: job[0])
    for step in range(10_000):
        clock.now = float(step)
        while left and left[0][0] <= step:
            engine.submit(left.pop(0)[1])
        engine.step()
        if not left and not engine.running and not engine.queue.waiting:
            break
    return [(e.at, e.what, e.adapter, e.tenant, tuple(sorted(e.more.items()))) for e in engine.ledger.events]


@pytest.mark.parametrize("policy", ["separate", "unified"])
@pytest.mark.parametrize("fairness", ["fcfs", "fair"])
def test_the_twin_decides_as_the_engine_does(zoo, policy, fairness):
    rng = np.random.default_rng(7)
    shas = [None, *zoo.shas.values()]
    start = rng.integers(
        3, VOCABULARY, 40
    ).tolist()  # prompts share beginnings, so that the prefix cache has work
    jobs = []
    for i in range(60):
        adapter = shas[min(int(rng.exponential(2.5)), len(shas) - 1)]
        prompt = start[: rng.integers(0, 40)] + rng.integers(3, VOCABULARY, rng.integers(1, 12)).tolist()
        tenant = f"tenant-{shas.index(adapter)}"
        request = Request(prompt, tenant, adapter, max_tokens=int(rng.integers(1, 9)), ignore_eos=True)
        jobs.append((i // 3, request))
    pages = {sha: preflight(zoo.folder_of(sha)).pages for sha in zoo.shas.values()}
    layout = Layout.of(small_model())
    settings = {
        "slots": 3,
        "max_rank": 8,
        "max_batch": 5,
        "kv_tokens": 256,
        "host_bytes": 20 * layout.width * 4,  # twenty pages: three or four adapters
        "policy": policy,
        "fairness": fairness,
    }
    clock = VirtualClock()
    with Engine(small_model(), zoo.folder_of, clock=clock, **settings) as engine:
        loader = engine.tiers.loader
        engine.tiers.loader = AtNextPoll(loader._read)
        real = locked(engine, clock, jobs)
        engine.tiers.loader = loader
    made = twins.twin(
        FREE, layout, pages=pages, max_tokens=engine.max_tokens, vocabulary=VOCABULARY, **settings
    )
    simulated = locked(made, made.clock, jobs)
    kinds = {event[1] for event in real}
    assert {
        "load",
        "host",
        "device",
        "evict",
        "drop",
        "admit",
        "end",
    } <= kinds  # the trace does put it under strain
    assert simulated == real


def test_loads_come_one_after_the_other():
    clock = VirtualClock()
    loader = VirtualLoader(
        costs(load={"call": 1.0, "byte": 0.1}), clock, lambda adapter: HostAdapter(adapter, 1, 10)
    )
    loader.start("a")
    loader.start("b")
    assert loader.next == 2.0 and loader.busy and not loader.finished()
    clock.reach(2.0)
    assert [name for name, _ in loader.finished()] == ["a"]
    clock.reach(3.9)
    assert not loader.finished()
    clock.reach(4.0)
    assert [name for name, _ in loader.finished()] == ["b"] and loader.next == math.inf and not loader.busy


def test_time_is_what_the_costs_say(layout):
    """One request by hand: load 3 s, prefill 2 s, then two decode steps of 1 s."""
    priced = costs(prefill={"call": 2.0}, decode={"call": 1.0}, load={"call": 3.0})
    engine = twins.twin(priced, layout, slots=2, max_rank=8, vocabulary=VOCABULARY)
    request = Request([5, 6], "t", "adapter", max_tokens=3, ignore_eos=True)
    run = replay(engine, [request], [0.5], wait=engine.wait)
    (answer,) = run.answers
    assert answer.stamps == [5.5, 6.5, 7.5]
    assert answer.ttft == 5.0 and answer.tpot == 1.0
    timing = answer.result.timing
    assert (timing.queue, timing.load, timing.prefill, timing.decode) == (0.0, 3.0, 2.0, 2.0)
    assert run.summary()["loads"] == 1 and run.summary()["hits"] == 0


def test_waiting_is_counted_from_the_arrival_in_the_trace(layout):
    """A request that comes while the engine computes cannot hide that it waited for the step to end."""
    engine = twins.twin(costs(prefill={"call": 10.0}), layout, vocabulary=VOCABULARY)
    requests = [Request([5], "t", None, max_tokens=1) for _ in range(2)]
    run = replay(engine, requests, [0.0, 1.0], wait=engine.wait)
    assert [answer.ttft for answer in run.answers] == [10.0, 19.0]


def test_fit_finds_the_costs_again():
    rng = np.random.default_rng(0)
    true = costs(
        prefill={"call": 2e-3, "token": 1e-5},
        decode={"call": 2e-3, "row": 1e-5, "adapter": 1e-4, "gathered": 1e-7},
        step={"call": 1e-4, "filled": 5e-4},
        load={"call": 4e-3, "byte": 1e-9},
    )
    log = twins.Log()
    for name, units in (("prefill", PREFILL), ("decode", DECODE), ("step", STEP), ("load", LOAD)):
        for _ in range(300):
            amounts = {unit: float(rng.integers(0, 30)) for unit in units} | {"call": 1}
            large = {"byte": 1e6, "cell": 1e3, "gathered": 1e3}
            amounts = {unit: value * large.get(unit, 1) for unit, value in amounts.items()}
            seconds = twins._price(getattr(true, name), amounts)
            log.of[name].append((amounts, seconds * rng.normal(1, 0.01)))
    found = log.fit()
    for name in ("prefill", "decode", "step", "load"):
        for unit, value in getattr(true, name).items():
            assert getattr(found, name)[unit] == pytest.approx(value, rel=0.1, abs=2e-5), (name, unit)
            assert getattr(found, name)[unit] >= 0
        assert found.fit[name]["r2"] > 0.9
    with pytest.raises(LabsError, match="no prefill"):
        twins.Log().fit()


def test_a_measured_engine_is_left_as_it_was_and_its_twin_plays_the_same_trace(zoo):
    trace = closed(16, uniform(len(zoo.shas)), prompt=(3, 20), output=(2, 6))
    shas = list(zoo.shas.values())
    requests = trace.requests(shas, VOCABULARY)
    settings = {"slots": 4, "max_rank": 8, "max_batch": 4}
    with Engine(small_model(), zoo.folder_of, **settings) as engine:
        executor = engine.executor
        with twins.recording(engine) as log:
            replay(engine, requests, outstanding=6)
        fitted = log.fit()
        assert engine.executor is executor and "step" not in vars(engine) and "submit" not in vars(engine)
        measured = replay(engine, requests, outstanding=6)
    for part in ("prefill", "decode", "step", "load"):
        assert all(value >= 0 for value in getattr(fitted, part).values())
    assert fitted.load["call"] + fitted.load["byte"] > 0  # the loader was measured too
    guess = twins.simulate(
        trace,
        fitted,
        engine.layout,
        adapters=shas,
        warm=trace,
        outstanding=6,
        vocabulary=VOCABULARY,
        **settings,
    )
    assert guess.run.tokens == measured.tokens == trace.summary()["output_tokens"]
    assert guess.run.seconds > 0
    table = twins.errors(measured, guess.run)
    assert table["tokens_per_s"]["error_percent"] is not None


def test_the_same_seed_gives_the_same_run_to_the_last_digit(layout):
    priced = costs(prefill={"token": 1e-4}, decode={"call": 1e-2, "adapter": 1e-3}, load={"call": 5e-2})
    trace = poisson(20, 80, zipf(40), seed=5)
    runs = [twins.simulate(trace, priced, layout, slots=8, max_rank=8).run for _ in range(2)]
    assert [a.stamps for a in runs[0].answers] == [a.stamps for a in runs[1].answers]
    assert runs[0].events == runs[1].events and runs[0].events["evict"] > 0


def test_thousands_of_adapters(layout):
    trace = poisson(500, 600, uniform(5000), output=2, seed=1)
    priced = costs(decode={"call": 1e-3}, load={"call": 1e-3})
    run = twins.simulate(trace, priced, layout, max_rank=8, queue_limit=1000).run
    assert run.summary()["failed"] == 0 and run.events["load"] > 400


def test_the_cliff_is_where_slots_and_host_memory_run_out(layout):
    """Slots for 8, host memory for 16: up to there adapters stay, beyond it nearly every request reads the disk."""
    priced = costs(prefill={"call": 1e-3}, decode={"call": 1e-3}, load={"call": 0.2})
    rows = twins.working_set(
        lambda adapters: poisson(20, 150, uniform(adapters), output=4, seed=2),
        [4, 8, 16, 32, 64],
        priced,
        layout,
        slots=8,
        max_rank=8,
        host_bytes=16 * 8 * layout.width * 4,
    )
    loads = [row["loads"] for row in rows]
    assert loads[:3] == [0, 0, 0] and loads[3] > 30 and loads[4] > loads[3]
    moved = [row["moved"] for row in rows]
    assert moved[0] == moved[1] == 0 and moved[2] > 0
    assert twins.cliff(rows, key="ttft_p99")["adapters"] == 32
    assert twins.cliff(rows[:3], key="ttft_p99") is None


def test_when_to_merge():
    """By hand: mixed 10 + 1 per adapter ms a step, base 8 ms: merging 30 ms pays after 30 / (11 - 8) = 10 steps."""
    mixed = costs(decode={"call": 10e-3, "adapter": 1e-3})
    base = costs(decode={"call": 8e-3})
    answer = twins.merge_or_multiplex(mixed, base, 30e-3, rows=8)
    assert answer["merge_after_steps"] == 10
    assert answer["multiplex_from"] == 2  # 12 ms against 2 x 8 ms
    assert answer["merged_ms"][4] == 32.0 and answer["multiplexed_ms"][4] == 14.0
    never = twins.merge_or_multiplex(base, base, 30e-3, rows=8)
    assert never["merge_after_steps"] is None


def test_a_setting_that_no_engine_has_is_refused(layout):
    with pytest.raises(LabsError, match="no setting 'slot'"):
        twins.twin(FREE, layout, slot=3)
