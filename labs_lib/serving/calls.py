"""One generation between two threads: the engine's makes tokens, the event loop's turns them into text.

The engine's thread never waits: it hands each token to the loop and goes on. What a slow client has not taken yet waits
here, at most `max_tokens` integers for each request; a client that goes away ends its request in the engine.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

from labs_lib.errors import LabsError
from labs_lib.serving.metrics import Metrics
from labs_lib.serving.text import Detokenizer, StopStrings
from labs_lib.serving.types import QueueFull, Request, Result
from labs_lib.serving.web import ApiError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """What one token added. `token` is None where the model ended by itself: its end token is not text."""

    token: int | None
    text: str
    last: bool = False


class Calls:
    """Opens calls to the engine, within a bound for each tenant."""

    def __init__(self, engine, metrics: Metrics, limit: int) -> None:
        self.engine, self.metrics, self.limit = engine, metrics, limit
        self.inflight: Counter[str] = Counter()

    async def open(
        self, request: Request, detokenizer: Detokenizer, stops: list[str], arrived: float
    ) -> "Call":
        """Hand a request to the engine.

        Raises:
            ApiError: 429 when the tenant has too many requests under way or the engine's queue is full, 400 when the
                engine refuses the request.
        """
        tenant = request.tenant
        if self.inflight[tenant] >= self.limit:
            raise ApiError(
                429,
                f"You have {self.limit} requests under way, which is this server's limit for a tenant: wait for one.",
                kind="requests",
                code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )
        call = Call(self, request, detokenizer, stops, arrived)
        self.inflight[tenant] += 1
        self.metrics.opened(tenant, len(request.prompt))
        try:
            await call.submit()
        except QueueFull as error:
            call.close("429")
            wait = str(max(1, math.ceil(error.retry_after)))
            raise ApiError(
                429,
                str(error),
                kind="requests",
                code="rate_limit_exceeded",
                headers={"retry-after": wait},
                counted=True,
            ) from error
        except LabsError as error:
            call.close("400")
            raise ApiError(400, str(error), code="invalid_value", counted=True) from error
        except BaseException:
            call.close()
            raise
        return call


class Call:
    """A request in the engine. Read `pieces()` once, then `finish`, `result`, `tokens`; always `close()` it."""

    def __init__(
        self, calls: Calls, request: Request, detokenizer: Detokenizer, stops: list[str], arrived: float
    ) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.finish: str | None = None  # `stop` or `length`, once it is known
        self.ended_by_stop_string = False
        self.result: Result | None = None
        self._calls, self._detokenizer, self._stops = calls, detokenizer, StopStrings(stops)
        self._loop = asyncio.get_running_loop()
        # (when, token), and the result at the end: it cannot overflow
        self._inbox: asyncio.Queue[tuple[float, int | Result]] = asyncio.Queue(request.max_tokens + 1)
        self._id: int | None = None
        self._closed = self._failed = False
        self._arrived, self._first, self._last = arrived, None, None

    async def submit(self) -> None:
        """On a thread of the pool: the engine's lock may be held for a moment, and the loop must not wait for it."""

        def work() -> None:
            self._id = self._calls.engine.submit(
                self.request, self._hear, lambda result: self._hear(0, result)
            )
            if self._closed:  # the client went while we were here
                self._calls.engine.abort(self._id)

        await self._loop.run_in_executor(None, work)

    def _hear(self, _: int, item: int | Result) -> None:
        """On the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, (time.monotonic(), item))
        except RuntimeError:  # the loop is closed: the server is gone, and nobody listens
            log.debug("a token came after the server had ended")

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it comes; the last piece says so. Raises ApiError if the engine gives up."""
        while True:
            when, item = await self._inbox.get()
            if isinstance(item, Result):  # ended by the model's own end token, or not well
                self._end(item, "stop")
                yield Piece(None, self._rest(), last=True)
                return
            text = self._take(when, item)
            if self._stops.stopped or len(self.tokens) == self.request.max_tokens:
                if not self._stops.stopped:
                    text += self._rest()
                self._end(await self._ending(), "stop" if self._stops.stopped else "length")
                self.ended_by_stop_string = self._stops.stopped
                yield Piece(item, text, last=True)
                return
            yield Piece(item, text)

    def _take(self, when: float, token: int) -> str:
        self._first, self._last = self._first or when, when
        self.tokens.append(token)
        return self._stops.add(self._detokenizer.add(token))

    def _rest(self) -> str:
        text = self._stops.add(self._detokenizer.end())
        return text if self._stops.stopped else text + self._stops.end()

    async def _ending(self) -> Result:
        """The result of a request that needs no more tokens."""
        if self._stops.stopped:
            self._abort()
        while True:
            _, item = await self._inbox.get()
            if isinstance(item, Result):
                return item

    def _end(self, result: Result, finish: str) -> None:
        self.result = result
        if result.finish == "error" and not self._stops.stopped:
            self._failed = True
            raise ApiError(
                500,
                result.error or "The engine could not serve this request.",
                kind="server_error",
                code="engine_error",
                headers={"x-should-retry": "false"},  # the openai client would try a broken adapter again
                counted=True,
            )
        if (
            result.finish == "abort"
            and len(self.tokens) < self.request.max_tokens
            and not self._stops.stopped
        ):
            self._failed = True
            raise ApiError(
                503, "The server is shutting down.", kind="server_error", code="shutting_down", counted=True
            )
        self.finish = finish

    def _abort(self) -> None:
        if self._id is not None:
            self._loop.run_in_executor(None, self._calls.engine.abort, self._id)

    def close(self, outcome: str | None = None) -> None:
        """Give back its place; if the engine still works for it, stop that. More calls do nothing."""
        if self._closed:
            return
        self._closed = True
        if self.result is None:
            self._abort()
        tenant = self.request.tenant
        self._calls.inflight[tenant] -= 1
        if not self._calls.inflight[tenant]:
            del self._calls.inflight[tenant]
        outcome = outcome or ("ok" if self.finish else "error" if self._failed else "aborted")
        self._calls.metrics.closed(
            tenant,
            outcome,
            len(self.tokens),
            None if self._first is None else self._first - self._arrived,
            None if self._first is None else self._last - self._first,
        )
