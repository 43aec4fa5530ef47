"""Runs a script, or a module with -m, on the pretended device: `python -m tests.pretend_cuda [--small] ...`."""

import argparse
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

from . import pretend


def small_profiles(size: str) -> None:
    """The CUDA profiles' device and dtype with the steps and rows of `smoke`, and another base if `size` names one."""
    from labs_lib.lab.profiles import PROFILES

    smoke = PROFILES["smoke"]
    sizes = {name: getattr(smoke, name) for name in ("steps", "rows", "seeds", "grid")}
    for name, profile in PROFILES.items():
        if profile.cuda:
            PROFILES[name] = replace(profile, **sizes, size=size or profile.size)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.pretend_cuda", description=__doc__)
    parser.add_argument("--small", action="store_true", help="steps and rows as in the profile smoke")
    parser.add_argument("--size", default="", help="with --small: this base instead of the profile's")
    parser.add_argument(
        "--noise", action="store_true", help="sums are off by a last digit, each time by another"
    )
    parser.add_argument("-m", action="store_true", dest="module", help="the target is a module's name")
    parser.add_argument("target", help="a script's path")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    args = parser.parse_args()
    if args.small:
        small_profiles(args.size)
    sys.argv = [args.target, *args.arguments]
    with pretend(os.environ.get("PROFILE", "gpu"), args.noise):
        if args.module:
            runpy.run_module(args.target, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(args.target).parent))
            runpy.run_path(args.target, run_name="__main__")


if __name__ == "__main__":
    main()
