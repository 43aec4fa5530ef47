"""The shadow oracle: a sampled share of what was served, judged by models that have the adapter merged in.

It shares nothing with the serving path but the files: its own copy of the base, and PEFT's own loading and merging. A
result is judged in one pass over prompt and output: at each position, would the merged model have said the same,
given the same beginning? So a difference is found where it happens, and what follows it is still judged.

Greedy results only: a sampled token proves nothing.
"""

import copy
import logging
import queue
import random
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from labs_lib.errors import LabsError
from labs_lib.serving.adapter import digest_of
from labs_lib.serving.types import Result

log = logging.getLogger(__name__)

KEPT = 1000  # mismatches, ties and failures that stay in memory
# Logits this close count as equal, because merged and unmerged weights round differently.
TIES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.4}


@dataclass(frozen=True)
class Difference:
    """Where a result and the oracle part: at output position `position` the engine said `got`, the oracle `expected`.

    `gap` is how much higher the oracle's logit for `expected` is. `more` later positions differ as well.
    """

    id: int
    tenant: str
    adapter: str | None
    slot: int
    generation: int
    position: int
    got: int | None  # None: the engine stopped here
    expected: int
    gap: float
    more: int
    result: Result = field(repr=False, compare=False)

    def __str__(self) -> str:
        return (
            f"Request {self.id} of {self.tenant} (adapter {(self.adapter or 'base')[:12]}, slot {self.slot}, "
            f"generation {self.generation}): output token {self.position} is {self.got}, its own weights say "
            f"{self.expected} (logit gap {self.gap:.3g}); {self.more} later tokens differ too."
        )


@dataclass
class Tally:
    """How one tenant's judged results came out."""

    agree: int = 0
    tie: int = (
        0  # the only differences are near-ties of the oracle's logits, which rounding may decide either way
    )
    mismatch: int = 0
    unjudged: int = 0  # sampled, but the oracle could not load the adapter (or its files have changed)


class Witness:
    """What each adapter should say: models that have it merged in by PEFT, one after the other.

    Args:
        model: a model for this purpose only, never the one that serves; or a function that loads one.
        folder_of: the folder of an adapter version, by its sha256.
        copies: merged models kept, least recently used dropped; each takes as much memory as the base.
    """

    def __init__(self, model, folder_of: Callable[[str], Path], copies: int = 2) -> None:
        self._model, self._folder_of, self.copies = model, folder_of, max(copies, 1)
        self._merged: OrderedDict[str | None, torch.nn.Module] = OrderedDict()  # least recently used first
        self._loading = threading.Lock()

    @torch.inference_mode()
    def judge(self, result: Result, tie: float = TIES[torch.float32]) -> Difference | None:
        """The first position at which the merged model says otherwise (a real one before a near-tie), or None.

        One forward pass over prompt and output, without a cache.
        """
        request = result.request
        said: list[int | None] = list(result.tokens)
        if result.finish == "stop":
            said.append(None)  # it ended here, so a stop token must have been the best
        logits = self._logits(request.adapter, request.prompt + result.tokens)
        logits = logits[len(request.prompt) - 1 :][: len(said)]
        best, expected = logits.max(-1)
        found = []
        for position, token in enumerate(said):
            right = [token] if token is not None else list(request.stop_ids)
            gap = float(best[position] - logits[position, right].max())
            if gap > 0:
                found.append((gap < tie, position, gap))
        if not found:
            return None
        _, position, gap = min(found)
        lease = result.provenance
        return Difference(
            result.id,
            request.tenant,
            request.adapter,
            lease.slot,
            lease.generation,
            position,
            said[position],
            int(expected[position]),
            gap,
            more=sum(not tied for tied, other, _ in found if other > position),
            result=result,
        )

    @torch.inference_mode()
    def answer(self, adapter: str | None, prompt: list[int], count: int) -> list[int]:
        """The first `count` greedy tokens of the merged model, without any cache: slow and sure."""
        tokens: list[int] = []
        while len(tokens) < count:
            tokens.append(int(self._logits(adapter, prompt + tokens)[-1].argmax()))
        return tokens

    @torch.inference_mode()
    def agrees(self, adapter: str | None, prompt: list[int], tokens: list[int]) -> bool:
        """Would the merged model say exactly these tokens? One pass."""
        logits = self._logits(adapter, prompt + tokens)[len(prompt) - 1 : -1]
        return logits.argmax(-1).tolist() == tokens

    def _logits(self, adapter: str | None, tokens: list[int]) -> torch.Tensor:
        """(tokens, vocabulary), float32, of the merged model."""
        model = self.merged(adapter)
        ids = torch.tensor([tokens], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        if not torch.isfinite(logits).all():
            raise LabsError("The merged model's logits are not finite: it can judge nothing.")
        return logits

    def merged(self, adapter: str | None):
        """A model of our own with the adapter merged in by PEFT; None is the base."""
        with self._loading:
            if adapter in self._merged:
                self._merged.move_to_end(adapter)
                return self._merged[adapter]
            while len(self._merged) >= self.copies:
                self._merged.popitem(last=False)
            with torch.inference_mode(False), torch.no_grad():
                self._merged[adapter] = model = self._merge(adapter)
            return model

    def _merge(self, adapter: str | None):
        from peft import PeftModel

        from labs_lib.serving.layers import MultiLoRALinear

        base = self._model
        if isinstance(base, torch.nn.Module):
            if any(isinstance(module, MultiLoRALinear) for module in base.modules()):
                raise LabsError("This model serves: give the oracle a copy of its own.")
            base = copy.deepcopy(base) if adapter is not None else base
        else:
            base = base()
        if adapter is None:
            return base.eval()
        folder = self._folder_of(adapter)
        if digest_of(folder) != adapter:
            raise LabsError(f"The files of adapter {adapter[:12]} have changed since it was published.")
        return PeftModel.from_pretrained(base, str(folder)).merge_and_unload().eval()


class ShadowOracle:
    """Replays a share of finished greedy requests on merged weights.

    Args:
        witness: what should have been said.
        share: of the results that are judged, drawn with `seed`.
        tie: logit gaps below this are near-ties; `TIES` has one for each type of number.
        waiting: results that wait to be judged; more are dropped and counted, so that serving never waits.
        on_mismatch: called with each mismatch, on the oracle's thread.

    Use it as `engine.observers.append(oracle)` and then `start()` a thread, or call `judge_waiting()` now and then.
    """

    def __init__(
        self,
        witness: Witness,
        share: float = 0.05,
        seed: int = 0,
        *,
        tie: float = TIES[torch.float32],
        waiting: int = 64,
        on_mismatch: Callable[[Difference], None] | None = None,
    ) -> None:
        if not 0 <= share <= 1:
            raise LabsError(f"share={share} of the results cannot be judged: give a number from 0 to 1.")
        self.witness, self.share, self.tie = witness, share, tie
        self.on_mismatch = on_mismatch
        self._draw = random.Random(seed)
        self._waiting: queue.Queue[Result | None] = queue.Queue(waiting)
        self._thread: threading.Thread | None = None
        self.tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self.mismatches: deque[Difference] = deque(maxlen=KEPT)
        self.ties: deque[Difference] = deque(maxlen=KEPT)
        self.failures: deque[tuple[Result, str]] = deque(maxlen=KEPT)
        self.seen = self.dropped = 0

    # -- the engine's side ---------------------------------------------------------------------------------------

    def __call__(self, result: Result) -> None:
        """Take a result in, if it is drawn; returns at once. For `engine.observers`."""
        said_something = result.tokens or result.finish == "stop"
        if result.request.temperature > 0 or result.provenance is None or not said_something:
            return
        self.seen += 1
        if self._draw.random() >= self.share:
            return
        try:
            self._waiting.put_nowait(result)
        except queue.Full:
            self.dropped += 1

    # -- the oracle's side ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Judge on a thread of its own, with one core, until `stop()`."""

        def run() -> None:
            torch.set_num_threads(1)  # the cores belong to serving
            while (result := self._waiting.get()) is not None:
                self._judge_safely(result)
                self._waiting.task_done()
            self._waiting.task_done()

        self._thread = threading.Thread(target=run, name="oracle", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Judge what waits, then end the thread."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def judge_waiting(self) -> None:
        """Judge what waits, here and now; with a thread running, wait until it has."""
        if self._thread is not None:
            self._waiting.join()
            return
        while True:
            try:
                result = self._waiting.get_nowait()
            except queue.Empty:
                return
            self._judge_safely(result)
            self._waiting.task_done()

    def __enter__(self) -> "ShadowOracle":
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def _judge_safely(self, result: Result) -> None:
        tally = self.tallies[result.request.tenant]
        try:
            difference = self.witness.judge(result, self.tie)
        except Exception as error:  # a retired adapter, no memory: the oracle's trouble must not end it
            log.warning("the oracle could not judge request %d: %s", result.id, error)
            tally.unjudged += 1
            self.failures.append((result, str(error) or type(error).__name__))
            return
        if difference is None:
            tally.agree += 1
        elif difference.gap < self.tie:
            tally.tie += 1
            self.ties.append(difference)
        else:
            tally.mismatch += 1
            self.mismatches.append(difference)
            log.error("ISOLATION: %s", difference)
            if self.on_mismatch is not None:
                self.on_mismatch(difference)

    # -- what came out -------------------------------------------------------------------------------------------

    @property
    def clean(self) -> bool:
        """Something was judged, and nothing was wrong."""
        return not self.mismatches and any(tally.agree + tally.tie for tally in self.tallies.values())

    def report(self) -> dict:
        """Counts in all and per tenant, and the mismatches in words; JSON-ready."""
        tenants = {tenant: asdict(tally) for tenant, tally in list(self.tallies.items())}
        total = {key: sum(tally[key] for tally in tenants.values()) for key in asdict(Tally())}
        return {
            "seen": self.seen,
            "dropped": self.dropped,
            "waiting": self._waiting.qsize(),
            **total,
            "tenants": tenants,
            "mismatches": [str(difference) for difference in list(self.mismatches)],
        }
