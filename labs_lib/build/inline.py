"""Exercises from the library's own source: the text of a function or class, with the imports it needs, and its stub.

Everything is read from the files with `ast`; no module of the course is imported, so that a build loads no torch.
"""

import ast
import builtins
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from labs_lib.errors import LabsError

KEEP = re.compile(r"\s*# keep$")
Definition = ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported name: `from module import original as name`; without `original`, `import module as name`."""

    name: str
    module: str
    original: str = ""


@dataclass(frozen=True)
class Inlined:
    """An exercise's text in both notebooks, and what has to be imported before it."""

    name: str
    module: str
    imports: tuple[Import, ...]
    solution: str
    stub: str


class Module:
    """A module's source, by name: its top-level definitions, imports and constants."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = _find(name).read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        tree = ast.parse(self.text)
        self.definitions: dict[str, Definition] = {}
        self.imports: dict[str, Import] = {}
        self.assigned: set[str] = set()
        self.futures: list[Import] = []
        for node in tree.body:
            if isinstance(node, Definition):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for each in imported(node, package=name.rpartition(".")[0]):
                    if each.module == "__future__":
                        self.futures.append(each)
                    else:
                        self.imports[each.name] = each
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                self.assigned |= {
                    n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
                }

    def inline(self, name: str) -> Inlined:
        """The definition called `name`, ready for both notebooks.

        Raises:
            LabsError: there is none, it has no docstring or no "Steps:" in it, or nothing in it can be left out.
        """
        node = self.definitions.get(name)
        if node is None:
            raise LabsError(f"{self.name} defines no function or class {name!r}")
        if "Steps:" not in (ast.get_docstring(node) or ""):
            raise LabsError(f'{self.name}.{name} needs a docstring with a numbered "Steps:" section')
        stub = self._class_stub(node) if isinstance(node, ast.ClassDef) else self._stub(node, name)
        if "NotImplementedError" not in stub:
            raise LabsError(f"{self.name}.{name} leaves nothing to write: every method is kept")
        return Inlined(name, self.name, tuple(self._needs(node)), _without_keep(self._source(node)), stub)

    def _needs(self, node: Definition) -> Iterator[Import]:
        """What the definition uses of its module, in the module's order: its imports, then its own names."""
        used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - {node.name}
        if self.futures and any(f.original == "annotations" for f in self.futures):
            yield from (f for f in self.futures if f.original == "annotations")
        yield from (each for name, each in self.imports.items() if name in used)
        own = self.definitions.keys() | self.assigned
        for name in sorted((used & own) - set(dir(builtins))):
            yield Import(name, self.name, name)

    # --- text

    def _source(self, node: ast.stmt) -> str:
        return "\n".join(self.lines[_first_line(node) - 1 : node.end_lineno])

    def _head(self, node: Definition) -> str:
        """Decorators and signature, to the line before the body."""
        first = node.body[0]
        start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))])
        if start > node.lineno:
            lines = self.lines[_first_line(node) - 1 : start - 1]
        else:  # def f(x): return x
            lines = [
                *self.lines[_first_line(node) - 1 : node.lineno - 1],
                self.lines[start - 1][: first.col_offset].rstrip(),
            ]
        while lines and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
            lines.pop()
        return "\n".join(lines)

    def _stub(self, node: Definition, path: str) -> str:
        """Decorators, signature, docstring, and a body that says what is to do."""
        indent = " " * (node.col_offset + 4)
        docstring = [self._source(node.body[0])] if _is_docstring(node.body[0]) else []
        return "\n".join([self._head(node), *docstring, f'{indent}raise NotImplementedError("TODO: {path}")'])

    def _class_stub(self, node: ast.ClassDef) -> str:
        """The class with every method stubbed that is not marked `# keep`; attributes stay."""
        text = self._head(node)
        for child in node.body:
            gap = "\n\n" if self.lines[_first_line(child) - 2].strip() == "" else "\n"
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                kept = any(KEEP.search(line) for line in self._head(child).splitlines())
                text += gap + (
                    _without_keep(self._source(child))
                    if kept
                    else self._stub(child, f"{node.name}.{child.name}")
                )
            else:
                text += gap + self._source(child)
        return text


@cache
def module(name: str) -> Module:
    """The module called `name`, parsed once."""
    return Module(name)


def imported(node: ast.Import | ast.ImportFrom, package: str = "") -> Iterator[Import]:
    """The names that an import statement binds; relative ones are resolved against `package`."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.asname or alias.name.partition(".")[0], alias.name)
        return
    source = node.module or ""
    if node.level:
        parts = package.split(".")
        source = ".".join([*parts[: len(parts) - node.level + 1], *([source] if source else [])])
    for alias in node.names:
        yield Import(alias.asname or alias.name, source, alias.name)


def import_lines(imports: Iterable[Import]) -> list[str]:
    """Import statements, the names of one module on one line, in the order of first use."""
    lines: dict[str, list[str]] = {}
    for each in dict.fromkeys(imports):
        target = each.original or each.module
        rename = "" if each.name in (target, target.partition(".")[0]) else f" as {each.name}"
        if each.original:
            lines.setdefault(f"from {each.module} import ", []).append(target + rename)
        else:
            lines[f"import {target}{rename}"] = []
    return [statement + ", ".join(names) for statement, names in lines.items()]


def _find(name: str) -> Path:
    """The file of a module, found without importing its packages."""
    top, *rest = name.split(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        raise LabsError(f"there is no module {name!r}")
    path = Path(spec.origin)
    for part in rest:
        folder = path.parent / part
        path = folder / "__init__.py" if folder.is_dir() else path.parent / f"{part}.py"
    if not path.is_file():
        raise LabsError(f"there is no module {name!r}")
    return path


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def _is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _without_keep(text: str) -> str:
    return "\n".join(KEEP.sub("", line) if "# keep" in line else line for line in text.splitlines())
