"""The fixture course (two tiny labs) in a folder of its own, and a kernel that can import what it needs."""

import os
import shutil
from pathlib import Path

import pytest

from labs_lib.build.manifest import load_manifest
from labs_lib.build.notebooks import Course

FIXTURE = Path(__file__).parent / "fixture"
REPOSITORY = Path(__file__).parents[2]


def copy_course(folder: Path) -> Course:
    shutil.copytree(FIXTURE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return Course(folder, load_manifest(folder / "manifest.yaml"))


@pytest.fixture(scope="session", autouse=True)
def importable():
    """Kernels and this process find the fixture's modules, and this checkout's labs_lib."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FIXTURE)
        path = [str(FIXTURE), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        patch.delenv("LABS_REPOSITORY", raising=False)
        patch.delenv("LABS_RELEASE", raising=False)
        yield


@pytest.fixture
def course(tmp_path) -> Course:
    """A fresh copy of the fixture course."""
    return copy_course(tmp_path / "course")


@pytest.fixture
def edit(course):
    """edit(old, new): change the source of lab 90."""

    def change(old: str, new: str) -> None:
        path = course.root / "solutions" / "90_sums.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


@pytest.fixture(scope="session")
def executed(tmp_path_factory) -> Course:
    """The fixture course, built and executed once; read only."""
    from labs_lib.build.notebooks import build

    course = copy_course(tmp_path_factory.mktemp("executed") / "course")
    assert build(course, course.manifest.labs, execute=True) == []
    return course
