"""`labs lab`: JupyterLab, open on the first notebook, on a port that is free."""

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from labs_lib.errors import LabsError
from labs_lib.paths import root

FIRST = "notebooks/00_start_here.ipynb"
PORT, TRIES = 8888, 50  # Jupyter itself says when a port is taken, and takes another
# Offline by default: no question about news, no look for updates.
SETTINGS = (
    '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}\n'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "notebook", nargs="?", default=FIRST, help=f"which notebook to open (default: {FIRST})"
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"first port to try (default: {PORT})")
    parser.add_argument("--no-browser", action="store_true", help="print the address, open no browser")
    parser.add_argument("--ip", default="localhost", help="address to listen on (default: localhost)")


def main(args: argparse.Namespace) -> int:
    if find_spec("jupyterlab") is None:
        raise LabsError("JupyterLab is not installed: use `make lab`, or `pip install -e '.[jupyter]'`.")
    home = root()
    if not (home / args.notebook).is_file():
        raise LabsError(f"There is no notebook {args.notebook} in {home}: `labs build` writes the notebooks.")
    quiet_jupyter()
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        f"--LabApp.default_url=/lab/tree/{quote(args.notebook)}",
    ]
    command += [f"--ServerApp.root_dir={home}", f"--ServerApp.ip={args.ip}", f"--ServerApp.port={args.port}"]
    command += [f"--ServerApp.port_retries={TRIES}", *(["--no-browser"] if args.no_browser else [])]
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # containers and rented GPUs; Jupyter refuses without it
        command.append("--allow-root")
    print("JupyterLab is starting; Ctrl-C twice in this terminal stops it.", flush=True)
    process = subprocess.Popen(command, cwd=home)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # Jupyter has got it too, and asks before it stops
            continue


def quiet_jupyter() -> None:
    """Write the settings above into this environment, unless it has some or is not ours to write to."""
    path = Path(sys.prefix) / "share" / "jupyter" / "lab" / "settings" / "overrides.json"
    if sys.prefix != sys.base_prefix and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SETTINGS)
