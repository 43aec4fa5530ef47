"""`progress()`: every exercise of the lab in its order, and the claims observed."""

import pytest

from labs_lib.lab import check as module
from labs_lib.lab.check import answer, check
from labs_lib.lab.progress import progress, report
from labs_lib.measure import claims, context


@pytest.fixture(autouse=True)
def lab(monkeypatch):
    """Lab 98 with three short answers, in a registry of its own."""
    monkeypatch.setattr(module, "_registry", {})
    monkeypatch.setattr(module, "_attempts", {})
    monkeypatch.setattr(claims, "_observed", [])
    monkeypatch.delenv("LABS_STRICT", raising=False)
    exec(
        "for name in ('first', 'second', 'third'): answer(f'lab98.{name}', reference=1)",
        {"__name__": "checks_of_lab98", "answer": answer},
    )
    context.set(lab="98", profile="cpu")
    yield
    context.reset()


def test_every_exercise_has_a_row_also_those_never_checked(capsys):
    check(1, "lab98.third")
    check(2, "lab98.second")
    check(2, "lab98.second")
    assert report().exercises == [
        ("first", "TODO", "not checked yet"),
        ("second", "FAIL", "after 2 checks"),
        ("third", "OK", ""),
    ]
    capsys.readouterr()
    progress()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 of 3 exercises OK"
    assert lines[2] == "  second  FAIL  after 2 checks"


def test_a_later_success_counts():
    check(2, "lab98.first")
    check(1, "lab98.first")
    assert report().exercises[0] == ("first", "OK", "after 2 checks")


def test_claims_are_listed_once_with_their_verdict(monkeypatch, tmp_path):
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    for _ in range(2):
        claims.claim(8).observe(0.593)
    ((what, verdict, _),) = report().claims
    assert what.startswith("claim 8: ")
    assert verdict == claims.observed()[-1].word
    assert "1 claim put on trial" in report().headline


def test_html_is_escaped(monkeypatch):
    monkeypatch.setattr(module, "_registry", {})
    exec("answer('lab98.a<b', reference=1)", {"__name__": "checks_of_lab98", "answer": answer})
    assert "a&lt;b" in report()._repr_html_()


def test_a_lab_without_exercises_says_so():
    context.set(lab="97")
    assert "no exercises yet" in repr(report())
