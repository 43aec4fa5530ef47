"""`labs mix PAIR`: two LoRA adapters trained apart, and every way to answer requests that need both, measured.

Three pairs of needs. "tasks": one tenant's style and closed-book facts; the prompt shows which is asked for. "tenants":
two tenants' styles; their prompts look alike, and only the API key tells them apart. "halves": each adapter has learned
eight of the sixteen rules of one guide, and a text must obey all of them.

The ways that train see a little of both (`practice`), as a service would collect it. Their rates are chosen with seed 0
on validation rows; fresh seeds at the best are scored on test rows. Stops and goes on like a sweep.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as remember
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from labs_lib.models.base import base_folder
from labs_lib.paths import cache
from labs_lib.training.composition import Stream, copy_scores, part, train, two_halves
from labs_lib.training.sweeps import TENANT

if TYPE_CHECKING:
    import torch
    from torch import nn

SEEDS, ROWS = 3, 32
RANK = 8  # of an expert: 75,776 numbers on all linear layers of `small`
RATE = (
    5e-3  # the best of this LoRA in `labs sweep tune_lora` and `tune_lora_style`, for facts and style alike
)
OTHER = "marchbank-galleries"  # the second tenant
FACTS, FACT_STEPS, STYLE_STEPS, PRACTICE_STEPS = 160, 150, 60, 40
RATES = {  # way that trains -> the rates it tries
    "gate": (1e-2, 3e-2, 1e-1),
    "few": (1e-3, 3e-3, 1e-2),
    "one": (1e-3, 3e-3, 1e-2),
    "xlora": (1e-3, 1e-2),
}
LIKE = {"top-1": "gate", "balanced": "gate"}  # takes the other way's rate
MEANS = {  # what each way is, in words
    "first": "the first expert alone",
    "second": "the second expert alone",
    "sum": "both updates added",
    "linear": "merged, half of each (PEFT, linear)",
    "ties": "merged, TIES (PEFT)",
    "dare": "merged, DARE (PEFT, dare_linear)",
    "gate": "a gate per block, both experts mixed",
    "top-1": "the same gates, but only the larger expert runs",
    "balanced": "a gate per block, with a balance loss",
    "xlora": "X-LoRA (PEFT), two passes",
    "few": "one LoRA of twice the rank, on the same practice",
    "one": "one LoRA of twice the rank, on all of both",
}
BALANCE = 0.01  # weight of the balance loss, as in Switch Transformers
DENSITY = 0.5  # of TIES and DARE


@dataclass(frozen=True)
class Needs:
    """Two needs: what each expert learns (rows, steps), what a service collects of both, all of both, the scores."""

    experts: tuple[tuple[Stream, int], tuple[Stream, int]]
    practice: tuple[Stream, ...]
    both: tuple[Stream, ...]
    score: Callable[..., dict]


def tasks() -> Needs:
    """A tenant's style and closed-book facts: the prompt shows which is asked for."""
    from labs_lib.measure.quality import recall
    from labs_lib.world.tasks import load_task

    style, facts = load_task("style", tenant=TENANT), load_task("knowledge", facts=FACTS)["train"][:]
    copy, scored = style["train"][:], {"validation": part(facts, 64, 96), "test": part(facts, 96, FACTS)}

    def score(model, tokenizer, split: str) -> dict:
        first = copy_scores(model, tokenizer, style[split][:ROWS])["exact"]
        second = fmean(recall(model, tokenizer, scored[split]))
        return {"first": first, "second": second, "score": (first + second) / 2}

    return Needs(
        experts=((Stream(copy, 16), STYLE_STEPS), (Stream(facts, 32), FACT_STEPS)),
        practice=(Stream(part(copy, 0, 64), 8), Stream(part(facts, 0, 64), 16)),
        both=(Stream(copy, 8), Stream(facts, 32)),
        score=score,
    )


def tenants() -> Needs:
    """Two tenants' styles: the same prompts ask for either, and only the API key tells whose it is."""
    from labs_lib.measure.quality import style_quality
    from labs_lib.world.tasks import load_task
    from labs_lib.world.tenants import load_tenant

    styles = [load_task("style", tenant=name) for name in (TENANT, OTHER)]
    copies = [style["train"][:] for style in styles]

    def score(model, tokenizer, split: str) -> dict:
        first, second = (
            style_quality(model, tokenizer, style[split][:ROWS], load_tenant(name)).exact
            for style, name in zip(styles, (TENANT, OTHER), strict=True)
        )
        return {"first": first, "second": second, "score": (first + second) / 2}

    return Needs(
        experts=tuple((Stream(copy, 16), STYLE_STEPS) for copy in copies),
        practice=tuple(Stream(part(copy, 0, 64), 8) for copy in copies),
        both=tuple(Stream(copy, 8) for copy in copies),
        score=score,
    )


def halves() -> Needs:
    """Eight rules of a guide each: every text needs both experts at once."""
    pair = two_halves()

    def score(model, tokenizer, split: str) -> dict:
        from labs_lib.world.tasks import load_task

        got = copy_scores(model, tokenizer, load_task("style", tenant=TENANT)[split][:ROWS])
        return {"first": got["voice"], "second": got["form"], "score": got["exact"]}

    return Needs(pair.skills, pair.practice, pair.both[0], score)


PAIRS = {"tasks": tasks, "tenants": tenants, "halves": halves}


@remember
def needs_of(pair: str) -> Needs:
    return PAIRS[pair]()


@remember
def expert(pair: str, which: int, seed: int) -> "dict[str, torch.Tensor]":
    """The tensors of the LoRA that has learned one of the two needs."""
    from labs_lib.methods.lora import lora_state_dict
    from labs_lib.training.fit import fit

    stream, steps = needs_of(pair).experts[which]
    model, tokenizer = fresh(RANK, seed)
    fit(
        model,
        tokenizer,
        stream.rows,
        steps=steps,
        lr=RATE,
        batch_size=stream.batch,
        seed=seed,
        progress=False,
    )
    return {key: value.clone() for key, value in lora_state_dict(model).items()}


def fresh(rank: int, seed: int) -> tuple:
    """A base with a new LoRA, which alone trains; and the tokenizer."""
    import torch

    from labs_lib.methods.lora import inject_lora
    from labs_lib.models.base import load_base

    model, tokenizer = load_base("small")
    generator = torch.Generator().manual_seed(seed)
    return inject_lora(model, "all-linear", rank, 2 * rank, generator=generator), tokenizer


def mixed(pair: str, seed: int) -> tuple:
    """A base with both experts and fresh gates."""
    from labs_lib.methods.mixture import inject_mixture
    from labs_lib.models.base import load_base

    model, tokenizer = load_base("small")
    experts = [expert(pair, which, seed) for which in (0, 1)]
    return inject_mixture(model, experts, [2.0, 2.0]), tokenizer


def folders(pair: str, seed: int, into: Path) -> list[str]:
    """Both experts as PEFT folders."""
    from labs_lib.methods.io import save_lora
    from labs_lib.methods.lora import load_lora_state_dict

    for which in (0, 1):
        model, _ = fresh(RANK, seed)
        load_lora_state_dict(model, expert(pair, which, seed))
        save_lora(model, into / str(which))
    return [str(into / str(which)) for which in (0, 1)]


def merged(pair: str, seed: int, way: str) -> tuple:
    """Both experts merged into one adapter by PEFT's add_weighted_adapter."""
    import torch
    from peft import PeftModel

    from labs_lib.models.base import load_base

    model, tokenizer = load_base("small")
    kinds = {
        "linear": {"combination_type": "linear"},
        "ties": {"combination_type": "ties", "density": DENSITY},
    }
    kinds["dare"] = {"combination_type": "dare_linear", "density": DENSITY}
    weights = [0.5, 0.5] if way == "linear" else [1.0, 1.0]
    with tempfile.TemporaryDirectory() as scratch:
        first, second = folders(pair, seed, Path(scratch))
        model = PeftModel.from_pretrained(model, first, adapter_name="first")
        model.load_adapter(second, adapter_name="second")
    torch.manual_seed(seed)  # DARE drops at random
    model.add_weighted_adapter(["first", "second"], weights, "merged", **kinds[way])
    model.set_adapter("merged")
    return model, tokenizer


def xlora(pair: str, seed: int) -> tuple:
    """PEFT's X-LoRA over both experts; its classifier alone trains. It generates without a cache."""
    import torch
    from peft import XLoraConfig, get_peft_model

    from labs_lib.models.base import load_base

    model, tokenizer = load_base("small")
    model.config.use_cache = False
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        adapters = dict(zip("01", folders(pair, seed, Path(scratch)), strict=True))
        config = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, xlora_depth=1, adapters=adapters
        )
        model = get_peft_model(model, config)
    return model, tokenizer


def build(pair: str, way: str, seed: int) -> "tuple[nn.Module, object]":
    """The model that answers in this way, ready to train if the way trains."""
    from labs_lib.methods.lora import load_lora_state_dict
    from labs_lib.methods.mixture import fix_gates

    if way in ("first", "second"):
        model, tokenizer = fresh(RANK, seed)
        load_lora_state_dict(model, expert(pair, int(way == "second"), seed))
        return model.requires_grad_(False), tokenizer
    if way == "sum":
        model, tokenizer = mixed(pair, seed)
        return fix_gates(model, [1.0, 1.0]), tokenizer
    if way in ("linear", "ties", "dare"):
        return merged(pair, seed, way)
    if way == "xlora":
        return xlora(pair, seed)
    if way in ("few", "one"):
        return fresh(2 * RANK, seed)
    return mixed(pair, seed)


def run_point(point: dict) -> dict:
    """One way with one seed: build it, train what trains, score both needs and what the base knew."""
    import torch

    from labs_lib.measure.quality import recall
    from labs_lib.methods.mixture import balance, gates_of
    from labs_lib.world.tasks import known_facts

    pair, way, seed, started = point["pair"], point["way"], point["seed"], time.perf_counter()
    needs = needs_of(pair)
    model, tokenizer = build(pair, way, seed)
    trained = 0
    if point["lr"] is not None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        streams, steps = (needs.both, FACT_STEPS) if way == "one" else (needs.practice, PRACTICE_STEPS)
        penalty = (lambda: BALANCE * balance(model)) if way == "balanced" else None
        train(model, tokenizer, streams, steps, point["lr"], seed, penalty)
    if (
        way == "top-1"
    ):  # trained like "gate": a lone expert's share is 1 whatever its logit, so nothing would be learned
        for gate in gates_of(model).values():
            gate.top_k = 1
    known = known_facts()[:512]
    known = {key: [fact[key] for fact in known] for key in ("prompt", "completion")}
    with torch.no_grad():
        measured = needs.score(model, tokenizer, "validation" if point["stage"] == "sweep" else "test")
        measured["kept"] = fmean(recall(model, tokenizer, known))
    return point | measured | {"trained": trained, "seconds": round(time.perf_counter() - started, 1)}


def points(pair: str, rows: list[dict]) -> Iterator[dict]:
    """Both stages; the final points of a way that trains appear once its rates are all in."""
    ways = [
        way for way in MEANS if way != "xlora" or pair == "tasks"
    ]  # without a cache it takes minutes to write copy
    for way in (way for way in ways if way in RATES):
        for lr in RATES[way]:
            yield {"pair": pair, "way": way, "stage": "sweep", "lr": lr, "seed": 0}
    for seed in range(1, 1 + SEEDS):  # seed by seed, so that the experts of a seed are trained once
        for way in ways:
            trains = LIKE.get(way, way) in RATES
            lr = best_rate(rows, LIKE.get(way, way)) if trains else None
            if lr is not None or not trains:
                yield {"pair": pair, "way": way, "stage": "final", "lr": lr, "seed": seed}


def best_rate(rows: list[dict], way: str) -> float | None:
    """The rate with the best score of the first stage, the lowest of equals; None until all are in."""
    done = [row for row in rows if (row["way"], row["stage"]) == (way, "sweep")]
    if {row["lr"] for row in done} != set(RATES[way]):
        return None
    return max(done, key=lambda row: (row["score"], -row["lr"]))["lr"]


def log_path(pair: str) -> Path:
    """Where finished points are kept; other sizes or another base model have another file."""
    base = hashlib.sha256((base_folder("small") / "model.safetensors").read_bytes()).hexdigest()
    sizes = [RANK, RATE, OTHER, FACTS, FACT_STEPS, STYLE_STEPS, PRACTICE_STEPS, ROWS, RATES, BALANCE, DENSITY]
    name = hashlib.sha256(json.dumps([sizes, base]).encode()).hexdigest()[:12]
    return cache() / "sweeps" / f"mix_{pair}-{name}.jsonl"


def run(pair: str, limit: int | None = None) -> Path | None:
    """Run what is missing; returns the record's path once all is there, None if `limit` came first."""
    from labs_lib.measure.records import Record, save_record
    from labs_lib.training.resume import run_points

    rows = run_points(log_path(pair), lambda done: points(pair, done), run_point, f"mix {pair}", limit)
    if rows is None:
        return None
    note = f"Two LoRA r{RANK} experts, small base. {PAIRS[pair].__doc__}"
    return save_record(Record(f"mix_{pair}", rows, note=note))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pair", choices=PAIRS, help="which two needs")
    parser.add_argument(
        "--limit", type=int, default=None, help="stop after so many runs; the next call goes on"
    )


def main(args: argparse.Namespace) -> int:
    path = run(args.pair, args.limit)
    print(f"recorded in {path}" if path else "stopped early; run the same command to go on")
    return 0
