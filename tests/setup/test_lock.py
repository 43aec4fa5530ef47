"""One truth about versions: pyproject.toml's ranges, requirements.lock's pins and environment.yml agree."""

import re
import sys

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from labs_lib import bootstrap, lock
from labs_lib.paths import root

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
PROJECT = tomllib.loads((root() / "pyproject.toml").read_text())["project"]
LOCK = (root() / "requirements.lock").read_text()
CONDA = yaml.safe_load((root() / "environment.yml").read_text())["dependencies"]


def pins(python: str, system: str, machine: str) -> dict[str, str]:
    """What the lock installs there: name -> version. Fails when a name has two versions."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": system,
        "platform_machine": machine,
        "os_name": "posix",
        "platform_system": system.capitalize(),
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    found: dict[str, str] = {}
    for line in LOCK.splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            assert requirement.name not in found, f"two pins of {requirement.name} for Python {python}"
            found[canonicalize_name(requirement.name)] = pin.version
    return found


@pytest.mark.parametrize(("system", "machine"), PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_satisfies_every_range_of_pyproject(python, system, machine):
    ranges = list(PROJECT["dependencies"])
    for extra in lock.EXTRAS:
        ranges += PROJECT["optional-dependencies"][extra]
    pinned = pins(python, system, machine)
    for text in ranges:
        requirement = Requirement(text)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in requirements.lock: run `make lock`"
        assert requirement.specifier.contains(version), f"{text}, but the lock has {version}: run `make lock`"


def test_the_lock_names_no_cuda_package_and_no_address():
    assert lock.without_cuda(LOCK) == LOCK
    assert not re.search(r"nvidia|triton|://|--(extra-)?index|--find-links| @ ", LOCK)


def test_cuda_lines_are_dropped_and_no_others():
    text = "a==1\ncuda-toolkit==13.0\nnvidia-nccl-cu13==2 ; sys_platform == 'linux'\ntriton==3.7\ntritonclient==2\n"
    assert lock.without_cuda(text) == "a==1\ntritonclient==2\n"


def test_torch_is_held_where_the_lock_says_so_and_never_replaced_elsewhere():
    assert lock.HELD in LOCK.splitlines()
    assert bootstrap.torch_pin(root()) == lock.HELD
    (torch,) = (Requirement(text) for text in PROJECT["dependencies"] if text.startswith("torch"))
    assert all(torch.specifier.contains(v) for v in ("2.6.0", "2.9.1+cu126", "2.15.0", "2.99.0")), torch


def test_conda_brings_python_and_pip_and_pip_brings_the_lock():
    *conda, pip = CONDA
    names = {re.match(r"[a-z]+", text).group(0): text for text in conda}
    assert set(names) == {"python", "pip"}
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}
    assert SpecifierSet(names["python"].removeprefix("python")) == SpecifierSet(PROJECT["requires-python"])


def test_supported_pythons_are_the_same_everywhere():
    allowed = SpecifierSet(PROJECT["requires-python"])
    for minor in range(8, 16):
        assert allowed.contains(f"3.{minor}.1") == bootstrap.supported((3, minor)), f"Python 3.{minor}"
        assert bootstrap.supported((3, minor)) == (f"3.{minor}" in PYTHONS)
    assert sorted(bootstrap.PREFERRED) == sorted(PYTHONS)
