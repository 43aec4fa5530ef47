"""Who is served next: first come first served with skipping, or fair by virtual token counters; a bounded queue.

Both orders skip a request whose adapter is not on the device yet, so that one cold tenant does not hold up the others.
A request that has waited longer than `patience` is not overtaken any more, so that nobody starves.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from labs_lib.errors import LabsError
from labs_lib.serving.types import QueueFull

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2  # of a token in the virtual counter, as in Sheng et al. 2024


class Counters:
    """Virtual token counters: the service each tenant has had, in weighted tokens. Who has had least goes first.

    Source: Sheng et al. 2024, "Fairness in Serving Large Language Models", arXiv:2401.00588, algorithm 2.

    Steps:
        1. `arrive`: lift a tenant that has no sequence here to the least counter of those who are here, so that
           idling earns no credit; if nobody is here, to `floor`. Never down. Then count one sequence more in `here`.
        2. `charge`: add the tokens to what the tenant was served, prompt tokens times PROMPT_WEIGHT, output tokens
           times OUTPUT_WEIGHT.
        3. `leave`: one sequence less. With a tenant's last one, take it out of `here` and keep its counter as `floor`,
           so that having had the server alone is no debt.
        4. `order`: by what their tenant was served, among equals by `id`.
    """

    def __init__(self) -> None:  # keep
        self.served: defaultdict[str, float] = defaultdict(float)
        self.here: Counter[str] = Counter()  # waiting or running sequences of each tenant
        self.floor = 0.0  # counter of the tenant who left last

    def arrive(self, tenant: str) -> None:
        """A sequence of the tenant has come."""
        if not self.here[tenant]:
            least = min((self.served[other] for other in self.here), default=self.floor)
            self.served[tenant] = max(self.served[tenant], least)
        self.here[tenant] += 1

    def charge(self, tenant: str, prompt: int = 0, output: int = 0) -> None:
        """So many tokens were computed for the tenant."""
        self.served[tenant] += PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output

    def leave(self, tenant: str) -> None:
        """A sequence of the tenant has ended."""
        self.here[tenant] -= 1
        if not self.here[tenant]:
            del self.here[tenant]
            self.floor = self.served[tenant]

    def order(self, sequences: Iterable) -> list:
        """Sequences (each has `id` and `request.tenant`), the one to be tried first at the front."""
        return sorted(sequences, key=lambda each: (self.served[each.request.tenant], each.id))


class Queue:
    """Waiting sequences, in the order in which they should be tried: `fcfs` by arrival, `fair` by `Counters`."""

    def __init__(self, fairness: str = "fcfs", limit: int = 256, patience: float = 2.0) -> None:
        if fairness not in ("fcfs", "fair"):
            raise LabsError(f"fairness={fairness!r} is not known: 'fcfs' or 'fair'.")
        self.fairness, self.limit, self.patience = fairness, limit, patience
        self.waiting: dict[int, "Sequence"] = {}  # noqa: F821, UP037  (by id: removal from the middle is common)
        self.counters = Counters()

    def push(self, sequence) -> None:
        """Put a new sequence in; QueueFull if too many wait."""
        if len(self.waiting) >= self.limit:
            raise QueueFull(
                f"{len(self.waiting)} requests are waiting, which is this server's limit: try again later.",
                retry_after=1.0,
            )
        self.counters.arrive(sequence.request.tenant)
        self.waiting[sequence.id] = sequence

    def order(self) -> Iterator:
        """Waiting sequences, the one to be tried first at the front."""
        if self.fairness == "fcfs":
            return iter(list(self.waiting.values()))
        return iter(self.counters.order(self.waiting.values()))

    def overdue(self, now: float):
        """The sequence that has waited longest, if that is longer than `patience`."""
        oldest = next(iter(self.waiting.values()), None)
        return oldest if oldest is not None and now - oldest.arrived > self.patience else None

    def admitted(self, sequence) -> None:
        """It leaves the queue for the batch; its prompt is counted."""
        del self.waiting[sequence.id]
        self.counters.charge(sequence.request.tenant, prompt=len(sequence.request.prompt))

    def produced(self, sequence) -> None:
        """It got one more token."""
        self.counters.charge(sequence.request.tenant, output=1)

    def left(self, sequence) -> None:
        """It has ended, running or still waiting."""
        self.waiting.pop(sequence.id, None)
        self.counters.leave(sequence.request.tenant)
