"""`labs grade`: what a fresh run's checks say counts, whatever a notebook holds, does or breaks."""

import argparse
import csv
import shutil

import pytest

from labs_lib.build import grade
from labs_lib.build.notebooks import dumps, read_notebook
from labs_lib.build.source import SOLUTION, STUDENT
from labs_lib.errors import LabsError


@pytest.fixture
def handed_in(executed, tmp_path):
    """handed_in(name, kind, old, new): a copy of lab 90 with a change, as a learner's file."""
    import fixture_lab90  # noqa: F401 (its checks, as a real lab's would be found by its number)

    entry = executed.manifest.labs[0]

    def hand_in(name, kind=STUDENT, old="", new=""):
        notebook = read_notebook(executed.path(entry, kind))
        texts = [cell["source"] for cell in notebook["cells"]]
        assert any(old in text for text in texts)
        for cell in notebook["cells"]:
            cell["source"] = cell["source"].replace(old, new, 1) if old else cell["source"]
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dumps(notebook))
        return path

    return hand_in


def statuses(rows):
    return {row.exercise.rpartition(".")[2]: row.status for row in rows}


def test_solved_untouched_and_broken_are_told_apart(handed_in):
    solved = grade.grade(handed_in("ann.ipynb", SOLUTION), "ann")
    assert set(statuses(solved).values()) == {"OK"} and not solved[0].error and solved[0].lab == "90"
    untouched = grade.grade(handed_in("ben.ipynb"), "ben")
    assert set(statuses(untouched).values()) == {"TODO"}
    broken = grade.grade(handed_in("cid.ipynb", SOLUTION, "mean = check(mean)", "1 / 0"), "cid")
    assert statuses(broken) == {**statuses(solved), "mean": grade.NOT_REACHED}, "later exercises are graded"
    assert "ZeroDivisionError" in broken[0].error


def test_a_stored_or_printed_ok_counts_for_nothing(handed_in):
    faked = grade.grade(handed_in("dot.ipynb", STUDENT, "mean = check(mean)", "print('OK    mean')"), "dot")
    assert statuses(faked)["mean"] == grade.NOT_REACHED


def test_a_notebook_that_hangs_is_stopped(handed_in):
    path = handed_in("eve.ipynb", SOLUTION, "mean = check(mean)", "while True: pass")
    rows = grade.grade(path, "eve", limit=15)
    assert rows[0].error == "stopped after 15 s" and statuses(rows)["mean"] == grade.NOT_REACHED


def test_what_is_no_notebook_is_a_row(tmp_path):
    (tmp_path / "90_x.ipynb").write_text("{")
    (row,) = grade.grade(tmp_path / "90_x.ipynb", "x")
    assert "can be read" in row.error


def test_the_command_writes_a_row_per_check(handed_in, tmp_path, capsys):
    path = handed_in("fay/90_sums.ipynb", SOLUTION)
    copy = path.parent / ".ipynb_checkpoints" / path.name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    parser = argparse.ArgumentParser()
    grade.add_arguments(parser)
    assert grade.main(parser.parse_args([str(tmp_path / "in")])) == 0
    rows = list(csv.DictReader((tmp_path / "in" / "grades.csv").open()))
    assert {row["notebook"] for row in rows} == {"fay/90_sums.ipynb"} and len(rows) == 3
    assert "3 OK" in capsys.readouterr().out
    with pytest.raises(LabsError, match="is not a folder"):
        grade.main(parser.parse_args([str(tmp_path / "nowhere")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabsError, match="no notebooks"):
        grade.main(parser.parse_args([str(tmp_path / "empty")]))
