"""The per-tenant ledger: who waited for what, who used how much, who evicted whom, when each adapter was where."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from labs_lib.serving.types import Result

KEPT = 100_000  # events, and results, that stay in memory


@dataclass(frozen=True)
class Event:
    """Something that happened to an adapter at `at` seconds, for `tenant`. `what` as in Tiers; plus `admit`, `end`."""

    at: float
    what: str
    adapter: str | None
    tenant: str
    more: dict = field(default_factory=dict)


@dataclass
class Account:
    """What one tenant has had so far."""

    requests: Counter = field(default_factory=Counter)  # by how they finished
    prompt_tokens: int = 0
    output_tokens: int = 0
    busy: float = 0.0  # seconds of model time: each step's time, divided over its rows
    loads: int = 0
    evicted: Counter = field(default_factory=Counter)  # by whom
    timings: deque = field(default_factory=lambda: deque(maxlen=KEPT))


class Ledger:
    """Fed by the engine, read by anybody: `accounts`, `events`, `fairness()`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.accounts: defaultdict[str, Account] = defaultdict(Account)
        self.events: deque[Event] = deque(maxlen=KEPT)
        self.counts: Counter = Counter()  # of events

    def watch(self, what: str, adapter: str | None, tenant: str, **more) -> None:
        self.events.append(Event(self.clock(), what, adapter, tenant, more))
        self.counts[what] += 1
        if what == "load" and tenant:
            self.accounts[tenant].loads += 1
        if what == "evict":
            self.accounts[more["of"]].evicted[tenant] += 1

    def step(self, tenants: list[str], seconds: float) -> None:
        for tenant in tenants:
            self.accounts[tenant].busy += seconds / len(tenants)

    def end(self, result: Result) -> None:
        account = self.accounts[result.request.tenant]
        account.requests[result.finish] += 1
        if result.provenance is not None:
            account.prompt_tokens += len(result.request.prompt)
            account.output_tokens += len(result.tokens)
            account.timings.append(result.timing)
        self.watch("end", result.request.adapter, result.request.tenant, id=result.id, finish=result.finish)

    def fairness(self) -> float:
        """Jain's index of model time per tenant, of those who had any."""
        return jain_index([account.busy for account in self.accounts.values() if account.busy])


def jain_index(shares: Sequence[float]) -> float:
    """How evenly something is shared: 1 if all have the same, 1/n if one of n has everything. No unit matters.

    Source: Jain, Chiu, Hawe 1984, DEC-TR-301.

    Steps:
        1. Nobody, or nobody with anything: that is fair, 1.
        2. The square of the sum, over n times the sum of the squares.
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0
