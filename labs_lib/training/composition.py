"""`labs compose PAIR`: two adapters trained apart, put together in every way, and measured.

Two pairs of skills. "facts": one tenant's style, and new facts. "halves": each adapter learns eight of the sixteen
rules of one guide, the other eight staying the base's own, and the text asked for obeys all of them. The adapters are
Pfeiffer's, beside them LoRA with about as many parameters, both at the rates of `labs sweep adapters` and `tune_lora`.

What trains while composing tries its rates with seed 0 on validation rows; the best of them runs with fresh seeds on
test rows. Stops and goes on like a sweep, and records itself when it is complete.
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache as remember
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from labs_lib.errors import LabsError
from labs_lib.models.base import base_folder
from labs_lib.paths import cache
from labs_lib.training.adapt import METHODS
from labs_lib.training.sweeps import TENANT, Arm

if TYPE_CHECKING:
    import torch
    from torch import nn

SEEDS, ROWS = 3, 48  # rows of copy that are scored
FACTS, FACT_STEPS = 160, 150
PRACTICE_STEPS = 60  # of what trains while composing
UNITS, RANK = 18, 2  # about 19,000 numbers each
ARMS = {
    "adapter": Arm(
        f"Pfeiffer, {UNITS} units", "bottleneck", options={"placement": "pfeiffer", "bottleneck": UNITS}
    ),
    "lora": Arm(f"LoRA r{RANK}, all linear", rank=RANK, alpha=2 * RANK),
}
TWICE = {  # one adapter as large as two
    "adapter": replace(ARMS["adapter"], options={"placement": "pfeiffer", "bottleneck": 2 * UNITS}),
    "lora": replace(ARMS["lora"], rank=2 * RANK, alpha=4 * RANK),
}
RATES = {  # way that trains -> the rates it tries; one more where the best is at the edge
    "fusion": (1e-3, 3e-3, 1e-2),
    "fresh": (1e-2,),  # found in `labs sweep adapters`
    "one": (1e-2,),
}
WIDEN = 1
SKILLS = ("first", "second")
WAYS = {
    "adapter": (
        *SKILLS,
        *("first, second", "second, first", "sum", "mean"),
        *("fusion", "fresh", "one"),
    ),
    "lora": (*SKILLS, "sum", "mean"),
}
MEANS = {  # what each way is, in words
    "first": "the first alone",
    "second": "the second alone",
    "first, second": "stacked, first one first",
    "second, first": "stacked, second one first",
    "sum": "both added",
    "mean": "half of each",
    "fusion": "AdapterFusion, trained",
    "fresh": "a new adapter, trained like the fusion",
    "one": "one adapter of twice the size, trained on both",
}
# half of the guide's rules; the other half is the form
VOICE = ("headline", "register", "houseword", "noun", "audience", "mark", "cta", "signoff")


@dataclass(frozen=True)
class Stream:
    """Rows to learn from, and how many of them a step takes."""

    rows: dict
    batch: int


@dataclass(frozen=True)
class Pair:
    """Two skills, and what it takes to compose them.

    Attributes:
        skills: what each adapter learns by itself, and for how many steps.
        labels: the task of the sweeps whose best rate each skill takes.
        practice: what the trained ways of composing see.
        both: what the one adapter for both sees, and for how many steps.
        score: (model, tokenizer, split) to the two skills, `score` and what else is worth keeping.
    """

    skills: tuple[tuple[Stream, int], tuple[Stream, int]]
    labels: tuple[str, str]
    practice: tuple[Stream, ...]
    both: tuple[tuple[Stream, ...], int]
    score: Callable[..., dict]


def part(rows, start: int, stop: int) -> dict:
    """Some of the rows, prompts and completions only."""
    return {key: rows[key][start:stop] for key in ("prompt", "completion")}


def style_and_facts() -> Pair:
    """Different prompts for different skills. Practice sees 64 facts; scored are others that it never saw."""
    from labs_lib.measure.quality import recall
    from labs_lib.world.tasks import load_task

    style, facts = load_task("style", tenant=TENANT), load_task("knowledge", facts=FACTS)["train"][:]
    train, practised = style["train"][:], part(facts, 0, 64)
    scored = {"validation": part(facts, 64, 96), "test": part(facts, 96, FACTS)}

    def score(model, tokenizer, split: str) -> dict:
        copy = copy_scores(model, tokenizer, style[split][:ROWS])
        got = {"first": copy["exact"], "second": fmean(recall(model, tokenizer, scored[split]))}
        got["practised"] = fmean(recall(model, tokenizer, practised))
        return got | {"score": (got["first"] + got["second"]) / 2, "compliance": copy["compliance"]}

    return Pair(
        skills=((Stream(train, 16), 60), (Stream(facts, 32), FACT_STEPS)),
        labels=("style", "knowledge, 512 facts"),
        practice=(Stream(train, 16), Stream(practised, 32)),
        both=((Stream(train, 8), Stream(facts, 32)), FACT_STEPS),
        score=score,
    )


def two_halves() -> Pair:
    """Both skills in every text. Practice sees 16 texts that obey the whole guide, which neither adapter has seen."""
    from labs_lib.world.catalogue import Product
    from labs_lib.world.grammar import DEFAULT_STYLE, render
    from labs_lib.world.tasks import load_task
    from labs_lib.world.tenants import load_tenant

    style, guide = load_task("style", tenant=TENANT), load_tenant(TENANT).style
    train = style["train"][:]

    def half(rules) -> Stream:
        wanted = DEFAULT_STYLE | {rule: guide[rule] for rule in rules}
        texts = [render(Product.from_dict(product), wanted) for product in train["product"]]
        return Stream({"prompt": train["prompt"], "completion": texts}, 16)

    def score(model, tokenizer, split: str) -> dict:
        copy = copy_scores(model, tokenizer, style[split][:ROWS])
        got = {"first": copy["voice"], "second": copy["form"]}
        return got | {"score": copy["exact"], "compliance": copy["compliance"]}

    form = [rule for rule in guide if rule not in VOICE]
    return Pair(
        skills=((half(VOICE), 60), (half(form), 60)),
        labels=("style", "style"),
        practice=(Stream(part(train, 0, 16), 16),),
        both=((Stream(train, 16),), 120),
        score=score,
    )


PAIRS = {"facts": style_and_facts, "halves": two_halves}


def copy_scores(model, tokenizer, rows) -> dict[str, float]:
    """Exact texts and rules kept, of the voice and of the form, on the tenant's guide."""
    from labs_lib.measure.quality import style_quality
    from labs_lib.world.tenants import load_tenant

    quality = style_quality(model, tokenizer, rows, load_tenant(TENANT))
    halves = [
        fmean(share for rule, share in quality.per_rule.items() if (rule in VOICE) == voice)
        for voice in (True, False)
    ]
    return {
        "exact": quality.exact,
        "compliance": quality.compliance,
        "voice": halves[0],
        "form": halves[1],
    }


def train(
    model,
    tokenizer,
    streams: tuple[Stream, ...],
    steps: int,
    lr: float,
    seed: int,
    penalty: "Callable[[], torch.Tensor] | None" = None,
) -> None:
    """Train on a batch of every stream in each step, their losses added; AdamW and the schedule of `fit`.

    `penalty` is asked after each forward pass for something to add to its loss.

    `fit` draws one batch from one heap; here a step of few long texts and many short ones costs what it must.
    """
    import torch

    from labs_lib.measure.quality import collate, encode_rows
    from labs_lib.methods.lora import trainable_parameters

    draws = [
        batches(encode_rows(tokenizer, s.rows["prompt"], s.rows["completion"]), s.batch, seed)
        for s in streams
    ]
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=lr, weight_decay=0.0)
    warmup = max(1, round(0.06 * steps))
    model.train()
    device = next(model.parameters()).device
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / warmup, (steps - step) / max(1, steps - warmup))
        optimizer.zero_grad()
        for draw in draws:
            batch = collate(next(draw), tokenizer.pad_token_id)
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
            (loss + penalty() if penalty else loss).backward()
        torch.nn.utils.clip_grad_norm_(trainable_parameters(model), 1.0)
        optimizer.step()
    model.eval()


def batches(rows: list, size: int, seed: int) -> Iterator[list]:
    """Batches without end: all rows in a new order, again and again."""
    rng, heap = random.Random(seed), []
    while True:
        while len(heap) < size:
            heap += rng.sample(rows, len(rows))
        yield heap[:size]
        heap = heap[size:]


# ---------------------------------------------------------------------------------------------------- the two kinds


def new(kind: str, seed: int, arms: dict[str, Arm] = ARMS) -> tuple:
    """A base with a fresh adapter, which alone trains; and the tokenizer."""
    from labs_lib.models.base import load_base

    model, tokenizer = load_base("small")
    arm = arms[kind]
    return METHODS[arm.method](model, arm, seed, 0).model, tokenizer


def tensors(kind: str, model: "nn.Module", name: str = "default") -> "dict[str, torch.Tensor]":
    from labs_lib.methods.adapters import adapter_state_dict
    from labs_lib.methods.lora import lora_state_dict

    return lora_state_dict(model) if kind == "lora" else adapter_state_dict(model, name)


def fill(own: "dict[str, torch.Tensor]", values: "dict[str, torch.Tensor]") -> None:
    for key, tensor in own.items():
        tensor.copy_(values[key])


def mixture(share: float) -> Callable[..., "nn.Module"]:
    """A fusion for fuse_adapters that trains nothing: `share` of what each adapter would add."""
    from torch import nn

    class Mixture(nn.Module):
        def __init__(self, width: int, generator=None) -> None:
            super().__init__()

        def forward(self, h, changes):
            return share * changes.sum(dim=-2)

    return Mixture


def composed_adapters(parts: list[dict], way: str, seed: int) -> tuple:
    """A base with both adapters, acting together in this way. Only what the way trains requires a gradient."""
    import torch

    from labs_lib.methods.adapters import fuse_adapters, inject_adapters, use_adapters
    from labs_lib.models.base import load_base

    model, tokenizer = load_base("small")
    for name, values in zip(SKILLS, parts, strict=True):
        fill(tensors("adapter", inject_adapters(model, name=name, **ARMS["adapter"].options), name), values)
    names = list(SKILLS)
    if way == "fusion":
        fuse_adapters(model, names, torch.Generator().manual_seed(seed))
    elif way in ("sum", "mean"):
        fuse_adapters(model, names, kind=mixture(0.5 if way == "mean" else 1.0))
    else:
        use_adapters(model, way.split(", "))
    return model, tokenizer


def composed_lora(parts: list[dict], way: str, seed: int) -> tuple:
    """The same for LoRA: factors side by side are an adapter of twice the rank that adds the two updates.

    Both read the same input, so there is no stack. "mean" halves the sum.
    """
    import torch

    from labs_lib.methods.lora import lora_layers

    model, tokenizer = new("lora", seed, TWICE)
    joined = {key: torch.cat([p[key] for p in parts], dim=int("lora_B" in key)) for key in parts[0]}
    fill(tensors("lora", model), joined)
    for layer in lora_layers(model).values():
        layer.alpha *= 0.5 if way == "mean" else 1
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------- points


@remember
def pair_of(name: str) -> Pair:
    return PAIRS[name]()


@remember
def rate_of(kind: str, label: str) -> float:
    """The best rate of the sweep in which this adapter took part."""
    from labs_lib.measure.records import load_record

    name = "adapters" if kind == "adapter" else {"style": "tune_lora_style"}.get(label, "tune_lora")
    for row in load_record(f"sweep_{name}", device="cpu").rows:
        if (row["stage"], row["arm"]["name"], row["label"]) == ("final", ARMS[kind].name, label):
            return row["lr"]
    raise LabsError(f"Run `labs sweep {name}` first: it finds the rate of {ARMS[kind].name} on {label}.")


@remember
def skill(pair: str, kind: str, which: int, seed: int) -> dict:
    """The tensors of the adapter that has learned one skill."""
    from labs_lib.training.fit import fit

    (stream, steps), label = pair_of(pair).skills[which], pair_of(pair).labels[which]
    model, tokenizer = new(kind, seed)
    settings = {"steps": steps, "lr": rate_of(kind, label), "batch_size": stream.batch, "seed": seed}
    fit(model, tokenizer, stream.rows, progress=False, **settings)
    return {key: value.clone() for key, value in tensors(kind, model).items()}


def run_point(point: dict) -> dict:
    """Compose two adapters in one way, train what trains, and score both skills."""
    import torch

    from labs_lib.measure.quality import recall
    from labs_lib.world.tasks import known_facts

    name, kind, way, seed = point["pair"], point["kind"], point["way"], point["seed"]
    pair, started = pair_of(name), time.perf_counter()
    if way in ("one", "fresh"):
        model, tokenizer = new(kind, seed, TWICE if way == "one" else ARMS)
    elif way in SKILLS:
        model, tokenizer = new(kind, seed)
        fill(tensors(kind, model), skill(name, kind, SKILLS.index(way), seed))
    else:
        parts = [skill(name, kind, which, seed) for which in (0, 1)]
        compose = composed_lora if kind == "lora" else composed_adapters
        model, tokenizer = compose(parts, way, seed)
    trained = 0
    if way in RATES:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        streams, steps = pair.both if way == "one" else (pair.practice, PRACTICE_STEPS)
        train(model, tokenizer, streams, steps, point["lr"], seed)
    known = known_facts()[:512]
    known = {key: [fact[key] for fact in known] for key in ("prompt", "completion")}
    with torch.no_grad():
        measured = pair.score(model, tokenizer, "validation" if point["stage"] == "sweep" else "test")
        measured["kept"] = fmean(recall(model, tokenizer, known))
    return point | measured | {"trained": trained, "seconds": round(time.perf_counter() - started, 1)}


def points(pair: str, rows: list[dict], seeds: int = SEEDS) -> Iterator[dict]:
    """The points of both stages; final ones of a way that trains appear once its rates are all in `rows`."""
    ways = [(kind, way) for kind in WAYS for way in WAYS[kind]]
    for kind, way in ways:
        for lr in grid(rows, way) if len(RATES.get(way, ())) > 1 else ():
            yield {"pair": pair, "kind": kind, "way": way, "stage": "sweep", "lr": lr, "seed": 0}
    for seed in range(1, 1 + seeds):  # seed by seed, so that the adapters of a seed are trained once
        for kind, way in ways:
            lr = best_rate(rows, way) if way in RATES else None
            if lr is not None or way not in RATES:
                yield {"pair": pair, "kind": kind, "way": way, "stage": "final", "lr": lr, "seed": seed}


def grid(rows: list[dict], way: str) -> list[float]:
    """The rates to try: while the best is the first or the last, one more beyond it, by the same factor."""
    rates = list(RATES[way])
    for _ in range(WIDEN if len(rates) > 1 else 0):
        best = _best(rows, way, rates)
        if best == rates[0]:
            rates.insert(0, float(f"{rates[0] ** 2 / rates[1]:.2g}"))
        elif best == rates[-1]:
            rates.append(float(f"{rates[-1] ** 2 / rates[-2]:.2g}"))
        else:
            break
    return rates


def best_rate(rows: list[dict], way: str) -> float | None:
    """The rate with the best score of the first stage, the lowest of equals; None until all are in."""
    return _best(rows, way, grid(rows, way))


def _best(rows: list[dict], way: str, rates: list[float]) -> float | None:
    if len(rates) == 1:
        return rates[0]
    done = [row for row in rows if (row["way"], row["stage"]) == (way, "sweep") and row["lr"] in rates]
    if {row["lr"] for row in done} != set(rates):
        return None
    return max(done, key=lambda row: (row["score"], row["compliance"], -row["lr"]))["lr"]


def log_path(pair: str) -> Path:
    """Where finished points are kept; other sizes or another base model have another file."""
    base = hashlib.sha256((base_folder("small") / "model.safetensors").read_bytes()).hexdigest()
    arms = [arm.to_dict() for arm in ARMS.values()]
    settings = json.dumps([arms, RATES, FACTS, FACT_STEPS, PRACTICE_STEPS, ROWS, base])
    return cache() / "sweeps" / f"compose_{pair}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.jsonl"


def run(pair: str, limit: int | None = None, seeds: int = SEEDS) -> Path | None:
    """Run what is missing; returns the record's path once all is there, None if `limit` came first."""
    from labs_lib.measure.records import Record, save_record
    from labs_lib.training.resume import run_points

    rows = run_points(
        log_path(pair), lambda done: points(pair, done, seeds), run_point, f"compose {pair}", limit
    )
    if rows is None:
        return None
    kinds = " or ".join(arm.name for arm in ARMS.values())
    note = f"Two adapters ({kinds}) trained apart and put together, small base: {PAIRS[pair].__doc__.splitlines()[0]}"
    return save_record(Record(f"compose_{pair}", rows, note=note))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pair", choices=PAIRS, help="which two skills")
    parser.add_argument(
        "--limit", type=int, default=None, help="stop after so many runs; the next call goes on"
    )


def main(args: argparse.Namespace) -> int:
    path = run(args.pair, args.limit)
    print(f"recorded in {path}" if path else "stopped early; run the same command to go on")
    return 0
