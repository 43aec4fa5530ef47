"""`labs bench serving`: the engine against other ways to serve many adapters, outputs verified before time is taken.

All arms play the same traces in one process, in turns, each time in another order; ratios are taken within a turn, so
that what slows the machine for a while slows both sides. What the first play of an arm costs (allocation, reading
adapters) is played before and not counted.
"""

import argparse
import copy
import gc
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from labs_lib import quiet
from labs_lib.errors import LabsError
from labs_lib.measure.timing import no_collection

SECTIONS = ("decode", "threads", "throughput", "scale", "latency", "profile", "twin")
LARGE = ("grid", "fleet")  # for a model of real size: `bench_grid`
REAL_SIZE = 5e8  # parameters, from which on these are the default
OPS = ("gather", "tiles", "blocks", "segments", "grouped", "sgmv", "loop")
TIERS = ("hits", "moved", "loads", "evictions", "drops")
PROMPT = 32  # tokens of each prompt in the decode section


@dataclass(frozen=True)
class Plan:
    """What is measured. `requests` per trace; `rounds` x `steps` decode steps; a ratio has one value per repeat."""

    model: str = "small"
    adapters: int = 50
    many: int = 1000
    rank: int = 8
    batch: int = 32
    slots: int = 32
    repeats: int = 3
    rounds: int = 15
    steps: int = 3
    requests: int = 256
    exponent: float = 1.0  # of Zipf's law: adapter k is asked for in proportion to k ** -exponent
    load: float = 0.7  # of the engine's measured throughput: how fast requests come in the latency section
    slo: tuple[float, float] = (0.2, 0.05)  # seconds: to the first token, and for each one after
    op: str = "auto"
    policy: str = "separate"
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1  # of torch on a CPU: steps this small are slower on two, see the section of that name
    seed: int = 0
    graphs: str = "auto"
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)  # of the grid
    ranks: tuple[int, ...] = (16, 8, 64)
    peft: tuple[int, ...] = (
        1,
        8,
        32,
    )  # batches of the grid at which PEFT is measured: its adapters take seconds each
    counts: tuple[int, ...] = (1, 10, 50, 100, 1000)  # registered adapters of the fleet
    payload_gb: float = 4.0  # host memory for the adapters of these two
    minutes: float | None = None  # that these two may take together
    sections: tuple[str, ...] | None = None  # None chooses by the model's size

    @property
    def engine(self) -> str:
        """The name of the engine's arm."""
        return "engine" if self.op == "auto" else f"engine:{self.op}"

    @classmethod
    def quick(cls, **changes) -> "Plan":
        """Small enough to look at in a minute; too small to publish."""
        return cls(**({"many": 200, "rounds": 9, "requests": 64} | changes))


@dataclass
class Bench:
    """A plan with its model and adapters; each section returns rows for the record."""

    plan: Plan
    model: object
    folders: dict[str, Path]  # of `many` adapters; the first `adapters` of them are the usual ones

    def setup(self, adapters: int | None = None, **changes):
        from labs_lib.serving.arms import Setup

        plan = self.plan
        chosen = dict(list(self.folders.items())[: adapters or plan.adapters])
        settings = {"batch": plan.batch, "slots": plan.slots, "rank": plan.rank, "policy": plan.policy}
        settings |= {"kv_tokens": 256 * plan.batch, "graphs": plan.graphs}
        return Setup(self.model, chosen, **(settings | changes))

    @property
    def shas(self) -> list[str]:
        return list(self.folders)

    @property
    def vocabulary(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    def trace(self, popularity: np.ndarray, seed: int, count: int | None = None, rate: float | None = None):
        from labs_lib.serving import workload

        count = count or self.plan.requests
        if rate is None:
            return workload.closed(count, popularity, seed=seed)
        return workload.poisson(rate, count, popularity, seed=seed)

    def play(self, name: str, engine, trace, open_loop: bool = False):
        """One replay; closed loops have two full batches under way."""
        from labs_lib.serving.replay import replay

        trace = trace.base_only() if name == "base" else trace
        requests = trace.requests(self.shas, self.vocabulary)
        at = [arrival.at for arrival in trace]
        with no_collection():
            return replay(engine, requests, at, outstanding=None if open_loop else 2 * self.plan.batch)


@contextmanager
def engines(names: Sequence[str], setup) -> Iterator[dict]:
    from labs_lib.serving.arms import build

    built = {}
    try:
        for name in names:
            built[name] = build(name, setup)
        yield built
    finally:
        for engine in built.values():
            engine.close()


def _right(name: str, verdict) -> None:
    if not verdict.right:
        raise LabsError(f"The arm {name!r} gives wrong answers ({verdict}): there is nothing to time.")


def _turns(names: Sequence[str], repeats: int) -> Iterator[tuple[int, str]]:
    """Each arm once per repeat, every other repeat in the reverse order."""
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            yield repeat, name


def _ratio(values: Sequence[float], of: Sequence[float], statistic: str = "mean") -> dict[str, float]:
    """Paired ratios values[i] / of[i] with their 95 % interval: the median, or the geometric mean of a few."""
    from labs_lib.measure.stats import bootstrap_ci, mean_ci

    ratios = np.array(values) / np.array(of)
    if statistic == "median":
        estimate = bootstrap_ci(ratios, np.median)
        found = estimate.value, estimate.lo, estimate.hi
    else:  # of logarithms, so that twice as fast and half as fast weigh the same, and no end is below zero
        estimate = mean_ci(np.log(ratios))
        found = tuple(np.exp([estimate.value, estimate.lo, estimate.hi]))
    return {name: round(float(value), 4) for name, value in zip(("ratio", "lo", "hi"), found, strict=True)}


def _against(row: dict, name: str, ratio: dict[str, float]) -> dict:
    return row | {f"{name}{'' if key == 'ratio' else '_' + key}": value for key, value in ratio.items()}


# -- decode steps -------------------------------------------------------------------------------------------------


def able_ops(bench: Bench) -> list[str]:
    """Ops that can run here: `blocks` needs slots side by side, `sgmv` a GPU, `grouped` a new torch."""
    from torch.nn import functional as F

    able = [op for op in OPS if op not in ("blocks", "sgmv", "grouped")]
    if bench.plan.policy == "separate":
        able.append("blocks")
    if bench.plan.device != "cpu":
        able.append("sgmv")
    if hasattr(F, "grouped_mm"):
        able.append("grouped")
    return able


class Decoding:
    """A full batch of rows with an adapter each, all past their prompts, for as many steps as asked for."""

    def __init__(self, name: str, engine, bench: Bench, steps: int, prompt: int = PROMPT) -> None:
        from labs_lib.serving.types import Request

        plan, rng = bench.plan, np.random.default_rng(bench.plan.seed)
        self.engine, self.results = engine, []
        shas = [None if name.startswith("base") else sha for sha in bench.shas[: plan.batch]]
        engine.generate([Request([3], "warm-up", sha, max_tokens=1) for sha in shas])  # all on the device now
        for k, sha in enumerate(shas):
            words = rng.integers(3, bench.vocabulary, prompt).tolist()
            request = Request(words, f"tenant-{k}", sha, max_tokens=steps + 8, ignore_eos=True)
            engine.submit(request, on_end=self.results.append)
        while len(engine.running) < plan.batch:
            engine.step()
            if self.results:
                raise LabsError(f"The arm {name!r} could not serve its batch: {self.results[0].error}")

    def finish(self) -> list:
        """End the requests and return their results."""
        for sequence in list(self.engine.running):
            self.engine.abort(sequence.id)
        while self.engine.running:
            self.engine.step()
        return self.results


def decode(bench: Bench, oracle) -> list[dict]:
    """Time of a decode step at a full batch of distinct adapters."""
    plan = bench.plan
    names = ["base", plan.engine, *(f"engine:{op}" for op in able_ops(bench)), "peft_mixed", "merged"]
    names = list(dict.fromkeys(names))
    warm = 5
    total = warm + plan.rounds * (plan.steps + 1)
    setup = bench.setup(plan.batch, slots=plan.batch, kv_tokens=plan.batch * (total + 64))
    times: dict[str, list[float]] = {name: [] for name in names}
    with engines(names, setup) as built:
        for name, engine in built.items():
            short = Decoding(name, engine, bench, 8)
            for _ in range(4):
                engine.step()
            _right(name, oracle.verify(short.finish()))
        ready = {name: Decoding(name, engine, bench, total) for name, engine in built.items()}
        for name, _ in [(name, i) for name in names for i in range(warm)]:
            built[name].step()
        with no_collection():
            for _, name in _turns(names, plan.rounds):
                times[name].append(_step_seconds(built[name].step, plan.steps))
        for name, each in ready.items():
            _right(name, oracle.verify(each.finish()))
    rows = []
    for name in names:
        row = {"section": "decode", "arm": name, "ms": round(1e3 * float(np.median(times[name])), 4)}
        row = _against(row, "of_base", _ratio(times["base"], times[name], "median"))
        row = _against(row, "of_peft", _ratio(times["peft_mixed"], times[name], "median"))
        rows.append(
            row
            | {
                "batch": plan.batch,
                "distinct": plan.batch,
                "rounds": plan.rounds,
                "past": PROMPT + total // 2,
            }
        )
    return rows


def threads(bench: Bench, oracle) -> list[dict]:
    """A decode step of the base and the engine on one thread and on all: are more of them faster?"""
    import torch

    plan, counts = bench.plan, sorted({1, os.cpu_count() or 1})
    if plan.device != "cpu":
        return []
    total = len(counts) * plan.rounds * (plan.steps + 1)
    setup = bench.setup(plan.batch, slots=plan.batch, kv_tokens=plan.batch * (total + 64))
    cases = [(name, count) for name in ("base", plan.engine) for count in counts]
    times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    with engines(["base", plan.engine], setup) as built:
        ready = {name: Decoding(name, engine, bench, total) for name, engine in built.items()}
        try:
            with no_collection():
                for _, case in _turns(cases, plan.rounds):
                    torch.set_num_threads(case[1])
                    times[case].append(_step_seconds(built[case[0]].step, plan.steps))
        finally:
            torch.set_num_threads(plan.threads)
        for name, each in ready.items():
            _right(name, oracle.verify(each.finish()))
    return [
        {"section": "threads", "arm": name, "threads": count, "ms": round(1e3 * float(np.median(found)), 4)}
        for (name, count), found in times.items()
    ]


def _step_seconds(step: Callable[[], object], steps: int) -> float:
    """Mean of some steps, after one that is not counted: another arm's turn has filled the processor's caches."""
    step()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps


# -- whole traces -------------------------------------------------------------------------------------------------


def compare(
    bench: Bench,
    oracle,
    section: str,
    arms: Mapping[str, tuple[str, object, Callable[[int], object]]],
    against: Sequence[str],
    *,
    open_loop: bool = False,
    sample: int | None = None,
) -> tuple[list[dict], dict[str, list]]:
    """Play traces on arms in turns.

    Args:
        arms: label: (name of the arm, its setup, trace by seed).
        against: labels whose throughput the others' is divided by.
        sample: verify the answers of so many adapters only.

    Returns rows, one per arm, numbers being means over the repeats; and the runs by label.
    """
    from contextlib import ExitStack

    plan = bench.plan
    runs: dict[str, list] = {label: [] for label in arms}
    with ExitStack() as stack:
        built = {
            label: stack.enter_context(engines([name], setup))[name]
            for label, (name, setup, _) in arms.items()
        }
        for label, (name, _, trace) in arms.items():  # warm-up, and the proof that the arm is right
            run = bench.play(name, built[label], trace(plan.seed + 1000))
            _right(label, oracle.verify(run.results, sample))
        for repeat, label in _turns(list(arms), plan.repeats):
            name, _, trace = arms[label]
            run = bench.play(name, built[label], trace(plan.seed + repeat), open_loop)
            runs[label].append(run)
            _say(f"{section}: {label}, {run.throughput:,.0f} tokens/s")
        for label, done in runs.items():
            _right(label, oracle.verify([result for run in done for result in run.results], sample))
    rows = []
    for label, done in runs.items():
        summaries = [run.summary(*plan.slo) for run in done]
        row = {"section": section, "arm": label, "repeats": len(done)} | _mean(summaries)
        if arms[label][0].startswith("engine"):
            row |= lora_work(bench, done)
        else:  # the other arms hold all adapters all the time
            row = {key: value for key, value in row.items() if key not in TIERS}
        for other in against:
            values, base = ([run.throughput for run in runs[each]] for each in (label, other))
            row = _against(row, f"of_{other}", _ratio(values, base))
        rows.append(row)
    return rows, runs


def lora_work(bench: Bench, runs: Sequence) -> dict[str, float]:
    """Per run: FLOPs of the adapters' products, bytes moved from host to device and read from disk."""
    from labs_lib.serving.layout import Layout

    layout = Layout.of(bench.model)
    flops = 2 * bench.plan.rank * sum(spec.in_features + spec.out_features for spec in layout.linears)
    page = layout.width * bench.model.get_input_embeddings().weight.element_size()
    named = [result for run in runs for result in run.results if result.request.adapter is not None]
    tokens = sum(len(result.request.prompt) + len(result.tokens) - 1 for result in named)
    moved, loads = (sum(run.events[what] for run in runs) for what in ("device", "load"))
    return {
        "adapter_flops": round(flops * tokens / len(runs)),
        "moved_bytes": round(moved * bench.plan.rank * page / len(runs)),
        "loaded_bytes": round(loads * bench.plan.rank * page / len(runs)),
    }


def _mean(summaries: Sequence[dict]) -> dict:
    return {
        key: None
        if any(summary[key] is None for summary in summaries)
        else round(float(np.mean([summary[key] for summary in summaries])), 3)
        for key in summaries[0]
    }


def throughput(bench: Bench, oracle) -> list[dict]:
    """Tokens per second with as many requests waiting as fit twice, uniform and Zipf."""
    from labs_lib.serving.workload import uniform, zipf

    plan, rows = bench.plan, []
    patterns = {"uniform": uniform(plan.adapters), "zipf": zipf(plan.adapters, plan.exponent)}
    for pattern, popularity in patterns.items():
        names = ["base", plan.engine, "peft_mixed", "peft_switch", "merged"]
        arms = {
            name: (name, bench.setup(), lambda seed, p=popularity: bench.trace(p, seed)) for name in names
        }
        more, _ = compare(bench, oracle, f"throughput {pattern}", arms, ("base", "peft_mixed"))
        rows += [
            row | {"section": "throughput", "pattern": pattern, "adapters": plan.adapters} for row in more
        ]
    return rows


def scale(bench: Bench, oracle) -> list[dict]:
    """The same arrivals and lengths for few and for many registered adapters, with the same pool."""
    from labs_lib.serving.workload import zipf

    plan = bench.plan
    popularity = {count: zipf(count, plan.exponent) for count in (plan.adapters, plan.many)}
    arms = {
        str(count): (
            plan.engine,
            bench.setup(count),
            lambda seed, p=shares: bench.trace(p, seed, 2 * plan.requests),
        )
        for count, shares in popularity.items()
    }
    rows, _ = compare(bench, oracle, "scale", arms, (str(plan.adapters),), sample=64)
    return [
        row | {"adapters": int(row["arm"]), "slots": plan.slots, "exponent": plan.exponent} for row in rows
    ]


def latency(bench: Bench, oracle, rate: float) -> list[dict]:
    """Open loop: requests come at `rate` a second, whether or not the arm keeps up."""
    from labs_lib.serving.workload import zipf

    plan = bench.plan
    popularity = zipf(plan.adapters, plan.exponent)
    arms = {
        name: (name, bench.setup(), lambda seed: bench.trace(popularity, seed, 2 * plan.requests, rate))
        for name in ("base", plan.engine, "peft_mixed")
    }
    rows, _ = compare(bench, oracle, "latency", arms, (), open_loop=True)
    limits = {"slo_ttft": plan.slo[0], "slo_tpot": plan.slo[1]}
    return [row | {"rate": round(rate, 3), **limits} for row in rows]


# -- where time goes, and the twin ----------------------------------------------------------------------------------


def profile(bench: Bench) -> list[dict]:
    """A decode step by kind of work, for the base and the engine; and what it has to do at least."""
    from labs_lib.serving import profiler

    plan, rows = bench.plan, []
    seconds = 0.5 if plan.rounds < 10 else 2.0
    setup = bench.setup(plan.batch, slots=plan.batch, kv_tokens=512 * plan.batch)
    steps = min(400, bench.model.config.max_position_embeddings - 8) - PROMPT
    with engines(["base", plan.engine], setup) as built:
        for name, engine in built.items():
            batch = Decoding(name, engine, bench, steps)
            operations = profiler.operations(engine.step)
            started, calls = time.perf_counter(), 0

            def step(engine=engine, name=name):
                nonlocal batch, calls
                calls += 1
                if not engine.running or engine.running[0].length > steps:
                    batch.finish()
                    batch = Decoding(name, engine, bench, steps)
                engine.step()

            for _ in range(20):
                step()
            started, calls = time.perf_counter(), 0
            share = profiler.shares(step, seconds) if plan.device == "cpu" else {}
            if not share:
                for _ in range(50):
                    step()
            ms = 1e3 * (time.perf_counter() - started) / calls
            batch.finish()
            distinct = 0 if name == "base" else plan.batch
            floor = profiler.floor(
                engine.executor.model,
                engine.layout,
                plan.batch,
                plan.rank * bool(distinct),
                distinct,
                PROMPT + steps // 2,
            )
            rows.append(
                {"section": "profile", "arm": name, "ms": round(ms, 4), "operations": operations}
                | {f"ms: {kind}": round(ms * part, 4) for kind, part in share.items()}
                | floor
            )
    return rows


def predict(bench: Bench, oracle, rate: float) -> list[dict]:
    """Fit the twin's costs to one run, predict others, and say how wrong it was; then ask it what was not measured."""
    from labs_lib.serving import twin
    from labs_lib.serving.workload import poisson, uniform, zipf

    plan, few, many = bench.plan, bench.plan.adapters, bench.plan.many
    settings = {"slots": plan.slots, "max_rank": plan.rank, "max_batch": plan.batch, "policy": plan.policy}
    settings |= {"kv_tokens": 256 * plan.batch, "queue_limit": 1 << 20}
    popularity = {few: zipf(few, plan.exponent), many: zipf(many, plan.exponent)}
    rows, costs = [], {}
    for name in ("base", plan.engine):
        with engines([name], bench.setup(many)) as built:
            engine = built[name]
            bench.play(name, engine, bench.trace(popularity[many], plan.seed + 1000))
            with twin.recording(engine) as log:
                for seed in (2000, 2001):
                    bench.play(name, engine, bench.trace(popularity[many], plan.seed + seed))
                    bench.play(name, engine, bench.trace(popularity[few], plan.seed + seed, rate=rate), True)
            costs[name] = log.fit()
            layout = engine.layout
    rows.append({"section": "twin", "what": "costs", **costs[plan.engine].to_dict()})
    cases = {
        f"{few} adapters, open loop": (few, bench.trace(popularity[few], plan.seed + 3000, rate=rate), True),
        f"{many} adapters, closed loop": (many, bench.trace(popularity[many], plan.seed + 3001), False),
    }
    for what, (count, trace, open_loop) in cases.items():
        warm = bench.trace(popularity[count], plan.seed + 1000)
        with engines([plan.engine], bench.setup(count)) as built:
            engine = built[plan.engine]
            bench.play(plan.engine, engine, warm)
            measured = bench.play(plan.engine, engine, trace, open_loop)
            _right(plan.engine, oracle.verify(measured.results, 64))
        outstanding = None if open_loop else 2 * plan.batch
        guess = twin.simulate(
            trace,
            costs[plan.engine],
            layout,
            adapters=bench.shas,
            warm=warm,
            outstanding=outstanding,
            vocabulary=bench.vocabulary,
            pages=plan.rank,
            **settings,
        )
        for key, numbers in twin.errors(measured, guess.run, *plan.slo).items():
            rows.append({"section": "twin", "what": what, "key": key, **numbers})
    # What nobody measured: at what number of equally busy adapters do the slots, and then host memory, run out?
    started = time.perf_counter()
    times = (0.25, 0.5, 1, 2, 4, 16, 64) if plan.rounds > 9 else (0.5, 1, 2, 4)
    sizes = sorted({max(1, int(plan.slots * each)) for each in times})
    found = twin.working_set(
        lambda n: poisson(0.9 * rate / plan.load, 4 * plan.requests, uniform(n), seed=plan.seed),
        sizes,
        costs[plan.engine],
        layout,
        vocabulary=bench.vocabulary,
        pages=plan.rank,
        **settings,
    )
    seconds = round(time.perf_counter() - started, 1)
    rows += [{"section": "twin", "what": "working set", **row} for row in found]
    edge = twin.cliff(found, key="ttft_p99", drop=0.5)
    rows.append(
        {
            "section": "twin",
            "what": "cliff",
            "adapters": edge and edge["adapters"],
            "per_slot": edge and edge["per_slot"],
            "simulated_seconds": seconds,
        }
    )
    merging = merge_seconds(bench)
    answer = twin.merge_or_multiplex(costs[plan.engine], costs["base"], merging, rows=plan.batch)
    rows.append(
        {"section": "twin", "what": "merge or multiplex", "merge_ms": round(1e3 * merging, 3), **answer}
    )
    return rows


def merge_seconds(bench: Bench) -> float:
    """Seconds to merge one adapter into the weights and take it out again, by PEFT; the fastest of a few."""
    from peft import PeftModel

    peft = PeftModel.from_pretrained(copy.deepcopy(bench.model), bench.folders[bench.shas[0]])
    found = []
    for _ in range(5):
        started = time.perf_counter()
        peft.merge_adapter()
        peft.unmerge_adapter()
        found.append(time.perf_counter() - started)
    return min(found)


# -- the whole ------------------------------------------------------------------------------------------------------


def run(plan: Plan, folder: Path) -> list[dict]:
    """All sections of a plan; adapters are written below `folder`. Rows for the record."""
    from labs_lib.serving.arms import Oracle
    from labs_lib.serving.workload import random_adapters

    known = (*SECTIONS, *LARGE)
    if unknown := set(plan.sections or ()) - set(known):
        raise LabsError(f"There is no section {min(unknown)!r}; there are: {', '.join(known)}.")
    from labs_lib.serving.bench_grid import Budget, Made, fleet, grid

    budget = Budget(plan.minutes)
    model = load(plan)
    if plan.sections is None:
        plan = replace(plan, sections=LARGE if model.num_parameters() > REAL_SIZE else SECTIONS)
    rows = []
    if set(plan.sections) & set(LARGE):
        large = Bench(plan, model, {})
        made = Made(large)
        for section, measure in (("grid", grid), ("fleet", fleet)):
            if section in plan.sections:
                _say(f"section {section}")
                part = 0.6 if section == "grid" and "fleet" in plan.sections else 1.0
                rows += measure(large, budget.share(part), made)
        del made, large  # their copy of the model
        if not set(plan.sections) & set(SECTIONS):
            return rows
    plan = replace(plan, sections=tuple(each for each in plan.sections if each in SECTIONS))
    needs_many = {"scale", "twin"} & set(plan.sections)
    count = max(plan.many if needs_many else 0, plan.adapters, plan.batch)
    _say(f"writing {count} adapters of rank {plan.rank}")
    bench = Bench(plan, model, random_adapters(model, count, folder, rank=plan.rank, seed=plan.seed))
    oracle = Oracle(model, bench.folders)
    gc.collect()
    gc.freeze()  # what is here stays: a collection between two plays need not look at it again
    try:
        return rows + _sections(bench, oracle)
    finally:
        gc.unfreeze()


def _sections(bench: Bench, oracle) -> list[dict]:
    from labs_lib.serving.workload import zipf

    plan = bench.plan
    rows = [tell_apart(bench, oracle)]
    rate = None
    for section in plan.sections:
        _say(f"section {section}")
        if section == "decode":
            rows += decode(bench, oracle)
        elif section == "threads":
            rows += threads(bench, oracle)
        elif section == "throughput":
            rows += throughput(bench, oracle)
        elif section == "scale":
            rows += scale(bench, oracle)
        elif section == "profile":
            rows += profile(bench)
        else:
            rate = rate or plan.load * capacity(bench, rows, zipf(plan.adapters, plan.exponent))
            rows += latency(bench, oracle, rate) if section == "latency" else predict(bench, oracle, rate)
    return rows


def capacity(bench: Bench, rows: Sequence[dict], popularity: np.ndarray) -> float:
    """Requests per second that the engine can take, from the throughput section or a run of its own."""
    plan = bench.plan
    for row in rows:
        if row["section"] == "throughput" and row["arm"] == plan.engine and row["pattern"] == "zipf":
            return row["requests_per_s"]
    with engines([plan.engine], bench.setup()) as built:
        for seed in (1000, 0):
            done = bench.play(plan.engine, built[plan.engine], bench.trace(popularity, plan.seed + seed))
    return len(done.answers) / done.seconds


def tell_apart(bench: Bench, oracle) -> dict:
    """Can the oracle fail? Each answer is held against the next tenant's model: it should refuse all of them."""
    from labs_lib.serving.workload import uniform

    plan = bench.plan
    if plan.adapters < 2:
        raise LabsError("One adapter cannot be told from another: use --adapters 2 or more.")
    with engines([plan.engine], bench.setup()) as built:
        trace = bench.trace(uniform(min(8, plan.adapters)), plan.seed, 32)
        run = bench.play(plan.engine, built[plan.engine], trace)
    _right(plan.engine, oracle.verify(run.results))
    shas = bench.shas[: plan.adapters]
    return refusals(oracle, run.results, lambda sha: shas[(shas.index(sha) + 1) % len(shas)])


def refusals(oracle, results: Sequence, other: Callable[[str], str]) -> dict:
    """Hold each answer against the adapter `other(its own)`: a row that says how many the oracle refused."""
    refused = 0
    for result in results:
        wrong = replace(result, request=replace(result.request, adapter=other(result.request.adapter)))
        refused += not oracle.verify([wrong]).right
    if refused < len(results) / 2:
        raise LabsError(
            "The adapters answer too much alike for the oracle to tell them apart: make them stronger."
        )
    return {"section": "oracle", "answers": len(results), "refused_for_another_tenant": refused}


def load(plan: Plan):
    """The model: a base by its name; or of real size with random weights, a twin's name or `random:HIDDENxLAYERS`."""
    import torch

    from labs_lib.models.base import SIZES, load_base
    from labs_lib.models.twins import TWINS, random_like

    local = plan.model in SIZES or plan.model in TWINS or plan.model.startswith("random:")
    quiet.hub(wanted=not (local or Path(plan.model).is_dir()))
    dtype = getattr(torch, plan.dtype)
    if plan.model in TWINS:
        torch.manual_seed(plan.seed)
        return random_like(plan.model, plan.device, dtype)
    if not plan.model.startswith("random:"):
        return load_base(plan.model, dtype=dtype, device=plan.device)[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    try:
        hidden, layers = (int(word) for word in plan.model.removeprefix("random:").split("x"))
    except ValueError:
        raise LabsError(f"--model {plan.model}: write it as random:4096x32 (hidden size x layers).") from None
    torch.manual_seed(plan.seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=-(-8 * hidden // 3 // 256) * 256,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        max_position_embeddings=2048,
        dtype=dtype,
    )
    with torch.device(plan.device):
        return LlamaForCausalLM(config).to(dtype).eval()


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


def numbers(text: str) -> tuple[int, ...]:
    """An argument like 1,8,64."""
    try:
        found = tuple(int(word) for word in text.split(","))
        if min(found) < 1:
            raise ValueError
        return found
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of whole numbers above 0, as in 1,8,64"
        ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    plan = Plan()
    parser.add_argument(
        "--model",
        default=plan.model,
        help="a base, a folder, a hub id; of random weights a twin (llama-2-7b) or random:HIDDENxLAYERS "
        "(default: %(default)s)",
    )
    for name, told in {
        "adapters": "adapters that share the engine",
        "many": "adapters of the scale section",
        "rank": "of each adapter, on all linear layers",
        "batch": "rows that run together",
        "slots": "adapters that fit on the device",
        "repeats": "of each trace on each arm",
        "requests": "of a trace",
        "seed": "of adapters and traces",
    }.items():
        parser.add_argument(
            f"--{name}", type=int, default=None, help=f"{told} (default: {getattr(plan, name)})"
        )
    parser.add_argument(
        "--zipf",
        type=float,
        default=plan.exponent,
        help="adapter k is asked for like k ** -this (default: %(default)s)",
    )
    parser.add_argument(
        "--op", default=plan.op, help="how the engine applies adapters (default: %(default)s)"
    )
    parser.add_argument(
        "--policy", choices=["separate", "unified"], default=plan.policy, help="memory of the pool"
    )
    parser.add_argument("--device", default=plan.device, help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, else float32"
    )
    parser.add_argument(
        "--graphs", choices=["auto", "on", "off"], default=plan.graphs, help="recorded decode steps"
    )
    parser.add_argument(
        "--batches", type=numbers, default=plan.batches, help="of the grid (default: 1,2,4,...,64)"
    )
    parser.add_argument(
        "--ranks", type=numbers, default=plan.ranks, help="of the grid and fleet (default: 16,8,64)"
    )
    parser.add_argument(
        "--peft", type=numbers, default=plan.peft, help="batches at which PEFT takes part (default: 1,8,32)"
    )
    parser.add_argument(
        "--counts",
        type=numbers,
        default=plan.counts,
        help="of the fleet's adapters (default: 1,10,50,100,1000)",
    )
    parser.add_argument(
        "--payload-gb",
        type=float,
        default=plan.payload_gb,
        help="host memory for random adapters of grid and fleet; beyond it they share weights (default: %(default)g)",
    )
    parser.add_argument(
        "--minutes", type=float, help="for grid and fleet; what is not reached is said (default: no limit)"
    )
    parser.add_argument("--threads", type=int, default=plan.threads, help="of torch (default: %(default)s)")
    parser.add_argument(
        "--only",
        help=f"sections, with commas (default: {','.join(LARGE)} from half a billion parameters on, else "
        f"{','.join(SECTIONS)})",
    )
    parser.add_argument("--quick", action="store_true", help="a minute's look; nothing to publish")


def main(args: argparse.Namespace) -> int:
    import torch

    from labs_lib.measure.records import Record, save_record
    from labs_lib.serving import bench_report

    given = {
        name: getattr(args, name)
        for name in ("adapters", "many", "rank", "batch", "slots", "repeats", "requests", "seed")
        if getattr(args, name) is not None
    }
    given |= {"model": args.model, "exponent": args.zipf, "op": args.op, "policy": args.policy}
    given |= {
        "threads": args.threads,
        "device": args.device,
        "dtype": args.dtype or ("bfloat16" if torch.device(args.device).type == "cuda" else "float32"),
        "sections": tuple(args.only.split(",")) if args.only else None,
    }
    given |= {
        name: getattr(args, name)
        for name in ("graphs", "batches", "ranks", "peft", "counts", "payload_gb", "minutes")
    }
    if args.minutes is not None and args.minutes <= 0 or args.payload_gb <= 0:
        raise LabsError("--minutes and --payload-gb must be above 0.")
    plan = Plan.quick(**given) if args.quick else Plan(**given)
    if (
        min(
            plan.adapters,
            plan.many,
            plan.rank,
            plan.batch,
            plan.slots,
            plan.requests,
            plan.repeats,
            plan.threads,
        )
        < 1
    ):
        raise LabsError("All sizes must be at least 1.")
    torch.set_num_threads(plan.threads)
    quiet.silence()
    before = _load_average()
    with tempfile.TemporaryDirectory(prefix="labs-bench-") as folder:
        rows = run(plan, Path(folder))
    print(bench_report.tables(rows))
    load = {"before": before, "after": _load_average()}
    settings = {key: value for key, value in vars(plan).items() if key != "sections"}
    record = Record(
        "bench_serving",
        rows,
        note="every answer verified token by token against PEFT's merged models"
        + (", quick" if args.quick else ""),
        provenance={"settings": settings, "load_average": load},
    )
    path = save_record(record, device=plan.device)
    print(f"\nload average before {before}, after {load['after']}, {torch.get_num_threads()} threads")
    print(f"recorded in {path}")
    if drawn := bench_report.figure(rows, path.with_suffix(".png")):
        print(f"drawn in {drawn}")
    return 0


def _load_average() -> float | None:
    """Of the last minute: how busy the machine was, this process included."""
    return None if platform.system() == "Windows" else round(os.getloadavg()[0], 2)
