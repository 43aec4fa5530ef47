"""A digital twin: the engine's own scheduler, tiers and KV books under a virtual clock, with fitted costs for the rest.

What decides (who is admitted, evicted, loaded, in which order) is the same code as in the real engine. Only what takes
time is replaced: forward passes and loads advance a clock by costs that were fitted to a measured run. So it answers
in seconds what would take hours or another machine: thousands of adapters, other pool sizes, other traffic. It knows
nothing of what its costs do not hold, for instance caches of the processor; `validate` states its error.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np

from labs_lib.errors import LabsError
from labs_lib.serving.engine import Engine
from labs_lib.serving.layout import Layout
from labs_lib.serving.pool import Pool
from labs_lib.serving.replay import Run, replay
from labs_lib.serving.scheduler import Queue
from labs_lib.serving.tiers import HostAdapter
from labs_lib.serving.workload import Trace

# What a cost is made of; each is a number of seconds per unit.
PREFILL = (
    "call",
    "token",
    "row",
    "adapter",
    "loading",
)  # tokens with padding; loading: 1 while the loader works
DECODE = (
    "call",
    "row",
    "adapter",
    "cell",
    "gathered",
    "loading",
)  # cell: rows x longest past; gathered: anew
STEP = ("call", "row", "admitted", "filled", "loading")  # what a step takes outside of the model
LOAD = ("call", "byte")
ADAPTED = tuple(inspect.signature(Engine.__init__).parameters.values())
SETTINGS = {
    p.name: p.default for p in ADAPTED if p.kind is p.KEYWORD_ONLY
}  # of an engine, and their defaults


@dataclass(frozen=True)
class Costs:
    """Seconds per unit; `fit` holds the share of variance explained (R squared) and the number of measurements."""

    prefill: dict[str, float]
    decode: dict[str, float]
    step: dict[str, float]
    load: dict[str, float]
    submit: float = 0.0
    fit: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        return asdict(self)

    def decode_seconds(self, rows: int, adapters: int, past: int) -> float:
        """One decode step of a batch that stays the same, everything included; `past` tokens in each row."""
        model = {"call": 1, "row": rows, "adapter": adapters, "cell": rows * past}
        return _price(self.decode, model) + _price(self.step, {"call": 1, "row": rows})


def _price(costs: Mapping[str, float], amounts: Mapping[str, float]) -> float:
    return sum(costs[name] * amount for name, amount in amounts.items())


# -- what a batch amounts to: the same for measuring and for simulating ----------------------------------------------


class Amounts:
    """Counts what the executor has to do; remembers the last decode batch, as the executor's window does."""

    def __init__(self, loading: Callable[[], bool]) -> None:
        self._loading, self._last = loading, ()

    def prefill(self, rows: Sequence) -> dict[str, float]:
        new = max(len(row.request.prompt) - row.reservation.cached for row in rows)
        return {
            "call": 1,
            "token": len(rows) * new,
            "row": len(rows),
            "adapter": len({row.slot.number for row in rows} - {0}),
            "loading": self._loading(),
        }

    def decode(self, rows: Sequence) -> dict[str, float]:
        cells = len(rows) * max(row.length for row in rows)
        ids = tuple(row.id for row in rows)
        gathered, self._last = (cells if ids != self._last else 0), ids
        return {
            "call": 1,
            "row": len(rows),
            "adapter": len({row.slot.number for row in rows} - {0}),
            "cell": cells,
            "gathered": gathered,
            "loading": self._loading(),
        }


# -- measuring a real engine ------------------------------------------------------------------------------------------


class Log:
    """(amounts, seconds) of each forward pass, step and load of a recorded engine."""

    def __init__(self) -> None:
        self.of: dict[str, list[tuple[dict[str, float], float]]] = {
            name: [] for name in ("prefill", "decode", "step", "load")
        }
        self.submit: list[float] = []

    def fit(self) -> Costs:
        """Costs by least squares, none below zero (Lawson, Hanson 1974)."""
        named = {"prefill": PREFILL, "decode": DECODE, "step": STEP, "load": LOAD}
        fitted = {name: _fit(self.of[name], units) for name, units in named.items()}
        if not self.of["prefill"] or not self.of["decode"]:
            raise LabsError("Costs cannot be fitted: the measured run had no prefill or no decode step.")
        return Costs(
            **{name: costs for name, (costs, _) in fitted.items()},
            submit=float(np.mean(self.submit)) if self.submit else 0.0,
            fit={name: {"r2": r2, "n": len(self.of[name])} for name, (_, r2) in fitted.items()},
        )


def _fit(
    measured: Sequence[tuple[dict, float]], units: Sequence[str]
) -> tuple[dict[str, float], float | None]:
    from scipy.optimize import nnls

    if not measured:
        return dict.fromkeys(units, 0.0), None
    X = np.array([[float(amounts[unit]) for unit in units] for amounts, _ in measured])
    y = np.array([seconds for _, seconds in measured])
    scale = np.maximum(X.max(axis=0), 1e-12)  # tokens and calls differ by orders of magnitude
    weights, _ = nnls(X / scale, y)
    weights /= scale
    spread = ((y - y.mean()) ** 2).sum()
    r2 = None if spread == 0 else round(float(1 - ((y - X @ weights) ** 2).sum() / spread), 4)
    return dict(zip(units, map(float, weights), strict=True)), r2


class _Timed:
    """An executor that writes down how long each pass took."""

    def __init__(self, executor, amounts: Amounts, log: Log, clock: Callable[[], float]) -> None:
        self._executor, self._amounts, self._log, self._clock = executor, amounts, log, clock
        self.seconds = 0.0  # in passes, of the current step
        self.admitted = 0

    def __getattr__(self, name: str):
        return getattr(self._executor, name)

    def prefill(self, rows: Sequence) -> list[int]:
        self.admitted = len(rows)
        return self._timed("prefill", rows)

    def decode(self, rows: Sequence) -> list[int]:
        return self._timed("decode", rows)

    def _timed(self, name: str, rows: Sequence) -> list[int]:
        amounts = getattr(self._amounts, name)(rows)
        started = self._clock()
        tokens = getattr(self._executor, name)(rows)
        seconds = self._clock() - started
        self.seconds += seconds
        self._log.of[name].append((amounts, seconds))
        return tokens


@contextmanager
def recording(engine: Engine) -> Iterator[Log]:
    """While it is open, every pass, step and load of an engine that runs on this thread goes into the log."""
    log, tiers, clock = Log(), engine.tiers, time.perf_counter
    executor, read = engine.executor, getattr(tiers.loader, "_read", None)
    timed = _Timed(executor, Amounts(lambda: bool(tiers.loading)), log, clock)

    def step() -> bool:
        timed.seconds, timed.admitted = 0.0, 0
        loading, filled = bool(tiers.loading), engine.ledger.counts["device"]
        started = clock()
        worked = Engine.step(engine)
        seconds = clock() - started
        if worked:
            amounts = {
                "call": 1,
                "row": len(engine.running),
                "admitted": timed.admitted,
                "filled": engine.ledger.counts["device"] - filled,
                "loading": loading,
            }
            log.of["step"].append((amounts, seconds - timed.seconds))
        return worked

    def submit(*arguments, **named) -> int:
        started = clock()
        id = Engine.submit(engine, *arguments, **named)
        log.submit.append(clock() - started)
        return id

    def timed_read(adapter: str) -> HostAdapter:
        started = clock()
        loaded = read(adapter)
        log.of["load"].append(({"call": 1, "byte": loaded.nbytes}, clock() - started))
        return loaded

    engine.executor, engine.step, engine.submit = timed, step, submit
    if read is not None:
        tiers.loader._read = timed_read
    try:
        yield log
    finally:
        engine.executor = executor
        del engine.step, engine.submit  # the class's own show again
        if read is not None:
            tiers.loader._read = read


# -- simulating -------------------------------------------------------------------------------------------------------


class VirtualClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def reach(self, time: float) -> None:
        """Exactly then, or now if that is past: adding a difference could fall short by a rounding error."""
        self.now = max(self.now, time)


class CostExecutor:
    """Takes the time that the passes would take, and gives tokens that mean nothing."""

    def __init__(self, costs: Costs, clock: VirtualClock, loading: Callable[[], bool]) -> None:
        self._costs, self._clock, self._amounts = costs, clock, Amounts(loading)

    def prefill(self, rows: Sequence) -> list[int]:
        self._clock.advance(self._costs.step["admitted"] * len(rows))
        self._clock.advance(_price(self._costs.prefill, self._amounts.prefill(rows)))
        return [0] * len(rows)

    def decode(self, rows: Sequence) -> list[int]:
        self._clock.advance(_price(self._costs.decode, self._amounts.decode(rows)))
        return [0] * len(rows)

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass


class VirtualLoader:
    """Loads one adapter after the other, each in the time that its bytes take."""

    def __init__(self, costs: Costs, clock: VirtualClock, describe: Callable[[str], HostAdapter]) -> None:
        self._costs, self._clock, self._describe = costs, clock, describe
        self._under_way: list[tuple[float, HostAdapter]] = []
        self._free_at = 0.0

    def start(self, adapter: str) -> None:
        loaded = self._describe(adapter)
        seconds = _price(self._costs.load, {"call": 1, "byte": loaded.nbytes})
        self._free_at = max(self._free_at, self._clock()) + seconds
        self._under_way.append((self._free_at, loaded))

    def finished(self) -> list[tuple[str, HostAdapter]]:
        now = self._clock()
        done = [loaded for at, loaded in self._under_way if at <= now]
        self._under_way = [(at, loaded) for at, loaded in self._under_way if at > now]
        return [(loaded.adapter, loaded) for loaded in done]

    @property
    def next(self) -> float:
        """When the next load ends."""
        return self._under_way[0][0] if self._under_way else math.inf

    @property
    def busy(self) -> bool:
        return bool(self._under_way)

    def close(self) -> None:
        pass


class VirtualPool(Pool):
    """The books of a pool without its memory; moving an adapter in takes time."""

    def __init__(self, costs: Costs, clock: VirtualClock, *args) -> None:
        super().__init__(*args, device=None)
        self._costs, self._clock = costs, clock

    def fill(self, *args):
        self._clock.advance(self._costs.step["filled"])
        return super().fill(*args)


class Twin(Engine):
    """An engine of which only the decisions are real. Made by `twin`."""

    costs: Costs

    def step(self) -> bool:
        if self.running or self.queue.waiting:
            amounts = {"call": 1, "row": len(self.running), "loading": self.tiers.loader.busy}
            self.clock.advance(_price(self.costs.step, amounts))
        return super().step()

    def submit(self, *arguments, **named) -> int:
        self.clock.advance(self.costs.submit)
        return super().submit(*arguments, **named)

    def wait(self, until: float, now: float) -> None:
        """For `replay`: pass the time until something can happen."""
        until = min(until, self.tiers.loader.next)
        if until == math.inf:
            raise LabsError("The simulation is stuck: requests wait and nothing will ever happen.")
        self.clock.reach(until)


def twin(
    costs: Costs,
    layout: Layout,
    *,
    pages: int | Mapping[str, int] = 8,
    number: int = 4,
    max_tokens: int = 1 << 20,
    vocabulary: int = 1 << 20,
    **settings,
) -> Twin:
    """A twin of `Engine(model, ..., **settings)`.

    Args:
        layout: of the model that it stands for (of a model on the meta device, if it is large).
        pages: that an adapter takes (its rank), or for each adapter by its name.
        number: bytes of a weight.
    """
    if unknown := settings.keys() - SETTINGS.keys():
        raise LabsError(f"An engine has no setting {min(unknown)!r}; there are: {', '.join(SETTINGS)}.")
    settings = SETTINGS | settings
    clock = VirtualClock()

    def describe(adapter: str) -> HostAdapter:
        count = pages if isinstance(pages, int) else pages[adapter]
        return HostAdapter(adapter, count, count * layout.width * number)

    pool = VirtualPool(
        costs,
        clock,
        layout,
        settings["slots"],
        settings["max_rank"],
        settings["kv_tokens"],
        settings["policy"],
    )
    loader = VirtualLoader(costs, clock, describe)
    made = Twin.from_parts(
        CostExecutor(costs, clock, lambda: loader.busy),
        pool,
        loader,
        max_tokens=max_tokens,
        vocabulary=vocabulary,
        max_batch=settings["max_batch"],
        host_bytes=settings["host_bytes"],
        queue=Queue(settings["fairness"], settings["queue_limit"], settings["patience"]),
        prefix_cache=settings["prefix_cache"],
        clock=clock,
    )
    made.costs = costs
    return made


@dataclass
class Simulation:
    """A simulated run: `run` as `replay` gives it, and the twin with its ledger."""

    run: Run
    engine: Twin


def simulate(
    trace: Trace,
    costs: Costs,
    layout: Layout,
    *,
    adapters: Sequence[str] | None = None,
    warm: Trace | None = None,
    outstanding: int | None = None,
    vocabulary: int = 2048,
    **settings,
) -> Simulation:
    """Play a trace on a twin with these settings of an engine; `warm` is played before and not counted."""
    engine = twin(costs, layout, vocabulary=vocabulary, **settings)
    adapters = adapters or [f"adapter-{k}" for k in range(trace.adapters)]
    for each in filter(None, (warm, trace)):
        at = [arrival.at for arrival in each]
        run = replay(
            engine, each.requests(adapters, vocabulary), at, outstanding=outstanding, wait=engine.wait
        )
    return Simulation(run, engine)


COMPARED = ("tokens_per_s", "ttft_p50", "ttft_p99", "tpot_p50", "itl_p50", "hits", "moved", "loads")


def errors(measured: Run, predicted: Run, *slo: float) -> dict[str, dict[str, float | None]]:
    """Measured and predicted numbers of the same trace, with the prediction's error in percent of the measured."""
    ours, theirs = predicted.summary(*slo), measured.summary(*slo)
    table = {}
    for name in COMPARED:
        real, guess = theirs[name], ours[name]
        error = round(100 * (guess / real - 1), 1) if real and guess is not None else None
        table[name] = {"measured": real, "predicted": guess, "error_percent": error}
    return table


# -- what it is for ---------------------------------------------------------------------------------------------------


def working_set(
    make: Callable[[int], Trace],
    sizes: Sequence[int],
    costs: Costs,
    layout: Layout,
    *,
    slots: int = 32,
    **settings,
) -> list[dict]:
    """One row per number of adapters: throughput, latencies and loads of `make(adapters)`, played twice, second counts.

    The first play fills the tiers, so that what is seen is their size, not their being empty.
    """
    rows = []
    for adapters in sizes:
        trace = make(adapters)
        run = simulate(
            trace, costs, layout, warm=trace, **({"queue_limit": 1 << 20, "slots": slots} | settings)
        ).run
        rows.append({"adapters": adapters, "per_slot": round(adapters / slots, 3), **run.summary()})
    return rows


def cliff(rows: Sequence[dict], drop: float = 0.1, key: str = "tokens_per_s") -> dict | None:
    """The first row of `working_set` that is worse than the first by `drop`: less throughput, or a longer latency."""
    first = rows[0][key]
    for row in rows[1:]:
        worse = (
            row[key] < first * (1 - drop)
            if key in ("tokens_per_s", "goodput")
            else row[key] > first * (1 + drop)
        )
        if worse:
            return row
    return None


def merge_or_multiplex(
    costs: Costs, base: Costs, merge_seconds: float, *, rows: int = 32, past: int = 64
) -> dict:
    """When is it better to merge than to serve many adapters from one batch, with costs of both engines.

    Args:
        costs: of the multi-adapter engine.
        base: of the base model alone, which is what a merged model costs.
        merge_seconds: to merge one adapter into the weights and to take it out again.

    Returns:
        `merge_after_steps`: decode steps of a full batch of one adapter after which merging it has paid (None: never).
        `multiplex_from`: distinct adapters in a batch from which one mixed step is faster than a step of each merged
        copy on its own rows (None: never).
    """
    saved = costs.decode_seconds(rows, 1, past) - base.decode_seconds(rows, 0, past)
    found = None
    for distinct in range(2, rows + 1):
        copies = distinct * base.decode_seconds(rows / distinct, 0, past)
        if costs.decode_seconds(rows, distinct, past) < copies:
            found = distinct
            break
    return {
        "merge_after_steps": math.ceil(round(merge_seconds / saved, 6)) if saved > 0 else None,
        "multiplex_from": found,
        "multiplexed_ms": {
            d: round(1e3 * costs.decode_seconds(rows, d, past), 3) for d in (1, 2, 4, 8, rows)
        },
        "merged_ms": {
            d: round(1e3 * d * base.decode_seconds(rows / d, 0, past), 3) for d in (1, 2, 4, 8, rows)
        },
    }
