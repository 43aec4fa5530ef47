"""Installs the course for the running Python, from the clone that holds this file: what a notebook's first cell runs.

Standard library only. Packages that a kernel has loaded, or that are matched to the machine's GPU, keep their version:
they are pinned to what is there, so that pip finds them satisfied and never fetches another torch.
"""

import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

KEEP = ("torch", "torchvision", "torchaudio", "triton", "numpy")


def constraints() -> list[str]:
    """One `name==version` per package of KEEP that is installed."""
    pins = []
    for name in KEEP:
        try:
            pins.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return pins


def main() -> int:
    clone = Path(__file__).resolve().parents[2]
    print("Installing PEFT Labs (a minute or two) ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "keep.txt"
        pins.write_text("".join(pin + "\n" for pin in constraints()))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, "--constraint", str(pins), "--editable", str(clone)], capture_output=True, text=True
        )
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        print(f"{tail}\nThe course could not be installed (kept as they are: {', '.join(constraints())}).")
        print("Check the network, or start a fresh runtime, and run this cell again.")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
