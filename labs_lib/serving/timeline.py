"""What the ledger's events say over time, as tidy rows: where each adapter was, and what each tenant waited for.

Drawing is `labs_lib.lab.serving_plots`'s business; a table or a spreadsheet can use these rows as well.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median

from labs_lib.serving.ledger import Event, Ledger

PHASES = ("queue", "load", "prefill", "decode")


@dataclass(frozen=True)
class Interval:
    """An adapter in a tier, or a request that runs on it, from `start` to `end` (seconds, from the first event on).

    `what`: `loading` from disk, on the `host`, on the `device`, or `running` (a request, `id`). `tenant` is for whom.
    `ended` says how: `evict` (by tenant `by`; "" is nobody's request but an unload), `drop` from the host, `host` or
    `failed` for a load, the finish reason of a request, or "" if it was still so when the events end.
    """

    adapter: str | None
    what: str
    start: float
    end: float
    tenant: str
    ended: str = ""
    by: str = ""
    slot: int | None = None
    id: int | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.start


# event: (what it ends, what it begins)
_CHANGES = {
    "load": (None, "loading"),
    "host": ("loading", "host"),
    "failed": ("loading", None),
    "drop": ("host", None),
    "device": (None, "device"),
    "evict": ("device", None),
}


def intervals(events: Ledger | Iterable[Event], until: float | None = None) -> list[Interval]:
    """Rows in the order of their starts; times count from the first event.

    What began before the first event that the ledger still has starts at 0. `until` (on the engine's clock; default:
    the last event) closes what is open.
    """
    events = list(events.events if isinstance(events, Ledger) else events)
    if not events:
        return []
    zero, last = events[0].at, events[-1].at if until is None else until
    open_: dict[tuple, Event] = {}
    found: list[Interval] = []

    def close(key: tuple, at: float, event: Event | None = None) -> None:
        begun = open_.pop(key, None)
        who = begun or event
        if key[0] == "running" and begun is None:
            return  # it ended in the queue, or began before the record
        found.append(
            Interval(
                key[1] if key[0] != "running" else who.adapter,
                key[0],
                (begun.at if begun else zero) - zero,
                at - zero,
                begun.tenant if begun else who.more.get("of", who.tenant),
                "" if event is None else event.more.get("finish", event.what),
                event.tenant if event is not None and event.what == "evict" else "",
                who.more.get("slot"),
                who.more.get("id"),
            )
        )

    for event in events:
        if event.what == "admit":
            open_["running", event.more["id"]] = event
        elif event.what == "end":
            close(("running", event.more["id"]), event.at, event)
        elif event.what in _CHANGES:
            ends, begins = _CHANGES[event.what]
            if ends is not None:
                close((ends, event.adapter), event.at, event)
            if begins is not None:
                open_[begins, event.adapter] = event
    for key in list(open_):
        close(key, last)
    return sorted(found, key=lambda each: (each.start, each.end))


@dataclass(frozen=True)
class Breakdown:
    """What a tenant's requests spent their time on: seconds per request, the mean or the median of `requests`."""

    tenant: str
    requests: int
    queue: float
    load: float
    prefill: float
    decode: float

    @property
    def ttft(self) -> float:
        return self.queue + self.load + self.prefill

    @property
    def total(self) -> float:
        return self.ttft + self.decode


def breakdown(ledger: Ledger, how: str = "mean") -> list[Breakdown]:
    """One row per tenant, the one that waited longest first.

    `mean` adds up: the parts of all requests over their number. `median` is the request in the middle by total time,
    so that its parts add up too.
    """
    rows = []
    for tenant, account in ledger.accounts.items():
        timings = list(account.timings)
        if not timings:
            continue
        if how == "median":
            timings = [sorted(timings, key=lambda each: each.ttft + each.decode)[len(timings) // 2]]
        means = {phase: fmean(getattr(each, phase) for each in timings) for phase in PHASES}
        rows.append(Breakdown(tenant, len(account.timings), **means))
    return sorted(rows, key=lambda row: -row.total)


def evictions(events: Ledger | Iterable[Event]) -> dict[tuple[str, str], int]:
    """How often whose adapter (first) left the device for whom (second); what an unload removed is for ""."""
    counts: dict[tuple[str, str], int] = {}
    for each in intervals(events):
        if each.ended == "evict":
            counts[each.tenant, each.by] = counts.get((each.tenant, each.by), 0) + 1
    return counts


def residency(rows: Iterable[Interval], tier: str = "device") -> dict[str | None, float]:
    """Seconds that each adapter spent in a tier, most first."""
    seconds: dict[str | None, float] = {}
    for each in rows:
        if each.what == tier:
            seconds[each.adapter] = seconds.get(each.adapter, 0.0) + each.seconds
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def load_time(rows: Iterable[Interval]) -> float:
    """The median load from disk, in seconds; 0.0 if there was none."""
    return median([each.seconds for each in rows if each.what == "loading" and each.ended == "host"] or [0.0])
