"""What the engine is compared with: other ways to serve the same adapters, in the same continuous batching.

Each arm is an executor for the engine's own scheduler, key/value pages and windows, so that arms differ in one thing:
how a batch of rows with different adapters goes through the model. Before anything is timed, `verify` runs each
answer through the model that PEFT itself has merged.
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from labs_lib.errors import LabsError
from labs_lib.serving.engine import Engine
from labs_lib.serving.executor import ModelExecutor, Rows, check_model
from labs_lib.serving.layout import Layout
from labs_lib.serving.oracle import TIES, Witness
from labs_lib.serving.payloads import Given, Payloads
from labs_lib.serving.pool import Pool
from labs_lib.serving.scheduler import Queue
from labs_lib.serving.tiers import HostAdapter
from labs_lib.serving.types import Result


def share(model):
    """A second model with modules of its own and the very same weights, so that arms can wrap it differently."""
    weights = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(each): each for each in weights})


def merged(model, folder: Path):
    """A copy of the model with an adapter merged in, by PEFT."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload().eval()


class Plain(ModelExecutor):
    """The base model alone, its layers not wrapped: what serving costs without adapters."""

    def __init__(self, model, pool: Pool, graphs: str = "off", rows: int = 32) -> None:
        check_model(model)
        self._attach(model, pool.layout, pool, graphs, rows)

    def _index_of(self, rows: Rows, tokens: int) -> None:
        return None

    def _gains_of(self, rows: Rows, tokens: int) -> None:
        return None

    def _use(self, index: None, rows: Rows, tokens: int) -> None:
        pass

    def apply(self, index: None, gain_page: None, recorded: bool = False) -> None:
        pass

    def close(self) -> None:
        pass


def load_peft(model, folders: Mapping[str, Path]):
    """A PeftModel with all adapters loaded, each named by its sha256."""
    from peft import PeftModel

    peft = None
    for sha, folder in folders.items():
        if peft is None:
            peft = PeftModel.from_pretrained(model, folder, adapter_name=sha)
        else:
            peft.load_adapter(folder, adapter_name=sha)
    return peft.eval()


class _Named:
    """A PeftModel that is told which adapter each row of the batch uses."""

    def __init__(self, peft) -> None:
        self.peft, self.config, self.names = peft, peft.config, []

    def __call__(self, **inputs):
        return self.peft(**inputs, adapter_names=self.names)


class PeftMixed(Plain):
    """PEFT's `adapter_names`: one forward pass, in each layer a loop over the adapters of the batch."""

    def __init__(self, model, pool: Pool, peft) -> None:
        super().__init__(model, pool)
        self.model = _Named(peft)

    def _use(self, index: None, rows: Rows, tokens: int) -> None:
        self.model.names = [row.request.adapter or "__base__" for row in rows]


class Grouped(Plain):
    """A forward pass for each distinct adapter of the batch, with the model that `model_for(adapter)` gives."""

    keeps_order = True  # groups must be neighbours

    def __init__(self, model, pool: Pool, model_for: Callable[[str | None], object]) -> None:
        super().__init__(model, pool)
        self._model_for, self._adapters = model_for, []

    def prefill(self, rows: Rows) -> list[int]:
        order = sorted(range(len(rows)), key=lambda i: rows[i].slot.number)
        tokens = super().prefill([rows[i] for i in order])
        return [token for _, token in sorted(zip(order, tokens, strict=True))]

    def _use(self, index: None, rows: Rows, tokens: int) -> None:
        self._adapters = [row.request.adapter for row in rows]

    def _forward(self, tokens, positions, seen, window) -> torch.Tensor:
        logits, start = [], 0
        for adapter, group in itertools.groupby(self._adapters):
            rows = slice(start, start + len(list(group)))
            self.model = self._model_for(adapter)
            logits.append(super()._forward(tokens[rows], positions[rows], seen[rows], window.only(rows)))
            start = rows.stop
        return torch.cat(logits)


class OneAdapter(Queue):
    """Lets in only requests for the adapter that is running: batches of a single adapter, one after the other."""

    def __init__(self, limit: int) -> None:
        super().__init__("fcfs", limit)
        self._now: str | None = None
        self._running: set[int] = set()

    def order(self) -> Iterator:
        waiting = super().order()
        return (s for s in waiting if s.request.adapter == self._now) if self._running else waiting

    def overdue(self, now: float) -> None:
        return None

    def admitted(self, sequence) -> None:
        super().admitted(sequence)
        self._now = sequence.request.adapter
        self._running.add(sequence.id)

    def left(self, sequence) -> None:
        super().left(sequence)
        self._running.discard(sequence.id)


class Switch:
    """`model_for` by PEFT's `set_adapter`, which is called when the adapter changes."""

    def __init__(self, model, folders: Mapping[str, Path]) -> None:
        self.peft, self._now = load_peft(model, folders), ""

    def __call__(self, adapter: str | None):
        if adapter != self._now:
            if adapter is None:
                self.peft.base_model.disable_adapter_layers()
            else:
                if self._now is None:
                    self.peft.base_model.enable_adapter_layers()
                self.peft.set_adapter(adapter)
            self._now = adapter
        return self.peft


class Copies:
    """`model_for` by one full model per adapter."""

    def __init__(self, model, folders: Mapping[str, Path], payloads: Payloads | None = None) -> None:
        self._models = {None: model}
        for name, folder in folders.items():
            if payloads is None:
                self._models[name] = merged(model, folder)
            else:
                self._models[name] = copy.deepcopy(model)
                payloads.merge(self._models[name], model, name)

    def __call__(self, adapter: str | None):
        return self._models[adapter]


class Ready:
    """A loader for arms that hold all their adapters already."""

    def __init__(self) -> None:
        self._asked: list[str] = []

    def start(self, adapter: str) -> None:
        self._asked.append(adapter)

    def finished(self) -> list[tuple[str, HostAdapter]]:
        asked, self._asked = self._asked, []
        return [(adapter, HostAdapter(adapter, pages=1, nbytes=0)) for adapter in asked]

    def close(self) -> None:
        pass


@dataclass
class Setup:
    """What all arms share: the model, adapter folders by sha256, and the engine's settings."""

    model: object
    folders: Mapping[str, Path]
    batch: int = 32
    slots: int = 32
    rank: int = 8
    kv_tokens: int = 8192
    host_bytes: int = 256 << 20
    queue: int = 1 << 20  # waiting requests: a benchmark turns nobody away
    policy: str = "separate"
    graphs: str = "auto"
    payloads: Payloads | None = None  # instead of folders: adapters in memory, `folders` has their names only
    clock: Callable[[], float] = time.perf_counter


HOW = {"": None, "graphs": "on", "eager": "off"}
FOREIGN = {
    "base": "base model alone",
    "peft_mixed": "PEFT adapter_names",
    "peft_switch": "PEFT set_adapter, batches of one adapter",
    "merged": "a merged copy for each adapter",
}


def build(name: str, setup: Setup) -> Engine:
    """The engine of an arm: `engine` or `engine:<op>` is ours, the others are those of `FOREIGN`.

    `base` and the engine may end in `/graphs` or `/eager`: with recorded decode steps, or without. The base's
    `requests` should have no adapter. Close it after use.
    """
    model = share(setup.model)
    name, _, how = name.partition("/")
    if how not in HOW:
        raise LabsError(f"There is no way {how!r} to run an arm: graphs or eager.")
    graphs, payloads = HOW[how] or setup.graphs, setup.payloads
    ours = name == "engine" or name.startswith("engine:")
    if ours and payloads is None:
        return Engine(
            model,
            setup.folders.__getitem__,
            slots=setup.slots,
            max_rank=setup.rank,
            max_batch=setup.batch,
            kv_tokens=setup.kv_tokens,
            host_bytes=setup.host_bytes,
            policy=setup.policy,
            queue_limit=setup.queue,
            op=name.partition(":")[2] or "auto",
            graphs=graphs,
            clock=setup.clock,
        )
    dtype = model.get_input_embeddings().weight.dtype
    loader = Ready() if payloads is None or not ours else Given(payloads)
    slots, ranks = (setup.slots, setup.rank) if ours else (max(1, len(setup.folders)), 1)
    layout = Layout.of(model)
    pool = Pool(
        layout, slots, ranks, setup.kv_tokens, setup.policy if ours else "separate", dtype, model.device
    )
    if ours:
        executor = ModelExecutor(model, layout, pool, name.partition(":")[2] or "auto", graphs, setup.batch)
    else:
        pool.adapters = None  # these arms keep their adapters themselves
    if name == "base":
        executor = Plain(model, pool, graphs, setup.batch)
    elif name == "peft_mixed":
        peft = (
            load_peft(model, setup.folders) if payloads is None else payloads.peft(model, list(setup.folders))
        )
        executor = PeftMixed(model, pool, peft)
    elif name == "peft_switch":
        executor = Grouped(model, pool, Switch(model, setup.folders))
    elif name == "merged":
        executor = Grouped(model, pool, Copies(setup.model, setup.folders, payloads))
    elif not ours:
        raise LabsError(f"There is no arm {name!r}: engine, engine:<op>, {', '.join(FOREIGN)}.")
    return Engine.from_parts(
        executor,
        pool,
        loader,
        max_tokens=model.config.max_position_embeddings,
        vocabulary=model.get_input_embeddings().num_embeddings,
        max_batch=setup.batch,
        host_bytes=1 << 60,
        queue=OneAdapter(setup.queue) if name == "peft_switch" else Queue("fcfs", setup.queue),
        prefix_cache=True,
        clock=setup.clock,
    )


@dataclass(frozen=True)
class Verdict:
    """How many tokens were compared; `ties` are other tokens whose logit was equal within `TIES`."""

    requests: int
    tokens: int
    ties: int
    wrong: int  # tokens
    wrong_requests: int
    failed: int  # requests that ended with an error

    @property
    def right(self) -> bool:
        return not (self.wrong or self.failed) and self.tokens > 0

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens of {self.requests} requests, {self.wrong} wrong, {self.ties} ties" + (
            f", {self.failed} requests failed" if self.failed else ""
        )


class Oracle:
    """The truth about greedy answers: each token must be the best of the model that PEFT merged, given those before."""

    def __init__(self, model, folders: Mapping[str, Path], keep: int = 64, witness=None) -> None:
        self.witness = witness or Witness(model, folders.__getitem__, copies=keep)
        self.tie = TIES[model.get_input_embeddings().weight.dtype]

    @torch.inference_mode()
    def gaps(self, result: Result, adapter: str | None) -> torch.Tensor:
        """For each token of an answer: by how much the best logit of that adapter's model exceeds the token's."""
        prompt, tokens = result.request.prompt, result.tokens
        model = self.witness.merged(adapter)
        ids = torch.tensor([prompt + tokens[:-1]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
        return logits.amax(-1) - logits[torch.arange(len(tokens)), tokens]

    def verify(self, results: Iterable[Result], adapters: int | None = None) -> Verdict:
        """Compare answers with the truth; with `adapters`, only those of the first so many distinct ones."""
        chosen: dict[str | None, list[Result]] = {}
        failed = 0
        for result in results:
            if result.error is not None:
                failed += 1
            elif result.tokens and (
                result.request.adapter in chosen or adapters is None or len(chosen) < adapters
            ):
                chosen.setdefault(result.request.adapter, []).append(result)
        requests = tokens = ties = wrong = bad = 0
        for adapter, group in chosen.items():
            for result in group:
                gaps = self.gaps(result, adapter)
                wrong_here = int((gaps > self.tie).sum())
                requests, tokens = requests + 1, tokens + len(gaps)
                ties += int(((gaps > 0) & (gaps <= self.tie)).sum())
                wrong, bad = wrong + wrong_here, bad + bool(wrong_here)
        return Verdict(requests, tokens, ties, wrong, bad, failed)
