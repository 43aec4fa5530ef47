"""`labs build`: writes each lab's student and solution notebook from its source; `--check` compares, `--execute` runs.

A solution's stored outputs belong to one state of its code: the hash of that code is kept in the notebook, and outputs
whose hash is another one are dropped by a build and reported as stale by a check.

Notebooks are there to be worked in. What a learner has saved in one is never overwritten without a copy, and a check
only notes it; in continuous integration (`--strict`, or $CI is set) any difference from a build is a failure.
"""

import argparse
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labs_lib.build import lint
from labs_lib.build.manifest import MANIFEST, Entry, Manifest, load_manifest
from labs_lib.build.pages import pages
from labs_lib.build.source import SOLUTION, STUDENT, Cell, Problem, Source, code_hash, read_source
from labs_lib.build.work import cells_stamp, is_copy, keep_copy, outputs_stamp, own_work
from labs_lib.errors import LabsError
from labs_lib.paths import root

Notebook = dict[str, Any]  # nbformat 4.5, as JSON has it
BAR = re.compile(r"^.*\d+%\|.*$\n?", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDERS = {STUDENT: "notebooks", SOLUTION: "solutions"}
REPLACE = {STUDENT: "labs build {} --fresh", SOLUTION: "labs build {} --execute"}


@dataclass(frozen=True)
class Course:
    """The folder that holds `solutions/` and `notebooks/`, and the manifest that orders them."""

    root: Path
    manifest: Manifest

    def source_path(self, entry: Entry) -> Path:
        return self.root / FOLDERS[SOLUTION] / f"{entry.stem}.py"

    def path(self, entry: Entry, kind: str) -> Path:
        return self.root / FOLDERS[kind] / f"{entry.stem}.ipynb"

    def name(self, path: Path) -> str:
        """How messages call a file: relative to the course."""
        return path.relative_to(self.root).as_posix()

    def source(self, entry: Entry) -> Source:
        path = self.source_path(entry)
        if not path.is_file():
            raise LabsError(f"{self.name(path)} is missing: the manifest lists lab {entry.number}.")
        return read_source(path, self.name(path))


def this_course() -> Course:
    """The course of this checkout."""
    return Course(root(), load_manifest(MANIFEST))


@dataclass
class Built:
    """The notebooks made from one source, by kind, and the mistakes found on the way."""

    notebooks: dict[str, Notebook]
    problems: list[Problem]


def generate(course: Course, entry: Entry) -> Built:
    """Both notebooks of one lab, without outputs; nothing is written."""
    source = course.source(entry)
    notebooks, problems = {}, lint.lint_source(source, entry.number)
    for kind in (STUDENT, SOLUTION):
        texts = source.texts(kind)
        if kind == SOLUTION:
            digest = code_hash(texts)
        shown = [(cell, _with_install(course.manifest, cell, text)) for cell, text in texts]
        problems += lint.lint_texts(source, kind, shown)
        notebooks[kind] = _notebook(course.manifest, entry, kind, shown)
    for notebook in notebooks.values():
        notebook["metadata"]["labs"] |= {"code": digest, "cells": cells_stamp(notebook)}
    return Built(notebooks, list(dict.fromkeys(source.problems + problems)))


def _with_install(manifest: Manifest, cell: Cell, text: str) -> str:
    return manifest.bootstrap() + text if "setup" in cell.tags else text


def _notebook(manifest: Manifest, entry: Entry, kind: str, texts: Sequence[tuple[Cell, str]]) -> Notebook:
    def cell_id(index: int, what: str) -> str:
        return f"lab{entry.number}-{index:02d}-{what}"

    cells = [_cell("markdown", cell_id(0, "header"), manifest.header(entry))]
    for given, text in texts:
        special = [t for t in ("parameters", "setup", "exercise", "takeaway") if t in given.tags]
        what = special[0] if special else {"markdown": "text"}.get(given.kind, given.kind)
        cells.append(_cell(given.kind, cell_id(given.index, what), text, given.tags))
    last = max((given.index for given, _ in texts), default=0) + 1
    cells.append(_cell("markdown", cell_id(last, "footer"), manifest.footer(entry)))
    metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "labs": {"kind": kind, "lab": entry.number},
        "language_info": {"name": "python"},
    }
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _cell(kind: str, cell_id: str, text: str, tags: Sequence[str] = ()) -> dict[str, Any]:
    metadata: dict[str, Any] = {"tags": list(tags)} if tags else {}
    if "hide-input" in tags:
        metadata["jupyter"] = {"source_hidden": True}
    cell = {"cell_type": kind, "id": cell_id, "metadata": metadata, "source": text}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


# --- files


def dumps(notebook: Notebook) -> str:
    """The notebook as the text of its file: the same text for the same content."""
    import nbformat

    return nbformat.writes(nbformat.from_dict(notebook), version=4, indent=1).rstrip("\n") + "\n"


def read_notebook(path: Path) -> Notebook | None:
    """The stored notebook with joined source lines, or None if there is none or it cannot be read."""
    import nbformat

    if not path.is_file():
        return None
    try:
        return nbformat.read(path, as_version=4)
    except Exception:  # half written, a merge conflict: as good as none
        return None


def without_outputs(notebook: Notebook) -> Notebook:
    """A copy as a build makes it: no outputs, no counts, no marks of execution."""
    cells = [
        {**c, **({"outputs": [], "execution_count": None} if c["cell_type"] == "code" else {})}
        for c in notebook["cells"]
    ]
    marks = ("executed", "outputs")
    labs = {k: v for k, v in notebook["metadata"].get("labs", {}).items() if k not in marks}
    return {**notebook, "cells": cells, "metadata": {**notebook["metadata"], "labs": labs}}


def with_outputs(notebook: Notebook, executed: Mapping[str, Any]) -> Notebook:
    """`notebook` with the outputs of `executed`, a run of the same code, cleaned for storing.

    Code cells are matched in order, without the one that papermill puts in. (An id says where a cell stands, and a text
    cell put in moves that.)
    """
    ran = iter(
        cell
        for cell in executed["cells"]
        if cell["cell_type"] == "code" and "injected-parameters" not in cell["metadata"].get("tags", [])
    )
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            outputs = clean_outputs(next(ran, {}).get("outputs", []))
            for output in outputs:
                if "execution_count" in output:
                    output["execution_count"] = count
            cell = {**cell, "execution_count": count, "outputs": outputs}
        cells.append(cell)
    labs = notebook["metadata"]["labs"]
    marks = {"executed": labs["code"], "outputs": outputs_stamp({"cells": cells})}
    return {**notebook, "cells": cells, "metadata": {**notebook["metadata"], "labs": labs | marks}}


def clean_outputs(outputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Outputs as they are stored: no widgets, no progress bars, no memory addresses, streams joined."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        output = {key: value for key, value in output.items() if key != "transient"}
        last = joined[-1] if joined else {}
        if output["output_type"] == "stream" and last.get("name") == output["name"]:
            last["text"] += output["text"]  # a kernel may send a line and its end apart
        elif WIDGET not in output.get("data", {}):
            joined.append(output)
    for output in joined:
        if output["output_type"] == "stream":
            overwritten = re.sub(r"^[^\n]*\r(?!\n)", "", output["text"], flags=re.MULTILINE)
            output["text"] = BAR.sub("", overwritten)
        elif "text/plain" in output.get("data", {}):
            plain = re.sub(r" at 0x[0-9a-f]{6,}", "", output["data"]["text/plain"])
            output["data"] = {**output["data"], "text/plain": plain}
    return [output for output in joined if output["output_type"] != "stream" or output["text"].strip()]


# --- build, check


def build(
    course: Course, entries: Sequence[Entry], execute: bool = False, fresh: bool = False
) -> list[Problem]:
    """Write the notebooks of `entries`, and the generated pages; a lab with a mistake is not written.

    Args:
        execute: run each solution (cpu profile, strict) and store its outputs.
        fresh: replace a student notebook that holds someone's work, keeping a copy.
    """
    problems: list[Problem] = []
    for entry in entries:
        try:
            built = generate(course, entry)
            problems += built.problems or _write(course, entry, built, {STUDENT: fresh, SOLUTION: execute})
        except LabsError as error:
            problems.append(Problem(course.name(course.source_path(entry)), str(error)))
    for path, text in pages(course.root, course.manifest, problems).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return problems


def _write(course: Course, entry: Entry, built: Built, replace: Mapping[str, bool]) -> list[Problem]:
    """Write both notebooks; `replace` says of which kind someone's work may be moved aside."""
    problems = []
    for kind, notebook in built.notebooks.items():
        path = course.path(entry, kind)
        name, stored = course.name(path), read_notebook(path)
        left = _left(name, entry, kind, stored, notebook) if path.is_file() else None
        if left and not replace[kind]:
            problems.append(left)
            continue
        if kind == SOLUTION:
            notebook = _with_stored_outputs(notebook, stored)
            if replace[SOLUTION]:
                notebook = _executed(course, entry, notebook)
        if left:
            copy = course.name(keep_copy(path))
            problems.append(Problem(name, f"made anew; what you had there is now {copy}", note=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dumps(notebook), encoding="utf-8")
        if "executed" in notebook["metadata"]["labs"]:
            problems += lint.lint_outputs(name, notebook["cells"], SOLUTION)
    return problems


def _left(name: str, entry: Entry, kind: str, stored: Notebook | None, wanted: Notebook) -> Problem | None:
    """What is said of a notebook that a build leaves as it is, for someone's work in it; None if it holds none."""
    replace = f"`{REPLACE[kind].format(entry.number)}` would replace it, keeping a copy"
    if stored is None:
        return Problem(name, f"cannot be read; {replace}")
    work = own_work(stored, wanted)
    if not work:
        return None
    if _is_from(stored, wanted):
        return Problem(name, f"holds your own work ({work}), left as it is; {replace}", note=True)
    return Problem(name, f"holds your own work on another version of the lab; {replace}")


def _is_from(stored: Notebook, wanted: Notebook) -> bool:
    """Whether a stored notebook was built from the source as it is now, whatever was done in it since."""
    return without_outputs(stored)["metadata"]["labs"] == wanted["metadata"]["labs"]


def _with_stored_outputs(notebook: Notebook, stored: Notebook | None) -> Notebook:
    """The notebook with the outputs that are stored for this state of its code, if they are."""
    executed = stored["metadata"].get("labs", {}).get("executed") if stored else None
    return with_outputs(notebook, stored) if executed == notebook["metadata"]["labs"]["code"] else notebook


def _executed(course: Course, entry: Entry, notebook: Notebook) -> Notebook:
    """The notebook with the outputs of a run in the cpu profile, strict.

    Raises:
        LabsError: the run failed; says in which cell and how.
    """
    import tempfile

    from labs_lib.build import run

    with tempfile.TemporaryDirectory() as folder:
        given, done = Path(folder) / f"{entry.stem}.ipynb", Path(folder) / "executed.ipynb"
        given.write_text(dumps(notebook), encoding="utf-8")
        job = run.Job(given, done, course.root / FOLDERS[SOLUTION], "cpu", strict=True)
        name = course.name(course.path(entry, SOLUTION))
        print(f"{name}: running", flush=True)
        result = run.run_job(job)
        print(f"{name}: {result.cost}")
        if result.error:
            raise LabsError(f"{name} failed when run: {result.error}")
        return with_outputs(notebook, read_notebook(done))


def check(course: Course, entries: Sequence[Entry], strict: bool = False) -> list[Problem]:
    """What differs between the stored notebooks and pages and what a build would write.

    Args:
        strict: a learner's work, too, is a difference; else it is a note.
    """
    problems: list[Problem] = []
    for entry in entries:
        try:
            built = generate(course, entry)
        except LabsError as error:
            problems.append(Problem(course.name(course.source_path(entry)), str(error)))
            continue
        problems += built.problems
        for kind in (STUDENT, SOLUTION):
            problems += _compare(course, entry, kind, built.notebooks[kind], strict)
    problems += _strays(course, strict)
    for path, text in pages(course.root, course.manifest, problems).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            problems.append(
                Problem(course.name(path), "is not what the manifest and the records say: run `labs build`")
            )
    return problems


def _compare(course: Course, entry: Entry, kind: str, wanted: Notebook, strict: bool) -> list[Problem]:
    path = course.path(entry, kind)
    name, again = course.name(path), f"run `labs build {entry.number}`"
    stored = read_notebook(path)
    if stored is None:
        return [Problem(name, f"missing or unreadable: {again}")]
    left = _left(name, entry, kind, stored, wanted)
    if left and not strict:
        return [left]
    saved = not strict and _is_from(
        stored, wanted
    )  # by Jupyter, perhaps, which lays a file out in its own way
    problems = lint.lint_outputs(name, stored["cells"], kind)
    difference = None if saved else _difference(without_outputs(stored), wanted)
    if difference:
        where, what = difference
        said = f"differs from {course.name(course.source_path(entry))}: {what}. {again}"
        return [*problems, Problem(name, said, where)]
    labs = stored["metadata"].get("labs", {})
    if kind == STUDENT:
        if not saved and not problems and path.read_text(encoding="utf-8") != dumps(wanted):
            problems.append(Problem(name, f"differs from a fresh build in layout or run counts: {again}"))
    elif "executed" not in labs:
        problems.append(Problem(name, f"has no outputs: run `labs build --execute {entry.number}`"))
    elif labs["executed"] != wanted["metadata"]["labs"]["code"]:
        problems.append(Problem(name, f"its outputs are stale: run `labs build --execute {entry.number}`"))
    elif left:
        said = f"its outputs are not those of its build: run `labs build --execute {entry.number}`"
        problems.append(Problem(name, said))
    return problems


def _difference(stored: Notebook, wanted: Notebook) -> tuple[str, str] | None:
    """(cell, what) of the first difference, or None."""
    for i, (old, new) in enumerate(zip(stored["cells"], wanted["cells"], strict=False)):
        place = f"cell {i} ({new['id']})"
        if old["source"] != new["source"]:
            lines = difflib.ndiff(old["source"].splitlines(), new["source"].splitlines())
            changed = next((line for line in lines if line[:2] in ("- ", "+ ")), "")
            return place, f"its text ({changed[:90]!r})"
        for key in ("id", "cell_type", "metadata"):
            if old.get(key) != new[key]:
                return place, f"its {key.replace('_', ' ')} ({old.get(key)!r}, not {new[key]!r})"
    if len(stored["cells"]) != len(wanted["cells"]):
        return "", f"{len(stored['cells'])} cells, not {len(wanted['cells'])}"
    old, new = stored["metadata"].get("labs"), wanted["metadata"]["labs"]
    return None if old == new else ("", f"its metadata ({old}, not {new})")


def _strays(course: Course, strict: bool) -> list[Problem]:
    """Numbered files that the manifest does not know and that are no copies of what it knows.

    Among the notebooks to work in they may be a learner's own.
    """
    stems = {entry.stem for entry in course.manifest.labs}
    problems = []
    for kind, folder in FOLDERS.items():
        for path in sorted((course.root / folder).glob("[0-9][0-9]_*")):
            known = path.stem in stems or is_copy(path, stems)
            if path.suffix in (".py", ".ipynb") and not known:
                note = kind == STUDENT and not strict
                problems.append(Problem(course.name(path), "the manifest lists no such lab", note=note))
    return problems


# --- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("labs", nargs="*", metavar="LAB", help="a number or name, as in 01; default: all")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="write nothing; fail if anything is out of date")
    how.add_argument("--execute", action="store_true", help="run the solutions and store their outputs")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start over: replace notebooks with your work in them, keeping a copy",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        default=bool(os.environ.get("CI")),
        help="with --check: saved work is a difference like any other; the default where $CI is set",
    )


def main(args: argparse.Namespace) -> int:
    course = this_course()
    entries = course.manifest.select(args.labs)
    if args.check:
        problems = check(course, entries, args.strict)
    else:
        problems = build(course, entries, args.execute, args.fresh)
    for problem in problems:
        print(problem)
    failed = sum(not problem.note for problem in problems)
    done = "up to date" if args.check else "built"
    print(f"{len(entries)} labs: " + (f"{failed} problems" if failed else done))
    return 1 if failed else 0
