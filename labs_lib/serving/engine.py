"""The engine: requests in, tokens out, one model, many adapters, batched by the iteration.

`step()` takes in finished loads, admits who fits (row, KV pages, adapter on the device), runs their prompts, then
gives every running sequence one more token. Sequences join and leave between steps (Yu et al. 2022, "Orca", OSDI).
Each holds a lease on its slot, number and generation; before every forward pass the lease is compared with the slot,
so a sequence whose slot was given away fails instead of getting another tenant's tokens.
"""

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from labs_lib.errors import LabsError
from labs_lib.serving.kv import KVCache, Reservation
from labs_lib.serving.layout import Layout
from labs_lib.serving.ledger import Ledger
from labs_lib.serving.pool import Pool, Slot
from labs_lib.serving.scheduler import Queue
from labs_lib.serving.tiers import HostAdapter, ThreadLoader, Tiers
from labs_lib.serving.types import IsolationError, OnEnd, OnToken, Provenance, Request, Result, Timing

log = logging.getLogger(__name__)

PREFILL_TOKENS = 4096  # of one prefill pass, padding included: running sequences wait for it
LOOK = 1000  # events that `look` gives


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine. Times are the clock's, None until they happen."""

    id: int
    request: Request
    arrived: float
    on_token: OnToken | None = None
    on_end: OnEnd | None = None
    tokens: list[int] = field(default_factory=list)
    slot: Slot | None = None
    lease: Provenance | None = None
    reservation: Reservation | None = None
    generator: torch.Generator | None = None
    wanted: float | None = None  # since when its adapter is missing, if it is
    loading: float = 0.0  # seconds that it was missing before
    admitted: float | None = None
    first: float | None = None  # when its first token was there
    aborted: bool = False

    @property
    def length(self) -> int:
        """Tokens so far, prompt and output."""
        return len(self.request.prompt) + len(self.tokens)

    def finish(self) -> str | None:
        """Why it is over, or None if it goes on."""
        if self.tokens and self.tokens[-1] in self.request.stop_ids and not self.request.ignore_eos:
            return "stop"
        return "length" if len(self.tokens) >= self.request.max_tokens else None

    def timing(self, now: float) -> Timing:
        loading = self.loading + (now - self.wanted if self.wanted is not None else 0.0)
        admitted = now if self.admitted is None else self.admitted
        first = admitted if self.first is None else self.first
        return Timing(
            queue=max(0.0, admitted - self.arrived - loading),
            load=loading,
            prefill=first - admitted,
            decode=now - first if self.first is not None else 0.0,
        )


class Engine:
    """Serves LoRA adapters of one model.

    Args:
        model: a Llama-family transformers model, on its device. Its linear layers are wrapped until `close()`.
        folder_of: the folder of an adapter version, by its sha256.
        slots: adapters that fit on the device at `max_rank` each.
        max_rank: the largest rank accepted (a DoRA adapter needs one more).
        max_batch: sequences that run together.
        kv_tokens: tokens of keys and values that fit, over all running sequences.
        host_bytes: budget for adapters in host memory.
        policy: `separate` or `unified` memory for adapters and keys and values (`pool`).
        fairness: `fcfs` or `fair` (`scheduler`).
        queue_limit: waiting requests; one more is refused with QueueFull.
        patience: seconds after which the request that waits longest is not overtaken any more.
        op: how adapters are applied (`ops`); `auto` chooses by shape.
        graphs: record decode steps and replay them: `on`, `off`, or `auto`, on CUDA only (`executor`).
        prefix_cache: share the keys and values of equal beginnings of prompts under the same adapter version.
        clock: seconds; a virtual one in the digital twin.
    """

    def __init__(
        self,
        model,
        folder_of: Callable[[str], Path],
        *,
        slots: int = 32,
        max_rank: int = 16,
        max_batch: int = 32,
        kv_tokens: int = 8192,
        host_bytes: int = 256 << 20,
        policy: str = "separate",
        fairness: str = "fcfs",
        queue_limit: int = 256,
        patience: float = 2.0,
        op: str = "auto",
        graphs: str = "auto",
        prefix_cache: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from labs_lib.serving.adapter import read_pages
        from labs_lib.serving.executor import ModelExecutor

        layout = Layout.of(model)
        dtype = model.get_input_embeddings().weight.dtype
        weights = {spec.name: model.get_submodule(spec.name) for spec in layout.linears}

        def read(adapter: str) -> HostAdapter:
            manifest, values = read_pages(
                folder_of(adapter), layout, lambda name: weights[name].weight, dtype=dtype
            )
            if manifest.sha256 != adapter:
                raise IsolationError(
                    f"The files of adapter {adapter[:12]} have changed since it was published (they are now "
                    f"{manifest.sha256[:12]}): publish it again."
                )
            if model.device.type == "cuda":
                values = values.pin_memory()
            return HostAdapter(adapter, len(values), values.nbytes, manifest.dora, values)

        self.model, self.layout = model, layout
        pool = Pool(layout, slots, max_rank, kv_tokens, policy, dtype, model.device)
        self._setup(
            ModelExecutor(model, layout, pool, op, graphs, max_batch),
            pool,
            ThreadLoader(read),
            max_tokens=min(
                model.config.max_position_embeddings, getattr(model.config, "sliding_window", None) or 1 << 60
            ),
            vocabulary=model.get_input_embeddings().num_embeddings,
            max_batch=max_batch,
            host_bytes=host_bytes,
            queue=Queue(fairness, queue_limit, patience),
            prefix_cache=prefix_cache,
            clock=clock,
        )

    @classmethod
    def from_parts(cls, executor, pool: Pool, loader, **settings) -> "Engine":
        """An engine over any executor and loader: how the digital twin runs this same code without a model."""
        self = cls.__new__(cls)
        self.model, self.layout = None, pool.layout
        self._setup(executor, pool, loader, **settings)
        return self

    def _setup(
        self,
        executor,
        pool: Pool,
        loader,
        *,
        max_tokens: int,
        vocabulary: int,
        max_batch: int,
        host_bytes: int,
        queue: Queue,
        prefix_cache: bool,
        clock: Callable[[], float],
    ) -> None:
        self.executor, self.pool, self.queue, self.clock = executor, pool, queue, clock
        self.max_tokens, self.vocabulary, self.max_batch = max_tokens, vocabulary, max_batch
        self.ledger = Ledger(clock)
        self.tiers = Tiers(pool, loader, host_bytes, clock, self.ledger.watch)
        self.kv = KVCache(pool, prefix_cache)
        if pool.policy == "unified":
            self.tiers.prompts = self.kv
        self.running: list[Sequence] = []
        self.observers: list[OnEnd] = []  # called with every result, like `on_end`
        self._ids = itertools.count(1)
        self._lock = threading.RLock()  # around everything but the model's own work
        self._work = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._stopping = False

    # -- what callers do, from any thread ------------------------------------------------------------------------

    def submit(self, request: Request, on_token: OnToken | None = None, on_end: OnEnd | None = None) -> int:
        """Queue a request; returns its id. `on_token` and `on_end` are called on the engine's thread.

        Raises:
            LabsError: an empty or too long prompt, unknown token ids, or settings out of range.
            QueueFull: too many requests wait.
        """
        self._check(request)
        with self._work:
            if self._stopping:
                raise LabsError("The engine is shutting down: send the request to another one.")
            sequence = Sequence(next(self._ids), request, self.clock(), on_token, on_end)
            if request.temperature > 0:
                sequence.generator = torch.Generator()
                if request.seed is None:
                    sequence.generator.seed()
                else:
                    sequence.generator.manual_seed(request.seed)
            self.queue.push(sequence)
            if request.adapter is not None:
                self._prefetch(sequence)
            self._work.notify_all()
            return sequence.id

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise LabsError("The prompt has no tokens.")
        if request.max_tokens < 1:
            raise LabsError(f"max_tokens is {request.max_tokens}: at least 1.")
        total = len(request.prompt) + request.max_tokens
        if total > self.max_tokens:
            raise LabsError(
                f"The prompt ({len(request.prompt)} tokens) and max_tokens ({request.max_tokens}) make {total}, this "
                f"model takes {self.max_tokens}: shorten one of them."
            )
        if self.pool.kv_pages_for(total) > self.pool.kv_count:
            raise LabsError(f"{total} tokens do not fit into the key/value memory: raise --kv-tokens.")
        if not (request.temperature >= 0 and 0 < request.top_p <= 1):
            raise LabsError("temperature must be 0 or more, top_p above 0 and at most 1.")
        if min(request.prompt) < 0 or max(request.prompt) >= self.vocabulary:
            raise LabsError(f"The prompt holds token ids outside the vocabulary of {self.vocabulary}.")

    def abort(self, id: int) -> None:
        """End a request early (its client has gone); one that has ended already is left alone."""
        with self._work:
            for sequence in [*self.queue.waiting.values(), *self.running]:
                if sequence.id == id:
                    sequence.aborted = True
            self._work.notify_all()

    def pin(self, adapter: str) -> None:
        """Keep an adapter where it gets to: it is never evicted until `unload`."""
        with self._lock:
            self.tiers.pinned.add(adapter)
            self.tiers.prefetch(adapter)

    def unload(self, adapter: str) -> None:
        """Drop an adapter from device and host; LabsError while requests hold it."""
        with self._lock:
            self.tiers.unload(adapter)

    def stats(self) -> dict:
        """Counters and gauges, as /metrics shows them."""
        with self._lock:
            return {
                "running": len(self.running),
                "waiting": len(self.queue.waiting),
                "resident_adapters": len(self.pool.resident),
                "host_adapters": len(self.tiers.host),
                "host_bytes": self.tiers.host_used,
                "device_bytes": self.pool.nbytes,
                "kv_pages_free": self.pool.kv_free,
                "kv_pages": self.pool.kv_count,
                "prefix_tokens_reused": self.kv.hits,
                "events": dict(self.ledger.counts),
            }

    def look(self) -> dict:
        """Where every adapter is and whose requests run and wait, at one moment, with the ledger's newest events."""
        with self._lock:
            newest = list(itertools.islice(reversed(self.ledger.events), LOOK))[::-1]
            return {
                "slots": [
                    {"slot": s.number, "adapter": s.adapter, "tenant": s.tenant, "running": s.refs}
                    for s in self.pool.slots[1:]
                ],
                "host": list(self.tiers.host),
                "loading": list(self.tiers.loading),
                "running": Counter(each.request.tenant for each in self.running),
                "waiting": Counter(each.request.tenant for each in self.queue.waiting.values()),
                "events": newest,
                "events_seen": self.ledger.counts.total(),
            }

    def generate(self, requests: list[Request]) -> list[Result]:
        """Run requests to their end, on the calling thread unless `start` was called; results in their order."""
        results: dict[int, Result] = {}
        ids = [
            self.submit(request, on_end=lambda result: results.__setitem__(result.id, result))
            for request in requests
        ]
        self.drive(lambda: len(results) == len(ids))
        return [results[id] for id in ids]

    def drive(self, until: Callable[[], bool]) -> None:
        """Step on the calling thread until `until()`; if `start` was called, only wait."""
        while not until():
            if self._thread is not None or not self.step():
                time.sleep(0.0005)  # the engine's thread steps, or only a load is under way

    def start(self) -> None:
        """Step on a thread of its own until `stop()`."""
        threads = torch.get_num_threads()  # a new thread would start with the default

        def run() -> None:
            torch.set_num_threads(threads)
            while True:
                with self._work:
                    if self._stopping and not (self.running or self.queue.waiting):
                        return
                    if not self.running and not self.queue.waiting and not self.tiers.loading:
                        self._work.wait()
                        continue
                try:
                    worked = self.step()
                except Exception:  # a bug outside the forward pass: these requests fail, the engine goes on
                    log.exception("a step failed")
                    with self._lock:
                        for sequence in [*self.queue.waiting.values(), *self.running]:
                            self._end(
                                sequence, "error", "The engine failed at this step: see the server's log."
                            )
                    worked = True
                if not worked:
                    with self._work:
                        self._work.wait(0.001)  # a load is under way

        self._stopping = False
        self._thread = threading.Thread(target=run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, drain: bool = True) -> None:
        """End the thread: after all requests have ended, or (drain=False) aborting them."""
        with self._work:
            self._stopping = True
            if not drain:
                for sequence in [*self.queue.waiting.values(), *self.running]:
                    sequence.aborted = True
            self._work.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        else:
            self.drive(lambda: not (self.running or self.queue.waiting))

    def close(self) -> None:
        """Stop, and give the model back as it was."""
        self.stop(drain=False)
        self.tiers.loader.close()
        self.executor.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Everything that can be done now, once; False if there was nothing to do."""
        with self._lock:
            if arrived := self.tiers.poll():
                self._loaded(arrived)
            self._drop_ended()
            admitted = self._admit()
        if admitted:
            self._run(self.executor.prefill, admitted)
            with self._lock:
                for sequence in admitted:
                    if sequence in self.running:  # it may have ended with its first token
                        request = sequence.request
                        self.kv.share(request.adapter, request.prompt, sequence.reservation, self.clock())
        with self._lock:
            rows = sorted((s for s in self.running if not s.aborted), key=lambda s: s.slot.number)
        if rows:
            self._run(self.executor.decode, rows)
        return bool(admitted or rows)

    def _drop_ended(self) -> None:
        """Aborted requests leave; so do those whose adapter could not be loaded."""
        for sequence in [*self.running, *self.queue.waiting.values()]:
            if sequence.aborted:
                self._end(sequence, "abort")
        if self.tiers.failed:
            for sequence in list(self.queue.waiting.values()):
                error = self.tiers.failed.get(sequence.request.adapter)
                if error is not None:
                    self._end(sequence, "error", _told(error))
            self.tiers.failed.clear()

    def _prefetch(self, sequence: Sequence) -> None:
        adapter = sequence.request.adapter
        if self.pool.find(adapter) is None and adapter not in self.tiers.host:
            if sequence.wanted is None:
                sequence.wanted = self.clock()
            self.tiers.prefetch(adapter, sequence.request.tenant)

    def _loaded(self, adapters: list[str]) -> None:
        """From now on, what waits for these adapters waits for something else: a row, a slot, memory."""
        now = self.clock()
        for sequence in self.queue.waiting.values():
            if sequence.wanted is not None and sequence.request.adapter in adapters:
                sequence.loading += now - sequence.wanted
                sequence.wanted = None

    def _admit(self) -> list[Sequence]:
        """Sequences that start now: a free row, KV pages for their whole length, their adapter on the device."""
        admitted: list[Sequence] = []
        overdue = self.queue.overdue(self.clock())
        tried: set[int] = set()
        order, longest = self.queue.order(), 0
        while len(self.running) < self.max_batch:
            if overdue is not None and overdue.id not in tried:
                sequence = overdue
            else:
                sequence = next((s for s in order if s.id not in tried), None)
            if sequence is None:
                break
            length = max(longest, len(sequence.request.prompt))
            if admitted and length * (len(admitted) + 1) > PREFILL_TOKENS:
                break
            tried.add(sequence.id)
            lacks = self._start(sequence)
            if lacks is None:
                admitted.append(sequence)
                order, longest = self.queue.order(), length  # the counters of the fair order have changed
            elif lacks == "adapter":
                continue
            elif not self.running:  # everything is free, and still it does not fit
                self._end(sequence, "error", f"There is not enough device memory for this request ({lacks}).")
            elif lacks == "memory" or sequence is overdue:
                break  # nobody else may take what it waits for
        return admitted

    def _start(self, sequence: Sequence) -> str | None:
        """Move a sequence into the batch; else what it lacks: its `adapter` in host memory, a `slot`, or `memory`."""
        request, now = sequence.request, self.clock()
        slot = self.tiers.acquire(request.adapter, request.tenant)
        if slot is None:
            if request.adapter in self.tiers.host:
                return "slot"
            self._prefetch(sequence)
            return "adapter"
        tokens = len(request.prompt) + request.max_tokens
        reservation = self.kv.reserve(request.adapter, request.prompt, tokens, now)
        if self.pool.policy == "unified" and self.tiers.could_free(self.pool.kv_pages_for(tokens)):
            while reservation is None and self.tiers.evict_one(request.tenant):
                reservation = self.kv.reserve(request.adapter, request.prompt, tokens, now)
        if reservation is None:
            self.tiers.release(slot)
            return "memory"
        sequence.slot, sequence.reservation, sequence.admitted = slot, reservation, now
        sequence.lease = Provenance(slot.adapter, slot.number, slot.generation)
        self.queue.admitted(sequence)
        self.running.append(sequence)
        self.ledger.watch("admit", request.adapter, request.tenant, id=sequence.id, slot=slot.number)
        return None

    def _run(self, forward: Callable, rows: list[Sequence]) -> None:
        """One forward pass and what its tokens mean for each sequence. An error ends the sequences, not the engine."""
        rows = self._with_lease(rows)
        if not rows:
            return
        started = self.clock()
        try:
            tokens = forward(rows)
        except Exception as error:
            log.exception("a forward pass failed")
            with self._lock:
                self.executor.forget()
                for sequence in rows:
                    self._end(sequence, "error", _told(error))
            return
        now = self.clock()
        with self._lock:
            self.ledger.step([sequence.request.tenant for sequence in rows], now - started)
            for sequence, token in zip(rows, tokens, strict=True):
                sequence.tokens.append(token)
                if sequence.first is None:
                    sequence.first = now
                self.queue.produced(sequence)
                ended = sequence.finish()
                if ended == "stop":
                    sequence.tokens.pop()
                elif sequence.on_token is not None:
                    self._call(sequence.on_token, sequence.id, token)
                if ended:
                    self._end(sequence, ended)

    def _with_lease(self, rows: list[Sequence]) -> list[Sequence]:
        """Those whose slot still holds what they were promised; the others end with an IsolationError."""
        kept = []
        for sequence in rows:
            slot, lease = sequence.slot, sequence.lease
            if (slot.adapter, slot.generation) == (
                lease.adapter,
                lease.generation,
            ) and lease.adapter == sequence.request.adapter:
                kept.append(sequence)
            else:
                error = IsolationError(
                    "The slot of this request was given to another adapter while it ran: send it again."
                )
                with self._lock:
                    self._end(sequence, "error", str(error))
        return kept

    def _end(self, sequence: Sequence, finish: str, error: str | None = None) -> None:
        """Give back what a sequence holds and tell its owner."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.kv.release(sequence.reservation)
            self.tiers.release(sequence.slot)
        self.queue.left(sequence)
        result = Result(
            sequence.id,
            sequence.request,
            sequence.tokens,
            finish,
            sequence.lease,
            sequence.timing(self.clock()),
            error,
        )
        self.ledger.end(result)
        for observer in self.observers:
            self._call(observer, result)
        if sequence.on_end is not None:
            self._call(sequence.on_end, result)

    @staticmethod
    def _call(callback: Callable, *arguments) -> None:
        try:
            callback(*arguments)
        except Exception:  # a client's broken callback must not end anybody else's request
            log.exception("a callback failed")


def _told(error: Exception) -> str:
    """What a client may read: our own errors are written for users; of others only the kind, details are in the log."""
    if isinstance(error, LabsError):
        return str(error)
    return f"The request failed inside the engine ({type(error).__name__}): see the server's log."
