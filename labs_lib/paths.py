"""Where things are: the course's shipped data, and the place for what a learner's own runs leave behind."""

import os
from pathlib import Path

from labs_lib.errors import LabsError


def root() -> Path:
    """The course's checkout: $LABS_HOME, or the folder that holds `labs_lib/` and `data/`."""
    home = Path(os.environ.get("LABS_HOME") or Path(__file__).resolve().parent.parent)
    if not (home / "data").is_dir():
        raise LabsError(
            f"The course's data folder is missing at {home / 'data'}: install from a clone of the repository "
            "(pip install -e .), or set LABS_HOME to the clone."
        )
    return home


def data() -> Path:
    """Shipped, versioned, checksummed data."""
    return root() / "data"


def cache() -> Path:
    """A learner's own records, checkpoints and executed notebooks: $LABS_CACHE, or `.cache/` in the checkout."""
    path = Path(os.environ.get("LABS_CACHE") or root() / ".cache")
    path.mkdir(parents=True, exist_ok=True)
    return path
