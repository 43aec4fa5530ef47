"""`labs gpu`: every record that wants a GPU, made in one go within a budget of minutes, and taken up again later.

The steps are ordinary `labs` commands, in the order of what they tell for their time. Each is a process of its own with
a time limit, so that one that fails or hangs costs its own share and no more. A step whose record exists for this card
is not repeated unless asked for.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from labs_lib.errors import LabsError
from labs_lib.paths import root

LABS = (sys.executable, "-m", "labs_lib")
TWIN = "llama-2-7b"


@dataclass(frozen=True)
class Step:
    """One command of the plan.

    Attributes:
        name: for `--only`.
        tells: what is known afterwards.
        command: words of a process; `{minutes}` stands for what the step may take, `{half}` for half of it, `{jobs}`
            for notebooks at a time.
        share: of the whole budget.
        record, file: the record, or the path in the repository, by which the step is known to be done; "" for none.
    """

    name: str
    tells: str
    command: tuple[str, ...]
    share: float
    record: str = ""
    file: str = ""

    def was_done(self, device: str) -> bool:
        from labs_lib.measure.records import load_records

        recorded = self.record and load_records(self.record, device)
        return bool(recorded or (self.file and (root() / self.file).is_file()))


def _bench(target: str, *more: str, minutes: str = "{minutes}") -> tuple[str, ...]:
    return (*LABS, "bench", target, "--device", "cuda", "--minutes", minutes, *more)


PLAN = (
    Step(
        "tests",
        "kernels, engine and every method give the right numbers on this card",
        (
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "tests/serving",
            "tests/measure",
            "tests/training",
        ),
        0.06,
    ),
    Step(
        "kernels",
        "SGMV with its best pieces for this card, against the card's limits",
        _bench("kernels", "--tune", minutes="{half}"),  # once for the pieces, once for the rest
        0.13,
        "bench_kernels",
    ),
    Step(
        "training",
        "seconds and peak memory of a 7B training step, by method (claims 5, 20, 23, 36-39)",
        _bench("training", "--model", TWIN),
        0.2,
        "bench_training",
    ),
    Step(
        "serving",
        "1 to 1,000 adapters on one 7B model (claims 32, 34)",
        _bench("serving", "--model", TWIN),
        0.22,
        "bench_serving",
    ),
    Step(
        "inference",
        "milliseconds a token: merged, not merged, DoRA's gain kept or not",
        _bench("inference", "--model", TWIN),
        0.1,
        "bench_inference",
    ),
    # Several at a time, so only how they end is recorded; `LABS_RECORD=1 labs run 04 --profile gpu` records verdicts.
    Step(
        "labs",
        "every lab runs in the gpu profile",
        (*LABS, "run", "--solution", "--profile", "gpu", "--jobs", "{jobs}"),
        0.13,
        "lab_runs",
    ),
    Step(
        "pretrain",
        "a base of width 512",
        (*LABS, "pretrain", "large"),
        0.08,
        file="data/base/large/model.safetensors",
    ),
    Step(
        "competence",
        "what that base can do",
        (*LABS, "competence", "large", "--write"),
        0.01,
        file="data/base/large/competence.json",
    ),
    Step(
        "family",
        "soft prompts on a base of width 512 (claim 25)",
        (*LABS, "sweep", "prompt_large", "--device", "cuda"),
        0.07,
        "sweep_prompt_large",
    ),
)


def run_plan(
    plan: tuple[Step, ...], minutes: float, device: str, again: bool = False
) -> list[tuple[Step, str]]:
    """Run the steps in order; what one leaves of its share, the later ones get.

    Returns each step with how it ended: "done", "done before", "failed", "out of time" or "not reached".
    """
    end = time.monotonic() + 60 * minutes
    outcome = []
    for i, step in enumerate(plan):
        if not again and step.was_done(device):
            outcome.append((step, "done before"))
            continue
        left = end - time.monotonic()
        seconds = left * step.share / sum(each.share for each in plan[i:])
        if seconds < 5:
            outcome.append((step, "not reached"))
            continue
        print(f"\n== {step.name}: {step.tells} (up to {seconds / 60:.1f} min)", flush=True)
        outcome.append((step, _run(step, seconds)))
    return outcome


def _run(step: Step, seconds: float) -> str:
    """One process, which may take the seconds and half as much again before it is stopped, its children with it."""
    words = {
        "minutes": f"{seconds / 60:.2f}",
        "half": f"{seconds / 120:.2f}",
        "jobs": str(max(1, min(8, (os.cpu_count() or 1) // 2))),
    }
    process = subprocess.Popen(
        [word.format(**words) for word in step.command],
        cwd=root(),
        env={**os.environ, "LABS_RECORD": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    started = time.monotonic()
    try:
        status = process.wait(1.5 * seconds)
        ended = "done" if status == 0 else "failed"
    except subprocess.TimeoutExpired:
        ended = "out of time"
    finally:
        if process.poll() is None:  # also on Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(f"== {step.name}: {ended} after {time.monotonic() - started:.0f} s", flush=True)
    return ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=float, default=15.0, help="for the whole plan (default: %(default)g)"
    )
    parser.add_argument("--only", default="", help="steps, with commas")
    parser.add_argument("--again", action="store_true", help="also what is recorded for this card")
    parser.add_argument("--list", action="store_true", help="say the plan and stop")


def main(args: argparse.Namespace) -> int:
    names = [step.name for step in PLAN]
    wanted = [name for name in args.only.split(",") if name] or names
    if unknown := set(wanted) - set(names):
        raise LabsError(f"There is no step {', '.join(sorted(unknown))}: choose from {', '.join(names)}.")
    plan = tuple(step for step in PLAN if step.name in wanted)
    if args.list:
        whole = sum(step.share for step in plan)
        for step in plan:
            print(f"{step.name:10s} {args.minutes * step.share / whole:4.1f} min  {step.tells}")
        return 0
    import torch

    from labs_lib.measure.records import device_slug

    if not torch.cuda.is_available():
        raise LabsError(
            "torch sees no CUDA device here, and these records are about one: run this where there is. "
            "`labs gpu --list` says what it would do."
        )
    device = device_slug("cuda")
    outcome = run_plan(plan, args.minutes, device, args.again)
    print(f"\nOn {torch.cuda.get_device_name()}:")
    for step, ended in outcome:
        print(f"  {step.name:10s} {ended:16s} {step.tells}")
    print(f"Records are in data/measured/{device}.*.json. The same command goes on with what is missing.")
    return 0 if all(ended in ("done", "done before") for _, ended in outcome) else 1
