"""A notebook where labs_lib is missing, as on Colab: a clean environment, a clone at a tag, run by papermill."""

import dataclasses
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest

from labs_lib.lab import install

REPOSITORY = Path(__file__).parents[2]
SHIPPED = ("labs_lib", "data", "pyproject.toml", "README.md", "LICENSE")
SETUP = """
from labs_lib import setup

lab = setup(lab="00", profile=PROFILE)
import labs_lib, torch
print(labs_lib.__file__)
print(torch.__version__)
"""


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """A repository of this checkout's files with a tag, as file:// address."""
    folder = tmp_path_factory.mktemp("remote") / "the course"
    folder.mkdir()
    for name in SHIPPED:
        source = REPOSITORY / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "A release")
    git(folder, "tag", "v1")
    (folder / "labs_lib" / "__init__.py").write_text("raise RuntimeError('not the release')")
    git(folder, "commit", "-q", "-a", "-m", "Work after the release")
    return f"file://{folder}"


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An interpreter with torch, Jupyter and papermill, and without labs_lib."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    made = folder / "bin" / "python"
    script = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run([made, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    # packages are found through the path file; the .pth of an editable labs_lib among them is not
    (Path(own) / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    script = "import importlib.util as u, torch; print(u.find_spec('labs_lib'))"
    found = subprocess.run(
        [made, "-c", script], capture_output=True, text=True, env=environment(), cwd=folder
    )
    if found.stdout.strip() != "None":
        pytest.skip("labs_lib itself is among the packages here")
    return made


def environment() -> dict[str, str]:
    """No path to this checkout, no network: pip must find everything satisfied, the build backend included."""
    own = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "LABS_HOME", "PROFILE")
    }
    return own | {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_CONFIG_FILE": os.devnull}


def run(python: Path, folder: Path, bootstrap: str) -> tuple[str, str]:
    """Run a notebook of the parameters and setup cells; returns what it printed and papermill's complaint."""
    cells = [nbformat.v4.new_code_cell(source) for source in ('PROFILE = ""', bootstrap + SETUP.lstrip())]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "given.ipynb"
    )
    command = [
        python,
        "-m",
        "papermill",
        "given.ipynb",
        "done.ipynb",
        "-p",
        "PROFILE",
        "smoke",
        "-k",
        "python3",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())
    outputs = [o for c in nbformat.read(folder / "done.ipynb", 4).cells for o in c.get("outputs", [])]
    return "".join(o.get("text", "") for o in outputs), done.stderr


@pytest.mark.slow
def test_the_first_cells_fetch_the_release_and_leave_torch_alone(course, address, python, tmp_path):
    import torch

    manifest = dataclasses.replace(course.manifest, repository=address, release="v1")
    printed, complaint = run(python, tmp_path, manifest.bootstrap())
    lines = printed.splitlines()
    assert lines[-1:] == [torch.__version__], printed + complaint
    assert lines[-2] == str(tmp_path / "peft-labs" / "labs_lib" / "__init__.py")
    assert "profile smoke" in lines[-3]
    # a second kernel finds it installed, and clones nothing
    (tmp_path / "peft-labs" / "labs_lib" / "lab" / "install.py").write_text("raise SystemExit('run again')")
    printed, complaint = run(python, tmp_path, manifest.bootstrap())
    assert printed.splitlines()[-1:] == [torch.__version__], printed + complaint
    assert "Installing" not in printed


def test_what_a_kernel_has_loaded_is_pinned():
    from importlib.metadata import version

    assert f"torch=={version('torch')}" in install.constraints()
    assert f"numpy=={version('numpy')}" in install.constraints()
