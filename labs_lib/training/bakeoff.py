"""`labs bakeoff`: all methods of the course by one protocol, and what each costs besides quality.

One protocol for everybody: the same three learning rates for all tasks of an arm, half a decade apart, around the one
that the method's own lab (or paper) found. Where a task's best is at the edge of its grid, the grid grows, by two rates
at most; where even the best misses more than one in a hundred, the rates halfway to its neighbours are tried as well.
Of equally good rates the lowest wins, which forgets least; then come fresh seeds. `sweep` runs it seed by seed: stopped
early, every arm has equally many.
"""

import argparse
from pathlib import Path

from labs_lib.errors import LabsError
from labs_lib.models.room import check_device
from labs_lib.training.sweep import add_run_arguments, run_sweep
from labs_lib.training.sweeps import TENANT, Arm, Sweep, Task

#: Knowledge at three sizes (0.2, 0.8 and 3.1 kbit). Retention is what is left of old facts after each of these tasks.
TASKS = (
    Task("style", "style", steps=60, batch=8, tenant=TENANT),
    Task("classification", "classification", steps=40, batch=16),
    Task("knowledge, 32 facts", "knowledge", steps=40, batch=32, facts=32),
    Task("knowledge, 128 facts", "knowledge", steps=80, batch=32, facts=128),
    Task("knowledge, 512 facts", "knowledge", steps=150, batch=64, facts=512),
)


_GRID = tuple(float(f"{digit}e{power}") for power in range(-5, 2) for digit in (1, 3))


def _arm(name: str, middle: float, method: str = "lora", **more) -> Arm:
    """An arm with three rates of the grid ... 0.001, 0.003, 0.01, 0.03 ...: `middle` and its neighbours."""
    at = _GRID.index(middle)
    return Arm(name, method, rates=_GRID[at - 1 : at + 2], **more)


def _zoo(name: str, middle: float, method: str, rank: int = 8, alpha: float = 16, **options) -> Arm:
    return _arm(name, middle, "zoo", rank=rank, alpha=alpha, options={"method": method} | options)


#: About as many numbers as LoRA r8 on all linear layers, or as LoRA r2 elsewhere; VeRA, IA3 and the prompt have fewer.
ARMS = (
    _arm("full fine-tuning", 1e-3, "full"),
    _arm("LoRA r8", 3e-3),
    _arm("LoRA r2", 1e-2, rank=2, alpha=4),
    _arm("QLoRA r8", 3e-3, "qlora", quantise="nf4", options={"unpack": True}),
    _arm("DoRA r8", 3e-3, "dora"),
    _arm("LoRA+ r8", 1e-3, "lora_plus", options={"ratio": 8}),
    _arm("rsLoRA r8", 3e-3, "rslora"),
    _arm("AdaLoRA r12 to r8", 3e-2, "adalora", alpha=24, options={"init": 12}),
    _arm("prompt 20", 3e-2, "prompt", options={"tokens": 20}),
    _arm("prefix 18", 1e-1, "prefix", options={"tokens": 18}),
    _arm("Pfeiffer 18", 1e-2, "bottleneck", options={"placement": "pfeiffer", "bottleneck": 18}),
    _arm("LLaMA-Adapter 37", 1e-1, "llama_adapter", options={"prompts": 37, "layers": 4}),
    _arm("IA3", 3e-1, "ia3"),
    _arm("GaLore r8", 3e-3, "galore", options={"update_proj_gap": 50, "scale": 1.0}),
    _zoo("VeRA r256", 1e-1, "vera", rank=256),
    _zoo("Tied-LoRA r29", 1e-2, "tied_lora", rank=29),
    _zoo("LoHa r4", 1e-2, "loha", rank=4, alpha=8),
    _zoo("LoKr r16", 1e-2, "lokr", rank=16, factor=2),
    _zoo("OFT 32", 1e-2, "oft", block=32),
    _zoo("BOFT 8, 2 rounds", 1e-2, "boft", block=8, factors=2),
    _zoo("MiSS r15", 3e-3, "miss", rank=15),
    _arm("mix-and-match", 3e-2, "mix_and_match", options={"tokens": 9, "bottleneck": 9, "scale": 4.0}),
)

BAKEOFF = Sweep(
    name="bakeoff",
    note="All methods by five tasks: three rates, up to two more at an edge and two between, then five fresh seeds.",
    arms=ARMS,
    tasks=TASKS,
    rates=(),
    seeds=5,
    more={("*", "style"): 20, ("*", "classification"): 20},  # where five could not tell
    widen=2,
    refine=0.99,
    gentle=True,
)

#: The rows of the chapter's tables, at the sizes that it gives, or that the papers do.
ON_7B = (
    Arm("full fine-tuning", "full"),
    Arm("LoRA r16", rank=16, alpha=32),
    Arm("DoRA r16", "dora", rank=16, alpha=32),
    Arm("LoRA+ r16", "lora_plus", rank=16, alpha=32, options={"ratio": 8}),
    Arm("rsLoRA r16", "rslora", rank=16, alpha=32),
    Arm("prefix 30, projected", "prefix", options={"tokens": 30, "hidden": 1024}),
    Arm("prefix 30", "prefix", options={"tokens": 30}),
    Arm("prompt 10", "prompt", options={"tokens": 10}),
    Arm("prompt 200", "prompt", options={"tokens": 200}),
    Arm("adapters, 1/16 of the width", "bottleneck", options={"placement": "pfeiffer", "bottleneck": 256}),
    Arm("IA3", "ia3"),
    Arm("GaLore r128", "galore", rank=128),
)


def base_scores(size: str = "small") -> dict[str, float]:
    """What the base model scores on each task before any training."""
    from labs_lib.models.base import load_base
    from labs_lib.training.sweep import STYLE_ROWS_SCORED, evaluate
    from labs_lib.world.tasks import load_task

    model, tokenizer = load_base(size)
    scores = {}
    for task in TASKS:
        rows = load_task(task.task, tenant=task.tenant, facts=task.facts or 1024)["test"]
        rows = rows[:STYLE_ROWS_SCORED] if task.task == "style" else rows[:]
        scores[task.label] = evaluate(model, tokenizer, task.task, task.tenant, rows)["score"]
    return scores


def record_costs() -> Path:
    """Count what every arm costs on `small`, and what the chapter's rows cost on the twin of a 7B model; record it."""
    from tqdm.std import tqdm

    from labs_lib.measure.records import Record, save_record
    from labs_lib.models.twins import random_like
    from labs_lib.training.costs import after_merging, costs, servable, twin_costs

    twin = random_like("llama-2-7b")
    bar = tqdm(total=len(ARMS) + len(ON_7B), unit="arm", ncols=90, desc="costs")
    rows = [{"arm": None, "model": "small", "scores": base_scores()}]
    for arm in ARMS:
        bar.update()
        found = costs(arm) | after_merging(arm) | {"engines": servable(arm)}
        rows.append({"arm": arm.to_dict(), "model": "small", "rows": 16, "length": 64} | found)
    for arm in ON_7B:
        bar.update()
        rows.append(
            {"arm": arm.to_dict(), "model": "llama-2-7b", "rows": 1, "length": 512} | twin_costs(arm, twin)
        )
    bar.close()
    note = "Counted, not timed: one training step and one request; 7B on the meta device, bfloat16 weights."
    return save_record(Record("bakeoff_costs", rows, note))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument(
        "--costs", action="store_true", help="count what each method costs instead of training"
    )


def main(args: argparse.Namespace) -> int:
    check_device(args.device)
    if args.costs:
        if args.device != "cpu":
            raise LabsError(
                "--costs are counted, not timed, and the same on every device: leave --device out."
            )
        path = record_costs()
    else:
        path = run_sweep(BAKEOFF, args.jobs, args.limit, args.device, args.seeds)
    print(f"recorded in {path}" if path else "stopped early; run the same command to go on")
    return 0
