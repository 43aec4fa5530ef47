"""Bugs that shipped in real engines, each of which can be switched on in a running `Engine`.

    with fault("last-slot", engine):
        ...  # serves as the engine with the bug did

A fault replaces methods of the engine's parts and puts the right ones back at the end; what it has done to memory
meanwhile stays, so an engine is thrown away after a fault. Each names where the bug was found; where only the symptom
is published, the mechanism here is our guess and the entry says so. `fault_lab` scores tests against them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from labs_lib.errors import LabsError
from labs_lib.serving import ops, peft_config
from labs_lib.serving.engine import Engine
from labs_lib.serving.tiers import HostAdapter


@dataclass(frozen=True)
class Fault:
    """A bug to switch on.

    `what` is wrong in the code, `seen` is what a tenant would notice, `engine` had it, `source` says where to read
    about it. `caught_by` are the alarms of `fault_lab.alarms` that see it.
    """

    name: str
    what: str
    seen: str
    engine: str
    source: str
    caught_by: tuple[str, ...]
    patch: Callable[[Engine], Iterator[None]]


FAULTS: dict[str, Fault] = {}


@contextmanager
def fault(name: str, engine: Engine) -> Iterator[Engine]:
    """Switch a fault on for the length of a `with` block; begin and end it between two steps."""
    if name not in FAULTS:
        raise LabsError(f"There is no fault {name!r}: choose from {', '.join(FAULTS)}.")
    with engine._lock:
        switched = contextmanager(FAULTS[name].patch)(engine)
        switched.__enter__()
        engine.executor.forget()
    try:
        yield engine
    finally:
        with engine._lock:
            switched.__exit__(None, None, None)
            engine.executor.forget()


def _fault(name: str, **about) -> Callable:
    def add(patch: Callable[[Engine], Iterator[None]]) -> Callable:
        FAULTS[name] = Fault(name, patch=patch, **about)
        return patch

    return add


@contextmanager
def _replaced(owner: object, **methods) -> Iterator[None]:
    """Attributes of an object or module, other for a while."""
    missing = object()
    before = {name: vars(owner).get(name, missing) for name in methods}
    for name, method in methods.items():
        setattr(owner, name, method)
    try:
        yield
    finally:
        for name, value in before.items():
            delattr(owner, name) if value is missing else setattr(owner, name, value)


# -- which adapter does a row get ----------------------------------------------------------------------------------


@_fault(
    "last-slot",
    what="Rows without an adapter carry slot -1. Compiled kernels skip them; a gather on the CPU takes the last slot.",
    seen="Users of the base model get answers by another tenant's adapter, if their request shares a batch with one.",
    engine="vLLM, CPU backend",
    source="https://github.com/vllm-project/vllm/pull/48421",
    caught_by=("merged model", "oracle", "canary"),
)
def _last_slot(engine: Engine) -> Iterator[None]:
    right, last = engine.executor._index_of, engine.pool.slots[-1]

    def index_of(rows, tokens):
        if not any(row.slot.number for row in rows):
            return right(rows, tokens)
        return right([row if row.slot.number else SimpleNamespace(slot=last) for row in rows], tokens)

    with _replaced(engine.executor, _index_of=index_of):
        yield


@_fault(
    "stale-index",
    what="The list of each row's adapter is only written if the batch has adapters; a base batch finds the last one.",
    seen="After a batch [a, a], the batch [base, base] is answered by a.",
    engine="SGLang",
    source="https://github.com/sgl-project/sglang/issues/4739",
    caught_by=("merged model", "oracle"),
)
def _stale_index(engine: Engine) -> Iterator[None]:
    right, last = engine.executor._index_of, []

    def index_of(rows, tokens):
        if any(row.slot.number for row in rows):
            last[:] = [SimpleNamespace(slot=row.slot) for row in rows]
        elif last:
            rows = [last[i % len(last)] for i in range(len(rows))]
        return right(rows, tokens)

    with _replaced(engine.executor, _index_of=index_of):
        yield


@_fault(
    "leftover-index",
    what="The loop over decoding rows looks up the adapter with the loop variable that prefill has left behind.",
    seen="First tokens are right; then everybody goes on with the adapter of whoever joined last.",
    engine="Punica's text generation benchmark",
    source="https://github.com/punica-ai/punica/blob/149503875cb20a7c89556453931d5964c396bc38"
    "/benchmarks/bench_textgen_lora.py",
    caught_by=("merged model", "oracle", "canary"),
)
def _leftover_index(engine: Engine) -> Iterator[None]:
    executor = engine.executor
    prefill, right, last = executor.prefill, executor._index_of, []

    def remember(rows):
        tokens = prefill(rows)
        last[:] = [SimpleNamespace(slot=rows[-1].slot)]
        return tokens

    def all_alike(rows, tokens):
        decoding = tokens == 1 and last
        return right(last * len(rows) if decoding else rows, tokens)

    with _replaced(executor, prefill=remember, _index_of=all_alike):
        yield


@_fault(
    "row-order",
    what="Rows are sorted for the kernel, and the results are handed out without undoing the sort.",
    seen="Two tenants in one batch get each other's tokens.",
    engine="vLLM 0.1 returned batches in another order than they came in",
    source="https://github.com/vllm-project/vllm/issues/394",
    caught_by=("merged model", "oracle", "canary"),
)
def _row_order(engine: Engine) -> Iterator[None]:
    prefill, decode = engine.executor.prefill, engine.executor.decode

    def ordered(rows):
        return sorted(rows, key=lambda row: -row.slot.number)

    with _replaced(
        engine.executor,
        prefill=lambda rows: prefill(ordered(rows)),
        decode=lambda rows: decode(ordered(rows)),
    ):
        yield


@_fault(
    "remapped-in-flight",
    what="A new version is loaded over the old one in its slot, while requests run on it; nothing checks the lease.",
    seen="An answer begins with one version of the adapter and ends with another.",
    engine="vLLM's load_inplace, where it is meant so (for reinforcement learning)",
    source="https://github.com/vllm-project/vllm/pull/31326",
    caught_by=("merged model", "oracle", "canary", "audit"),
)
def _remapped(engine: Engine) -> Iterator[None]:
    tiers, pool, acquire = engine.tiers, engine.pool, engine.tiers.acquire

    def in_place(adapter, tenant):
        loaded = tiers.host.get(adapter)
        old = next((slot for slot in pool.resident if slot.tenant == tenant and slot.refs), None)
        if adapter is None or loaded is None or old is None or pool.find(adapter):
            return acquire(adapter, tenant)
        refs, old.refs = old.refs, 0
        pool.clear(old)
        slot = pool.fill(adapter, loaded.pages, loaded.values, loaded.gain, tenant)
        slot.refs = refs + 1
        return slot

    with _replaced(tiers, acquire=in_place), _replaced(engine, _with_lease=lambda rows: rows):
        yield


# -- what lies in a slot -------------------------------------------------------------------------------------------


@_fault(
    "not-zeroed",
    what="Slots are tensors of the largest rank, and eviction does not zero them; a smaller adapter covers a part.",
    seen="Answers change with who was there before: the newcomer runs with the rest of the last tenant's ranks.",
    engine="SGLang",
    source="https://github.com/sgl-project/sglang/pull/8103",
    caught_by=("merged model", "oracle", "canary", "audit"),
)
def _not_zeroed(engine: Engine) -> Iterator[None]:
    pool, right = engine.pool, engine.pool.fill
    if not pool.contiguous:
        raise LabsError("This fault needs slots of a fixed size: build the engine with policy='separate'.")

    def fill(*arguments):
        slot = right(*arguments)
        first = slot.number * pool.max_pages
        pool.table[slot.number] = torch.arange(
            first, first + pool.max_pages
        )  # the kernel reads the whole slot
        return slot

    with _replaced(pool, fill=fill), _replaced(pool.adapters, erase=lambda pages: None):
        yield


@_fault(
    "nan-spreads",
    what="Rows without an adapter are computed like the others and multiplied by zero; a fresh buffer may hold NaN.",
    seen="Base users get empty or constant answers: 0 x NaN is NaN.",
    engine="SGLang",
    source="https://github.com/sgl-project/sglang/pull/4799",
    caught_by=("merged model", "oracle", "canary", "audit"),
)
def _nan_spreads(engine: Engine) -> Iterator[None]:
    memory, width = engine.pool.adapters.data, engine.pool.max_pages
    fresh = [] if engine.pool.slots[-1].adapter else list(range(len(memory) - width, len(memory)))
    memory[fresh] = float("nan")  # what torch.empty may give

    def masked(x, a, b, index, out=None):
        y, base = ops.loop(x, a, b, index), index.slot == 0
        y[base] = 0.0 * (x[base] @ a[-width:].T @ b[-width:])
        return y if out is None else out.add_(y)

    ops.OPS["masked"] = masked
    try:
        with _replaced(engine.executor.step, op="masked"):
            yield
    finally:
        del ops.OPS["masked"]
        memory[fresh] = memory[fresh].nan_to_num(0.0)


@_fault(
    "scaled-twice",
    what="The scale is folded into B in place, in the very tensor that is kept for the next activation.",
    seen="Right at first; stronger each time that the adapter comes back from host memory.",
    engine="Unsloth's direct adapter loading into vLLM",
    source="https://github.com/unslothai/unsloth-zoo/pull/942",
    caught_by=("merged model", "oracle", "canary"),
)
def _scaled_twice(engine: Engine) -> Iterator[None]:
    right, seen = engine.pool.fill, set()

    def fill(adapter, pages, values, *more):
        if adapter in seen:
            for spec in engine.layout.linears:
                engine.layout.b(values, spec).mul_(2.0)
        seen.add(adapter)
        return right(adapter, pages, values, *more)

    with _replaced(engine.pool, fill=fill):
        yield


@_fault(
    "rslora-ignored",
    what="The scale is alpha / r for every adapter; use_rslora, which means alpha / sqrt(r), is not read.",
    seen="An rsLoRA adapter is served sqrt(r) times too weak: plausible text, poor quality, no error.",
    engine="TensorRT-LLM; vLLM before its pull request 6909",
    source="https://github.com/NVIDIA/TensorRT-LLM/issues/1668",
    caught_by=("merged model", "oracle", "canary"),
)
def _rslora_ignored(engine: Engine) -> Iterator[None]:
    right = peft_config.scales
    with _replaced(peft_config, scales=lambda config, names: right({**config, "use_rslora": False}, names)):
        yield


@_fault(
    "silent-base",
    what="Tensors whose names are not recognised are skipped, and an adapter of which nothing is left is served.",
    seen="The tenant gets the base model under the adapter's name, with status 200.",
    engine="vLLM",
    source="https://github.com/vllm-project/vllm/issues/34186",
    caught_by=("merged model", "oracle", "canary", "audit"),
)
def _silent_base(engine: Engine) -> Iterator[None]:
    def skipped(adapter: str, loaded: HostAdapter) -> HostAdapter:
        return replace(loaded, values=torch.zeros_like(loaded.values))

    with _loading(engine, skipped):
        yield


# -- what names an adapter, and what is remembered under the name ---------------------------------------------------


@_fault(
    "reused-name",
    what="Loaded adapters are cached under the tenant's name: a new version of the same name finds the old weights.",
    seen="A published fix does not arrive, though every response names the new version.",
    engine="SGLang",
    source="https://github.com/sgl-project/sglang/issues/8263",
    caught_by=("merged model", "oracle", "canary"),
)
def _reused_name(engine: Engine) -> Iterator[None]:
    by_name: dict[str, HostAdapter] = {}

    def cached(adapter: str, loaded: HostAdapter) -> HostAdapter:
        first = by_name.setdefault(engine.tiers.loading.get(adapter, ""), loaded)
        return replace(first, adapter=adapter)

    with _loading(engine, cached):
        yield


@_fault(
    "stale-prefix",
    what="Cached prompt pages are found by the adapter's name: after an update they are those of the old version.",
    seen="For prompts that begin as before, a mixture of the old and the new version.",
    engine="vLLM",
    source="https://github.com/vllm-project/vllm/issues/30931",
    caught_by=("merged model", "oracle", "canary"),
)
def _stale_prefix(engine: Engine) -> Iterator[None]:
    start, names = engine._start, {}

    def note(sequence):
        names[sequence.request.adapter] = sequence.request.adapter and sequence.request.tenant
        return start(sequence)

    with _replaced(engine, _start=note), _prefix_key(engine, names.get):
        yield


@_fault(
    "shared-prefix",
    what="Cached prompt pages are found by the prompt's tokens alone, whatever adapter computed them.",
    seen="Two tenants with one system prompt: the second one's answer starts from the first one's keys and values.",
    engine="llama.cpp's server; vLLM in 2024 (issue 3264)",
    source="https://github.com/ggml-org/llama.cpp/issues/26207",
    caught_by=("merged model", "oracle", "canary"),
)
def _shared_prefix(engine: Engine) -> Iterator[None]:
    with _prefix_key(engine, lambda adapter: None):
        yield


@_fault(
    "recycled-page",
    what="A cached prompt page is given to another sequence, and its entry in the prefix cache stays.",
    seen="Under memory pressure some answers change, at temperature 0 too.",
    engine="vLLM (open, as reported; the mechanism is not confirmed, this one is ours)",
    source="https://github.com/vllm-project/vllm/issues/38606",
    caught_by=("merged model", "oracle", "canary", "audit"),
)
def _recycled_page(engine: Engine) -> Iterator[None]:
    kv, gone = engine.kv, []

    def drop_idle():
        idle = [entry for entry in kv._entries.values() if entry.refs == 0 and entry not in gone]
        if not idle:
            return False
        entry = min(idle, key=lambda entry: entry.used)
        engine.pool.give_kv([entry.page])
        gone.append(entry)
        return True

    with _replaced(kv, drop_idle=drop_idle):
        yield


# -- what an error reaches -----------------------------------------------------------------------------------------


@_fault(
    "loader-kills-engine",
    what="Adapters are read inside the engine's step, and the exception for a missing file is not caught there.",
    seen="One tenant's deleted file fails every request that runs.",
    engine="vLLM 0.4; SGLang (issue 7447)",
    source="https://github.com/vllm-project/vllm/issues/4879",
    caught_by=("neighbours",),
)
def _loader_kills(engine: Engine) -> Iterator[None]:
    finished, broken = engine.tiers.loader.finished, []

    def raising():
        found = finished()
        broken.extend(loaded for _, loaded in found if isinstance(loaded, Exception))
        if broken:
            raise broken[0]
        return found

    with _replaced(engine.tiers.loader, finished=raising):
        yield


@contextmanager
def _loading(engine: Engine, change: Callable[[str, HostAdapter], HostAdapter]) -> Iterator[None]:
    """Let `change` have what the loader brings."""
    right = engine.tiers.loader.finished

    def finished():
        return [
            (adapter, change(adapter, loaded) if isinstance(loaded, HostAdapter) else loaded)
            for adapter, loaded in right()
        ]

    with _replaced(engine.tiers.loader, finished=finished):
        yield


@contextmanager
def _prefix_key(engine: Engine, key: Callable[[str | None], str | None]) -> Iterator[None]:
    """Let the prefix cache take `key(sha)` for the adapter's identity."""
    kv = engine.kv
    reserve, share = kv.reserve, kv.share
    with _replaced(
        kv,
        reserve=lambda adapter, *more: reserve(key(adapter), *more),
        share=lambda adapter, *more: share(key(adapter), *more),
    ):
        yield
