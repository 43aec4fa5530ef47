"""The way in for Colab and rented GPUs: a notebook alone, in a Python that has torch but no labs_lib.

For real: a fresh environment that sees this one's packages (as Colab has them) but not the course, a repository made
from this working tree with a `file://` address, and lab 00's student notebook, run by papermill in an empty folder.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from labs_lib.build.manifest import load_manifest
from labs_lib.build.notebooks import Course, dumps, generate
from labs_lib.paths import root

TAG = "v0"


def run(*command: str | Path, cwd: Path | None = None, **environ: str) -> str:
    dropped = ("PYTHONPATH", "LABS_HOME", "LABS_CACHE", "LABS_STRICT", "PROFILE", "MODEL_ID")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    done = subprocess.run(command, cwd=cwd, env=kept | environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """A repository with what git would take from this working tree, committed and tagged."""
    if not (root() / ".git").exists():
        pytest.skip("not a git checkout")
    copy = tmp_path_factory.mktemp("origin")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=root())
    for name in filter(None, listed.split("\0")):
        if (root() / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root() / name, copy / name)
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "course"), ("tag", TAG)):
        run(*git, *words, cwd=copy)
    return f"file://{copy}"


@pytest.fixture(scope="module")
def colab(tmp_path_factory) -> Path:
    """The Python of an environment with every package that is here except the course."""
    env = tmp_path_factory.mktemp("colab")
    run(sys.executable, "-m", "venv", env)
    run(
        env / "bin" / "pip", "uninstall", "-qy", "setuptools"
    )  # an old one, up to Python 3.11, would hide ours
    (site,) = (env / "lib").glob("python*/site-packages")
    # A folder named in a .pth file is searched, but its own .pth files (the editable course) are not read.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return env / "bin" / "python"


def torch_of(python: Path) -> str:
    code = "import importlib.metadata as m; d = m.distribution('torch'); print(d.version, d.locate_file('torch'))"
    return run(python, "-c", code)


@pytest.mark.slow
def test_a_notebook_alone_fetches_the_course_and_runs(address, colab, tmp_path, monkeypatch):
    monkeypatch.setenv("LABS_REPOSITORY", address)
    monkeypatch.setenv("LABS_RELEASE", TAG)
    course = Course(root(), load_manifest())
    notebook = tmp_path / "lab.ipynb"
    notebook.write_text(dumps(generate(course, course.manifest.labs[0]).notebooks["student"]))
    absent = "import importlib.util, sys; sys.exit(importlib.util.find_spec('labs_lib') is not None)"
    run(colab, "-c", absent, cwd=tmp_path)
    before = torch_of(colab)

    # Nothing may be fetched but the course: with no index, a pip that wants another torch fails.
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "HF_HUB_OFFLINE": "1", "LABS_STRICT": "0"}
    output = tmp_path / "executed.ipynb"
    words = (
        "-m",
        "papermill",
        notebook,
        output,
        "-p",
        "PROFILE",
        "smoke",
        "-k",
        "python3",
        "--no-progress-bar",
    )
    run(colab, *words, cwd=tmp_path, **offline)

    assert torch_of(colab) == before
    where = run(colab, "-c", "import labs_lib; print(labs_lib.__file__)", cwd=tmp_path.parent).strip()
    assert Path(where) == tmp_path / "peft-labs" / "labs_lib" / "__init__.py"
    assert f"lab {course.manifest.labs[0].number} | profile smoke" in output.read_text()
