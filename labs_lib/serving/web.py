"""HTTP plumbing that knows neither the engine nor tenants: errors as bodies, a guard around every request, streams.

What a client may do wrong is an `ApiError`; everything else that goes wrong is a 500 with an id that is in the log,
and never the end of the server.
"""

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response

from labs_lib.serving.api import NOT_SUPPORTED

log = logging.getLogger(__name__)

LORAX_PATHS = ("/", "/generate", "/generate_stream")


class ApiError(Exception):
    """An answer that is an error, in OpenAI's words; `status` is HTTP's."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        counted: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, _text(message), kind
        self.code, self.param, self.headers = code, param and _text(param), headers or {}
        self.counted = counted  # whether the metrics know of it already

    def body(self, path: str) -> dict:
        """OpenAI's error body, or LoRAX's on its paths."""
        if path in LORAX_PATHS:
            kinds = {
                400: "validation",
                413: "validation",
                429: "overloaded",
                503: "overloaded",
                500: "generation",
            }
            return {"error": self.message, "error_type": kinds.get(self.status, self.code or "request")}
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self, path: str) -> JSONResponse:
        return JSONResponse(self.body(path), self.status, self.headers)


def _text(words: str) -> str:
    """At most some lines that can be sent: names from a request may be long, or half of a surrogate pair."""
    return words[:1000].encode("utf-8", "replace").decode()


def internal_error(request_id: str) -> ApiError:
    return ApiError(
        500,
        f"Something went wrong inside the server; its log says more under {request_id}.",
        kind="server_error",
        code="internal_error",
    )


def invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, as one sentence. Never quotes the input: it may not be text at all."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    name = next((part for part in place if isinstance(part, str)), None)
    where = ".".join(map(str, place)) or "body"
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", code="invalid_json")
    if first["type"] == "extra_forbidden":
        field = place[-1]
        return ApiError(
            400, f"Unrecognized request argument supplied: {field}", code="unknown_parameter", param=name
        )
    if first["type"] == "missing":
        return ApiError(400, f"You must provide {where}.", code="missing_required_parameter", param=name)
    if asked := [part for part in place if part in NOT_SUPPORTED]:
        message = f"This server does not support {asked[0]!r} with this value: leave it out."
        return ApiError(400, message, code="unsupported_value", param=name)
    return ApiError(400, f"Invalid value for {where}: {first['msg']}.", code="invalid_value", param=name)


class ClientGone(Exception):  # noqa: N818
    """The client has closed the connection; there is nobody to answer."""


async def until_disconnect(receive: Callable, work: Coroutine):
    """Run `work` to its end; if the client goes first, cancel it and raise ClientGone.

    The body of the request must have been read: what `receive` says next is that the client has gone.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, one per item of `events`; `on_close` is called however the stream ends.

    A client that does not read holds up nobody: what waits for it stays where `events` come from. One that reads
    nothing for `write_seconds` is dropped. An error after the first byte becomes an event, since the status is sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[dict],
        on_close: Callable[[], None],
        *,
        headers: dict[str, str],
        done: str | None = "[DONE]",
        write_seconds: float = 30.0,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", **headers})
        del self.headers["content-length"]
        self._events, self._on_close, self._done, self._seconds = events, on_close, done, write_seconds

    async def __call__(self, scope, receive, send) -> None:
        try:
            await until_disconnect(receive, self._write(scope, send))
        except ClientGone:
            pass
        except asyncio.TimeoutError:
            log.warning("a client read nothing for %s s: its stream is closed", self._seconds)
        finally:
            self._on_close()

    async def _write(self, scope, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await self._send(send, json.dumps(event))
        except ApiError as error:
            await self._send(send, json.dumps(error.body(scope["path"])))
        except (asyncio.TimeoutError, OSError):
            raise
        except Exception:
            request_id = scope["state"]["request_id"]
            log.exception("stream %s failed", request_id)
            await self._send(send, json.dumps(internal_error(request_id).body(scope["path"])))
        if self._done:
            await self._send(send, self._done)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send, data: str) -> None:
        body = f"data: {data}\n\n".encode()
        # Waits while the client's buffers are full.
        await asyncio.wait_for(
            send({"type": "http.response.body", "body": body, "more_body": True}), self._seconds
        )


class Guard:
    """Around the whole app: gives each request an id, reads its body up to a limit, answers what nobody else caught."""

    def __init__(self, app, max_body: int, body_seconds: float) -> None:
        self.app, self.max_body, self.body_seconds = app, max_body, body_seconds

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def tagged(message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, _replay(await self._body(scope, receive), receive), tagged)
        except ClientGone:
            return
        except ApiError as error:
            answer = error
        except Exception:
            log.exception("request %s failed", request_id)
            answer = internal_error(request_id)
        else:
            return
        if not started:
            await answer.response(scope["path"])(scope, receive, tagged)

    async def _body(self, scope, receive) -> bytes:
        try:
            return await asyncio.wait_for(self._read(scope, receive), self.body_seconds)
        except asyncio.TimeoutError:
            message = f"The body did not arrive within {self.body_seconds:g} s."
            raise ApiError(408, message, code="request_timeout", headers={"connection": "close"}) from None

    async def _read(self, scope, receive) -> bytes:
        """The body; beyond the limit it is read but not kept, up to eight times the limit, so that the client hears."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        kept, size = [], 0
        more = not (declared.isdigit() and int(declared) > 8 * self.max_body)
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            size += len(message.get("body", b""))
            if size <= self.max_body:
                kept.append(message.get("body", b""))
            else:
                kept.clear()
            more = message.get("more_body", False) and size <= 8 * self.max_body
        if size > self.max_body or not (declared.isdigit() and int(declared) <= self.max_body):
            raise ApiError(
                413,
                f"The body is larger than this server's limit of {self.max_body:,} bytes: send less.",
                code="request_too_large",
                headers={"connection": "close"},
            )
        return b"".join(kept)


def _replay(body: bytes, receive: Callable) -> Callable:
    """The `receive` of an app whose body has been read already: the body at once, then whatever comes."""
    first = True

    async def replayed() -> dict:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed
