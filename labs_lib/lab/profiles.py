"""The profiles: one table that says how large a run is. Nothing else in the course branches on a profile's name."""

from dataclasses import dataclass

from labs_lib.errors import LabsError

GIB = 2**30


@dataclass(frozen=True)
class Profile:
    """How large a run is, on what kind of machine.

    Attributes:
        name: what PROFILE says.
        about: one line for `labs doctor` and error messages.
        cuda: whether it needs a CUDA device; the others run on the CPU even where there is one.
        size: member of the shipped base family.
        dtype: name of the torch dtype of the base model's weights.
        steps, rows: factors on what a lab asks for. A smoke run is there to prove that the cells run.
        seeds: at most this many of the seeds a lab asks for (0 = all).
        grid: at most this many of a sweep's points, the ends among them (0 = all).
    """

    name: str
    about: str
    cuda: bool = False
    size: str = "small"
    dtype: str = "float32"
    steps: float = 1.0
    rows: float = 1.0
    seeds: int = 0
    grid: int = 0


PROFILES = {
    p.name: p
    for p in (
        Profile("smoke", "seconds: do the cells run?", size="tiny", steps=0.02, rows=0.05, seeds=1, grid=2),
        Profile("cpu", "two CPU cores, the default"),
        # A T4 computes in float32 or float16; for models of this size float32 needs no loss scaling and fits.
        Profile("t4", "one GPU of about 16 GB (Colab's T4)", cuda=True, size="medium", rows=2.0),
        Profile("gpu", "one GPU of 24 GB or more", cuda=True, size="medium", dtype="bfloat16", rows=4.0),
    )
}
NAMES = ("auto", *PROFILES)


def auto_profile() -> Profile:
    """The profile that fits this machine: `gpu` from 20 GiB with bfloat16, `t4` for a smaller GPU, else `cpu`."""
    import torch

    if not torch.cuda.is_available():
        return PROFILES["cpu"]
    memory = torch.cuda.get_device_properties(0).total_memory
    large = memory >= 20 * GIB and torch.cuda.get_device_capability(0) >= (8, 0)
    return PROFILES["gpu" if large else "t4"]


def choose_profile(name: str) -> Profile:
    """The profile called `name` ("" and "auto" choose for this machine).

    Raises:
        LabsError: no such profile, or one that needs a CUDA device where there is none.
    """
    name = name.strip().lower() or "auto"
    if name == "auto":
        return auto_profile()
    if name not in PROFILES:
        raise LabsError(f"There is no profile {name!r}: choose one of {', '.join(NAMES)}.")
    profile = PROFILES[name]
    if profile.cuda:
        import torch

        if not torch.cuda.is_available():
            raise LabsError(
                f"Profile {name!r} needs a CUDA device and torch sees none here: use PROFILE='cpu' (or 'auto'), "
                "or install a CUDA build of torch."
            )
    return profile
