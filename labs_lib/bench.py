"""`labs bench TARGET`: names, one-line helps, and where each benchmark lives. It knows nothing else.

A target offers what a room offers to `labs`: `add_arguments(parser)` and `main(args) -> int`. All of them are imported
to list their options, so a target's module imports torch and the like inside its functions.
"""

import argparse
from importlib import import_module

# target: (module, what it measures)
TARGETS = {
    "serving": ("labs_lib.serving.bench", "the serving engine against other ways to serve adapters"),
    "kernels": ("labs_lib.serving.kernels", "kernels of the serving engine against the card's limits"),
    "training": ("labs_lib.training.bench", "a training step of every method: seconds and bytes"),
    "inference": ("labs_lib.training.bench_inference", "a decode step with every method's adapter"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    targets = parser.add_subparsers(dest="target", metavar="TARGET", required=True)
    for name, (module, summary) in TARGETS.items():
        room = import_module(module)
        target = targets.add_parser(name, help=summary, description=f"Measure {summary}.")
        room.add_arguments(target)
        target.set_defaults(measure=room.main)


def main(args: argparse.Namespace) -> int:
    return args.measure(args)
