"""The environment's builder, run as a user meets it: the wrong Python, a full disk, no network, an interruption.

A tiny course stands in for the real one: the same script, a lock of one local package, a build backend of 20 lines.
It needs no network, and its build waits for a file named `go`, so that it can be interrupted in the middle.
"""

import ast
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labs_lib import bootstrap

SCRIPT = Path(bootstrap.__file__)

BACKEND = """
import pathlib, time, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    start = time.monotonic()
    while not pathlib.Path({go!r}).exists() and time.monotonic() < start + 300:
        pathlib.Path({go!r} + ".wanted").touch()
        time.sleep(0.05)
    info = "{name}-1.0.dist-info"
    files = {{"{name}.py": "here = True\\n",
             info + "/METADATA": "Metadata-Version: 2.1\\nName: {name}\\nVersion: 1.0\\n",
             info + "/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"}}
    files[info + "/RECORD"] = "".join(f"{{path}},,\\n" for path in [*files, info + "/RECORD"])
    with zipfile.ZipFile(pathlib.Path(folder, "{name}-1.0-py3-none-any.whl"), "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return "{name}-1.0-py3-none-any.whl"

build_editable = build_wheel
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "{name}"
version = "1.0"
"""


def make_project(folder: Path, name: str, go: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "backend.py").write_text(BACKEND.format(name=name, go=str(go)))
    (folder / "pyproject.toml").write_text(PROJECT.format(name=name))


def make_course(root: Path) -> Path:
    make_project(root, "course", go=SCRIPT)
    make_project(root / "part", "part", go=root / "go")
    (root / "requirements.lock").write_text("# torch comes from elsewhere\n./part\n")
    (root / "labs_lib").mkdir()
    shutil.copy(SCRIPT, root / "labs_lib" / "bootstrap.py")
    return root


def start(root: Path, python: str = sys.executable, **environ: str) -> subprocess.Popen:
    """The script, as make calls it; the CPU index is out of reach, so that nothing leaves this machine."""
    return subprocess.Popen(
        [python, "-I", str(root / "labs_lib" / "bootstrap.py")],
        env={**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "PIP_NO_INDEX": "1", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """A tiny course whose first installation was killed and whose second was completed."""
    root = make_course(tmp_path_factory.mktemp("course"))
    process = start(root)
    deadline = time.monotonic() + 300
    while not (root / "go.wanted").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    said, _ = process.communicate()
    assert (root / "go.wanted").exists(), "the installation never came to the package"
    if sys.platform == "linux" and not bootstrap.has_nvidia_gpu():
        assert f"{bootstrap.TORCH_CPU} does not answer" in said
    assert (root / ".venv").exists() and not (root / ".venv" / "complete").exists()
    (root / "go").touch()
    status, out, err = finish(start(root))
    assert status == 0, err
    assert "Completing the environment" in out
    return root


def imports(root: Path, name: str) -> bool:
    done = subprocess.run([root / ".venv" / "bin" / "python", "-c", f"import {name}"], capture_output=True)
    return done.returncode == 0


def test_an_interrupted_installation_is_completed(course):
    assert imports(course, "part") and imports(course, "course")


def test_the_second_run_does_nothing(course):
    before = (course / ".venv" / "install.log").stat()
    assert finish(start(course)) == (0, "", "")
    assert (course / ".venv" / "install.log").stat() == before


def test_a_half_unpacked_package_is_installed_anew(course):
    (site,) = (course / ".venv" / "lib").glob("python*/site-packages")
    (site / "part-1.0.dist-info" / "INSTALLER").unlink()
    (site / "part.py").unlink()
    (course / ".venv" / "complete").unlink()
    assert not imports(course, "part")
    assert finish(start(course))[0] == 0
    assert imports(course, "part")


def test_a_changed_lock_is_installed(course):
    make_project(course / "more", "more", go=SCRIPT)
    with (course / "requirements.lock").open("a") as lock:
        lock.write("./more\n")
    assert finish(start(course))[0] == 0
    assert imports(course, "more")


def test_ctrl_c_says_how_to_go_on(course):
    (course / ".venv" / "complete").unlink()
    for name in ("go", "go.wanted"):
        (course / name).unlink()
    process = start(course)
    while not (course / "go.wanted").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    status, _, err = finish(process)
    (course / "go").touch()
    assert status == 130
    assert "Run the same command again" in err and "Traceback" not in err


def test_without_network_there_is_one_sentence(course):
    (course / ".venv" / "complete").unlink(missing_ok=True)
    lock = course / "requirements.lock"
    kept = lock.read_text()
    lock.write_text("a-package-that-is-not-there==1.0\n")
    status, _, err = finish(start(course, PIP_NO_INDEX="0", PIP_INDEX_URL="http://127.0.0.1:9/simple"))
    lock.write_text(kept)
    assert status == 1
    assert "The package index cannot be reached" in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_an_environment_that_was_moved_is_not_used(course, tmp_path):
    assert bootstrap.usable(course / ".venv")
    shutil.copytree(course / ".venv", tmp_path / ".venv", symlinks=True)
    assert not bootstrap.usable(tmp_path / ".venv")


def test_clean_removes_environment_and_caches_only(tmp_path):
    for name in (".venv/lib", ".cache/runs", "labs_lib/__pycache__", "notebooks"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "notebooks" / "00.ipynb").touch()
    bootstrap.clean(tmp_path, environment=True)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "labs_lib", "notebooks", "notebooks/00.ipynb"
    ]  # fmt: skip


# --- before anything is installed


def run_as(version: tuple[int, int, int], path: str) -> subprocess.CompletedProcess:
    """The script in a Python that says it is `version`, where PATH is `path`."""
    code = (
        f"import runpy, sys; sys.version_info = {version!r}; runpy.run_path({str(SCRIPT)!r})['find_python']()"
    )
    return subprocess.run(
        [sys.executable, "-c", code], env={"PATH": path}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0)])
def test_the_wrong_python_is_named_with_the_way_out(tmp_path, version):
    done = run_as(version, path=str(tmp_path))
    message = done.stderr.strip().splitlines()[-1]
    assert "3.10, 3.11, 3.12 or 3.13" in message and f"{version[0]}.{version[1]}" in message
    assert "make PYTHON=" in message


def test_with_the_wrong_python_another_one_on_the_path_is_taken(tmp_path):
    (tmp_path / "python3.12").symlink_to(sys.executable)
    done = run_as((3, 9, 18), path=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_python_without_venv_is_named(tmp_path):
    broken = tmp_path / "python3.11"
    broken.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'ensurepip'\" >&2\nexit 1\n")
    broken.chmod(0o755)
    message = run_as((3, 9, 18), path=f"{tmp_path}:/bin").stderr
    assert "python3-venv" in message and str(broken) in message


def test_a_full_disk_is_told_in_numbers(tmp_path):
    free = shutil.disk_usage(tmp_path).free / 1e9
    bootstrap.check_disk(tmp_path, need=0.0)
    with pytest.raises(
        bootstrap.SetupError, match=rf"about {free + 100:.1f} GB more .* only \d+\.\d GB are free"
    ):
        bootstrap.check_disk(tmp_path, need=free + 100)


def test_the_disk_filling_up_on_the_way_is_recognised(tmp_path):
    message = bootstrap.Pip(tmp_path).diagnosis(
        "ERROR: Could not install packages: [Errno 28] No space left on device"
    )
    assert "disk is full" in message and "TMPDIR" in message


def test_an_unreachable_address_costs_seconds_at_most():
    start_of_wait = time.monotonic()
    assert not bootstrap.reachable("http://127.0.0.1:9/", seconds=1.0)
    assert time.monotonic() - start_of_wait < 30


def test_any_python3_can_read_the_script():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    imported = {alias.name for node in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(node, ast.Import)
                for alias in node.names}  # fmt: skip
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
