"""Alarms that need no model of their own: canaries, whose right answer is known, and an audit of the engine's books.

A canary is a prompt whose answer under one tenant's adapter is known and differs from what the base would say. It goes
through the real path among everybody's requests; a single wrong token is a leak.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from labs_lib.errors import LabsError
from labs_lib.serving.oracle import Witness
from labs_lib.serving.types import IsolationError, Request, Result


@dataclass(frozen=True)
class Canary:
    """What `tenant` must get for `prompt` with its `adapter` version (None: the base)."""

    tenant: str
    adapter: str | None
    prompt: tuple[int, ...]
    expected: tuple[int, ...]

    @classmethod
    def of(
        cls,
        witness: Witness,
        tenant: str,
        adapter: str | None,
        prompt: Sequence[int],
        count: int = 8,
        others: Sequence[str | None] = (None,),
    ) -> "Canary":
        """A canary with the right answer; LabsError if one of the `others` (by default the base) says the same."""
        expected = witness.answer(adapter, list(prompt), count)
        for other in others:
            if other != adapter and witness.agrees(other, list(prompt), expected):
                raise LabsError(
                    f"This canary could not tell adapter {(adapter or 'base')[:12]} from "
                    f"{(other or 'base')[:12]}, which says the same: choose another prompt."
                )
        return cls(tenant, adapter, tuple(prompt), tuple(expected))


@dataclass(frozen=True)
class Leak:
    """A canary that was answered wrong: at output `position` it heard `got` (None: the request ended early)."""

    canary: Canary
    position: int
    got: int | None
    said_by: str  # the other canary whose expected token this is, if there is one

    def __str__(self) -> str:
        expected = self.canary.expected[self.position]
        hint = f", which {self.said_by} would have said" if self.said_by else ""
        return (
            f"Canary of {self.canary.tenant} (adapter {(self.canary.adapter or 'base')[:12]}): output token "
            f"{self.position} is {self.got}{hint}, not {expected}. Somebody else's weights are answering: stop serving."
        )


class CanaryProbe:
    """Sends canaries through an engine and listens to every token.

    Args:
        engine: running on its own thread or not.
        canaries: who sings.
        on_leak: called at the first wrong token, on the engine's thread, before the request has ended.
    """

    def __init__(
        self, engine, canaries: Sequence[Canary], on_leak: Callable[[Leak], None] | None = None
    ) -> None:
        if not canaries:
            raise LabsError("A probe without canaries would never find a leak: give it some.")
        self.engine, self.canaries, self.on_leak = engine, list(canaries), on_leak
        self.leaks: list[Leak] = []
        self.errors: list[Result] = []  # requests that failed: no leak, and no proof either
        self.pending = self.sung = 0

    def send(self) -> None:
        """Submit all canaries; returns at once. QueueFull is raised as for anybody else."""
        for canary in self.canaries:
            heard: list[int] = []
            request = Request(
                list(canary.prompt),
                canary.tenant,
                canary.adapter,
                max_tokens=len(canary.expected),
                ignore_eos=True,
            )
            self.engine.submit(request, self._listen(canary, heard), self._ended(canary, heard))
            self.pending += 1

    def run(self, among: Sequence[Request] = ()) -> list[Leak]:
        """Send them among other requests and wait for all; raises IsolationError at a leak.

        Returns an empty list, so that `assert not probe.run()` reads well. Failed canaries are in `errors`.
        """
        half = len(among) // 2
        for request in among[:half]:
            self.engine.submit(request)
        self.send()
        for request in among[half:]:
            self.engine.submit(request)
        self.engine.drive(lambda: not self.pending)
        if self.leaks:
            raise IsolationError(str(self.leaks[0]))
        return self.leaks

    def _listen(self, canary: Canary, heard: list[int]) -> Callable[[int, int], None]:
        def on_token(id: int, token: int) -> None:
            heard.append(token)
            if token != canary.expected[len(heard) - 1] and heard[:-1] == list(
                canary.expected[: len(heard) - 1]
            ):
                self._alarm(canary, len(heard) - 1, token)

        return on_token

    def _ended(self, canary: Canary, heard: list[int]) -> Callable[[Result], None]:
        def on_end(result: Result) -> None:
            self.pending -= 1
            if result.finish in ("error", "abort"):
                self.errors.append(result)
            elif tuple(heard) == canary.expected:
                self.sung += 1

        return on_end

    def _alarm(self, canary: Canary, position: int, got: int) -> None:
        said_by = [
            other.tenant
            for other in self.canaries
            if other.prompt == canary.prompt and other.expected[position : position + 1] == (got,)
        ]
        leak = Leak(canary, position, got, said_by[0] if said_by else "")
        self.leaks.append(leak)
        if self.on_leak is not None:
            self.on_leak(leak)


def audit(engine) -> list[str]:
    """What is wrong in the engine's books and memory, in words; an empty list if nothing is.

    It reads the whole pool, so it is for tests and quiet moments, not for every step. It sees what can be seen without
    knowing the adapters: leftovers, pages with two owners, references and leases that do not match.
    """
    with engine._lock:
        return [*_slots(engine), *_adapter_pages(engine.pool), *_kv_pages(engine)]


def _slots(engine):
    pool = engine.pool
    refs = Counter(sequence.slot.number for sequence in engine.running)
    for slot in pool.slots:
        row = pool.table[slot.number].tolist()
        if row != slot.pages + [0] * (len(row) - len(slot.pages)):
            yield f"Slot {slot.number} has pages {slot.pages}, the page table says {row}."
        if slot.number and slot.refs != refs[slot.number]:
            yield f"Slot {slot.number} counts {slot.refs} running requests, there are {refs[slot.number]}."
    if pool.slots[0].adapter is not None or pool.slots[0].pages:
        yield "Slot 0 is the base model's, and it holds an adapter."
    for sequence in engine.running:
        slot, lease = sequence.slot, sequence.lease
        if (slot.adapter, slot.generation) != (lease.adapter, lease.generation):
            yield f"Request {sequence.id} runs on slot {slot.number}, which was given to another adapter."


def _adapter_pages(pool):
    owned = Counter(page for slot in pool.resident for page in slot.pages)
    if twice := [page for page, count in owned.items() if count > 1]:
        yield f"Adapter pages {twice} have two owners."
    if pool.adapters is None:
        return
    filled = (pool.adapters.data != 0).any(1)
    for slot in pool.resident:
        if not filled[slot.pages].any():
            yield f"Slot {slot.number} should hold adapter {slot.adapter[:12]}, and holds only zeros."
    if pool.adapters is not pool.kv:
        filled[list(owned)] = False
        if left := filled.nonzero().flatten().tolist():
            yield f"Adapter pages {left} belong to nobody and are not zero: somebody's weights were left behind."


def _kv_pages(engine):
    pool, kv = engine.pool, engine.kv
    own = [page for s in engine.running for page in s.reservation.pages[len(s.reservation.shared) :]]
    owned = Counter(own + [entry.page for entry in kv._entries.values()])
    if twice := [page for page, count in owned.items() if count > 1]:
        yield f"Key/value pages {twice} have two owners."
    if free := owned.keys() - pool._kv_pages.owner.keys():
        yield f"Key/value pages {sorted(free)} are in use and also free."
    if pool.kv is None:
        return
    filled = (pool.kv.data != 0).any(1)
    filled[list(owned)] = False
    if pool.kv is pool.adapters:
        filled[[page for slot in pool.resident for page in slot.pages]] = False
    if left := filled.nonzero().flatten().tolist():
        yield f"Pages {left} belong to nobody and are not zero: somebody's keys and values were left behind."
