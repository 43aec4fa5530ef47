"""The `labs` command: names, one-line helps, and where each command lives. It knows nothing else.

A room offers a command by exporting `add_arguments(parser)` and `main(args) -> int`. The room is imported only when
its command is called, so that `labs --help` needs no torch.
"""

import argparse
import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from labs_lib.errors import LabsError

# command: (room, what it does)
COMMANDS = {
    "lab": ("labs_lib.launch", "open the course in JupyterLab"),
    "doctor": ("labs_lib.doctor", "say what this machine can do and which profile fits"),
    "run": ("labs_lib.build.run", "run notebooks from the first cell to the last"),
    "course": ("labs_lib.build.report", "run all labs in order, write a report to browse"),
    "claims": ("labs_lib.measure.claims", "the chapter's claims and what was measured about them"),
    "sweep": ("labs_lib.training.sweep", "run a recorded sweep; resumes where it stopped"),
    "fleet": (
        "labs_lib.training.fleet_run",
        "train every tenant's adapter, many in a batch; judge and publish them",
    ),
    "bakeoff": ("labs_lib.training.bakeoff", "all methods by one protocol; resumes where it stopped"),
    "compose": (
        "labs_lib.training.composition",
        "put two trained adapters together in every way; resumes where it stopped",
    ),
    "spectra": (
        "labs_lib.training.spectra",
        "are gradients low-rank, and how long does a basis stay right; resumes where it stopped",
    ),
    "mix": (
        "labs_lib.training.mixtures",
        "two adapters, requests that need both: mixtures, merges; resumes where it stopped",
    ),
    "pretrain": (
        "labs_lib.models.pretrain",
        "pretrain a member of the base family; resumes where it stopped",
    ),
    "competence": ("labs_lib.models.competence", "measure what a shipped base model knows and can do"),
    "serve": ("labs_lib.serving.serve", "serve one base and many tenants' adapters over HTTP"),
    "tenants": ("labs_lib.serving.tenants", "add tenants, publish and roll back their adapter versions"),
    "bench": ("labs_lib.bench", "measure serving, training or inference, and record it"),
    "gpu": ("labs_lib.gpu", "make every record that wants a GPU, within a budget of minutes"),
    "data": ("labs_lib.world.build", "rebuild the shipped data, or check it against its checksums"),
    "build": ("labs_lib.build.notebooks", "write the notebooks from solutions/*.py; --check only compares"),
    "book": ("labs_lib.build.book", "write the course as a site to read, from the stored outputs"),
    "grade": ("labs_lib.build.grade", "run learners' notebooks and write a CSV of their checks"),
    "test": ("labs_lib.suite", "lint, unit tests, every notebook"),
    "lock": ("labs_lib.lock", "update requirements.lock from the ranges in pyproject.toml"),
    "clean": ("labs_lib.clean", "remove the caches; notebooks, data and the environment stay"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit status: the room's own, 2 for a user's error (told in one sentence), 130 for Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(words)
    except LabsError as error:
        print(f"labs: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `labs ... | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="labs",
        description="PEFT Labs: fine-tuning methods from scratch, on trial, on two CPU cores.",
        epilog="`labs COMMAND --help` tells more. `make lab`, `make test` and `make course` also make the environment.",
    )
    parser.add_argument("--version", action="version", version=f"peft-labs {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, (room, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            module = _room(name, room)
            module.add_arguments(command)
            command.set_defaults(handler=module.main)
    args = parser.parse_args(words)
    return args.handler(args) or 0


def _room(command: str, room: str):
    if find_spec(room) is None:
        raise LabsError(f"`labs {command}` is not part of this version of the course.")
    return import_module(room)


def _version() -> str:
    try:
        return version("peft-labs")
    except PackageNotFoundError:
        from labs_lib import __version__

        return __version__
