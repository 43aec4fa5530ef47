"""What the rooms of the engine hand each other: a request, the proof of who answered it, and the result."""

from collections.abc import Callable
from dataclasses import dataclass, field

from labs_lib.errors import LabsError


class Refused(LabsError):  # noqa: N818  (read as what it says)
    """An adapter that this engine cannot serve right; the message says why and what to do."""


class QueueFull(LabsError):  # noqa: N818
    """Too many requests are waiting; `retry_after` (seconds) says when to come back."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class IsolationError(LabsError):
    """A request's adapter is not where its lease says: the request fails rather than get another tenant's tokens."""


@dataclass(frozen=True)
class Request:
    """One generation: which tokens, for whom, with which adapter version.

    `adapter` is the sha256 of an immutable adapter version, or None for the base model. Names never reach the engine.
    """

    prompt: list[int]
    tenant: str
    adapter: str | None = None
    max_tokens: int = 64
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()  # generation ends at any of these; the stop token itself is not returned
    ignore_eos: bool = False  # for benchmarks: always `max_tokens` tokens


@dataclass(frozen=True)
class Provenance:
    """Which weights made the tokens. Slot 0, generation 0 and `adapter` None are the base model."""

    adapter: str | None
    slot: int
    generation: int  # of the slot: it grows each time the slot is given to an adapter


@dataclass(frozen=True)
class Timing:
    """Seconds, on the engine's clock. Time to first token is queue + load + prefill."""

    queue: float  # waiting for room in the batch
    load: float  # waiting for the adapter to come up from disk or host memory
    prefill: float
    decode: float

    @property
    def ttft(self) -> float:
        return self.queue + self.load + self.prefill


@dataclass(frozen=True)
class Result:
    """How a request ended. `finish` is `stop`, `length`, `abort` or `error` (then `error` says why)."""

    id: int
    request: Request = field(repr=False)
    tokens: list[int]
    finish: str
    provenance: Provenance | None  # None if it never got as far as a slot
    timing: Timing
    error: str | None = None


# Called on the engine's thread; must return at once. `on_token(id, token)` for each token, then `on_end(result)` once.
OnToken = Callable[[int, int], None]
OnEnd = Callable[[Result], None]
