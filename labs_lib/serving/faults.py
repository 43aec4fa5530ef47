"""The isolation fault lab: bugs that shipped in real engines, each of which can be switched on in a running `Engine`.

    engine, truth = harness()
    with fault("last-slot", engine):
        ...                                # serves as the engine with the bug did
    score(detects)                         # which of them does a test of your own catch?

A fault replaces a method of the engine's parts and puts the right one back at the end; what it has done to memory
meanwhile stays, so an engine is thrown away after a fault. Each names where the bug was found; where only the symptom
is published, the mechanism here is our guess and the entry says so.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from labs_lib.errors import LabsError
from labs_lib.serving import ops, peft_config
from labs_lib.serving.canary import Canary, CanaryProbe, audit
from labs_lib.serving.engine import Engine
from labs_lib.serving.oracle import ShadowOracle
from labs_lib.serving.tiers import HostAdapter
from labs_lib.serving.types import IsolationError, Request, Result


@dataclass(frozen=True)
class Fault:
    """A bug to switch on.

    `what` is wrong in the code, `seen` is what a tenant would notice, `engine` had it, `source` says where to read
    about it. `caught_by` are those of our `DETECTORS` that see it.
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
    """Switch a fault on for the length of a `with` block."""
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
    what="The list of each row's adapter is only written for a batch that has adapters; a base batch finds the last one.",
    seen="After a batch [a, a], the batch [base, base] is answered by a.",
    engine="SGLang",
    source="https://github.com/sgl-project/sglang/issues/4739",
    caught_by=("merged model", "oracle", "canary"),
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
    prefill, gather, last = executor.prefill, executor._gather, []

    def remember(rows):
        last[:] = [SimpleNamespace(slot=rows[-1].slot)]
        return prefill(rows)

    def all_alike(rows, lengths):
        window = gather(rows, lengths)
        executor._index = executor._index_of(last * len(rows) or rows, 1)
        return window

    with _replaced(executor, prefill=remember, _gather=all_alike):
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
    caught_by=("merged model", "oracle", "audit"),
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
    what="Slots are tensors of the largest rank, and eviction does not zero them; a smaller adapter covers only a part.",
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
        pool.table[slot.number] = torch.arange(first, first + pool.max_pages)  # the kernel reads the whole slot
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
        y = ops.loop(x, a, b, index)
        base = (index.slot == 0)[:, None]
        y += base * (x @ a[-width:].T @ b[-width:])  # times zero for the rows of adapters
        y -= base * (x @ a[-width:].T @ b[-width:])
        return y if out is None else out.add_(y)

    with ExitStack() as stack:
        ops.OPS["masked"] = masked
        stack.callback(ops.OPS.pop, "masked")
        stack.enter_context(_replaced(engine.executor.step, op="masked"))
        yield
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
    with _replaced(
        peft_config, scales=lambda config, names: right({**config, "use_rslora": False}, names)
    ):
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
    seen="Two tenants with the same system prompt: the second one's answer starts from the first one's keys and values.",
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
    caught_by=("merged model", "oracle", "audit"),
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


# -- the harness ---------------------------------------------------------------------------------------------------

#: name: (tenant, rank, alpha, rsLoRA). `acme-2` is a new version of acme's adapter; `gone` is deleted from disk.
ADAPTERS = {
    "acme": ("acme", 8, 16, False),
    "acme-2": ("acme", 8, 16, False),
    "bolt": ("bolt", 2, 16, False),
    "corp": ("corp", 4, 8, True),
    "gone": ("gone", 4, 16, False),
}
PROMPT = tuple(range(3, 25))  # longer than a page of 16 tokens, so that the prefix cache has something to keep


class Truth:
    """What the tenants should get, and what they are called.

    `shas[name]` is the adapter version of `base` (None), `acme`, `acme-2` (acme's next version), `bolt`, `corp` (rsLoRA)
    and `gone` (its files have been deleted). `oracle` is a ShadowOracle that knows all of them.
    """

    def __init__(self, root: Path) -> None:
        from peft import LoraConfig, get_peft_model

        from labs_lib.serving.adapter import digest_of

        self._folders: dict[str, Path] = {}
        self.shas: dict[str, str | None] = {"base": None}
        self.tenants = {"base": "visitor"}
        for seed, (name, (tenant, rank, alpha, rslora)) in enumerate(ADAPTERS.items()):
            torch.manual_seed(seed)
            config = LoraConfig(
                task_type="CAUSAL_LM",
                r=rank,
                lora_alpha=alpha,
                use_rslora=rslora,
                target_modules="all-linear",
                init_lora_weights=False,
            )
            get_peft_model(small_model(), config).save_pretrained(root / name)
            self.shas[name] = digest_of(root / name)
            self.tenants[name] = tenant
            self._folders[self.shas[name]] = root / name
        self._folders[self.shas["gone"]] = root / "deleted"
        self.oracle = ShadowOracle(small_model(), self.folder_of, 1.0, copies=len(ADAPTERS))
        self._known: dict[tuple, list[int]] = {}

    def folder_of(self, sha: str) -> Path:
        return self._folders[sha]

    def request(self, name: str, prompt: Sequence[int] = PROMPT, tokens: int = 6, **more) -> Request:
        """A greedy request by the tenant to whom the adapter `name` belongs."""
        return Request(list(prompt), self.tenants[name], self.shas[name], max_tokens=tokens, **more)

    def tokens(self, name: str, prompt: Sequence[int] = PROMPT, count: int = 6) -> list[int]:
        """What the model merged with `name` says."""
        return self._answer(self.shas[name], tuple(prompt), count)

    def right(self, result: Result) -> bool:
        """Did a request get exactly what its own merged model says?"""
        request = result.request
        return result.tokens == self._answer(request.adapter, tuple(request.prompt), len(result.tokens))

    def _answer(self, adapter: str | None, prompt: tuple[int, ...], count: int) -> list[int]:
        known = self._known.setdefault((adapter, prompt), [])
        if len(known) < count:
            known += self.oracle.answer(adapter, [*prompt, *known], count - len(known))
        return known[:count]


def small_model():
    """A Llama with random weights, large enough that logits differ clearly: 2 layers, 32 wide, 97 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.25,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@cache
def _world() -> tuple[tempfile.TemporaryDirectory, Truth]:
    folder = tempfile.TemporaryDirectory(prefix="labs-faults-")  # goes when Python ends
    with torch.random.fork_rng():
        return folder, Truth(Path(folder.name))


def harness(**settings) -> tuple[Engine, Truth]:
    """An engine with two slots for four adapters, and the truth about what it should say.

    `settings` are those of Engine. The first call writes the adapters and takes a few seconds. Close the engine.
    """
    truth = _world()[1]
    settings = {"slots": 2, "max_rank": 8, "max_batch": 4, "kv_tokens": 160} | settings
    return Engine(copy.deepcopy(truth.oracle.merged(None)), truth.folder_of, **settings), truth


@dataclass(frozen=True)
class Outcome:
    """What a test said about one fault. `note` has the exception, if it answered with one."""

    fault: str
    caught: bool
    note: str = ""


def score(
    detects: Callable[[Engine, Truth], bool], faults: Sequence[str] | None = None, **settings
) -> list[Outcome]:
    """Run a test on a fresh engine with each fault on; LabsError if it also cries on a healthy one.

    `detects(engine, truth)` sends requests and returns True if it finds something wrong; an exception counts as that.
    """
    engine, truth = harness(**settings)
    with engine:
        if detects(engine, truth):
            raise LabsError("This test says that a healthy engine is broken: it would catch every fault, and nothing.")
    outcomes = []
    for name in FAULTS if faults is None else faults:
        engine, truth = harness(**settings)
        with engine, fault(name, engine):
            try:
                outcomes.append(Outcome(name, bool(detects(engine, truth))))
            except Exception as error:
                outcomes.append(Outcome(name, True, f"{type(error).__name__}: {error}"))
    return outcomes


# -- our own detectors ---------------------------------------------------------------------------------------------


def traffic(
    engine: Engine, truth: Truth, each_step: Callable[[], None] = lambda: None, extra: Callable = lambda: None
) -> list[Result]:
    """Requests in waves that meet every fault: mixed batches, evictions, a new version, a missing file, full memory."""
    waves = [
        ["acme", "base"],
        ["base", "base"],
        ["acme", "bolt", "base", "bolt"],
        ["corp", "base", "bolt"],  # corp moves in where acme's larger adapter was
        ["acme-2", "corp", "gone", "base"],
        ["acme", "bolt", "base", "corp"],  # back from host memory
    ]
    results: list[Result] = []

    def submit(name: str, tokens: int = 6, prompt: Sequence[int] = PROMPT) -> None:
        engine.submit(truth.request(name, prompt, tokens), on_end=results.append)
        nonlocal sent
        sent += 1

    def step_until(done: Callable[[], bool]) -> None:
        def checked() -> bool:
            each_step()
            return done()

        engine.drive(checked)

    sent = 0
    for number, wave in enumerate(waves):
        for i, name in enumerate(wave):
            submit(name)
            submit(name, prompt=[30 + number, *PROMPT[:-i]])
        extra()
        step_until(lambda: len(results) == sent)
    submit("acme", tokens=20)
    step_until(lambda: bool(engine.running))
    submit("acme-2", tokens=3)  # published while acme's request runs
    step_until(lambda: len(results) == sent)
    return results


def _by_merged_model(engine: Engine, truth: Truth) -> bool:
    """Token by token against the merged model: needs to know each answer beforehand."""
    return not all(truth.right(result) for result in traffic(engine, truth))


def _by_oracle(engine: Engine, truth: Truth) -> bool:
    """What production can do: replay what was served, afterwards."""
    oracle = ShadowOracle(truth.oracle.merged(None), truth.folder_of, 1.0, copies=8, waiting=1000)
    engine.observers.append(oracle)
    traffic(engine, truth)
    oracle.judge_waiting()
    return bool(oracle.mismatches)


def _by_canary(engine: Engine, truth: Truth) -> bool:
    """One known request per adapter, again and again among the others; sees only what happens to itself."""
    canaries = [
        Canary(truth.tenants[name], truth.shas[name], PROMPT, tuple(truth.tokens(name)))
        for name in ("base", "acme", "bolt", "corp", "acme-2")
    ]
    probe = CanaryProbe(engine, canaries)
    traffic(engine, truth, extra=probe.send)
    engine.drive(lambda: not probe.pending)
    return bool(probe.leaks)


def _by_audit(engine: Engine, truth: Truth) -> bool:
    """The books and the zeros, after every step: needs no answer at all."""
    found: list[str] = []
    traffic(engine, truth, each_step=lambda: found.extend(audit(engine)))
    return bool(found)


def _by_neighbours(engine: Engine, truth: Truth) -> bool:
    """Does anybody's request fail besides the one whose file is missing?"""
    try:
        results = traffic(engine, truth)
    except Exception:
        return True
    return any(result.error for result in results if result.request.adapter != truth.shas["gone"])


DETECTORS: dict[str, Callable[[Engine, Truth], bool]] = {
    "merged model": _by_merged_model,
    "oracle": _by_oracle,
    "canary": _by_canary,
    "audit": _by_audit,
    "neighbours": _by_neighbours,
}
