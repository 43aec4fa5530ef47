"""Playing a trace on an engine, real or simulated, and what came of it: throughput, latencies, what the tiers did.

Time to first token is counted from when the trace says that a request arrives, not from when the engine got round to
taking it in, so that an overloaded engine cannot hide its queue ("coordinated omission").
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from labs_lib.serving.types import QueueFull, Request, Result


@dataclass
class Answer:
    """What a request got. Times are seconds from the start of the replay."""

    at: float  # arrival
    stamps: list[float] = field(default_factory=list)  # of each token
    result: Result | None = None  # None: refused because too many were waiting

    @property
    def ttft(self) -> float:
        return self.stamps[0] - self.at if self.stamps else math.inf

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for a single token."""
        count = len(self.stamps) - 1
        return (self.stamps[-1] - self.stamps[0]) / count if count > 0 else None


@dataclass
class Run:
    """A finished replay: answers in the order of the requests, and how often each event of the ledger happened."""

    answers: list[Answer]
    seconds: float
    events: Counter

    @property
    def results(self) -> list[Result]:
        return [answer.result for answer in self.answers if answer.result is not None]

    @property
    def tokens(self) -> int:
        return sum(len(answer.stamps) for answer in self.answers)

    @property
    def throughput(self) -> float:
        """Output tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def summary(self, slo_ttft: float = 0.5, slo_tpot: float = 0.1) -> dict:
        """Latencies in milliseconds. `goodput`: answered requests per second that kept both limits (in seconds).

        `hits` are admitted requests that found their adapter on the device, `moved` adapters that went from host to
        device, `loads` those read from disk.
        """
        done = [each for each in self.answers if each.result is not None and each.result.error is None]
        good = [e for e in done if e.ttft <= slo_ttft and (e.tpot is None or e.tpot <= slo_tpot)]
        named = sum(each.result.request.adapter is not None for each in done)
        first = [each.ttft for each in done if each.stamps]
        per_token = [each.tpot for each in done if each.tpot is not None]
        gaps = np.concatenate([np.diff(each.stamps) for each in done]) if done else []
        return {
            "requests": len(self.answers),
            "failed": len(self.answers) - len(done),
            "seconds": round(self.seconds, 4),
            "requests_per_s": round(len(done) / self.seconds, 3) if self.seconds else 0.0,
            "tokens_per_s": round(self.throughput, 2),
            "goodput": round(len(good) / self.seconds, 3) if self.seconds else 0.0,
            **_percentiles("ttft", first),
            **_percentiles("tpot", per_token),
            **_percentiles("itl", gaps),
            "hits": named - self.events["device"],
            "moved": self.events["device"],
            "loads": self.events["load"],
            "evictions": self.events["evict"],
            "drops": self.events["drop"],
        }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    if not len(seconds):
        return {f"{name}_p50": None, f"{name}_p99": None}
    return {f"{name}_p{q}": round(float(np.percentile(seconds, q)) * 1e3, 3) for q in (50, 99)}


def _sleep(until: float, now: float) -> None:
    time.sleep(max(0.0, min(until - now, 0.0005)))  # shortly: a load may end before


def replay(
    engine,
    requests: Sequence[Request],
    at: Sequence[float] | None = None,
    *,
    outstanding: int | None = None,
    wait: Callable[[float, float], None] = _sleep,
) -> Run:
    """Send the requests at their times, on the calling thread, and step until all are answered.

    Args:
        at: seconds from the start, ascending. Open loop: nobody waits for an answer.
        outstanding: instead, closed loop: as many requests at any time, the next one when one has ended.
        wait: called with (until, now) when there is nothing to do before `until` but loads.
    """
    clock, begin, before = engine.clock, engine.clock(), Counter(engine.ledger.counts)
    answers: list[Answer] = []
    todo, running = deque(enumerate(requests)), 0

    def send(number: int, request: Request) -> None:
        nonlocal running
        answer = Answer(clock() - begin if at is None or outstanding is not None else at[number])
        answers.append(answer)

        def on_token(id: int, token: int) -> None:
            answer.stamps.append(clock() - begin)

        def on_end(result: Result) -> None:
            nonlocal running
            answer.result = result
            running -= 1

        try:
            running += 1
            engine.submit(request, on_token, on_end)
        except QueueFull:
            running -= 1

    def due() -> bool:
        if outstanding is not None:
            return running < outstanding
        return at is None or begin + at[todo[0][0]] <= clock()

    while todo or running:
        while todo and due():
            send(*todo.popleft())
        if not engine.step():
            next_one = begin + at[todo[0][0]] if todo and at is not None and outstanding is None else math.inf
            wait(next_one, clock())
    return Run(answers, clock() - begin, Counter(engine.ledger.counts) - before)
