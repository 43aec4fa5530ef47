"""Customers: a plan of calls, sent over HTTP at their times by as many clients as it takes, and what each one heard.

The plan does not wait for answers (open loop), so that a slow server shows as long waits and not as little traffic.
"""

import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from labs_lib.serving.workload import Trace


@dataclass(frozen=True)
class Call:
    """A request for `tenant`'s own adapter, `at` seconds from the start."""

    at: float
    tenant: str
    prompt: str
    max_tokens: int = 80


@dataclass
class Reply:
    """What a call got. `status` 0: no answer at all. `seconds` counts from when the call was due."""

    call: Call
    status: int = 0
    seconds: float = 0.0
    text: str = ""
    tokens: int = 0
    version: int | None = None
    adapter: str | None = None
    slot: int | None = None
    error: str = ""


@dataclass
class Played:
    """All replies in the order of the plan, and what happened meanwhile: (when, what it returned)."""

    replies: list[Reply]
    happened: list[tuple[float, object]] = field(default_factory=list)

    @property
    def failed(self) -> list[Reply]:
        """Those without an answer that a customer could use."""
        return [reply for reply in self.replies if reply.status != 200]


def plan(
    trace: Trace, tenants: Sequence[str], prompts: Mapping[str, Sequence[str]], max_tokens: int = 80
) -> list[Call]:
    """A trace's arrivals as calls: adapter k is `tenants[k]`, who asks for its own prompts in turn."""
    asked = dict.fromkeys(tenants, 0)
    calls = []
    for arrival in trace:
        who = tenants[arrival.adapter or 0]
        calls.append(Call(arrival.at, who, prompts[who][asked[who] % len(prompts[who])], max_tokens))
        asked[who] += 1
    return calls


def play(
    url: str,
    calls: Sequence[Call],
    keys: Mapping[str, str],
    *,
    during: Sequence[tuple[float, Callable[[], object]]] = (),
    clients: int = 64,
) -> Played:
    """Send the calls at their times; greedy, to `/v1/completions`, each with its tenant's key.

    Args:
        during: (seconds, what to do then), done on a thread of its own while the calls go on.
        clients: calls that can be under way at once; what is due beyond that waits, and its wait counts.
    """
    started = time.perf_counter()
    happened: list[tuple[float, object]] = []
    broken: list[BaseException] = []

    def act() -> None:
        try:
            for at, what in sorted(during, key=lambda each: each[0]):
                time.sleep(max(0.0, started + at - time.perf_counter()))
                done = what()
                happened.append((time.perf_counter() - started, done))
        except BaseException as error:
            broken.append(error)

    actor = threading.Thread(target=act, name="operator")
    actor.start()
    with ThreadPoolExecutor(clients, thread_name_prefix="customer") as pool:
        waiting = []
        for call in sorted(calls, key=lambda each: each.at):
            time.sleep(max(0.0, started + call.at - time.perf_counter()))
            waiting.append(pool.submit(_ask, url, call, keys.get(call.tenant, ""), started))
        replies = [each.result() for each in waiting]
    actor.join()
    if broken:
        raise broken[0]
    return Played(replies, happened)


def _ask(url: str, call: Call, key: str, started: float) -> Reply:
    reply, where = Reply(call), urlsplit(url)
    body = {"model": call.tenant, "prompt": call.prompt, "max_tokens": call.max_tokens, "temperature": 0}
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=120)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        reply.status, said = answer.status, json.loads(answer.read())
        if reply.status == 200:
            reply.text, origin = said["choices"][0]["text"], said["provenance"]
            reply.tokens = said["usage"]["completion_tokens"]
            reply.version, reply.adapter, reply.slot = origin["version"], origin["adapter"], origin["slot"]
        else:
            reply.error = said["error"]["message"]
    except (OSError, http.client.HTTPException, ValueError) as error:
        reply.error = str(error) or type(error).__name__
    finally:
        connection.close()
    reply.seconds = time.perf_counter() - started - call.at
    return reply
