"""`labs doctor`: what this machine can do for the course, and which profile fits.

Each finding is `ok`, `note` (works, with something to know) or `PROBLEM` (with what to do). Exit status 1 if there is
a problem. Nothing here trains, downloads, or waits longer than a few seconds.
"""

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from labs_lib.bootstrap import reachable, supported
from labs_lib.errors import LabsError
from labs_lib.paths import root

GB = 1e9
MEMORY_GB = 3.0  # the most that a notebook takes at the profile `cpu`
DISK_GB = 2.0  # checkpoints, sweeps and executed notebooks of the whole course
HUB = "https://huggingface.co"
TOLD = ("full fine-tuning", "LoRA r16", "QLoRA r16")


class Finding(NamedTuple):
    """One line of the report: how it stands ("ok", "note" or "PROBLEM"), about what, and the words."""

    level: str
    topic: str
    text: str


def python() -> Finding:
    text = f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}"
    if supported(sys.version_info):
        return Finding("ok", "Python", text)
    return Finding("PROBLEM", "Python", f"{text}: the course needs 3.10 to 3.13")


def packages() -> Finding:
    names = (
        "torch",
        "transformers",
        "peft",
        "datasets",
        "bitsandbytes",
        "galore-torch",
        "jupyterlab",
        "papermill",
    )
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    text = ", ".join(found)
    if not missing:
        return Finding("ok", "Packages", text)
    return Finding("PROBLEM", "Packages", f"{', '.join(missing)} missing: `make env` installs all ({text})")


def device() -> Finding:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        text = f"{properties.name}, {properties.total_memory / GB:.0f} GB, CUDA {torch.version.cuda}"
        return Finding(
            "ok", "GPU", text if count == 1 else f"{text}; {count} devices, the labs use the first"
        )
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return Finding("note", "GPU", "there is an NVIDIA driver, but this torch is a CPU build")
    threads = torch.get_num_threads()
    cores = "1 CPU thread does" if threads == 1 else f"{threads} CPU threads do"
    return Finding("ok", "GPU", f"none that torch can use; {cores} for every lab")


def bitsandbytes() -> Finding:
    """Its 4-bit and 8-bit kernels, tried on 64 numbers on the device at hand."""
    import torch

    from labs_lib import quiet

    quiet.silence()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        x = torch.linspace(-1, 1, 64, device=where)
        error = (dequantize_4bit(*quantize_4bit(x, quant_type="nf4")) - x).abs().max().item()
    except Exception as reason:  # whatever a missing native library raises
        return Finding(
            "note", "bitsandbytes", f"no backend for {where} ({reason}): 4-bit labs use the course's own code"
        )
    if error > 0.2:
        return Finding(
            "PROBLEM", "bitsandbytes", f"NF4 on {where} is off by {error:.2f}: reinstall bitsandbytes"
        )
    return Finding("ok", "bitsandbytes", f"NF4 works on {where}")


def memory() -> Finding:
    import psutil

    state, granted = psutil.virtual_memory(), memory_granted()
    available, total = min(state.available, granted), min(state.total, granted)
    text = f"{available / GB:.1f} of {total / GB:.1f} GB free"
    if available < MEMORY_GB * GB:
        return Finding(
            "note", "Memory", f"{text}; a lab takes up to {MEMORY_GB:.0f} GB: close other programs"
        )
    return Finding("ok", "Memory", text)


def memory_granted(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> float:
    """Bytes that a container may use, of what its host has; infinite where nothing is limited."""
    try:
        return float(limit.read_text().replace("max", "inf"))
    except (OSError, ValueError):
        return float("inf")


def disk() -> Finding:
    free = shutil.disk_usage(root()).free
    text = f"{free / GB:.1f} GB free in {root()}"
    if free < DISK_GB * GB:
        return Finding(
            "PROBLEM", "Disk", f"{text}; the course leaves up to {DISK_GB:.0f} GB behind: make room"
        )
    return Finding("ok", "Disk", text)


def data() -> Finding:
    from labs_lib.world.build import verify

    verify()
    return Finding("ok", "Data", "shipped models and tasks are present, checksums agree")


def hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return Finding("note", "Hub", "switched off by HF_HUB_OFFLINE; the labs need no hub")
    address = os.environ.get("HF_ENDPOINT", HUB)
    if reachable(address):
        return Finding("ok", "Hub", f"{address} answers: MODEL_ID may name any causal language model there")
    return Finding("note", "Hub", f"{address} does not answer; the labs need no hub, MODEL_ID does")


def profile() -> Finding:
    from labs_lib.lab.profiles import auto_profile

    fit = auto_profile()
    return Finding("ok", "Profile", f"{fit.name}: {fit.about}")


def room() -> Finding | None:
    """The largest public models that this card can train, by method, as counted in lab 19; None without a card."""
    import torch

    from labs_lib.measure import load_record
    from labs_lib.training import fits

    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(0).total_memory / GB
    largest = fits.fitting(load_record(fits.RECORD, device="cpu").rows, card)
    told = "; ".join(f"{method} {largest[method] or 'none'}" for method in TOLD)
    return Finding("ok", "Room", f"trains at most, {fits.LENGTH} tokens at a time: {told}")


CHECKS: tuple[Callable[[], Finding | None], ...] = (
    python, packages, device, bitsandbytes, memory, disk, data, hub, profile, room
)  # fmt: skip


def findings() -> Iterator[Finding]:
    """All findings, each as soon as it is known. A check that breaks down is a finding too."""
    for check in CHECKS:
        try:
            if finding := check():
                yield finding
        except (LabsError, ImportError, OSError) as reason:
            yield Finding("PROBLEM", check.__name__.capitalize(), str(reason))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def main(args: argparse.Namespace) -> int:
    problems = 0
    for level, topic, text in findings():
        problems += level == "PROBLEM"
        print(f"{level:<8} {topic:<13} {text}", flush=True)
    print("\nThis machine is ready." if not problems else f"\n{problems} problem(s) to solve first.")
    return 1 if problems else 0
