"""What /metrics shows, in Prometheus' words: what each tenant asked and how fast it came, and the engine's own counts.

Each app has its own registry of metrics, so two servers in one process (a notebook, a test) do not add up.
"""

from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # of the time to the first token
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)  # between two tokens


class Metrics:
    """Fed by the gateway, one call per event; `text()` is the scrape."""

    def __init__(self, engine, watch=None) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "labs"}
        self._requests = Counter(
            "requests",
            "Requests that have ended, by outcome: ok, aborted (the client went away), error (ours), or the HTTP "
            "status of a refusal. Tenant `-` is a request without a valid key.",
            ["tenant", "outcome"],
            **own,
        )
        self._prompt = Counter(
            "prompt_tokens", "Tokens of the prompts that were taken in.", ["tenant"], **own
        )
        self._output = Counter("output_tokens", "Tokens that came out.", ["tenant"], **own)
        self._inflight = Gauge(
            "inflight_requests", "Requests between arrival and last byte.", ["tenant"], **own
        )
        self._ttft = Histogram(
            "time_to_first_token_seconds", "From arrival.", ["tenant"], buckets=SECONDS, **own
        )
        self._tpot = Histogram(
            "time_per_output_token_seconds",
            "Mean over a request's tokens after the first.",
            ["tenant"],
            buckets=TOKEN_SECONDS,
            **own,
        )
        self.registry.register(EngineCollector(engine))
        if watch is not None:
            self.registry.register(WatchCollector(watch))

    def opened(self, tenant: str, prompt_tokens: int) -> None:
        self._prompt.labels(tenant).inc(prompt_tokens)
        self._inflight.labels(tenant).inc()

    def closed(self, tenant: str, outcome: str, tokens: int, first: float | None, rest: float | None) -> None:
        """A request that was opened has ended. `first` and `rest` in seconds: to the first token, and all after it."""
        self._requests.labels(tenant, outcome).inc()
        self._inflight.labels(tenant).dec()
        self._output.labels(tenant).inc(tokens)
        if first is not None:
            self._ttft.labels(tenant).observe(first)
        if rest is not None and tokens > 1:
            self._tpot.labels(tenant).observe(rest / (tokens - 1))

    def refused(self, tenant: str | None, status: int) -> None:
        """A request that never got to the engine."""
        self._requests.labels(tenant or "-", str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class EngineCollector:
    """Reads `engine.stats()` and its ledger at each scrape: queue, batch, memory, what the tiers did."""

    def __init__(self, engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        stats = self.engine.stats()
        for name, value in stats.items():
            if isinstance(value, (int, float)):
                yield GaugeMetricFamily(f"labs_engine_{name}", f"The engine's `{name}`, now.", value=value)
        slots = len(self.engine.pool.slots) - 1  # without the base's
        yield GaugeMetricFamily("labs_engine_slots", "Adapters that could be on the device.", value=slots)
        events = CounterMetricFamily(
            "labs_engine_events",
            "load, host, device: an adapter was asked from disk, got to host memory, to a slot; evict, drop: it left "
            "the slot, host memory; failed: it could not be loaded; admit, end: a request joined, left the batch.",
            labels=["event"],
        )
        for event, count in sorted(stats["events"].items()):
            events.add_metric([event], count)
        yield events
        yield from self._accounts()

    def _accounts(self) -> Iterator[CounterMetricFamily]:
        loads = CounterMetricFamily("labs_adapter_loads", "Loads from disk for a tenant.", labels=["tenant"])
        evictions = CounterMetricFamily(
            "labs_adapter_evictions",
            "A tenant's adapter left its slot for another's.",
            labels=["tenant", "by"],
        )
        busy = CounterMetricFamily(
            "labs_model_seconds", "Model time, each step divided over its rows.", labels=["tenant"]
        )
        for tenant, account in list(self.engine.ledger.accounts.items()):
            loads.add_metric([tenant], account.loads)
            busy.add_metric([tenant], account.busy)
            for by, count in list(account.evicted.items()):
                evictions.add_metric([tenant, by], count)
        yield from (loads, evictions, busy)


class WatchCollector:
    """What the watch over isolation (`watch`) has proved."""

    def __init__(self, watch) -> None:
        self.watch = watch

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        yield GaugeMetricFamily(
            "labs_isolated",
            "0 once a tenant was answered by another's adapter.",
            value=self.watch.found is None,
        )
        yield CounterMetricFamily(
            "labs_canaries", "Canaries that were answered right.", value=self.watch.sung
        )
        judged = CounterMetricFamily(
            "labs_oracle_results", "Results that the shadow oracle has judged.", labels=["tenant", "outcome"]
        )
        for tenant, tally in list(self.watch.oracle.tallies.items()):
            for outcome, count in asdict(tally).items():
                judged.add_metric([tenant, outcome], count)
        yield judged
