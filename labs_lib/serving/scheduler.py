"""Who is served next: first come first served with skipping, or fair by virtual token counters; a bounded queue.

Both orders skip a request whose adapter is not on the device yet, so that one cold tenant does not hold up the others.
A request that has waited longer than `patience` is not overtaken any more, so that nobody starves.
"""

from collections import defaultdict
from collections.abc import Iterator

from labs_lib.errors import LabsError
from labs_lib.serving.types import QueueFull

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2  # of a token in the virtual counter, as in Sheng et al. 2024


class Queue:
    """Waiting sequences, in the order in which they should be tried.

    `fcfs`: by arrival. `fair`: the tenant with the least service first, counted in weighted tokens; a tenant that comes
    back after a pause starts from the least counter of those who are there, so that idling earns no credit. If nobody
    is there it starts from the counter of who left last, so that having had the server alone is no debt.
    Source of `fair`: Sheng et al. 2024, "Fairness in Serving Large Language Models", arXiv:2401.00588, algorithm 2.
    """

    def __init__(self, fairness: str = "fcfs", limit: int = 256, patience: float = 2.0) -> None:
        if fairness not in ("fcfs", "fair"):
            raise LabsError(f"fairness={fairness!r} is not known: 'fcfs' or 'fair'.")
        self.fairness, self.limit, self.patience = fairness, limit, patience
        self.waiting: dict[int, "Sequence"] = {}  # noqa: F821, UP037  (by id: removal from the middle is common)
        self.served: defaultdict[str, float] = defaultdict(float)  # virtual token counters
        self._present: defaultdict[str, int] = defaultdict(int)  # waiting or running sequences of each tenant
        self._floor = 0.0  # counter of the tenant who left last

    def push(self, sequence) -> None:
        """Put a new sequence in; QueueFull if too many wait."""
        if len(self.waiting) >= self.limit:
            raise QueueFull(
                f"{len(self.waiting)} requests are waiting, which is this server's limit: try again later.",
                retry_after=1.0,
            )
        tenant = sequence.request.tenant
        if not self._present[tenant]:
            others = [self.served[other] for other, count in self._present.items() if count]
            self.served[tenant] = max(self.served[tenant], min(others, default=self._floor))
        self._present[tenant] += 1
        self.waiting[sequence.id] = sequence

    def order(self) -> Iterator:
        """Waiting sequences, the one to be tried first at the front."""
        if self.fairness == "fcfs":
            return iter(list(self.waiting.values()))
        by_service = sorted(self.waiting.values(), key=lambda s: (self.served[s.request.tenant], s.id))
        return iter(by_service)

    def overdue(self, now: float):
        """The sequence that has waited longest, if that is longer than `patience`."""
        oldest = next(iter(self.waiting.values()), None)
        return oldest if oldest is not None and now - oldest.arrived > self.patience else None

    def admitted(self, sequence) -> None:
        """It leaves the queue for the batch; its prompt is counted."""
        del self.waiting[sequence.id]
        self.served[sequence.request.tenant] += PROMPT_WEIGHT * len(sequence.request.prompt)

    def produced(self, sequence) -> None:
        """It got one more token."""
        self.served[sequence.request.tenant] += OUTPUT_WEIGHT

    def left(self, sequence) -> None:
        """It has ended, running or still waiting."""
        self.waiting.pop(sequence.id, None)
        tenant = sequence.request.tenant
        self._present[tenant] -= 1
        if not self._present[tenant]:
            del self._present[tenant]
            self._floor = self.served[tenant]
