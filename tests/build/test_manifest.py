"""The manifest: what is read from it, and the cells and install lines made from it."""

import ast
import dataclasses

import pytest

from labs_lib.build.manifest import load_manifest
from labs_lib.errors import LabsError


@pytest.fixture
def manifest(course):
    return course.manifest


def at(manifest, repository, release=""):
    return dataclasses.replace(manifest, repository=repository, release=release)


def test_header_and_footer(manifest):
    first, second = manifest.labs
    header = manifest.header(second)
    assert header.startswith("# Lab 91: After\n\n**What comes after?**")
    assert "| [90 Sums](90_sums.ipynb) | 1 / 1 / 1 | Prerequisites, sections 2, 3.1 |" in header
    assert "Previous" not in manifest.footer(first) and "[91 After](91_after.ipynb)" in manifest.footer(first)
    assert "Next" not in manifest.footer(second) and "[90 Sums](90_sums.ipynb)" in manifest.footer(second)


def test_a_badge_needs_an_address_on_github(manifest):
    lab = manifest.labs[0]
    assert "colab" not in manifest.header(lab)
    assert "colab" not in at(manifest, "file:///srv/course").header(lab)
    header = at(manifest, "https://github.com/some/course.git", "v1").header(lab)
    assert "https://colab.research.google.com/github/some/course/blob/v1/notebooks/90_sums.ipynb" in header


def test_install_lines_without_an_address_say_what_to_do(manifest):
    lines = manifest.bootstrap()
    ast.parse(lines)
    namespace: dict = {}
    exec(lines, namespace)  # labs_lib is here: nothing happens
    with pytest.raises(ModuleNotFoundError, match="make lab"):
        exec(lines.replace('"labs_lib"', '"labs_lib_that_is_not_here"'), namespace)


def test_install_lines_with_an_address_clone_its_release(manifest):
    lines = at(manifest, "file:///srv/my course", "v1.2").bootstrap()
    ast.parse(lines)
    assert (
        "'clone', '-q', '--depth', '1', '--branch', 'v1.2', '--', 'file:///srv/my course', 'peft-labs'"
        in lines
    )
    assert "--branch" not in at(manifest, "file:///srv/course").bootstrap()
    assert len(lines.splitlines()) <= 7
    exec(lines, {})  # labs_lib is here: nothing is cloned


def test_the_environment_overrides_the_address(course, monkeypatch):
    monkeypatch.setenv("LABS_REPOSITORY", "file:///elsewhere")
    monkeypatch.setenv("LABS_RELEASE", "v9")
    manifest = load_manifest(course.root / "manifest.yaml")
    assert (manifest.repository, manifest.release) == ("file:///elsewhere", "v9")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("    title: Sums\n", "", "lab 90: missing or unknown key 'title'"),
        ("    title: Sums\n", "    title: Sums\n    colour: red\n", "missing or unknown key 'colour'"),
        ('number: "91"', 'number: "90"', "two labs have the number '90'"),
        ("slug: after", "slug: sums", "two labs have the slug 'sums'"),
        ('number: "90"', "number: 90", "write the number 90 in quotes"),
    ],
)
def test_mistakes_in_a_manifest(course, old, new, says):
    path = course.root / "manifest.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(LabsError, match=says):
        load_manifest(path)


def test_the_course_s_own_manifest_is_in_order():
    labs = load_manifest().labs
    assert [lab.number for lab in labs] == sorted(
        {lab.number for lab in labs}
    )  # labs are written in any order
    numbers = {lab.number for lab in labs}
    for lab in labs:
        assert lab.question.endswith("?") and lab.outcomes
        assert set(lab.minutes) == {"cpu", "t4", "h100"}
        earlier = {p for p in lab.prerequisites if p.isdigit()}
        assert earlier <= numbers and all(p < lab.number for p in earlier)
