"""Every exercise of every lab: the reference passes, each listed mistake gets its own words, a stub is TODO."""

import pytest

from labs_lib.build.inline import import_lines, module
from labs_lib.build.notebooks import this_course
from labs_lib.errors import LabsError
from labs_lib.lab.check import FAIL, OK, TODO, find, judge, labs_with_checks, load_checks

EXERCISES = [exercise for lab in labs_with_checks() for exercise in load_checks(lab)]
CODE = [exercise for exercise in EXERCISES if not exercise.is_answer]


def sources():
    course = this_course()
    return [course.source(entry) for entry in course.manifest.labs if course.source_path(entry).is_file()]


# (lab's source, module, name) of each exercise that a lab inlines
INLINED = [(source, *each) for source in sources() for each in source.exercises()]


def title(value):
    return getattr(value, "name", None) or str(value)


@pytest.mark.parametrize("exercise", EXERCISES, ids=title)
def test_the_reference_passes(exercise):
    outcome = judge(exercise, exercise.reference())
    assert (outcome.status, outcome.message) == (OK, "")


@pytest.mark.parametrize(
    ("exercise", "mutant"),
    [(e, m) for e in EXERCISES for m in e.mutants],
    ids=lambda v: getattr(v, "says", None) or v.name,
)
def test_each_mistake_is_diagnosed_in_its_own_words(exercise, mutant):
    outcome = judge(exercise, mutant.candidate)
    assert outcome.status == FAIL, f"{mutant.says}: {outcome.message}"
    assert mutant.says in outcome.message


@pytest.mark.parametrize("exercise", EXERCISES, ids=title)
def test_mistakes_are_listed_and_told_apart(exercise):
    messages = [judge(exercise, mutant.candidate).message for mutant in exercise.mutants]
    assert len(messages) >= (2 if exercise in CODE else 1), "list the mistakes people make"
    assert len(set(messages)) == len(messages), messages


@pytest.mark.parametrize("exercise", EXERCISES, ids=title)
def test_an_empty_answer_is_todo(exercise):
    assert judge(exercise, ...).status == TODO


@pytest.mark.parametrize(("source", "path", "name"), INLINED, ids=lambda v: v if isinstance(v, str) else "")
def test_the_untouched_stub_is_todo(source, path, name):
    """The stub as the student notebook has it, beside the references of the exercises before it."""
    namespace: dict = {}
    for other_path, other in source.exercises():
        made = module(other_path).inline(other)
        exec("\n".join(import_lines(need for need in made.imports if need.name not in namespace)), namespace)
        if (other_path, other) == (path, name):
            exec(made.stub, namespace)
            break
        namespace[other] = find(other).reference()
    outcome = judge(find(name), namespace[name])
    assert outcome.status == TODO, f"a vacuous check: the stub gets {outcome.status} {outcome.message}"


def test_every_exercise_of_every_lab_has_a_check():
    for _, _, name in INLINED:
        try:
            find(name)
        except LabsError as error:
            pytest.fail(str(error))
