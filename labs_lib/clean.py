"""`labs clean`: removes the caches. `make clean` removes the environment too."""

import argparse

from labs_lib.bootstrap import CACHES, clean
from labs_lib.paths import root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def main(args: argparse.Namespace) -> int:
    clean(root(), environment=False)
    print(f"Removed {', '.join(CACHES)} and __pycache__ from {root()}.")
    return 0
