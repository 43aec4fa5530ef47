"""`labs bench training`: what a training step of every method takes, in seconds and bytes, on the device at hand.

One base stays in memory; each arm gets modules of its own over its weights (`bench_arms.share`). It is measured alone
for memory, then for time in turns with LoRA r16, round by round, so that a clock that drifts slows both sides. What
does not fit, or needs a package that is not there, is a row that says so. It resumes where it stopped.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import re
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from labs_lib import quiet
from labs_lib.errors import LabsError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from labs_lib.training.bench_arms import BenchArm, Trainee

LEAST, MOST = 5, 15  # rounds; between them as many as `Plan.seconds` allow
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Plan:
    """What is measured: a step of `rows` x `length` tokens, checkpointing or not, in `seconds` of turns per arm."""

    model: str = "small"
    device: str = "cpu"
    dtype: str = "float32"
    rows: int = 1
    length: int = 512
    seconds: float = 4.0
    least: int = LEAST
    checkpointing: tuple[bool, ...] = (False,)
    arms: tuple[str, ...] = ()
    seed: int = 0

    def points(self, arms: "tuple[BenchArm, ...]") -> list[dict]:
        """One per arm and way to hold activations, those without checkpointing first."""
        return [
            arm.settings()
            | {"checkpointing": ways, "model": self.model, "rows": self.rows, "length": self.length}
            for ways in self.checkpointing
            for arm in arms
        ]


class Bases:
    """The base model, in full or in 4 bits, loaded when first asked for."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.held = plan, {}

    def get(self, packed: bool = False) -> "nn.Module":
        if packed not in self.held:
            self.held[packed] = load(
                self.plan.model, self.plan.device, self.plan.dtype, self.plan.seed, packed
            )
        return self.held[packed]

    def only(self, packed: bool) -> "nn.Module":
        """This one, after the other was dropped: for a count of what is on the device."""
        self.held.pop(not packed, None)
        clean(self.plan.device)
        return self.get(packed)


def load(name: str, device: str, dtype: str, seed: int = 0, packed: bool = False) -> "nn.Module":
    """The base: a twin of random numbers made on the device itself, or a real model by load_base; packed, in 4 bits."""
    import torch

    from labs_lib.models.base import SIZES, load_base
    from labs_lib.models.twins import TWINS, pack_linears, random_like, random_packed

    kind = getattr(torch, dtype)
    torch.manual_seed(seed)
    if name in TWINS or name.startswith("random:"):
        model = random_packed(name, device, kind) if packed else random_like(name, device, kind)
        return model.requires_grad_(False)
    quiet.hub(wanted=not (name in SIZES or Path(name).is_dir()))
    model = load_base(name, dtype=kind, device=device)[0]
    return (pack_linears(model, kind) if packed else model).requires_grad_(False)


def clean(device: str) -> None:
    """Let go of what nobody holds any more, on the device as well."""
    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# -- one arm ----------------------------------------------------------------------------------------------------------


def measure(arm: "BenchArm", plan: Plan, bases: Bases, checkpointing: bool = False) -> dict:
    """Memory, parameters, FLOPs and time of one arm; or what kept it from being measured. Leaves nothing behind."""
    held = {}
    try:
        return _measure(arm, plan, bases, checkpointing, held)
    except ImportError as error:
        return {"missing": error.name or str(error)}
    except (LabsError, ValueError) as error:  # the method's own refusal, in its own words
        return {"refused": str(error)}
    except (RuntimeError, MemoryError) as error:
        return (no_room(error, plan.device) or {"failed": in_words(error)}) | held
    except Exception as error:  # one arm's bug is that arm's row: the others are still worth a card's time
        return {"failed": in_words(error)}


def _measure(arm: "BenchArm", plan: Plan, bases: Bases, checkpointing: bool, held: dict) -> dict:
    import torch

    from labs_lib.measure.count import count_flops, count_parameters, optimizer_state_bytes, tensor_bytes
    from labs_lib.measure.memory import peak_memory
    from labs_lib.training.bench_arms import random_bases, trainee

    cuda = plan.device.startswith("cuda")
    base = bases.only(arm.packed)
    batch = tokens(plan, base)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        held["base_bytes"] = torch.cuda.memory_allocated()
    begun = time.perf_counter()
    with random_bases(), ExitStack() as stack:
        one = trainee(arm, base, batch, checkpointing)
        stack.callback(one.close)
        held["ready_s"] = round(time.perf_counter() - begun, 3)
        flops = count_flops(one.step)  # the first step also makes the optimiser's states
        if cuda:
            clean(plan.device)
        peak = peak_memory(one.step, one.model, one.optimizers, batch, device=plan.device)
        row = {
            "params": count_parameters(one.model).trainable,
            "weight_bytes": tensor_bytes(one.model),
            "state_bytes": sum(map(optimizer_state_bytes, one.optimizers)),
            "peak_bytes": peak.peak,
            "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
            "exact": peak.exact,
            "train_flops": flops,
        }
        row |= held | timed(arm, one, plan, bases, checkpointing)
        row["finite"] = math.isfinite(one.loss())
    return row


def tokens(plan: Plan, base: "nn.Module") -> "dict[str, torch.Tensor]":
    """A batch of random tokens on the base's device; without padding, so that no mask is needed."""
    import torch

    generator = torch.Generator().manual_seed(plan.seed)
    vocabulary = base.get_input_embeddings().num_embeddings
    ids = torch.randint(3, vocabulary, (plan.rows, plan.length), generator=generator).to(plan.device)
    return {"input_ids": ids, "labels": ids}


def timed(arm: "BenchArm", one: "Trainee", plan: Plan, bases: Bases, checkpointing: bool = False) -> dict:
    """Seconds of a step, and its ratio to LoRA's in the same rounds; alone where the two have no room together."""
    import numpy as np

    from labs_lib.measure.stats import bootstrap_ci
    from labs_lib.measure.timing import time_ratios
    from labs_lib.training.bench_arms import reference, trainee

    def turns(against: "BenchArm | None"):
        once, steps = seconds_of(one.step, plan.device), {"arm": one.step}
        if against:
            steps["reference"] = trainee(against, bases.get(), one.batch, checkpointing).step
            steps["reference"]()
            once += seconds_of(steps["reference"], plan.device)
        settings = {"rounds": _rounds(plan, once), "warmup": 1, "min_seconds": 0.0}
        return time_ratios(steps, list(steps)[-1], **settings)["arm"]

    row = {"against": reference(arm).name, "paired": True}
    try:
        found = turns(reference(arm))
    except (RuntimeError, MemoryError) as error:
        if not no_room(error, plan.device):
            raise
        row["paired"] = False
    if row["paired"]:
        row |= {"ratio": found.ratio.value, "ratio_lo": found.ratio.lo, "ratio_hi": found.ratio.hi}
        row["reference_s"] = found.baseline_seconds
    else:
        clean(plan.device)
        found = turns(None)
    middle = bootstrap_ci(found.samples, np.median)
    row |= {"step_s": middle.value, "step_lo": middle.lo, "step_hi": middle.hi, "rounds": len(found.samples)}
    return row | {"tokens_per_s": plan.rows * plan.length / middle.value}


def _rounds(plan: Plan, seconds: float) -> int:
    """As many turns as `plan.seconds` hold."""
    return max(plan.least, min(MOST, int(plan.seconds / max(seconds, 1e-9))))


def seconds_of(step, device: str) -> float:
    import torch

    started = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def no_room(error: BaseException, device: str) -> dict:
    """What a failed allocation tells: bytes held at most until then, and asked for on top. Empty for another error."""
    import torch

    text = str(error)
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(
        each in text for each in words
    ):
        return {}
    found = re.search(r"Tried to allocate ([\d.]+) (KiB|MiB|GiB)", text)
    asked = int(float(found[1]) * UNITS[found[2]]) if found else 0
    held = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0
    return {"out_of_memory": True, "asked_bytes": asked, "needed_bytes": held + asked}


def in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# -- the whole --------------------------------------------------------------------------------------------------------


def chosen(plan: Plan, config) -> "tuple[BenchArm, ...]":
    """The arms of a plan, in the table's order."""
    from labs_lib.training.bench_arms import arms_for

    arms = arms_for(config, half=plan.dtype in ("bfloat16", "float16"))
    known = {arm.name: arm for arm in arms}
    if unknown := [name for name in plan.arms if name not in known]:
        raise LabsError(f"There is no arm {unknown[0]!r}; there are: {'; '.join(known)}.")
    return tuple(known[name] for name in plan.arms) or arms


def config_of(name: str):
    """A model's config, without its weights."""
    from labs_lib.models.base import SIZES, base_config
    from labs_lib.models.twins import TWINS, twin_config

    if name in TWINS or name.startswith("random:"):
        return twin_config(name)
    if name in SIZES:
        return base_config(name)
    from transformers import AutoConfig

    if "/" not in name and not Path(name).is_dir():
        known = ", ".join((*SIZES, *TWINS))
        raise LabsError(f"No base {name!r}: one of {known}, random:HIDDENxLAYERS, a folder, or a hub id.")
    quiet.hub(wanted=not Path(name).is_dir())
    return AutoConfig.from_pretrained(name)


def run(plan: Plan, log: Path, minutes: float = math.inf) -> tuple[list[dict], bool]:
    """The rows of all points, and whether that is all of them; the log keeps what is done."""
    from labs_lib.measure.timing import no_collection
    from labs_lib.training.resume import find, run_points

    arms = chosen(plan, config_of(plan.model))
    points, known, bases = plan.points(arms), {arm.name: arm for arm in arms}, Bases(plan)
    until = time.monotonic() + 60 * minutes
    costs: dict[int, dict] = {}

    def one(point: dict) -> dict:
        arm = known[point["arm"]]
        left = (until - time.monotonic()) / (len(points) - points.index(point))
        shorter = replace(plan, seconds=min(plan.seconds, 0.5 * left))
        with no_collection():
            row = point | measure(arm, shorter, bases, point["checkpointing"])
        clean(plan.device)
        if arm.arm.method == "galore" and "step_s" in row:
            row |= refreshing(costs, arm, bases, until)
        return row | left_behind(plan, bases)

    rows = run_points(log, lambda rows: points, one, "training", until=until)
    if rows is not None:
        return rows, True
    kept = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return [row for point in points if (row := find(kept, point))], False


def refreshing(costs: dict[int, dict], arm: "BenchArm", bases: Bases, until: float) -> dict:
    """GaLore's decompositions, measured once for all its arms; an eighth of the time that is left goes to them."""
    from labs_lib.training.bench_arms import refresh_costs

    rank = arm.arm.rank
    if rank not in costs:
        costs[rank] = refresh_costs(bases.get(), rank, min(60.0, (until - time.monotonic()) / 8))
    return costs[rank]


def left_behind(plan: Plan, bases: Bases) -> dict:
    """Bytes on a GPU after an arm beyond the bases' own: near nothing, or the next arm is counted too high."""
    if not plan.device.startswith("cuda"):
        return {}
    import torch

    from labs_lib.measure.count import tensor_bytes

    return {"left_bytes": torch.cuda.memory_allocated() - tensor_bytes(list(bases.held.values()))}


def table(rows: list[dict]) -> str:
    """Rows as lines to read."""
    lines = [f"{'':36} {'ms':>9} {'x LoRA':>22} {'peak GB':>9} {'states GB':>10} {'parameters':>14}"]
    for row in rows:
        name = row["arm"] + (", checkpointing" if row["checkpointing"] else "")
        if "step_s" not in row:
            lines.append(f"{name:36} {obstacle(row)}")
            continue
        ratio = (
            f"{row['ratio']:.2f} [{row['ratio_lo']:.2f}, {row['ratio_hi']:.2f}]" if row["paired"] else "alone"
        )
        sizes = f"{row['peak_bytes'] / 1e9:9.3f} {row['state_bytes'] / 1e9:10.3f} {row['params']:14,}"
        lines.append(f"{name:36} {1e3 * row['step_s']:9.2f} {ratio:>22} {sizes}")
    return "\n".join(lines)


def obstacle(row: dict) -> str:
    """Why a row has no time."""
    if row.get("out_of_memory"):
        return f"out of memory: at least {row['needed_bytes'] / 1e9:.1f} GB needed"
    if "missing" in row:
        return f"needs the package {row['missing']}"
    return row.get("refused") or row.get("failed", "not measured")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="small, llama-2-7b, random:HIDDENxLAYERS, ... (default: 7B on a GPU, else small)"
    )
    add_device(parser)
    parser.add_argument("--rows", type=int, default=1, help="sequences in a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--arms", default="", help="names, with semicolons (default: all)")
    parser.add_argument("--checkpointing", choices=["no", "yes", "both"], default="no", help="of activations")
    parser.add_argument(
        "--seconds",
        type=float,
        default=Plan.seconds,
        help="of turns per arm, 5 to 15 of them (default: %(default)s)",
    )
    parser.add_argument(
        "--count",
        action="store_true",
        help="measure nothing: count the bytes of a step without weights, for four model sizes, and record them",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="for all: fewer turns, the last arm begun before that; the same call resumes",
    )
    parser.add_argument(
        "--quick", action="store_true", help="three turns per arm: a look, nothing to publish"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU that has it"
    )


def device_and_dtype(args: argparse.Namespace) -> tuple[str, str]:
    """Where and in which type: what was asked for, else what fits."""
    import torch

    there = torch.cuda.is_available()
    device = args.device or ("cuda" if there else "cpu")
    if device.startswith("cuda") and not there:
        raise LabsError("There is no GPU that torch can use: take --device cpu, or a CUDA build of torch.")
    half = "bfloat16" if there and torch.cuda.get_device_capability()[0] >= 8 else "float16"
    return device, args.dtype or (half if device.startswith("cuda") else "float32")


def main(args: argparse.Namespace) -> int:
    if args.count:
        from labs_lib.training.fits import record_counts

        print(f"recorded in {record_counts()}")
        return 0
    device, dtype = device_and_dtype(args)
    if min(args.rows, args.length) < 1 or args.minutes <= 0:
        raise LabsError("Rows, length and minutes are above 0.")
    quiet.silence()
    plan = Plan(
        model=args.model or ("llama-2-7b" if device.startswith("cuda") else "small"),
        device=device,
        dtype=dtype,
        rows=args.rows,
        length=args.length,
        seconds=0.0 if args.quick else args.seconds,
        least=3 if args.quick else LEAST,
        checkpointing={"no": (False,), "yes": (True,), "both": (False, True)}[args.checkpointing],
        arms=tuple(name.strip() for name in args.arms.split(";") if name.strip()),
    )
    log = log_of("training", plan)
    before = load_average()
    rows, complete = run(plan, log, args.minutes)
    print(table(rows))
    if not rows:
        raise LabsError("Nothing was measured in that time: give it more --minutes.")
    note = (
        "peak of one step alone on the device; time in turns with LoRA; a twin's weights are random numbers"
    )
    note += ("" if complete else f"; stopped after {len(rows)} rows") + (", quick" if args.quick else "")
    save("bench_training", rows, plan, note, before)
    if complete:
        log.unlink()
    return 1 if any("failed" in row for row in rows) else 0


def log_of(what: str, plan) -> Path:
    """Where unfinished work of this plan is kept: other settings, device or versions are other work."""
    from labs_lib.measure.records import device_slug, versions
    from labs_lib.paths import cache

    slug = device_slug(plan.device)
    settings = json.dumps([asdict(plan), slug, versions()], sort_keys=True)
    return cache() / "bench" / f"{what}-{slug}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.jsonl"


def save(name: str, rows: list[dict], plan, note: str, before: float) -> None:
    """Record rows with what the numbers depend on besides the device."""
    import torch

    from labs_lib.measure.records import Record, save_record

    load = {"before": before, "after": load_average()}
    precision = torch.get_float32_matmul_precision()
    settings = {"settings": asdict(plan), "float32_products": precision, "threads": torch.get_num_threads()}
    if plan.device.startswith("cuda"):
        card = torch.cuda.get_device_properties(plan.device)
        settings |= {"gpu": card.name, "gpu_bytes": card.total_memory, "cuda": torch.version.cuda}
    path = save_record(Record(name, rows, note, settings | {"load_average": load}), device=plan.device)
    print(f"recorded in {path}")


def load_average() -> float | None:
    """Processes that wanted a core in the last minute, this one included; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
