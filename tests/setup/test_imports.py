"""Dependencies point one way, importing the course is cheap, and what is imported is declared.

Imports are read from the source, those inside functions included: a lazy import is a dependency too.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import labs_lib

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(labs_lib.__file__).parent
# room: the rooms it may know, besides itself and the ground floor
ROOMS = {
    "methods": set(),
    "world": set(),
    "models": {"world", "methods", "measure", "training"},
    "measure": {"methods", "models", "world"},
    "training": {"methods", "models", "world", "measure", "serving"},
    "serving": {"methods", "models", "world", "measure"},
}
GROUND = {"errors", "paths", "quiet", "__version__"}


def imports(path: Path, package: Path = PACKAGE) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    here = path.relative_to(package.parent).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) + "." if node.level else ""
            module = base + (node.module or "")
            found |= {module} if module != "labs_lib" else {f"labs_lib.{alias.name}" for alias in node.names}
    return found


def files(room: str = "") -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def wrong_rooms(room: str, paths: list[Path], package: Path = PACKAGE) -> list[str]:
    """The imports by which a room's files know a room that they should not."""
    allowed = ROOMS[room] | GROUND | {room}
    return [
        f"{path.relative_to(package)} imports {name}"
        for path in paths
        for name in sorted(imports(path, package))
        if name.split(".")[0] == "labs_lib" and [*name.split("."), ""][1] not in allowed
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_the_rooms_below_it(room):
    assert not wrong_rooms(room, files(room))


def test_a_wrong_import_would_be_seen(tmp_path):
    """The test above can fail: absolute, relative, lazy and top-level-name imports are all seen."""
    room = tmp_path / "labs_lib" / "world"
    room.mkdir(parents=True)
    for i, line in enumerate(
        ["import labs_lib.lab.check", "from ..lab import setup", "def f():\n    from labs_lib import cli"]
    ):
        (room / f"m{i}.py").write_text(line)
    found = wrong_rooms("world", sorted(room.glob("*.py")), tmp_path / "labs_lib")
    assert [line.split(" imports ")[1] for line in found] == [
        "labs_lib.lab.check",
        "labs_lib.lab",
        "labs_lib.cli",
    ]


def test_methods_import_torch_only():
    """Besides the error class, and the reader of the file format, which loads when a file is read or written."""
    known = sys.stdlib_module_names | {"torch", "safetensors"}
    outside = {
        f"{path.name} imports {name}"
        for path in files("methods")
        for name in imports(path)
        if name.split(".")[0] not in known and not name.startswith(("labs_lib.methods", "labs_lib.errors"))
    }
    assert not outside
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in files("methods")]
    loaded = loaded_after(f"import {', '.join(names)}") - loaded_after("import torch")
    assert loaded - sys.stdlib_module_names == {"labs_lib"}


def test_nothing_imports_the_command_line():
    users = [path.name for path in files() if "labs_lib.cli" in imports(path)]
    assert users == ["__main__.py"]


def test_every_imported_package_is_declared():
    """An import that only another package's dependency satisfies breaks when that one drops it."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    ranges = sum(project["optional-dependencies"].values(), list(project["dependencies"]))
    declared = {canonicalize_name(Requirement(text).name) for text in ranges}
    package_of = {"yaml": "pyyaml", "IPython": "ipykernel", "PIL": "pillow"}
    known = sys.stdlib_module_names | {
        "labs_lib",
        "triton",
    }  # triton: what has it, has it from torch for CUDA
    undeclared = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files()
        for name in imports(path)
        if (top := name.split(".")[0]) not in known
        and canonicalize_name(package_of.get(top, top)) not in declared
    }
    assert not undeclared


def loaded_after(code: str) -> set[str]:
    """Top-level packages that a fresh Python has loaded after running `code`."""
    code += "\nimport sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")[-2].split())


def test_importing_the_course_loads_no_library():
    loaded = loaded_after("import labs_lib; dir(labs_lib)")
    foreign = {name for name in loaded - loaded_after("") if name not in sys.stdlib_module_names}
    assert foreign == {"labs_lib"}


def test_help_loads_no_library():
    code = "from labs_lib.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    foreign = {name for name in loaded_after(code) - loaded_after("") if name not in sys.stdlib_module_names}
    assert foreign == {"labs_lib"}


def test_every_short_name_exists():
    """`from labs_lib import fit` and the like: each promised name is there."""
    for name in labs_lib.__all__:
        assert getattr(labs_lib, name) is not None
