"""The course's own labs: sources keep the rules, the names they check are registered, notebooks are current."""

import pytest

from labs_lib.build.lint import check_names
from labs_lib.build.notebooks import check, generate, this_course
from labs_lib.build.source import SOLUTION, STUDENT, read_source
from labs_lib.lab.check import find, load_checks

COURSE = this_course()
LABS = COURSE.manifest.labs


@pytest.mark.parametrize("entry", LABS, ids=lambda entry: entry.stem)
def test_a_source_keeps_the_rules(entry):
    assert [str(problem) for problem in generate(COURSE, entry).problems] == []


@pytest.mark.parametrize("entry", LABS, ids=lambda entry: entry.stem)
def test_the_notebooks_are_what_a_build_writes(entry):
    """Work that somebody has saved in one is noted; `labs build --check` in continuous integration refuses it."""
    assert [str(problem) for problem in check(COURSE, [entry]) if not problem.note] == []


@pytest.mark.parametrize("entry", LABS, ids=lambda entry: entry.stem)
def test_a_lab_checks_exactly_its_registered_exercises(entry):
    source = read_source(COURSE.source_path(entry))
    names = check_names(source)
    for name in names:
        find(name)
    assert sorted(names) == sorted(exercise.name for exercise in load_checks(entry.number))


@pytest.mark.parametrize("entry", LABS, ids=lambda entry: entry.stem)
def test_code_cells_are_short(entry):
    """House style: a median of 12 lines at most, exercises (the library's own functions) and folded cells apart."""
    apart = {"exercise", "hide-input"}
    for kind in (STUDENT, SOLUTION):
        cells = [c for c in generate(COURSE, entry).notebooks[kind]["cells"] if c["cell_type"] == "code"]
        read = [c for c in cells if not apart & set(c["metadata"].get("tags", []))]
        lines = sorted(len(c["source"].splitlines()) for c in read)
        assert lines[len(lines) // 2] <= 12, lines
