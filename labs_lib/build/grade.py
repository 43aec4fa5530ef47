"""`labs grade DIR`: runs learners' notebooks, each in its own process and within a time limit; a CSV of their checks.

What counts is what `check` says in this run, not what is stored in a notebook. A cell that fails does not end the run:
the exercises after it are graded too. It runs the learners' code as you: for strangers' notebooks, use a container.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from labs_lib.build.notebooks import read_notebook
from labs_lib.errors import LabsError
from labs_lib.lab.check import OUTCOMES, load_checks
from labs_lib.lab.profiles import NAMES

NOT_REACHED = "NOT REACHED"
SKIPPED = {".ipynb_checkpoints"}


@dataclass(frozen=True)
class Grade:
    """One exercise of one notebook: a row of the CSV."""

    notebook: str
    lab: str
    exercise: str
    status: str
    message: str = ""
    seconds: float = 0.0
    error: str = ""


def lab_of(notebook: dict | None, path: Path) -> str:
    """A notebook's lab: as its build noted it, else from the file's name (01_lora-ann.ipynb); "" if neither tells."""
    noted = notebook["metadata"].get("labs", {}).get("lab", "") if notebook else ""
    return noted or (path.name[:2] if path.name[:2].isdigit() else "")


def grade(path: Path, name: str, profile: str = "smoke", limit: float = 600) -> list[Grade]:
    """Run one notebook and return a row for each exercise of its lab. Raises nothing that a notebook can cause."""
    notebook = read_notebook(path)
    lab = lab_of(notebook, path)
    if notebook is None or not lab:
        return [Grade(name, lab, "", NOT_REACHED, error="no notebook of the course can be read here")]
    start = time.perf_counter()
    outcomes, error = _run(path.resolve(), profile, limit)
    seconds = round(time.perf_counter() - start, 1)
    names = dict.fromkeys([*(each.name for each in load_checks(lab)), *outcomes])
    if not names:
        return [
            Grade(name, lab, "", NOT_REACHED, seconds=seconds, error=error or f"lab {lab} has no exercises")
        ]
    return [Grade(name, lab, each, *outcomes.get(each, (NOT_REACHED, "")), seconds, error) for each in names]


def _run(path: Path, profile: str, limit: float) -> tuple[dict[str, tuple[str, str]], str]:
    """The last outcome of each check, and what went wrong with the run as a whole.

    The run is a process of its own: after the limit it is killed, and the kernel that it started with it.
    """
    import psutil

    with tempfile.TemporaryDirectory(prefix="labs-grade-") as scratch:
        kept = Path(scratch) / "outcomes.jsonl"
        env = {**os.environ, OUTCOMES: str(kept), "LABS_STRICT": "0"}
        words = [sys.executable, "-m", "labs_lib.build.grade", str(path), profile]
        run = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            error = run.communicate(timeout=limit)[0].strip()
        except subprocess.TimeoutExpired:
            error = f"stopped after {limit:g} s"
            for process in [*psutil.Process(run.pid).children(recursive=True), run]:
                process.kill()
            run.communicate()
        lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    return {row["name"]: (row["status"], row["message"]) for row in map(json.loads, lines)}, error


def execute(path: Path, profile: str) -> str:
    """Run a notebook to its end, whatever its cells raise; returns the first error, or "" if there was none."""
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell

    notebook = read_notebook(path)
    cells = notebook["cells"]
    after = next((i + 1 for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", [])), 0)
    cells.insert(after, new_code_cell(f"PROFILE = {profile!r}"))
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        allow_errors=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except Exception as failure:  # the kernel died
        return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0]}"
    return _first_error(notebook)


def _first_error(notebook: dict) -> str:
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                return f"cell {cell['id']}: {output['ename']}: {output['evalue']}".splitlines()[0]
    return ""


def notebooks_in(folder: Path) -> list[Path]:
    """All notebooks of a folder and its subfolders; Jupyter's own copies are left out."""
    found = sorted(folder.rglob("*.ipynb"))
    return [path for path in found if not SKIPPED & set(path.relative_to(folder).parts)]


def grade_all(folder: Path, profile: str, limit: float, workers: int) -> Iterator[list[Grade]]:
    """Rows of each notebook in `folder`, in order, as they get ready."""
    paths = notebooks_in(folder)
    if not paths:
        raise LabsError(f"There are no notebooks (*.ipynb) in {folder}.")
    with ThreadPoolExecutor(workers) as pool:  # each waits for a process of its own
        yield from pool.map(
            lambda path: grade(path, path.relative_to(folder).as_posix(), profile, limit), paths
        )


def line(rows: Sequence[Grade]) -> str:
    counts = Counter(row.status for row in rows)
    told = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return f"{rows[0].notebook}: {told}" + (f"  ({rows[0].error})" if rows[0].error else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="learners' notebooks, also in subfolders")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="default: grades.csv in DIR")
    parser.add_argument("--profile", choices=NAMES, default="smoke", help="default: %(default)s")
    parser.add_argument(
        "--limit", type=float, default=600, metavar="S", help="seconds per notebook (%(default)s)"
    )
    parser.add_argument(
        "-j", "--jobs", type=int, default=1, metavar="N", help="notebooks at a time (default 1)"
    )


def main(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        raise LabsError(f"{args.folder} is not a folder: name the one that holds the learners' notebooks.")
    if args.jobs < 1 or args.limit <= 0:
        raise LabsError("-j and --limit take numbers above 0.")
    target = args.csv or args.folder / "grades.csv"
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Grade)])
        writer.writeheader()
        for rows in grade_all(args.folder, args.profile, args.limit, args.jobs):
            writer.writerows(asdict(row) for row in rows)
            file.flush()
            print(line(rows), flush=True)
    print(f"written to {target}")
    return 0


if __name__ == "__main__":  # the process of one notebook
    print(execute(Path(sys.argv[1]), sys.argv[2]))
