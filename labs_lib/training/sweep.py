"""`labs sweep NAME`: run a named sweep point by point, resumable, and record it when it is complete.

A sweep has two stages with equal effort for every arm: each arm tries the same learning rates with one seed, scored on
the validation split, then runs the best of them with fresh seeds, scored on the test split, which alone are reported.
What the sweeps are stands in `sweeps`.
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

from labs_lib.errors import LabsError
from labs_lib.models.base import verified
from labs_lib.models.room import check_device
from labs_lib.paths import cache
from labs_lib.training.adapt import METHODS
from labs_lib.training.sweeps import SWEEPS, Arm, Sweep

KNOWN_FACTS_PROBED = 512
STYLE_ROWS_SCORED = 48
SPLIT = {"sweep": "validation", "final": "test"}  # stage -> what it is scored on


def evaluate(model, tokenizer, task: str, tenant: str | None, rows) -> dict[str, float]:
    """The task's scores on `rows` of one split, and the recall of facts the base knew before (1 - forgetting).

    The splits of the knowledge task are the same facts, because what was not trained cannot be recalled: there is
    nothing to hold out, and the rate is chosen by the very quantity that is asked for. Fresh seeds keep the lucky draw
    of the choice out of the result. A style must hold for products that neither training nor the choice has seen.
    """
    from labs_lib.measure.quality import accuracy, perplexity, recall, style_quality
    from labs_lib.world.tasks import known_facts
    from labs_lib.world.tenants import load_tenant

    known = known_facts()[:KNOWN_FACTS_PROBED]
    scores = {
        "kept": fmean(recall(model, tokenizer, {k: [f[k] for f in known] for k in ("prompt", "completion")}))
    }
    if task == "knowledge":
        scores["score"] = fmean(recall(model, tokenizer, rows))
    elif task == "retention":  # a repair: what the base knew is what is asked for
        scores["score"] = scores["kept"]
    elif task == "domain":  # the (geometric) mean probability of a token, so that more is better
        scores["perplexity"] = perplexity(model, tokenizer, rows)
        scores["score"] = 1 / scores["perplexity"]
    elif task == "classification":
        right = accuracy(model, tokenizer, rows)
        scores["score"] = fmean(right)
        for kind in sorted(set(rows["kind"])):  # plain, with a "but", negated
            scores[kind] = fmean(hit for hit, of in zip(right, rows["kind"], strict=True) if of == kind)
    else:
        style = style_quality(model, tokenizer, rows, load_tenant(tenant))
        scores |= {"score": style.exact, "compliance": style.compliance, "fidelity": style.fidelity}
    return scores


def run_point(point: dict, size: str = "small", device: str = "cpu") -> dict:
    """Train and evaluate one point (as `points` makes them) on any base that `load_base` knows, in float32.

    Returns:
        The point with its measurements.
    """
    from labs_lib.models.base import fresh_base, load_base
    from labs_lib.training.fit import fit
    from labs_lib.world.tasks import load_task

    arm = Arm(**point["arm"])
    started, worked = time.perf_counter(), time.process_time()
    model, tokenizer = load_base(size, device=device, quantise=arm.quantise)
    if arm.options.get("fresh"):
        model = fresh_base(size, point["seed"]).to(device)
    data = load_task(point["task"], tenant=point.get("tenant"), facts=point.get("facts", 1024))
    adapted = METHODS[arm.method](model, arm, point["seed"], point["steps"])
    model = adapted.model
    split, held_out = SPLIT[point["stage"]], None
    if "watch" in arm.options:  # while the rate is chosen, the last step alone
        steps = {point["steps"], *(arm.options["watch"] if split == "test" else ())}
        held_out = watch_style(steps, tokenizer, data[split][:STYLE_ROWS_SCORED], point["tenant"])
    try:
        run = fit(
            model,
            tokenizer,
            few(data["train"], arm.options.get("examples"), point["seed"]),
            steps=point["steps"],
            lr=point["lr"],
            batch_size=point["batch"],
            seed=point["seed"],
            optimizer=adapted.optimizer and adapted.optimizer(point["lr"]),
            callbacks=adapted.callbacks + ([held_out] if held_out else []),
            progress=False,
        )
        measured = {"loss": run.final_loss, "params": run.trainable_parameters} | adapted.finish()
        if held_out:
            measured |= {"watched": held_out.seen, "held_loss": held_out.seen[-1]["loss"]}
        if arm.curve:
            measured["losses"] = [round(loss, 4) for loss in run.losses]
        rows = data[split]
        rows = rows[:STYLE_ROWS_SCORED] if point["task"] == "style" else rows[:]
        measured |= evaluate(model, tokenizer, point["task"], point.get("tenant"), rows)
    except LabsError as error:  # a rate at which the loss diverges is a result: it scores nothing
        if "loss became" not in str(error):
            raise
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        measured = {"loss": None, "params": trainable, "kept": 0.0, "score": 0.0, "diverged": True}
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
    return point | measured | {name: round(value, 1) for name, value in spent.items()}


def few(train, examples: int | None, seed: int) -> dict:
    """The training rows, or the first `examples` of them in an order that depends on the seed alone."""
    if examples is None:
        return train[:]
    order = list(range(len(train)))
    random.Random(seed).shuffle(order)
    return train[order[:examples]]


def watch_style(steps: set[int], tokenizer, rows: dict, tenant: str):
    """A callback for the Trainer that scores a style on held-out `rows` after these steps; `seen` keeps the scores.

    Each entry: step, held-out loss (nats per completion token), and the shares of exact texts, rules and facts.
    """
    from transformers import TrainerCallback

    from labs_lib.measure.quality import row_losses, style_quality
    from labs_lib.world.tenants import load_tenant

    class Watch(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step in steps:
                losses = row_losses(model, tokenizer, rows)
                style = style_quality(model, tokenizer, rows, load_tenant(tenant))
                scores = {"exact": style.exact, "compliance": style.compliance, "fidelity": style.fidelity}
                loss = sum(nats for nats, _ in losses) / sum(tokens for _, tokens in losses)
                self.seen.append({"step": state.global_step, "loss": round(loss, 4)} | scores)

    return Watch()


def points(sweep: Sweep, rows: list[dict]) -> Iterator[dict]:
    """The points of both stages; those of the second appear once the first stage of an arm is in `rows`."""
    for arm in sweep.arms:
        for task in sweep.tasks:
            base = task.settings() | {"arm": arm.to_dict(), "stage": "sweep", "seed": 0}
            choose = partial(best_point, rows, arm, task.label, gentle=sweep.gentle)
            rates = grid(choose, arm.rates or sweep.rates, sweep.widen, sweep.refine)
            for lr in rates:
                yield base | {"lr": lr}
            if (best := choose(rates)) is not None:
                for seed in sweep.fresh_seeds(arm.name, task.label):
                    yield base | {"lr": best["lr"], "stage": "final", "seed": seed}


def grid(
    choose: Callable, rates: tuple[float, ...], widen: int = 0, refine: float = 0.0
) -> tuple[float, ...]:
    """The rates to try: while the best is the first or the last, one more beyond it, by the same factor.

    Then, if even the best scores less than `refine`, the rates halfway (in log) to its neighbours. `choose` gives the
    best point of some rates, None if they have not all been tried.
    """
    rates = list(rates)
    for _ in range(widen):
        best = choose(tuple(rates))
        if best and best["lr"] == rates[0]:
            rates.insert(0, float(f"{rates[0] ** 2 / rates[1]:.2g}"))
        elif best and best["lr"] == rates[-1]:
            rates.append(float(f"{rates[-1] ** 2 / rates[-2]:.2g}"))
        else:
            break
    best = choose(tuple(rates)) if refine else None
    if best and best["score"] < refine:
        pairs = [pair for pair in pairwise(rates) if best["lr"] in pair]
        rates += [float(f"{(low * high) ** 0.5:.2g}") for low, high in pairs]
    return tuple(sorted(rates))


def best_point(
    rows: list[dict], arm: Arm, task: str, rates: tuple[float, ...], gentle: bool = False
) -> dict | None:
    """The first stage's row with the best score; None until all rates are in.

    Ties go to the lower loss: held-out where that was watched, else of training. With `gentle` they go to the lower
    rate, unless nothing was learned at any: there the loss says which came closest.
    """
    first = [r for r in rows if r["stage"] == "sweep" and r["arm"]["name"] == arm.name and r["label"] == task]
    done = [r for r in first if r["lr"] in rates]
    if {r["lr"] for r in done} != set(rates):
        return None

    def merit(row: dict) -> tuple[float, float]:
        if gentle and row["score"] > 0:
            return row["score"], -row["lr"]
        loss = row.get("held_loss", row["loss"])
        return row["score"], -(loss if loss is not None else float("inf"))

    return max(done, key=merit)


def best_rate(
    rows: list[dict], arm: Arm, task: str, rates: tuple[float, ...], gentle: bool = False
) -> float | None:
    """The learning rate of best_point."""
    best = best_point(rows, arm, task, rates, gentle)
    return best and best["lr"]


def _key(point: dict) -> str:
    return json.dumps([point["arm"]["name"], point["label"], point["stage"], point["lr"], point["seed"]])


def log_path(sweep: Sweep, device: str = "cpu") -> Path:
    """Where a sweep's finished points are kept; another definition, base model or kind of device has another file."""
    from labs_lib.measure.records import device_slug

    base = hashlib.sha256((verified(sweep.size) / "model.safetensors").read_bytes()).hexdigest()
    settings = json.dumps([sweep.to_dict(), base], sort_keys=True)
    name = sweep.name if device == "cpu" else f"{device_slug(device)}.{sweep.name}"
    return cache() / "sweeps" / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.jsonl"


def run_sweep(
    sweep: Sweep, jobs: int = 1, limit: int | None = None, device: str = "cpu", seeds: int | None = None
) -> Path | None:
    """Run what is missing of a sweep; returns the record's path once it is complete, None if `limit` came first.

    `device` is where all runs go, and whose record it is. With `seeds`, every arm gets at least so many fresh ones.
    Seed by seed: when it is stopped early, all arms have got equally far.

    Rows of the log that the sweep does not ask for, or no longer, are left out of the record.
    """
    from labs_lib.measure.records import Record, save_record
    from labs_lib.training.resume import run_waves

    if seeds:
        more = sweep.more | {("*", "*"): sweep.seeds}
        sweep = replace(sweep, more={key: max(number, seeds) for key, number in more.items()})

    def lowest_seed(missing: list[dict]) -> list[dict]:
        return [p for p in missing if p["seed"] == min(p["seed"] for p in missing)]

    rows = run_waves(
        log_path(sweep, device),
        lambda done: points(sweep, done),
        lowest_seed,
        lambda todo: _results(todo, sweep.size, jobs, device),
        sweep.name,
        limit,
        key=_key,
    )
    if rows is None:
        return None
    return save_record(Record(f"sweep_{sweep.name}", rows, note=sweep.note), device=device)


def _results(todo: list[dict], size: str, jobs: int, device: str) -> Iterator[dict]:
    """Rows of the points, as they get ready: in this process, or in `jobs` processes side by side."""
    if jobs == 1:
        yield from (run_point(point, size, device) for point in todo)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_one_share, initargs=(jobs,)) as pool:
        for future in as_completed([pool.submit(run_point, point, size, device) for point in todo]):
            yield future.result()


def _one_share(jobs: int) -> None:
    """Give each worker its share of the cores: runs side by side beat threads within one small run."""
    import os

    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=SWEEPS, help="which sweep")
    add_run_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """How a sweep is run, whichever it is: shared with `labs bakeoff`."""
    parser.add_argument("-j", "--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
    parser.add_argument(
        "--limit", type=int, default=None, help="stop after so many runs; the next call goes on"
    )
    parser.add_argument(
        "--device", default="cpu", help="where all runs go; each device has its own record (default: cpu)"
    )
    parser.add_argument("--seeds", type=int, help="at least so many fresh seeds for every arm")


def main(args: argparse.Namespace) -> int:
    check_device(args.device)
    path = run_sweep(SWEEPS[args.name], args.jobs, args.limit, args.device, args.seeds)
    print(f"recorded in {path}" if path else "stopped early; run the same command to go on")
    return 0
