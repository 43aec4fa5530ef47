"""Reads a lab's source (py:percent) and turns each cell into what the student and the solution notebook show.

AUTHORING.md describes the format. Mistakes are collected as Problems, so that an author sees all of them at once.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from labs_lib.build import inline
from labs_lib.errors import LabsError

STUDENT, SOLUTION = "student", "solution"
TAGS = {"parameters", "setup", "exercise", "takeaway", "hide-input", "solution-only", "student-only"}
BEGIN, END, STUB = "### BEGIN SOLUTION", "### END SOLUTION", "### STUB:"


@dataclass(frozen=True)
class Problem:
    """One mistake, and where it is: printed as `file, cell 7 (line 83): what`. A note is no mistake."""

    file: str
    message: str
    cell: str = ""
    note: bool = False

    def __str__(self) -> str:
        where = f"{self.file}, {self.cell}" if self.cell else self.file
        return f"{'note: ' if self.note else ''}{where}: {self.message}"


@dataclass(frozen=True)
class Cell:
    """One cell of a source. `index` counts from 1, `line` is its marker's line."""

    index: int
    line: int
    kind: str  # "markdown" or "code"
    text: str
    tags: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"cell {self.index} (line {self.line})"

    @property
    def is_code(self) -> bool:
        return self.kind == "code"

    @property
    def tree(self) -> ast.Module | None:
        """The parsed code; None for text and for code that does not parse."""
        try:
            return ast.parse(self.text) if self.is_code else None
        except SyntaxError:
            return None

    def exercises(self) -> list[tuple[str, str]]:
        """(module, name) of each exercise that the cell imports.

        Raises:
            LabsError: the cell holds something else than `from module import name`.
        """
        body = self.tree.body if self.tree else []
        if not body or not all(
            isinstance(node, ast.ImportFrom) and node.module and not node.level for node in body
        ):
            raise LabsError("an exercise cell holds `from module import name` and nothing else")
        names = [(node.module, alias) for node in body for alias in node.names]
        if any(alias.asname or alias.name == "*" for _, alias in names):
            raise LabsError("an exercise is imported under its own name")
        return [(source, alias.name) for source, alias in names]


@dataclass
class Source:
    """A lab's source: its cells and the mistakes found while reading it."""

    file: str
    cells: list[Cell]
    problems: list[Problem] = field(default_factory=list)

    def exercises(self) -> list[tuple[str, str]]:
        """(module, name) of every exercise, in order; cells that do not parse are left to `render`."""
        found = []
        for cell in self.cells:
            if "exercise" in cell.tags:
                try:
                    found += cell.exercises()
                except LabsError:
                    continue
        return found

    def texts(self, kind: str) -> list[tuple[Cell, str]]:
        """The cells of one notebook, STUDENT or SOLUTION, with the text each shows there; fills `problems`."""
        shown: list[tuple[Cell, str]] = []
        known: set[inline.Import] = set()  # what earlier cells have bound
        for cell in self.cells:
            if {STUDENT: "solution-only", SOLUTION: "student-only"}[kind] in cell.tags:
                continue
            try:
                if "exercise" in cell.tags:
                    text = _exercise(cell, kind, known)
                else:
                    text = _answers(cell.text, kind) if cell.is_code else cell.text
                    known |= set(_imports(cell))
            except LabsError as error:
                self.problems.append(Problem(self.file, str(error), cell.place))
                continue
            shown.append((cell, _takeaway(text) if "takeaway" in cell.tags else text))
        return shown


def read_source(path: Path, name: str = "") -> Source:
    """Parse `path`; `name` is how messages call it. A docstring before the first cell marker is for authors only."""
    import jupytext

    text, name = path.read_text(encoding="utf-8"), name or path.name
    markers = [i for i, line in enumerate(text.splitlines(), 1) if line.startswith("# %%")]
    parsed = jupytext.reads(text, fmt="py:percent").cells
    before = len(parsed) - len(markers)  # text before the first marker makes a cell of its own
    cells = [
        Cell(i, line, given.cell_type, given.source, tuple(given.metadata.get("tags", [])))
        for i, (line, given) in enumerate(zip(markers, parsed[before:], strict=True), 1)
    ]
    source = Source(name, cells)
    for cell in cells:
        odd = [tag for tag in cell.tags if tag not in TAGS]
        if odd:
            known = ", ".join(sorted(TAGS))
            source.problems.append(Problem(name, f"unknown tag {odd[0]!r}; there are {known}", cell.place))
    return source


def code_hash(cells: Sequence[tuple[Cell, str]]) -> str:
    """What stored outputs depend on: the solution's code, inlined exercises included, without the install lines."""
    code = [text for cell, text in cells if cell.is_code]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


# --- one cell


def _exercise(cell: Cell, kind: str, known: set[inline.Import]) -> str:
    """The imports an exercise still needs here, then its source or its stub."""
    inlined = [inline.module(source).inline(name) for source, name in cell.exercises()]
    own = {inline.Import(each.name, each.module, each.name) for each in inlined}
    needs = [need for each in inlined for need in each.imports if need not in known | own]
    known |= {*needs, *own}
    imports = "\n".join(inline.import_lines(needs))
    bodies = [each.solution if kind == SOLUTION else each.stub for each in inlined]
    return "\n\n\n".join([*([imports] if imports else []), *bodies])


def _imports(cell: Cell) -> Iterator[inline.Import]:
    for node in cell.tree.body if cell.tree else []:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from inline.imported(node)


def _answers(text: str, kind: str) -> str:
    """`text` with each marked solution kept (without its markers) or replaced by its STUB lines."""
    lines, stubs, inside = [], 0, False
    for line in text.splitlines():
        mark = line.strip()
        if mark == BEGIN:
            if inside:
                raise LabsError(f"{BEGIN} inside another one: close the first with {END}")
            inside, stubs = True, 0
        elif mark == END:
            if not inside:
                raise LabsError(f"{END} without {BEGIN}")
            if not stubs:
                raise LabsError(f"a solution needs a `{STUB} name = ...` line directly after {BEGIN}")
            inside = False
        elif mark.startswith(STUB):
            if not inside:
                raise LabsError(f"{STUB} stands outside {BEGIN} ... {END}")
            stubs += 1
            if kind == STUDENT:
                lines.append(line[: line.index("#")] + mark.removeprefix(STUB).removeprefix(" "))
        elif re.match(r"#+ *(BEGIN|END) SOLUTION|#+ *STUB\b", mark, re.IGNORECASE):
            raise LabsError(
                f"{mark!r} is no marker: write {BEGIN}, {END} or {STUB} exactly so, alone on its line"
            )
        elif not inside or kind == SOLUTION:
            lines.append(line)
    if inside:
        raise LabsError(f"{BEGIN} without {END}")
    return "\n".join(lines)


def _takeaway(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in f"**Takeaway.** {text.lstrip()}".splitlines())
