"""A learner's own work in a notebook: how it is told from what a build wrote, and how it is kept.

A build stamps each notebook with a hash of its cells, and a solution with one of its outputs, in the metadata that
Jupyter keeps when it saves. So the difference is seen without git, in a downloaded archive too.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any


def cells_stamp(notebook: Mapping[str, Any]) -> str:
    """A hash of what is written in the notebook; what Jupyter changes by itself (layout, counts) has no part in it."""
    return _hash(_cells(notebook))


def outputs_stamp(notebook: Mapping[str, Any]) -> str:
    """A hash of the notebook's outputs; "" if it has none."""
    outputs = [cell["outputs"] for cell in notebook["cells"] if cell.get("outputs")]
    return _hash(outputs) if outputs else ""


def own_work(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What somebody has put into `stored` since it was built, in words; "" if there is nothing to lose.

    Args:
        wanted: the notebook that a build would write now.
    """
    labs, words = stored["metadata"].get("labs", {}), []
    if cells_stamp(stored) not in (labs.get("cells"), cells_stamp(wanted)):
        changed = {cell[0] for cell in _pairs(stored) ^ _pairs(wanted)}
        words.append(f"{len(changed)} {'cell' if len(changed) == 1 else 'cells'} changed")
    if outputs_stamp(stored) != labs.get("outputs", ""):
        words.append("outputs saved")
    return ", ".join(words)


def keep_copy(path: Path) -> Path:
    """Move a notebook out of the way, beside its old place, where Jupyter shows it; returns its new path."""
    copy = path.with_name(f"{path.stem}.mine-{datetime.now():%Y-%m-%d-%H%M%S}{path.suffix}")
    return path.rename(copy)


def is_copy(path: Path, stems: set[str]) -> bool:
    """Whether a file is a copy of a lab's notebook: one of `keep_copy`, or Jupyter's `01_lora-Copy1.ipynb`."""
    return any(path.name.startswith((f"{stem}.mine-", f"{stem}-Copy")) for stem in stems)


def _cells(notebook: Mapping[str, Any]) -> list[list]:
    return [
        [c.get("id"), c["cell_type"], c["source"], c["metadata"].get("tags", [])] for c in notebook["cells"]
    ]


def _pairs(notebook: Mapping[str, Any]) -> set[tuple]:
    return {(cell.get("id"), cell["source"]) for cell in notebook["cells"]}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
