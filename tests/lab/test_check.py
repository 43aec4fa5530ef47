"""`check()`: what it says and hands back for stubs, mistakes, crashes and right answers; the registry behind it."""

import random
import sys

import pytest
import torch

from labs_lib.errors import LabsError
from labs_lib.lab import check as module
from labs_lib.lab.check import (
    FAIL,
    OK,
    CheckFailed,
    Diagnosis,
    answer,
    check,
    close,
    exercise,
    expect,
    find,
    judge,
    mutant,
)

HINTS = ["First hint.", "Second hint."]


class Counter:
    """The reference of the class exercise."""

    def __init__(self, start):
        self.n = start

    def next(self):
        self.n += 1
        return self.n


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """An empty registry with a function, a class and a few short answers; nothing of it stays."""
    monkeypatch.setattr(module, "_registry", {})
    monkeypatch.setattr(module, "_attempts", {})
    monkeypatch.delenv("LABS_STRICT", raising=False)

    @exercise("double", reference=lambda: reference_double, hints=HINTS)
    def _(candidate, ref):
        got = candidate(3)
        expect(got is not None, "it returns None: is a `return` missing?")
        if got == 9:
            raise Diagnosis("that is the square: twice, not squared")
        close(got, ref(3), "double(3)")

    @exercise("Counter", reference=f"{__name__}:Counter" if __name__ in sys.modules else lambda: Counter)
    def _(candidate, ref):
        counter = candidate(4)
        close(counter.next(), 5, "the number after 4")

    answer(
        "lab00.bytes", reference=lambda: 8_000, unit="bytes", hints=HINTS, mistakes={4_000: "one state only"}
    )
    answer("lab00.word", reference="Adam")
    answer("lab00.pair", reference=[1.0, 2.0])
    answer("lab00.guess", reference=0.5, within=(0, 1))


def reference_double(x):
    return 2 * x


def said(capsys):
    return capsys.readouterr().out.splitlines()


# --- what a learner sees


def test_a_right_answer_is_handed_back(capsys):
    def double(x):
        return x + x

    assert check(double) is double
    assert said(capsys) == ["OK    double"]


def test_a_stub_is_todo_and_the_reference_stands_in(capsys):
    def double(x):
        raise NotImplementedError("TODO: double")

    assert check(double) is reference_double
    first, second = said(capsys)
    assert first.startswith("TODO  double: not written yet")
    assert "The course's own double stands in" in second


def test_a_mistake_is_diagnosed_with_the_next_hint_each_time(capsys):
    def double(x):
        return x * x

    lines = []
    for _ in range(3):
        assert check(double) is reference_double
        lines.append(said(capsys))
    assert [each[0] for each in lines] == ["FAIL  double: that is the square: twice, not squared"] * 3
    assert [each[1].strip() for each in lines] == [
        "Hint 1 of 2: First hint.",
        "Hint 2 of 2: Second hint.",
        "Hint 2 of 2: Second hint.",
    ]


def test_observed_and_expected_are_shown(capsys):
    def double(x):
        return x + 1

    check(double)
    assert said(capsys)[0] == "FAIL  double: double(3) is off: observed 4 where 6 is expected"


def test_a_crash_shows_the_exception_and_the_learner_s_line(capsys):
    def double(x):
        y = x + undefined_name  # noqa: F821
        return y

    check(double)
    assert "FAIL  double: NameError: name 'undefined_name' is not defined (line " in (line := said(capsys)[0])
    assert "`y = x + undefined_name" in line


def test_an_answer_the_check_cannot_use_is_told_as_such(capsys):
    def double(x):
        return "six"

    check(double)
    assert "double(3) should be a tensor or a number, got str" in said(capsys)[0]

    def double():
        return 6

    check(double)
    assert "the check could not use what it gave: TypeError" in said(capsys)[0]


def test_a_class_is_todo_until_its_methods_are_written(capsys):
    class Stub:
        def __init__(self, start):
            raise NotImplementedError("TODO: Counter.__init__")

    class Half(Counter):
        def next(self):
            raise NotImplementedError("TODO: Counter.next")

    class Wrong(Counter):
        def next(self):
            return self.n

    assert check(Stub, "Counter") is Counter
    assert check(Half, "Counter") is Counter
    assert check(Wrong, "Counter") is Counter
    assert check(Counter) is Counter
    heads = [line for line in said(capsys) if line[0] != " "]
    assert heads[0].startswith("TODO  Counter: Counter.__init__ is not written yet")
    assert heads[1].startswith("TODO  Counter: Counter.next is not written yet")
    assert heads[2].startswith("FAIL  Counter: the number after 4 is off: observed 4 where 5")
    assert heads[3] == "OK    Counter"


def test_another_not_implemented_error_is_no_todo():
    def double(x):
        raise NotImplementedError("no such kernel")

    assert judge(find("double"), double).status == FAIL


@pytest.mark.parametrize("empty", [None, ..., (1, ...), [None]])
def test_an_empty_short_answer_is_todo(empty, capsys):
    assert check(empty, "lab00.bytes") == 8_000
    first, second = said(capsys)
    assert first.startswith("TODO  bytes") and "The course's answer stands in" in second
    assert "8" not in first + second  # the answer is not given away


@pytest.mark.parametrize(
    ("name", "given", "status", "says"),
    [
        ("lab00.bytes", 8_000, OK, ""),
        ("lab00.bytes", 8_020.0, OK, ""),
        ("lab00.bytes", 4_000, FAIL, "4000 bytes: one state only"),
        ("lab00.bytes", 8.0, FAIL, "8 bytes is 1,000 times too small: check the units"),
        ("lab00.bytes", 9_000, FAIL, "9000 bytes is too large"),
        ("lab00.bytes", -8_000, FAIL, "too small"),
        ("lab00.bytes", "8000", FAIL, "a number is asked for, got '8000'"),
        ("lab00.bytes", True, FAIL, "a number is asked for"),
        ("lab00.bytes", float("nan"), FAIL, "nan"),
        ("lab00.word", " adam ", OK, ""),
        ("lab00.word", "SGD", FAIL, "'SGD' is not it"),
        ("lab00.pair", (1, 2.001), OK, ""),
        ("lab00.pair", [1], FAIL, "2 values are asked for, got 1"),
        ("lab00.guess", 0.99, OK, ""),
        ("lab00.guess", 40, FAIL, "40 cannot be: it lies between 0 and 1"),
    ],
)
def test_short_answers(name, given, status, says):
    outcome = judge(find(name), given)
    assert outcome.status == status
    assert says in outcome.message


def test_strict_raises_on_todo_and_fail_and_not_on_ok(monkeypatch, capsys):
    monkeypatch.setenv("LABS_STRICT", "1")
    with pytest.raises(CheckFailed, match="TODO  bytes"):
        check(..., "lab00.bytes")
    with pytest.raises(CheckFailed, match="FAIL  bytes: 4000 bytes: one state only Hint 1 of 2"):
        check(4_000, "lab00.bytes")
    assert check(8_000, "lab00.bytes") == 8_000


def test_an_unknown_check_suggests_the_nearest():
    with pytest.raises(LabsError, match=r"no check called 'lab00\.byte': did you mean lab00\.bytes"):
        check(1, "lab00.byte")
    with pytest.raises(LabsError, match="pass its name"):
        check(12)


# --- what an author relies on


def test_a_check_draws_the_same_numbers_and_disturbs_nobody_s():
    drawn = []

    @exercise("drawing", reference=lambda: None)
    def _(candidate, ref):
        drawn.append((torch.rand(1).item(), random.random()))

    torch.manual_seed(1)
    random.seed(1)
    expected = torch.rand(1).item(), random.random()
    torch.manual_seed(1)
    random.seed(1)
    judge(find("drawing"), int)
    judge(find("drawing"), int)
    assert (torch.rand(1).item(), random.random()) == expected
    assert drawn[0] == drawn[1] != expected


def test_close_says_what_differs():
    expected = torch.tensor([[1.0, 2.0]])
    close([[1.0, 2.0]], expected, "x")
    for got, says in [
        (None, "x is None: is a `return` missing?"),
        (torch.ones(2, 1), r"x has shape \(2, 1\), expected \(1, 2\)"),
        (torch.tensor([[1.0, 2.5]]), "x is off: observed 2.5 where 2 is expected"),
        (torch.tensor([[float("nan"), 2.0]]), "x contains nan"),
        (object(), "should be a tensor or a number, got object"),
    ]:
        with pytest.raises(Diagnosis, match=says):
            close(got, expected, "x")


def test_mutants_belong_to_an_exercise_that_exists():
    mutant("double", says="square")(lambda x: x * x)
    assert [wrong.says for wrong in find("double").mutants] == ["square"]
    with pytest.raises(LabsError, match="must come after the exercise"):
        mutant("nothing", says="x")(lambda x: x)


def test_two_checks_of_one_name_are_an_error():
    namespace = {"__name__": "another_module", "answer": answer}
    with pytest.raises(LabsError, match=r"Two checks are called 'lab00\.word'"):
        exec("answer('lab00.word', reference='x')", namespace)
