"""The rules a lab keeps: sizes, tags, checks, alt text, no absolute paths. Each broken one is a Problem."""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from labs_lib.build.source import SOLUTION, STUB, STUDENT, Cell, Problem, Source

CODE_LINES, TEXT_WORDS, SETUP_LINES = 45, 120, 11
PARAMETERS = {"PROFILE", "MODEL_ID"}
ABSOLUTE = re.compile(
    r"""(?<![\w.:/~-])/(?:home|tmp|work|root|Users)(?=/\w|["'])|(?<!\w)[C-F]:\\(?:Users|Windows|Program|\w+\\)"""
)
DATA_URI = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=\s]+")


def lint_source(source: Source, number: str) -> list[Problem]:
    """The rules that can be seen in the source itself."""
    rules = (_frame(source, number), _checked(source), *map(_cell, source.cells))
    return [
        Problem(source.file, message, cell.place if cell else "") for rule in rules for cell, message in rule
    ]


def lint_texts(source: Source, kind: str, texts: Sequence[tuple[Cell, str]]) -> list[Problem]:
    """The rules about what a notebook shows: sizes, after exercises are inlined."""
    problems = []
    for cell, text in texts:
        lines, words = len(text.splitlines()), count_words(text)
        if cell.is_code and lines > CODE_LINES:
            said = f"{lines} lines of code in the {kind} notebook, at most {CODE_LINES}"
        elif not cell.is_code and words > TEXT_WORDS:
            said = f"{words} words, at most {TEXT_WORDS}: split the cell or say less"
        elif "setup" in cell.tags and lines > SETUP_LINES:
            said = f"the setup cell has {lines} lines, install lines included, at most {SETUP_LINES}"
        else:
            continue
        problems.append(Problem(source.file, said, cell.place))
    if kind == STUDENT:
        problems += [Problem(source.file, said, cell.place) for cell, said in _answered(texts)]
    return problems


def lint_outputs(name: str, cells: Sequence[Mapping[str, Any]], kind: str) -> list[Problem]:
    """The rules about stored outputs: none for students; no errors, paths or figures without alt text."""
    problems = []
    for i, cell in enumerate(cells):
        for output in cell.get("outputs", []):
            for message in [_output(output)] if kind == SOLUTION else ["outputs in a student notebook"]:
                if message:
                    problems.append(Problem(name, message, f"cell {i} ({cell.get('id', '?')})"))
                    break
    return problems


def count_words(text: str) -> int:
    """Words a reader reads: a formula or a link is one, code blocks, HTML tags and table rules are none."""
    for pattern, by in (
        (r"```.*?```", " "),
        (r"\$\$.*?\$\$|\$[^$\n]+\$", " formula "),
        (r"!?\[([^\]]*)\]\([^)]*\)", r"\1"),
        (r"<[^>]+>", " "),
    ):
        text = re.sub(pattern, by, text, flags=re.DOTALL)
    return sum(bool(re.search(r"\w", word)) for word in text.split())


# --- rules


def _frame(source: Source, number: str) -> Iterator[tuple[Cell | None, str]]:
    """Parameters first, then setup with the lab's number; a takeaway somewhere; progress() at the end."""
    code = [cell for cell in source.cells if cell.is_code]
    first, second = [*code, None, None][:2]
    if first is None or "parameters" not in first.tags or _assigned_empty(first) != PARAMETERS:
        yield first, 'the first code cell is tagged "parameters" and holds PROFILE = "" and MODEL_ID = ""'
    if second is None or "setup" not in second.tags or _setup_number(second) != number:
        yield (
            second,
            f'the second code cell is tagged "setup" and calls setup(lab="{number}", profile=PROFILE, ...)',
        )
    for tag in ("parameters", "setup"):
        for extra in [cell for cell in source.cells if tag in cell.tags][1:]:
            yield extra, f'a second cell tagged "{tag}"'
    if not any("takeaway" in cell.tags for cell in source.cells):
        yield None, 'a lab needs at least one text cell tagged "takeaway"'
    if not any(_calls(cell.tree, "progress") for cell in code):
        yield None, "a lab ends in progress()"


def _checked(source: Source) -> Iterator[tuple[Cell | None, str]]:
    """Each exercise is named once and followed by `name = check(name)`; no check name is used twice."""
    exercises: dict[str, Cell] = {}
    checked: dict[str, Cell] = {}
    for cell in source.cells:
        if "exercise" in cell.tags:
            for _, name in Source("", [cell]).exercises():
                if name in exercises:
                    yield cell, f"exercise {name!r} is there already, in {exercises[name].place}"
                exercises.setdefault(name, cell)
        for name in _check_names(cell):
            if name in checked:
                yield cell, f"{name!r} is checked already, in {checked[name].place}"
            checked.setdefault(name, cell)
    for name, cell in exercises.items():
        if name not in checked or checked[name].index < cell.index:
            yield cell, f"exercise {name!r} is not followed by `{name} = check({name})`"


def _cell(cell: Cell) -> Iterator[tuple[Cell, str]]:
    found = ABSOLUTE.search(cell.text)
    if found:
        yield cell, f"absolute path {found[0]!r}"
    if cell.is_code and cell.tree is None:
        yield cell, "the code does not parse"
    if cell.is_code and {"student-only", "takeaway"} & set(cell.tags):
        yield cell, '"student-only" and "takeaway" are for text cells'
    if not cell.is_code and {"exercise", "setup", "parameters"} & set(cell.tags):
        yield cell, '"exercise", "setup" and "parameters" are for code cells'
    for node in ast.walk(cell.tree) if cell.tree else ():
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if (
            isinstance(function, ast.Attribute)
            and function.attr == "show"
            and _root(function) in ("plt", "pyplot", "fig")
        ):
            yield cell, "show a figure with `show(fig, alt=...)`: what it shows, for those who cannot see it"
        if (
            isinstance(function, ast.Name)
            and function.id == "show"
            and not any(k.arg == "alt" for k in node.keywords)
        ):
            yield cell, "`show` needs alt=..."


def _output(output: Mapping[str, Any]) -> str:
    """What is wrong with one stored output, or ""."""
    if output["output_type"] == "error":
        return f"the stored run failed: {output.get('ename')}: {output.get('evalue')}"
    data = output.get("data", {})
    texts = [
        output.get("text", ""),
        *(v if isinstance(v, str) else json.dumps(v) for m, v in data.items() if "image" not in m),
    ]
    found = next((f for text in texts if (f := ABSOLUTE.search(DATA_URI.sub("", text)))), None)
    if found:
        return f"absolute path {found[0]!r} in an output"
    html = data.get("text/html", "")
    if re.search(r"<img(?![^>]*\balt=\"[^\"])", html):
        return "an image without alt text in an output"
    images = [mime for mime in data if mime.startswith("image/")]
    if images and "<img" not in html and not output.get("metadata", {}).get(images[0], {}).get("alt"):
        return "a figure without alt text in an output: use `show(fig, alt=...)`"
    return ""


def _answered(texts: Sequence[tuple[Cell, str]]) -> Iterator[tuple[Cell, str]]:
    """A short answer that the student notebook gives away, or leaves undefined: its check would not say TODO."""
    values: dict[str, ast.expr] = {}
    for cell, text in texts:
        try:
            statements = ast.parse(text).body if cell.is_code else []
        except SyntaxError:
            yield cell, "the code of the student notebook does not parse"
            continue
        for statement in statements:
            for call in _calls(statement, "check"):
                if len(call.args) < 2:
                    continue
                for name in (n.id for n in ast.walk(call.args[0]) if isinstance(n, ast.Name)):
                    value = values.get(name)
                    if not (isinstance(value, ast.Constant) and value.value in (None, ...)):
                        yield cell, f"`{name}` is checked, but no {STUB} line sets it to `...`"
            if isinstance(statement, ast.Assign):
                for target in statement.targets:
                    values |= {n.id: statement.value for n in ast.walk(target) if isinstance(n, ast.Name)}


# --- reading code


def _assigned_empty(cell: Cell) -> set[str]:
    """Names that the cell assigns "" to; {"?"} if it does anything else."""
    names = set()
    for node in cell.tree.body if cell.tree else []:
        if not (
            isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value == ""
        ):
            return {"?"}
        names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _setup_number(cell: Cell) -> str:
    for call in _calls(cell.tree, "setup"):
        for keyword in call.keywords:
            if keyword.arg == "lab" and isinstance(keyword.value, ast.Constant):
                return str(keyword.value.value)
    return ""


def _calls(tree: ast.AST | None, name: str) -> list[ast.Call]:
    nodes = ast.walk(tree) if tree else ()
    return [
        n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name
    ]


def _check_names(cell: Cell) -> Iterator[str]:
    """The exercise named by each check(...): its second argument, or the name of its first."""
    for call in _calls(cell.tree, "check"):
        given = (
            call.args[1]
            if len(call.args) > 1
            else next((k.value for k in call.keywords if k.arg == "name"), None)
        )
        if isinstance(given, ast.Constant):
            yield str(given.value)
        elif call.args and isinstance(call.args[0], ast.Name):
            yield call.args[0].id


def check_names(source: Source) -> list[str]:
    """Every exercise that the lab's cells check, in order."""
    return [name for cell in source.cells for name in _check_names(cell)]


def _root(node: ast.Attribute) -> str:
    return node.value.id if isinstance(node.value, ast.Name) else ""
