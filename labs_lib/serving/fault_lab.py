"""The isolation fault lab: an engine, the truth about it, and a score for tests that should catch the faults.

    engine, truth = harness()
    def detects(engine, truth) -> bool: ...     # send requests, look at what comes back
    score(detects)                              # which faults does it catch, and is it silent without?

`alarms` are our own answer: what a serving engine can watch, and what each way of watching sees.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from labs_lib.errors import LabsError
from labs_lib.serving.canary import Canary, CanaryProbe, audit
from labs_lib.serving.engine import Engine
from labs_lib.serving.faults import FAULTS, fault
from labs_lib.serving.oracle import ShadowOracle, Witness
from labs_lib.serving.types import Request, Result

#: name: (tenant, rank, alpha, rsLoRA). `acme-2` is a new version of acme's adapter; `gone` is deleted from disk.
ADAPTERS = {
    "acme": ("acme", 8, 16, False),
    "acme-2": ("acme", 8, 16, False),
    "bolt": ("bolt", 2, 16, False),
    "corp": ("corp", 4, 8, True),
    "gone": ("gone", 4, 16, False),
}
PROMPT = tuple(
    range(3, 25)
)  # longer than a page of 16 tokens, so that the prefix cache has something to keep


class Truth:
    """What the tenants should get, and what they are called.

    `shas[name]` is the adapter version of `base` (None), `acme`, `acme-2` (its next version), `bolt`, `corp` (rsLoRA)
    and `gone` (its files have been deleted). `witness` has all but the last merged into models.
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
        self.witness = Witness(small_model(), self.folder_of, copies=len(ADAPTERS))
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
            known += self.witness.answer(adapter, [*prompt, *known], count - len(known))
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
    settings = {"slots": 2, "max_rank": 8, "max_batch": 8, "kv_tokens": 256} | settings
    return Engine(copy.deepcopy(truth.witness.merged(None)), truth.folder_of, **settings), truth


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
            raise LabsError(
                "This test says that a healthy engine is broken: it would catch every fault, and nothing."
            )
    outcomes = []
    for name in FAULTS if faults is None else faults:
        engine, truth = harness(**settings)
        with engine, fault(name, engine):
            try:
                outcomes.append(Outcome(name, bool(detects(engine, truth))))
            except Exception as error:
                outcomes.append(Outcome(name, True, f"{type(error).__name__}: {error}"))
    return outcomes


# -- our own answer ------------------------------------------------------------------------------------------------

WAVES = [
    ["acme", "base"],
    ["base", "base"],
    ["acme", "bolt", "base", "bolt"],
    ["corp", "base", "bolt"],  # corp moves in where acme's larger adapter was
    ["acme-2", "corp", "gone", "base"],
    ["acme", "bolt", "base", "corp"],  # back from host memory
]


def traffic(
    engine: Engine,
    truth: Truth,
    each_step: Callable[[], None] = lambda: None,
    each_wave: Callable[[list[str]], None] = lambda wave: None,
    results: list[Result] | None = None,
) -> list[Result]:
    """Requests in waves that meet every fault: mixed batches, evictions, a missing file, full memory, a new version.

    `results` (given or new) fills as requests end, also if a step raises.
    """
    results = [] if results is None else results

    def submit(name: str, prompt: Sequence[int] = PROMPT, tokens: int = 6) -> None:
        engine.submit(truth.request(name, prompt, tokens), on_end=results.append)

    def idle() -> bool:
        return not engine.running and not engine.queue.waiting

    def step_until(done: Callable[[], bool]) -> None:
        def checked() -> bool:
            each_step()
            return done()

        engine.drive(checked)

    for number, wave in enumerate(WAVES):
        # Into host memory first: were the disk slow, the base's requests would be over before the others begin.
        for name in set(wave) - {"base", "gone"}:
            with engine._lock:
                engine.tiers.prefetch(truth.shas[name], truth.tenants[name])
        step_until(lambda: not engine.tiers.loading)
        for i, name in enumerate(wave):
            submit(name)
            submit(name, [30 + number, *PROMPT[: len(PROMPT) - i]])
        each_wave(wave)
        step_until(idle)
    submit("acme", tokens=20)
    step_until(lambda: bool(engine.running))
    submit("acme-2", tokens=3)  # published while acme's request runs
    step_until(idle)
    return results


def alarms(engine: Engine, truth: Truth) -> dict[str, bool]:
    """Run `traffic`; which ways of watching find something wrong?

    `merged model`: every token against the truth, known beforehand; for tests.
    `oracle`: what was served is replayed afterwards, here all of it; for production, a share.
    `canary`: one known request per adapter among the others; sees only what happens to itself.
    `audit`: the books and the zeros after every step; needs no answers.
    `neighbours`: does a request fail, or the step, besides the request whose file is missing?
    """
    oracle = ShadowOracle(truth.witness, share=1.0, waiting=1000)
    canaries = [
        Canary(truth.tenants[name], truth.shas[name], PROMPT, tuple(truth.tokens(name)))
        for name in ("base", "acme", "bolt", "corp", "acme-2")
    ]
    probe = CanaryProbe(engine, canaries)
    books: list[str] = []
    results: list[Result] = []
    dead = False
    engine.observers.append(oracle)
    try:
        traffic(
            engine,
            truth,
            each_step=lambda: books.extend(audit(engine)),
            each_wave=lambda wave: probe.send() if set(wave) != {"base"} else None,
            results=results,
        )
        engine.drive(lambda: not probe.pending)
    except Exception:
        dead = True
    oracle.judge_waiting()
    failed = [result for result in results if result.error and result.request.adapter != truth.shas["gone"]]
    return {
        "merged model": not all(truth.right(result) for result in results),
        "oracle": bool(oracle.mismatches),
        "canary": bool(probe.leaks),
        "audit": bool(books),
        "neighbours": dead or bool(failed),
    }


def table(faults: Sequence[str] | None = None, **settings) -> dict[str, dict[str, bool]]:
    """Fault by alarm; `healthy` is the engine as it is."""
    found = {}
    for name in ["healthy", *(FAULTS if faults is None else faults)]:
        engine, truth = harness(**settings)
        with engine:
            if name == "healthy":
                found[name] = alarms(engine, truth)
            else:
                with fault(name, engine):
                    found[name] = alarms(engine, truth)
    return found
