"""Two sections of `labs bench serving` for a model of real size, bounded in time.

`grid`: a decode step at each batch size, every row with an adapter of its own, at each rank: the base alone, the engine
with recorded steps and without, PEFT's mixed batch, a merged copy for each tenant while copies fit into memory.
`fleet`: whole traces, 1 to 1,000 registered adapters against the base alone.

Adapters are made in memory (`payloads`). What time or memory did not allow is a row that says so.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np

from labs_lib.measure.timing import no_collection
from labs_lib.serving.bench import (
    Bench,
    Decoding,
    _against,
    _ratio,
    _right,
    _say,
    _step_seconds,
    compare,
    engines,
    refusals,
)

PAST = (
    62  # tokens of each prompt: the window grows to 128 columns while steps are not timed yet, and no further
)
WARM = 4
SLOW_ROUNDS = 3  # of arms whose step takes many times the base's
CHECKED = 8  # adapters whose answers are verified
# Of the fleet's requests. All have one length, so that a whole batch starts and ends together: what is compared is
# mostly decoding, not how often prompts of single requests interrupt it.
PROMPT, OUTPUT, WAVES = 32, 64, 4


class Budget:
    """Minutes to spend: a case starts only if as much is left as the longest one of its kind has taken."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self._longest: dict[str, float] = {}

    def share(self, part: float) -> "Budget":
        """A part of what is left."""
        now = time.monotonic()
        return Budget(None if self.end is None else part * (self.end - now) / 60)

    def allows(self, kind: str) -> bool:
        return self.end is None or time.monotonic() + self._longest.get(kind, 0.0) < self.end

    def took(self, kind: str, seconds: float) -> None:
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))


def memory_left(device: str) -> float:
    """Bytes that can still be had."""
    import torch

    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return psutil.virtual_memory().available


def needs(arm: str, bench: Bench, adapters: int, adapter_bytes: int, tokens: int) -> float:
    """Bytes that an arm takes besides the base's weights: adapters or copies, keys and values in pages and window."""
    from labs_lib.serving.layout import Layout

    weights = sum(each.nbytes for each in bench.model.parameters())
    own = {"base": 0, "merged": adapters * weights}.get(arm.partition("/")[0], adapters * adapter_bytes)
    return own + 2 * tokens * Layout.of(bench.model).cell * bench.model.dtype.itemsize


class Made:
    """Adapters by rank, made when they are first needed, and the truth about their answers."""

    def __init__(self, bench: Bench) -> None:
        from labs_lib.serving.arms import Oracle
        from labs_lib.serving.payloads import Merging

        self.bench, self._payloads = bench, {}
        self.witness = Merging(bench.model)
        self.told: list[dict] = []  # whether the oracle can tell one adapter's answers from another's
        self.oracle = Oracle(bench.model, {}, witness=self.witness)

    def payloads(self, rank: int):
        from labs_lib.serving.payloads import Payloads

        plan = self.bench.plan
        if rank not in self._payloads:
            count = max(*plan.batches, *plan.counts)
            made = Payloads(self.bench.model, count, rank, 1e9 * plan.payload_gb, seed=plan.seed)
            _say(
                f"{count} adapters of rank {rank}, {made.nbytes / 1e6:,.0f} MB each, {made.distinct} different ones"
            )
            self._payloads[rank] = made
            self.witness.known.append(made)
        return self._payloads[rank]


# -- grid -----------------------------------------------------------------------------------------------------------


def grid_cases(batches: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, int]]:
    """(rank, batch): what most is asked about first, a batch of 32 at every rank; then from the smallest up."""
    first = [(rank, 32) for rank in ranks if 32 in batches]
    return first + [(rank, batch) for batch in sorted(batches) for rank in ranks if batch != 32]


def grid(bench: Bench, budget: Budget, made: Made) -> list[dict]:
    """One row for each rank, batch and arm."""
    plan, rows, missed = bench.plan, [], []
    for rank, batch in grid_cases(plan.batches, plan.ranks):
        if not budget.allows("grid"):
            missed.append(f"rank {rank}, batch {batch}")
            continue
        started = time.monotonic()
        rows += _case(bench, made, rank, batch)
        budget.took("grid", time.monotonic() - started)
    if missed:
        rows.append({"section": "not reached", "what": "grid: " + "; ".join(missed), "minutes": plan.minutes})
    return rows


def _case(bench: Bench, made: Made, rank: int, batch: int) -> list[dict]:
    """The arms of one rank and batch, in turns."""
    gc.collect()  # engines that are closed still hold their memory until then
    payloads, oracle = made.payloads(rank), made.oracle
    total = WARM + bench.plan.rounds * (bench.plan.steps + 1)
    tokens = batch * (PAST + total + 24)
    small = Bench(
        replace(bench.plan, batch=batch, rank=rank), bench.model, dict.fromkeys(payloads.names[:batch])
    )
    setup = small.setup(batch, slots=batch, kv_tokens=tokens, payloads=payloads)
    ours = bench.plan.engine
    names = [
        "base",
        ours,
        *(["base/eager", f"{ours}/eager"] if _recorded(bench) else []),
        "peft_mixed",
        "merged",
    ]
    common = {
        "section": "grid",
        "rank": rank,
        "batch": batch,
        "distinct": batch,
        "payloads": payloads.distinct,
    }
    rows, left = [], 0.9 * memory_left(bench.plan.device)
    for name in list(names):
        need = needs(name, bench, batch, payloads.nbytes, tokens)
        if need > left:
            names.remove(name)
            why = f"needs {need / 1e9:.1f} GB more, {left / 1e9:.1f} are left"
            rows.append({**common, "arm": name, "missing": why})
            _say(f"rank {rank}, batch {batch}: {name} {why}")
        else:
            left -= need
    times: dict[str, list[float]] = {name: [] for name in names}
    with engines(names, setup) as built:
        for name, engine in built.items():
            short = Decoding(name, engine, small, 8, PAST)
            for _ in range(4):
                engine.step()
            done = short.finish()
            _right(name, oracle.verify(done, CHECKED))
            if name == ours and not made.told:
                made.told = [refusals(oracle, done[:CHECKED], payloads.another)]
                rows += made.told
        ready = {name: Decoding(name, engine, small, total, PAST) for name, engine in built.items()}
        for name in names:
            for _ in range(WARM):
                built[name].step()
        with no_collection():
            for name in _uneven_turns(names, bench.plan.rounds):
                times[name].append(_step_seconds(built[name].step, bench.plan.steps))
        for name, each in ready.items():
            _right(name, oracle.verify(each.finish(), CHECKED))
    for name in names:
        count = len(times[name])
        base = times["base"][:count]
        row = {**common, "arm": name, "rounds": count, "past": PAST + total // 2}
        row["ms"] = round(1e3 * float(np.median(times[name])), 4)
        row["added_ms"] = round(1e3 * float(np.median(np.array(times[name]) - np.array(base))), 4)
        rows.append(_against(row, "of_base", _ratio(base, times[name], "median")))
    of = {row["arm"]: row for row in rows if "ms" in row}
    _say(
        f"rank {rank}, batch {batch}: base {of['base']['ms']:.2f} ms, engine {of[ours]['ms']:.2f} ms "
        f"({of[ours]['of_base']:.2f} of its speed)"
        if ours in of
        else f"rank {rank}, batch {batch}: no room"
    )
    return rows


def _uneven_turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Like `bench._turns`, but arms that step many times per batch take part in the first rounds only."""
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            if turn < SLOW_ROUNDS or name not in ("peft_mixed", "merged"):
                yield name


def _recorded(bench: Bench) -> bool:
    """Whether decode steps are recorded here, so that without is another arm."""
    import torch

    return bench.plan.graphs == "on" or (
        bench.plan.graphs == "auto" and torch.device(bench.plan.device).type == "cuda"
    )


# -- fleet ----------------------------------------------------------------------------------------------------------


def fleet(bench: Bench, budget: Budget, made: Made) -> list[dict]:
    """Tokens per second with many registered adapters, asked for alike, against the base alone on the same trace."""
    from labs_lib.serving.workload import closed, uniform

    plan, rows, missed = bench.plan, [], []
    requests = min(plan.requests, WAVES * plan.batch)
    counts = sorted(
        plan.counts, key=lambda count: (count != 100, count != 1, -count)
    )  # what claim 32 says, first
    for rank, count in product([rank for rank in plan.ranks if rank != 16] or plan.ranks, counts):
        if not budget.allows("fleet"):
            missed.append(f"{count} adapters of rank {rank}")
            continue
        started = time.monotonic()
        gc.collect()
        payloads = made.payloads(rank)
        large = Bench(replace(plan, rank=rank), bench.model, dict.fromkeys(payloads.names))
        slots = _slots(bench, count, payloads.nbytes)
        setup = large.setup(count, slots=slots, payloads=payloads, host_bytes=1 << 60)
        alone = large.setup(1, payloads=payloads)
        trace = partial(closed, requests, uniform(count), prompt=PROMPT, output=OUTPUT)
        arms = {
            name: (name, settings, lambda seed, trace=trace: trace(seed=seed))
            for name, settings in (("base", alone), (plan.engine, setup))
        }
        name = f"{count} adapters of rank {rank}"
        more, _ = compare(large, made.oracle, name, arms, ("base",), sample=CHECKED)
        common = {"section": "fleet", "adapters": count, "rank": rank, "slots": slots}
        common |= {"batch": plan.batch, "prompt": PROMPT, "output": OUTPUT}
        rows += [row | common | {"payloads": min(count, payloads.distinct)} for row in more]
        budget.took("fleet", time.monotonic() - started)
    if missed:
        rows.append(
            {"section": "not reached", "what": "fleet: " + "; ".join(missed), "minutes": plan.minutes}
        )
    return rows


def _slots(bench: Bench, count: int, nbytes: int) -> int:
    """Adapters on the device: as many as there are, up to four batches and a quarter of the memory that is left."""
    room = int(0.25 * memory_left(bench.plan.device) // nbytes)
    return max(bench.plan.batch, min(count, 4 * bench.plan.batch, room))
