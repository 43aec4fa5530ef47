"""What is running now: lab, profile, device, seed, model. `setup()` fills it in, records and claims read."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Context:
    """`lab` is its number ("01"), `device` a torch device type ("cpu", "cuda"), `model` a size or hub id."""

    lab: str = ""
    profile: str = ""
    device: str = "cpu"
    seed: int = 0
    model: str = ""


_current = Context()


def current() -> Context:
    """The context of this process; all defaults before `setup()` has run."""
    return _current


def set(**fields) -> Context:
    """Change the named fields, keep the others. Unknown names raise TypeError."""
    global _current
    _current = replace(_current, **fields)
    return _current


def reset() -> None:
    """Back to the defaults (for tests)."""
    global _current
    _current = Context()
