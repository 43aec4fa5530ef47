"""`setup()`, the first call of every notebook: seeds, device, profile, plot style, quiet libraries, versions."""

import os
import platform
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from labs_lib import quiet
from labs_lib.errors import LabsError
from labs_lib.lab.profiles import Profile, choose_profile

if TYPE_CHECKING:
    import torch

SEED = 2024


@dataclass(frozen=True)
class Lab:
    """What a notebook knows about its run.

    Attributes:
        number: the lab's number, "01".
        profile: how large the run is; read by the methods below, never by a notebook's own `if`.
        device: "cpu" or "cuda".
        dtype: torch dtype of the base model's weights.
        seed: the first seed; every generator was seeded with it.
        strict: whether a check that is not OK raises (LABS_STRICT=1).
        model_id: a hub id or a folder that stands in for the shipped base, or "".
    """

    number: str
    profile: Profile
    device: str
    dtype: "torch.dtype"
    seed: int
    strict: bool
    model_id: str = ""

    @property
    def size(self) -> str:
        """The member of the shipped base family that fits this profile."""
        return self.profile.size

    def steps(self, n: int) -> int:
        """Training steps for a run that takes `n` at full size; at least 2."""
        return max(2, round(n * self.profile.steps))

    def rows(self, n: int) -> int:
        """Evaluation rows for a measurement that takes `n` at full size; at least 4."""
        return max(4, round(n * self.profile.rows))

    def seeds(self, n: int) -> list[int]:
        """`n` consecutive seeds, or the fewer that the profile grants."""
        return [self.seed + i for i in range(min(n, self.profile.seeds or n))]

    def grid(self, values: Sequence) -> list:
        """A sweep's points, or the fewer that the profile grants: evenly spread, both ends kept."""
        keep = min(len(values), self.profile.grid or len(values))
        if keep <= 1:
            return list(values[:keep])
        return [values[round(i * (len(values) - 1) / (keep - 1))] for i in range(keep)]

    def base(self, **options):
        """(model, tokenizer): the base model of this run; options go to `labs_lib.load_base`."""
        from labs_lib.measure import context
        from labs_lib.models.base import DEFAULT, base_folder, load_base

        name = self.model_id or self.size
        model, tokenizer = load_base(name, **{"dtype": self.dtype, "device": self.device, **options})
        if self.model_id and model.name_or_path == str(base_folder(DEFAULT)):  # the hub was out of reach
            context.set(model=DEFAULT)  # what is measured from here on is not about that model
        return model, tokenizer


def setup(lab: str, profile: str = "", model_id: str = "", seed: int = SEED) -> Lab:
    """Prepare this kernel for a lab and print one line about it.

    Args:
        lab: the lab's number, "01".
        profile: "auto", "smoke", "cpu", "t4" or "gpu"; "" takes $PROFILE, else "auto".
        model_id: a causal LM of the hub, or a folder; "" takes $MODEL_ID, else the shipped base.
        seed: seeds Python, NumPy and torch.

    Raises:
        LabsError: an unknown profile, a profile without its GPU, or shipped data that is missing or changed.
    """
    number = _number(lab)
    chosen = choose_profile(profile or os.environ.get("PROFILE", ""))
    model_id = (model_id or os.environ.get("MODEL_ID", "")).strip()
    quiet.silence()
    quiet.hub(wanted=bool(model_id) and not Path(model_id).is_dir())
    _verify_data()

    import torch

    # More threads than cores granted (a container's share, taskset) would only wait for each other.
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    seed_everything(seed)
    prepared = Lab(
        number=number,
        profile=chosen,
        device="cuda" if chosen.cuda else "cpu",
        dtype=getattr(torch, chosen.dtype),
        seed=seed,
        strict=os.environ.get("LABS_STRICT") == "1",
        model_id=model_id,
    )
    _plot_style()
    from labs_lib.measure import context

    context.set(
        lab=number, profile=chosen.name, device=prepared.device, seed=seed, model=model_id or chosen.size
    )
    print(_summary(prepared))
    return prepared


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (on every device)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def available_cores() -> int:
    """Cores this process may use: the affinity mask and, in a container, its share of CPU time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _number(lab: str | int) -> str:
    number = str(lab).zfill(2)
    if not (number.isdigit() and len(number) == 2):
        raise LabsError(f'setup(lab={lab!r}): a lab is named by its number, as in lab="01".')
    return number


def _verify_data() -> None:
    """The checksums of everything shipped (some 15 MB, 0.1 s)."""
    from labs_lib.world.build import verify

    verify()


def _plot_style() -> None:
    """The course's matplotlib style."""
    from labs_lib.lab import plots

    plots.use_style()


def _summary(lab: Lab) -> str:
    import torch

    if lab.device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        where = f"{threads} CPU thread{'s' * (threads != 1)}"
    versions = " ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "peft"))
    model = lab.model_id or f"shipped {lab.size}"
    return (
        f"PEFT Labs {_version('peft-labs')}, lab {lab.number} | profile {lab.profile.name} on {where} | "
        f"base: {model} | Python {platform.python_version()} {versions}"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return sys.modules["labs_lib"].__version__ if package == "peft-labs" else "missing"
