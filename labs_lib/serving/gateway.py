"""The HTTP server: OpenAI's, LoRAX's and vLLM's APIs over one engine. `create_app` makes it.

Who may ask for what is `access`; how tokens become text is `calls`; shapes are `api`. Here the routes meet.
"""

import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from labs_lib.errors import LabsError
from labs_lib.serving import api, live
from labs_lib.serving.access import Access, Target, in_thread
from labs_lib.serving.calls import Call, Calls
from labs_lib.serving.metrics import Metrics
from labs_lib.serving.text import Detokenizer, encode_chat, special_ids
from labs_lib.serving.types import Request as EngineRequest
from labs_lib.serving.watch import Watch
from labs_lib.serving.web import ApiError, EventStream, Guard, invalid, until_disconnect

GREEDY_BELOW = 1e-3  # a temperature below is greedy: dividing logits by it would only overflow
COMPLETION_TOKENS = 16  # OpenAI's default for completions
MAX_BODY = 1 << 20

_bearer = HTTPBearer(auto_error=False, description="A tenant's key; the admin's key on the admin's paths.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


@dataclass(frozen=True)
class Job:
    """A request under way: the call, the version that its model name meant, and what each answer repeats."""

    call: Call
    target: Target
    model: str
    id: str
    created: int

    def head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def origin(self) -> dict:
        """Which weights made the tokens; known once the call has ended."""
        lease = self.call.result.provenance
        return {
            "adapter": lease.adapter,
            "version": self.target.version,
            "slot": lease.slot,
            "generation": lease.generation,
        }

    def usage(self) -> dict:
        prompt, output = len(self.call.request.prompt), len(self.call.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def headers(self) -> dict[str, str]:
        """A stream's headers leave before slot and generation are known; they are in its last chunk."""
        headers = {
            "x-adapter-sha256": self.target.adapter or "base",
            "x-adapter-version": str(self.target.version or "base"),
        }
        if self.call.result is not None:
            lease = self.call.result.provenance
            headers |= {"x-adapter-slot": str(lease.slot), "x-adapter-generation": str(lease.generation)}
        return headers


class Gateway:
    """What the routes share; `app.state.gateway`. Set `closing` to answer 503 while what is under way ends."""

    def __init__(
        self,
        engine,
        tokenizer,
        access: Access,
        metrics: Metrics,
        calls: Calls,
        *,
        default_max: int,
        write_seconds: float,
        watch: Watch | None,
    ) -> None:
        self.watch = watch
        self.engine, self.tokenizer, self.access = engine, tokenizer, access
        self.metrics, self.calls = metrics, calls
        self.default_max, self.write_seconds = default_max, write_seconds
        self.created = int(time.time())
        self.closing = False
        self._special = special_ids(tokenizer)
        self._end_tokens = end_tokens(tokenizer, engine.model)
        self._longest_token = max(map(len, tokenizer.get_vocab()))
        # Threads of their own, so that one tenant's long prompts do not hold up everybody's keys.
        self._tokenising = ThreadPoolExecutor(2, thread_name_prefix="tokenise")

    async def tenant(self, request: Request, credentials: Credentials) -> str:
        """Dependency: the name of the tenant who asks."""
        if self.closing:
            raise ApiError(
                503,
                "The server is shutting down: try again, it may be back.",
                kind="server_error",
                code="shutting_down",
                headers={"retry-after": "5"},
            )
        if self.watch is not None and self.watch.found:
            raise ApiError(
                503,
                "The server has found that a tenant was answered with another's adapter, and serves nobody until its "
                "operator has looked at it.",
                kind="server_error",
                code="isolation_broken",
            )
        request.state.tenant = await self.access.tenant(credentials and credentials.credentials)
        return request.state.tenant

    async def admin(self, credentials: Credentials) -> None:
        """Dependency: goes on only with the admin's key."""
        self.access.admin(credentials and credentials.credentials)

    async def open(
        self,
        tenant: str,
        model: str | None,
        prompt: list[int],
        *,
        prefix: str,
        default: int,
        max_tokens: int | None,
        temperature: float,
        top_p: float | None,
        seed: int | None,
        stop: str | list[str] | None,
        ignore_eos: bool | None,
    ) -> Job:
        """Settle which version is meant, check the length, hand it to the engine."""
        arrived = time.monotonic()
        target = await self.access.target(tenant, model)
        room = self.engine.max_tokens - len(prompt)
        count = max_tokens if max_tokens is not None else max(1, min(default, room))
        if count > room:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.engine.max_tokens} tokens, you asked for "
                f"{len(prompt) + count} ({len(prompt)} in the prompt, {count} to come): shorten one of them.",
                code="context_length_exceeded",
                param="messages" if prefix == "chatcmpl" else "prompt",
            )
        request = EngineRequest(
            prompt=prompt,
            tenant=tenant,
            adapter=target.adapter,
            max_tokens=count,
            temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
            top_p=1.0 if top_p is None else top_p,
            seed=seed,
            stop_ids=self._end_tokens,
            ignore_eos=bool(ignore_eos),
        )
        stops = [stop] if isinstance(stop, str) else stop or []
        call = await self.calls.open(request, Detokenizer(self.tokenizer, self._special), stops, arrived)
        name = model or self.access.model_name
        return Job(call, target, name, f"{prefix}-{uuid.uuid4().hex}", int(time.time()))

    async def open_openai(self, tenant: str, body: api.Generate, prompt: list[int], **more) -> Job:
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options are for streams: set stream.", param="stream_options")
        return await self.open(
            tenant,
            body.model,
            prompt,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            stop=body.stop,
            ignore_eos=body.ignore_eos,
            **more,
        )

    async def open_lorax(self, tenant: str, body: api.LoraxRequest) -> Job:
        """As LoRAX, greedy unless something asks for sampling."""
        asked = body.parameters or api.LoraxParameters()
        sampled = asked.do_sample or asked.temperature is not None or asked.top_p is not None
        return await self.open(
            tenant,
            asked.adapter_id,
            await self.encode(body.inputs),
            prefix="gen",
            default=self.default_max,
            max_tokens=asked.max_new_tokens,
            temperature=(1.0 if asked.temperature is None else asked.temperature) if sampled else 0.0,
            top_p=asked.top_p,
            seed=asked.seed,
            stop=asked.stop,
            ignore_eos=asked.ignore_eos_token,
        )

    async def encode(self, prompt: str | list[int] | list[str]) -> list[int]:
        """Token ids of a prompt."""
        if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], str)):
            return prompt
        text = prompt if isinstance(prompt, str) else prompt[0]
        self._check_size(len(text), "prompt")
        return (await in_thread(self.tokenizer, text, pool=self._tokenising)).input_ids

    async def encode_chat(self, messages: list[api.Message]) -> list[int]:
        plain = [message.plain() for message in messages]
        self._check_size(sum(len(message["content"]) for message in plain), "messages")
        try:
            return await in_thread(encode_chat, self.tokenizer, plain, pool=self._tokenising)
        except Exception as error:  # templates raise what they like: roles out of order, ...
            message = f"The model's chat template refused these messages: {error}"
            raise ApiError(400, message, code="invalid_value", param="messages") from error

    def _check_size(self, characters: int, param: str) -> None:
        """Refuse what cannot fit, however it is tokenized: tokenizing a megabyte takes a second."""
        if characters > self.engine.max_tokens * self._longest_token:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.engine.max_tokens} tokens, which {characters:,} "
                "characters cannot be: shorten the prompt.",
                code="context_length_exceeded",
                param=param,
            )

    async def stream(
        self, request: Request, job: Job, events: AsyncIterator[dict], done: str | None = "[DONE]"
    ) -> EventStream:
        """Answer with events. The first is waited for, so that what fails before it still gets its HTTP status."""
        try:
            first = await until_disconnect(request.receive, anext(events))
        except BaseException:
            job.call.close()
            raise

        async def from_first() -> AsyncIterator[dict]:
            yield first
            async for event in events:
                yield event

        return EventStream(
            from_first(), job.call.close, headers=job.headers(), done=done, write_seconds=self.write_seconds
        )


def end_tokens(tokenizer, model) -> tuple[int, ...]:
    """The tokens at which a generation ends: the tokenizer's, and those of the model's generation config."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    return tuple(sorted({id_ for id_ in (*ids, tokenizer.eos_token_id) if id_ is not None}))


async def _whole(request: Request, job: Job) -> list:
    """All pieces of a call, unless the client goes first; the call is closed either way."""

    async def pieces() -> list:
        return [piece async for piece in job.call.pieces()]

    try:
        return await until_disconnect(request.receive, pieces())
    finally:
        job.call.close()


# -------------------------------------------------------------------------------------------------------------- answers


async def completion(request: Request, job: Job) -> Response:
    text = "".join(piece.text for piece in await _whole(request, job))
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": job.call.finish}
    more = {"choices": [choice], "usage": job.usage(), "provenance": job.origin()}
    return JSONResponse(job.head("text_completion") | more, headers=job.headers())


async def completion_events(job: Job, usage: bool) -> AsyncIterator[dict]:
    head = job.head("text_completion") | ({"usage": None} if usage else {})
    async for piece in job.call.pieces():
        if piece.text or piece.last:
            choice = {"index": 0, "text": piece.text, "logprobs": None, "finish_reason": job.call.finish}
            yield head | {"choices": [choice]} | ({"provenance": job.origin()} if piece.last else {})
    if usage:
        yield head | {"choices": [], "usage": job.usage(), "provenance": job.origin()}


async def chat(request: Request, job: Job) -> Response:
    text = "".join(piece.text for piece in await _whole(request, job))
    said = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": job.call.finish}
    more = {"choices": [choice], "usage": job.usage(), "provenance": job.origin()}
    return JSONResponse(job.head("chat.completion") | more, headers=job.headers())


async def chat_events(job: Job, usage: bool) -> AsyncIterator[dict]:
    head = job.head("chat.completion.chunk") | ({"usage": None} if usage else {})

    def chunk(delta: dict, finish: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return head | {"choices": [choice]}

    begun = False
    async for piece in job.call.pieces():
        if not begun:
            yield chunk({"role": "assistant", "content": ""})
            begun = True
        if piece.text:
            yield chunk({"content": piece.text})
    yield chunk({}, job.call.finish) | {"provenance": job.origin()}
    if usage:
        yield head | {"choices": [], "usage": job.usage(), "provenance": job.origin()}


class Lorax:
    """LoRAX's words for a job. Its client needs a number for `logprob`: none is computed, it is always 0."""

    def __init__(self, job: Job, tokenizer) -> None:
        self.job, self.tokenizer = job, tokenizer

    def token(self, piece) -> dict:
        """The end token where the model ended by itself; it only carries text if a character was left unfinished."""
        id_ = self.tokenizer.eos_token_id if piece.token is None else piece.token
        return {
            "id": id_,
            "text": piece.text,
            "logprob": 0.0,
            "special": piece.token is None and not piece.text,
        }

    def end(self) -> dict:
        call = self.job.call
        reason = "length" if call.finish == "length" else "eos_token"
        return {
            "finish_reason": "stop_sequence" if call.ended_by_stop_string else reason,
            "prompt_tokens": len(call.request.prompt),
            "generated_tokens": len(call.tokens),
            "seed": call.request.seed,
        }

    async def whole(self, request: Request, details: bool) -> tuple[dict, dict[str, str]]:
        pieces = await _whole(request, self.job)
        body = {"generated_text": "".join(piece.text for piece in pieces), "provenance": self.job.origin()}
        if details:
            tokens = [self.token(piece) for piece in pieces if piece.token is not None or piece.text]
            body["details"] = self.end() | {"prefill": [], "tokens": tokens}
        return body, self.job.headers()

    async def events(self) -> AsyncIterator[dict]:
        text = ""
        async for piece in self.job.call.pieces():
            text += piece.text
            event = {"token": self.token(piece), "generated_text": None, "details": None}
            if piece.last:
                event |= {"generated_text": text, "details": self.end(), "provenance": self.job.origin()}
            yield event


# -------------------------------------------------------------------------------------------------------------- the app


def create_app(
    engine,
    registry,
    tokenizer,
    *,
    admin_key: str | None,
    model_name: str,
    allow_base: bool = True,
    adapter_root: Path | None = None,
    max_inflight: int = 32,
    max_body: int = MAX_BODY,
    default_max_tokens: int = 256,
    write_seconds: float = 30.0,
    body_seconds: float = 30.0,
    watch: Watch | None = None,
) -> FastAPI:
    """The server, for a running engine; it starts and stops nothing.

    Args:
        engine: `start()`ed by the caller.
        registry: tenants and versions; may be written by other processes at any time.
        tokenizer: of the engine's model.
        admin_key: opens /metrics, /admin and the load and unload paths; None shuts them.
        model_name: what the base is called.
        allow_base: whether tenants may use the base itself.
        adapter_root: the only directory from which adapters may be published over HTTP; None is nowhere.
        max_inflight: requests that one tenant may have under way; one more gets 429.
        max_body: bytes of a request's body; more gets 413.
        default_max_tokens: of a chat or /generate that does not say, unless the context ends before.
        write_seconds: after which a client that reads nothing of its stream is dropped.
        body_seconds: in which a request's body must arrive; later gets 408.
        watch: `start()`ed by the caller; once it has found a leak, everybody gets 503.
    """
    access = Access(
        registry, admin_key=admin_key, model_name=model_name, allow_base=allow_base, adapter_root=adapter_root
    )
    metrics = Metrics(engine, watch)
    gateway = Gateway(
        engine,
        tokenizer,
        access,
        metrics,
        Calls(engine, metrics, max_inflight),
        default_max=default_max_tokens,
        write_seconds=write_seconds,
        watch=watch,
    )
    app = FastAPI(title="PEFT Labs multi-adapter server", version="1", docs_url=None, redoc_url=None)
    app.state.gateway = gateway
    app.add_middleware(Guard, max_body=max_body, body_seconds=body_seconds)
    _answer_errors(app, metrics)
    _openai_routes(app, gateway)
    _lorax_routes(app, gateway)
    _admin_routes(app, gateway, registry)
    return app


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error in the words of the API that was called, and counted."""

    def answer(request: Request, error: ApiError) -> Response:
        if not error.counted:
            metrics.refused(getattr(request.state, "tenant", None), error.status)
        return error.response(request.url.path)

    async def own(request: Request, error: ApiError) -> Response:
        return answer(request, error)

    async def bad_body(request: Request, error: RequestValidationError) -> Response:
        return answer(request, invalid(error))

    async def http(request: Request, error: StarletteHTTPException) -> Response:
        return answer(
            request, ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        )

    app.add_exception_handler(ApiError, own)
    app.add_exception_handler(RequestValidationError, bad_body)
    app.add_exception_handler(StarletteHTTPException, http)


def _documented(model: type | None, error: type, streamed: bool = False) -> dict:
    """What a route may answer, for the OpenAPI description. `model` None: it only streams."""
    ok: dict = {"description": "The answer."} | ({"model": model} if model else {})
    if streamed:
        event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        ok["content"] = {"text/event-stream": {"itemSchema": event}}
    wrong = {"model": error, "description": "What is wrong with the request; with 429, Retry-After."}
    ours = {"model": error, "description": "Our fault, with an id that is in the log; or 503, shutting down."}
    return {200: ok, "4XX": wrong, "5XX": ours}


def _openai_routes(app: FastAPI, gateway: Gateway) -> None:
    tenant = Annotated[str, Depends(gateway.tenant)]

    def card(name: str, version, owner: str) -> api.ModelCard:
        if version is None:
            return api.ModelCard(id=name, created=gateway.created, owned_by="base")
        return api.ModelCard(
            id=name,
            created=gateway.created,
            owned_by=owner,
            parent=gateway.access.model_name,
            version=version.number,
            adapter=version.sha256,
        )

    @app.get("/v1/models", responses=_documented(api.ModelList, api.ErrorBody))
    async def models(tenant: tenant) -> api.ModelList:
        """The models that exist for you: your adapter, its versions, and the base if it is offered."""
        return api.ModelList(data=[card(*each, tenant) for each in await gateway.access.models(tenant)])

    @app.get("/v1/models/{model_id:path}", responses=_documented(api.ModelCard, api.ErrorBody))
    async def model(model_id: str, tenant: tenant) -> api.ModelCard:
        for name, version in await gateway.access.models(tenant):
            if name == model_id:
                return card(name, version, tenant)
        raise gateway.access.unknown(model_id)

    @app.post("/v1/completions", responses=_documented(api.Completion, api.ErrorBody, streamed=True))
    async def completions(body: api.CompletionRequest, request: Request, tenant: tenant) -> Response:
        prompt = await gateway.encode(body.prompt)
        job = await gateway.open_openai(
            tenant, body, prompt, prefix="cmpl", default=COMPLETION_TOKENS, max_tokens=body.max_tokens
        )
        if body.stream:
            return await gateway.stream(request, job, completion_events(job, _wants_usage(body)))
        return await completion(request, job)

    @app.post("/v1/chat/completions", responses=_documented(api.Chat, api.ErrorBody, streamed=True))
    async def chats(body: api.ChatRequest, request: Request, tenant: tenant) -> Response:
        prompt = await gateway.encode_chat(body.messages)
        job = await gateway.open_openai(
            tenant,
            body,
            prompt,
            prefix="chatcmpl",
            default=gateway.default_max,
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        )
        if body.stream:
            return await gateway.stream(request, job, chat_events(job, _wants_usage(body)))
        return await chat(request, job)


def _wants_usage(body: api.Generate) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _lorax_routes(app: FastAPI, gateway: Gateway) -> None:
    tenant = Annotated[str, Depends(gateway.tenant)]

    async def whole(body: api.LoraxRequest, request: Request, tenant: str) -> tuple[dict, dict[str, str]]:
        lorax = Lorax(await gateway.open_lorax(tenant, body), gateway.tokenizer)
        return await lorax.whole(request, bool(body.parameters and body.parameters.details))

    async def stream(body: api.LoraxRequest, request: Request, tenant: str) -> Response:
        lorax = Lorax(await gateway.open_lorax(tenant, body), gateway.tokenizer)
        return await gateway.stream(request, lorax.job, lorax.events(), done=None)

    @app.post("/generate", responses=_documented(api.LoraxResponse, api.LoraxError))
    async def generate(body: api.LoraxRequest, request: Request, tenant: tenant) -> Response:
        answer, headers = await whole(body, request, tenant)
        return JSONResponse(answer, headers=headers)

    @app.post("/generate_stream", responses=_documented(None, api.LoraxError, streamed=True))
    async def generate_stream(body: api.LoraxRequest, request: Request, tenant: tenant) -> Response:
        return await stream(body, request, tenant)

    @app.post("/", responses=_documented(list[api.LoraxResponse], api.LoraxError, streamed=True))
    async def compat_generate(body: api.LoraxCompatRequest, request: Request, tenant: tenant) -> Response:
        """What the `lorax-client` package calls: `stream` chooses, and a whole answer is a list of one."""
        if body.stream:
            return await stream(body, request, tenant)
        answer, headers = await whole(body, request, tenant)
        return JSONResponse([answer], headers=headers)


def _admin_routes(app: FastAPI, gateway: Gateway, registry) -> None:
    admin = [Depends(gateway.admin)]

    async def change(function, *arguments):
        """Run a change of the registry; what it refuses is the caller's error."""
        try:
            return await in_thread(function, *arguments)
        except LabsError as error:
            raise ApiError(400, str(error), code="refused") from error

    async def known(name: str) -> None:
        if name not in {tenant.name for tenant in await in_thread(registry.tenants)}:
            message = f"There is no tenant {name[:100]!r}: add it with `labs tenants add`."
            raise ApiError(404, message, code="tenant_not_found")

    async def card(name: str) -> api.TenantCard:
        current = await in_thread(registry.current, name)
        versions = [
            api.VersionCard(
                number=each.number,
                adapter=each.sha256,
                state=each.state,
                rank=each.rank,
                nbytes=each.nbytes,
                note=each.note,
            )
            for each in await in_thread(registry.versions, name)
        ]
        return api.TenantCard(name=name, current=current and current.number, versions=versions)

    @app.get("/health", responses={503: {"model": api.Health, "description": "Do not send requests here."}})
    async def health() -> api.Health:
        broken = gateway.watch is not None and gateway.watch.found
        if broken or gateway.closing:
            status = "isolation broken" if broken else "shutting down"
            return JSONResponse({"status": status, "model": gateway.access.model_name}, 503)
        return api.Health(status="ok", model=gateway.access.model_name)

    @app.get("/", include_in_schema=False)
    async def live_page() -> Response:
        """A page to look at; it knows nothing until it is given the admin's key."""
        html, headers = live.page()
        return HTMLResponse(html, headers=headers)

    @app.get("/admin/live", dependencies=admin, responses=_documented(api.Live, api.ErrorBody))
    async def live_picture(since: Annotated[int, Query(ge=0)] = 0) -> api.Live:
        """Who is in which tier, who waits, each tenant's latency, and what moved after the event `since`."""
        return api.Live(**await in_thread(live.picture, gateway.engine, registry, gateway.watch, since))

    @app.get("/admin/isolation", dependencies=admin, responses=_documented(api.Isolation, api.ErrorBody))
    async def isolation() -> api.Isolation:
        """What the shadow oracle and the canaries have proved so far."""
        return api.Isolation(
            watched=gateway.watch is not None, **(gateway.watch.report() if gateway.watch else {})
        )

    @app.get(
        "/metrics",
        dependencies=admin,
        response_class=PlainTextResponse,
        responses=_text("Prometheus' text format."),
    )
    async def metrics() -> Response:
        """Admin only, since it names the tenants."""
        return PlainTextResponse(
            await in_thread(gateway.metrics.text), media_type="text/plain; version=0.0.4"
        )

    @app.get("/admin/tenants", dependencies=admin, responses=_documented(api.TenantList, api.ErrorBody))
    async def tenants() -> api.TenantList:
        return api.TenantList(tenants=[await card(each.name) for each in await in_thread(registry.tenants)])

    @app.post(
        "/admin/tenants/{name}/rollback",
        dependencies=admin,
        responses=_documented(api.TenantCard, api.ErrorBody),
    )
    async def rollback(name: str, body: api.Rollback | None = None) -> api.TenantCard:
        """Serve an earlier version again, from the next request on."""
        await known(name)
        await change(registry.rollback, name, body and body.to)
        return await card(name)

    @app.post(
        "/v1/load_lora_adapter",
        dependencies=admin,
        response_class=PlainTextResponse,
        responses=_text("Done."),
    )
    async def load(body: api.LoadAdapter) -> Response:
        """vLLM's: publish a folder below the adapter root as a tenant's adapter."""
        await known(body.lora_name)
        folder = await in_thread(gateway.access.folder, body.lora_path)
        if not body.load_inplace and await in_thread(registry.current, body.lora_name):
            message = f"The lora adapter {body.lora_name!r} has already been loaded. To publish a new version of it, "
            raise ApiError(
                400, message + "set 'load_inplace' to true.", code="already_loaded", param="lora_name"
            )
        await change(registry.publish, body.lora_name, folder, "load_lora_adapter")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post(
        "/v1/unload_lora_adapter",
        dependencies=admin,
        response_class=PlainTextResponse,
        responses=_text("Done."),
    )
    async def unload(body: api.UnloadAdapter) -> Response:
        """vLLM's: the name serves nothing any more; requests under way end on what they began with."""
        await known(body.lora_name)
        for version in await gateway.access.versions(body.lora_name):
            await change(registry.retire, body.lora_name, version.number)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _text(description: str) -> dict:
    """As `_documented`, for answers in plain text; the errors stay JSON."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    return {
        200: {"description": description},
        "4XX": {"description": "What is wrong with the request.", "content": error},
        "5XX": {"description": "Our fault, with an id that is in the log.", "content": error},
    }
