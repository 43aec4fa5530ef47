"""`labs run` and `labs course`, on real kernels: what passes, what fails and how it is told, time and memory."""

import shutil

import nbformat
import pytest

from labs_lib.build import report
from labs_lib.build.manifest import Entry
from labs_lib.build.notebooks import Course, build, dumps, generate, read_notebook
from labs_lib.build.run import Job, Task, run_job, run_tasks
from labs_lib.build.source import SOLUTION, STUDENT
from labs_lib.errors import LabsError

MEGABYTE = 10**6


def notebook(path, *sources):
    """A notebook without torch, so that its kernel starts fast; its first cell holds the parameters."""
    cells = [nbformat.v4.new_code_cell(source) for source in ('PROFILE = ""', *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def test_a_run_passes_profile_and_strictness_and_measures_memory(tmp_path):
    given = notebook(
        tmp_path / "a.ipynb",
        "import os, time, pathlib\nprint(PROFILE, os.environ['LABS_STRICT'], pathlib.Path.cwd().name)",
        f"block = bytearray({300 * MEGABYTE})\ntime.sleep(0.5)",
    )
    result = run_job(Job(given, tmp_path / "done.ipynb", tmp_path, "smoke", strict=True))
    assert result.error == ""
    assert 300 * MEGABYTE < result.peak_bytes < 900 * MEGABYTE
    printed = [
        o["text"] for c in read_notebook(tmp_path / "done.ipynb")["cells"] for o in c.get("outputs", [])
    ]
    assert printed == [f"smoke 1 {tmp_path.name}\n"]


@pytest.mark.parametrize(("alone", "told"), [(True, "1"), (False, "0")])
def test_what_a_notebook_measures_beside_others_is_not_the_course_s_record(
    alone, told, tmp_path, monkeypatch
):
    """A clock that others share is wrong: `labs gpu` runs several at a time and records only how they ended."""
    monkeypatch.setenv("LABS_RECORD", "1")
    given = notebook(tmp_path / "a.ipynb", "import os\nprint(os.environ['LABS_RECORD'])")
    assert not run_job(Job(given, tmp_path / "done.ipynb", tmp_path, "smoke", alone=alone)).error
    outputs = [o for c in read_notebook(tmp_path / "done.ipynb")["cells"] for o in c.get("outputs", [])]
    assert [o["text"] for o in outputs] == [f"{told}\n"]


def test_a_failing_cell_is_named_with_its_traceback_and_the_copy_is_kept(tmp_path):
    given = notebook(tmp_path / "a.ipynb", "x = 1", "def f():\n    return x / 0\nf()", "print('not reached')")
    cell = nbformat.read(given, as_version=4).cells[2].id
    result = run_job(Job(given, tmp_path / "done.ipynb", tmp_path, "smoke"))
    assert result.error.startswith(f"cell {cell}: ZeroDivisionError: division by zero")
    assert "return x / 0" in result.error
    assert (tmp_path / "done.ipynb").is_file()


def test_a_dead_kernel_is_a_failure_not_a_crash(tmp_path):
    given = notebook(tmp_path / "a.ipynb", "import os\nos._exit(9)")
    assert "the kernel died" in run_job(Job(given, tmp_path / "done.ipynb", tmp_path, "smoke")).error


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two labs of one cell each: the first runs, the second fails; and a list with a line for each."""
    root = tmp_path_factory.mktemp("pair")
    (root / "notebooks").mkdir()
    labs = [
        Entry(number, slug, slug, f"{slug}?", [], [], {}, [])
        for number, slug in (("90", "good"), ("91", "bad"))
    ]
    notebook(root / "notebooks" / "90_good.ipynb", "1 + 1")
    notebook(root / "notebooks" / "91_bad.ipynb", "raise ValueError('on purpose')")
    from labs_lib.build.manifest import Manifest

    return Course(root, Manifest(labs))


def test_a_list_of_notebooks_in_parallel(pair, capsys):
    tasks = [Task(entry, STUDENT, "smoke", strict=False) for entry in pair.manifest.labs]
    results = run_tasks(pair, tasks, pair.root / "executed", workers=2)
    assert [bool(result.error) for result in results] == [False, True]
    printed = capsys.readouterr().out
    assert "notebooks/90_good.ipynb  smoke  ok" in printed
    assert "ValueError: on purpose" in printed
    assert "executed/91_bad.student.ipynb" in printed
    assert "1 passed, 1 failed" in printed


def test_a_report_of_both(pair):
    assert report.course(pair, "smoke", STUDENT) == 1
    folder = pair.root / "build" / "report"
    index = (folder / "index.html").read_text()
    assert (
        '<a href="90_good.html">' in index
        and "1 labs ran, 1 failed" in index
        and "ValueError: on purpose" in index
    )
    assert "ValueError" in (folder / "91_bad.html").read_text()


def test_a_fresh_run_takes_the_notebook_as_built_not_as_saved(executed, tmp_path, capsys):
    entry = executed.manifest.labs[1]
    broken = Course(tmp_path / "course", executed.manifest)
    shutil.copytree(executed.root, broken.root)
    broken.path(entry, STUDENT).write_text("half an ans")
    (result,) = run_tasks(broken, [Task(entry, STUDENT, "smoke", False, fresh=True)], tmp_path / "done")
    assert result.error == ""


def test_a_missing_notebook_is_a_sentence(pair):
    with pytest.raises(LabsError, match=r"solutions/90_good.ipynb is missing: run `labs build 90`"):
        run_tasks(pair, [Task(pair.manifest.labs[0], SOLUTION, "cpu", strict=True)], pair.root / "executed")


def test_an_untouched_student_notebook_runs_and_says_todo_for_every_check(executed, tmp_path):
    entry = executed.manifest.labs[0]
    result = run_job(Job(executed.path(entry, STUDENT), tmp_path / "done.ipynb", tmp_path, "smoke"))
    assert result.error == ""
    printed = "".join(
        o.get("text", "")
        for c in read_notebook(tmp_path / "done.ipynb")["cells"]
        for o in c.get("outputs", [])
    )
    assert [line.split(":")[0] for line in printed.splitlines() if line[:4] in ("OK  ", "TODO", "FAIL")] == [
        "TODO  mean",
        "TODO  Scaler",
        "TODO  dozen",
    ]
    assert "profile smoke" in printed


def test_a_page_shows_alt_text_and_folds_hidden_cells(executed, tmp_path):
    report.page(executed.path(executed.manifest.labs[0], SOLUTION), tmp_path / "page.html", "Lab 90")
    page = (tmp_path / "page.html").read_text()
    assert page.count("A line from half an egg at step 1 to a dozen at step 2.") == 1
    assert 'alt="A line from half an egg at step 1 to a dozen at step 2."' in page
    assert "subplots" not in page
    assert 'href="91_after.html"' in page


def test_a_built_notebook_survives_papermill_s_own_reading(course, tmp_path):
    """No warnings about the format, and the ids come through: outputs are matched by them."""
    build(course, course.manifest.labs)
    notebook = generate(course, course.manifest.labs[1]).notebooks[STUDENT]
    path = tmp_path / "x.ipynb"
    path.write_text(dumps(notebook))
    assert [c["id"] for c in read_notebook(path)["cells"]] == [c["id"] for c in notebook["cells"]]
