"""`labs test`: everything that must hold before a change lands, cheapest first, stopping at the first failure."""

import argparse
import os
import subprocess
import sys
import time
from importlib.util import find_spec

from labs_lib.errors import LabsError
from labs_lib.paths import root

PYTHON = (sys.executable, "-m")
LABS = (*PYTHON, "labs_lib")
# A notebook on each core: two threads within one small model gain less. Each takes up to 1.3 GB.
SIDE_BY_SIDE = ("--jobs", str(min(4, os.cpu_count() or 1)))
# group, what it shows, command
STEPS = (
    ("lint", "Ruff finds no fault", (*PYTHON, "ruff", "check", "--output-format=concise", ".")),
    ("lint", "Ruff would format nothing", (*PYTHON, "ruff", "format", "--check", ".")),
    ("lint", "Notebooks agree with their sources", (*LABS, "build", "--check")),
    (
        "unit",
        "Unit tests",
        (*PYTHON, "pytest", "-q", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"),
    ),
    ("book", "The book, with no link that leads nowhere", (*LABS, "book")),
    (
        "notebooks",
        "Student notebooks, untouched, in smoke",
        (*LABS, "run", "--student", "--fresh", "--profile", "smoke", *SIDE_BY_SIDE),
    ),
    (
        "notebooks",
        "Solutions, strict, in cpu",
        (*LABS, "run", "--solution", "--strict", "--fresh", "--profile", "cpu", *SIDE_BY_SIDE),
    ),
)
# Nothing may need a network, or depend on there being one. Side by side, each unit test's process has one thread.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
UNIT = {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", choices=list(dict.fromkeys(group for group, _, _ in STEPS)), help="one part of it"
    )


def main(args: argparse.Namespace) -> int:
    for tool in ("ruff", "pytest", "papermill"):
        if find_spec(tool) is None:
            raise LabsError(
                f"{tool} is not installed: use `make test`, or `pip install -e '.[jupyter,serve,dev]'`."
            )
    environ = {**ENVIRONMENT, **os.environ}
    times = []
    for group, title, command in STEPS:
        if args.only not in (None, group):
            continue
        print(f"\n== {title}", flush=True)
        start = time.monotonic()
        own = environ | UNIT if group == "unit" else environ
        status = subprocess.run(command, cwd=root(), env=own, check=False).returncode
        times.append(f"{time.monotonic() - start:6.0f} s  {title}")
        if status:
            rerun = " ".join(("labs", *command[3:]) if command[:3] == LABS else command[2:])
            print(f"\nFAILED: {title} (exit status {status}). Again: .venv/bin/{rerun}", file=sys.stderr)
            return 1
    print("\n" + "\n".join(times))
    return 0
