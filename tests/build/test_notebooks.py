"""`labs build` and its `--check`: the same text every time, every difference named, outputs tied to their code."""

import argparse
import json
import sys

import pytest

from labs_lib.build.notebooks import (
    build,
    check,
    clean_outputs,
    dumps,
    generate,
    read_notebook,
    with_outputs,
    without_outputs,
)
from labs_lib.build.source import SOLUTION, STUDENT
from labs_lib.errors import LabsError


def told(course, strict=True):
    return [str(problem) for problem in check(course, course.manifest.labs, strict)]


def failures(course):
    """What a person is told that is not only a note."""
    return [str(problem) for problem in check(course, course.manifest.labs) if not problem.note]


def rewrite(path, change):
    """Apply change(notebook as JSON) to a stored notebook."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def outputs_of(notebook, text="hello\n"):
    """`notebook` as if it had been executed, each code cell printing `text`."""
    ran = [
        {**cell, "outputs": [{"output_type": "stream", "name": "stdout", "text": text}]}
        for cell in notebook["cells"]
    ]
    return with_outputs(notebook, {"cells": ran})


@pytest.fixture
def built(course):
    """The fixture course with both notebooks of each lab written, the solutions with (made-up) outputs."""
    assert build(course, course.manifest.labs) == []
    for entry in course.manifest.labs:
        path = course.path(entry, SOLUTION)
        path.write_text(dumps(outputs_of(generate(course, entry).notebooks[SOLUTION])))
    assert told(course) == []
    return course


def files(course):
    paths = [*course.root.glob("notebooks/*"), *course.root.glob("solutions/*.ipynb")]
    return {path: path.read_bytes() for path in paths}


def test_a_rebuild_changes_nothing_and_keeps_outputs(built):
    before = files(built)
    assert len(before) == 5  # two labs, two kinds, the index
    assert build(built, built.manifest.labs) == []
    assert files(built) == before


def test_a_text_cell_put_in_leaves_each_output_under_its_own_cell(built, edit):
    """Ids count cells, so that every one after a new cell has another."""
    path = built.path(built.manifest.labs[0], SOLUTION)

    def outputs():
        cells = [cell for cell in read_notebook(path)["cells"] if cell["cell_type"] == "code"]
        return [(cell["source"], "".join(o["text"] for o in cell["outputs"])) for cell in cells]

    def number_them(notebook):
        for i, cell in enumerate(c for c in notebook["cells"] if c["cell_type"] == "code"):
            cell["outputs"][0]["text"] = f"output {i}\n"

    rewrite(path, number_them)
    stored = read_notebook(path)
    path.write_text(dumps(with_outputs(without_outputs(stored), stored)))
    before = outputs()
    edit("# ## 1. The idea", "# ## 0. Before\n# Words.\n\n# %% [markdown]\n# ## 1. The idea")
    assert build(built, built.manifest.labs) == []
    assert outputs() == before and len(set(before)) == len(before)


def test_ids_are_unique_and_say_lab_position_and_kind(built):
    for kind in (STUDENT, SOLUTION):
        cells = read_notebook(built.path(built.manifest.labs[0], kind))["cells"]
        ids = [cell["id"] for cell in cells]
        assert len(set(ids)) == len(ids)
        assert ids[:5] == [
            "lab90-00-header",
            "lab90-01-parameters",
            "lab90-02-setup",
            "lab90-03-text",
            "lab90-04-exercise",
        ]
        assert ids[-1] == "lab90-14-footer"


def test_both_notebooks_are_valid_and_frame_the_source(built):
    import nbformat

    for kind in (STUDENT, SOLUTION):
        notebook = read_notebook(built.path(built.manifest.labs[0], kind))
        nbformat.validate(notebook)
        assert notebook["cells"][0]["source"].startswith("# Lab 90: Sums")
        assert "91_after.ipynb" in notebook["cells"][-1]["source"]
        hidden = [cell for cell in notebook["cells"] if "hide-input" in cell["metadata"].get("tags", [])]
        assert [cell["metadata"]["jupyter"] for cell in hidden] == [{"source_hidden": True}]


def test_changed_code_drops_outputs_and_a_check_says_so(built, edit):
    edit("many + 2", "2 + many")
    assert any("differs from solutions/90_sums.py: its text ('- dozen = many + 2')" in m for m in told(built))
    assert build(built, built.manifest.labs) == []
    assert told(built) == ["solutions/90_sums.ipynb: has no outputs: run `labs build --execute 90`"]


def test_changed_prose_keeps_outputs(built, edit):
    edit("The mean is", "A mean is")
    assert build(built, built.manifest.labs) == []
    assert told(built) == []


def test_outputs_of_other_code_are_stale(built):
    rewrite(
        built.path(built.manifest.labs[0], SOLUTION),
        lambda nb: nb["metadata"]["labs"].update(executed="0" * 16),
    )
    assert told(built) == ["solutions/90_sums.ipynb: its outputs are stale: run `labs build --execute 90`"]


def test_an_edited_library_function_makes_outputs_stale(built, tmp_path, monkeypatch):
    """The hash covers the inlined source: here the exercise's module is replaced by one with another body."""
    from labs_lib.build import inline

    changed = inline.module("fixture_methods").text.replace("math.prod(x.shape)", "x.numel()")
    (tmp_path / "fixture_methods.py").write_text(changed)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fixture_methods", raising=False)
    inline.module.cache_clear()
    try:
        assert any(
            "solutions/90_sums.ipynb, cell 4 (lab90-04-exercise): differs" in message
            for message in told(built)
        )
    finally:
        inline.module.cache_clear()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda nb: nb["cells"][3].update(source="edited by hand"),
            "cell 3 (lab90-03-text): differs from solutions/90_sums.py",
        ),
        (
            lambda nb: nb["cells"][3].update(id="other"),
            "cell 3 (lab90-03-text): differs from solutions/90_sums.py: its id",
        ),
        (lambda nb: nb["cells"][4]["metadata"].update(tags=[]), "cell 4 (lab90-04-exercise): differs"),
        (lambda nb: nb["cells"].pop(), "differs from solutions/90_sums.py: 13 cells, not 14"),
        (
            lambda nb: nb["cells"][5].update(
                outputs=[{"output_type": "stream", "name": "stdout", "text": "x"}]
            ),
            "cell 5 (lab90-05-code): outputs in a student notebook",
        ),
        (
            lambda nb: nb["cells"][5].update(execution_count=3),
            "differs from a fresh build in layout or run counts",
        ),
    ],
)
def test_edited_student_notebooks(built, change, says):
    rewrite(built.path(built.manifest.labs[0], STUDENT), change)
    (message,) = told(built)
    assert message.startswith("notebooks/90_sums.ipynb") and says in message


def test_missing_broken_and_stray_files(built):
    """Jupyter's copies of a lab, and notebooks without a number, are a learner's own."""
    entry = built.manifest.labs[0]
    built.path(entry, STUDENT).unlink()
    built.path(entry, SOLUTION).write_text("<<<<<<< HEAD")
    (built.root / "notebooks" / "42_stray.ipynb").write_text("{}")
    for name in ("my own notes", "90_sums-Copy1"):
        (built.root / "notebooks" / f"{name}.ipynb").write_text("{}")
    messages = told(built)
    assert "notebooks/90_sums.ipynb: missing or unreadable: run `labs build 90`" in messages
    assert "solutions/90_sums.ipynb: missing or unreadable: run `labs build 90`" in messages
    assert "notebooks/42_stray.ipynb: the manifest lists no such lab" in messages
    assert len(messages) == 3
    assert len(failures(built)) == 2  # the stray one may be somebody's
    (problem,) = build(built, built.manifest.labs)
    assert str(problem).startswith("solutions/90_sums.ipynb: cannot be read; `labs build 90 --execute` would")


def test_a_missing_source_is_named_and_the_others_are_built(course):
    (course.root / "solutions" / "90_sums.py").unlink()
    (problem,) = build(course, course.manifest.labs)
    assert "solutions/90_sums.py is missing" in str(problem)
    assert course.path(course.manifest.labs[1], STUDENT).is_file()


def test_a_lab_with_a_mistake_is_not_written(course, edit):
    edit("### END SOLUTION\n", "")
    assert [problem.file for problem in build(course, course.manifest.labs)] == ["solutions/90_sums.py"]
    assert not course.path(course.manifest.labs[0], STUDENT).exists()


def save(path, edit=(), output=None):
    """Save a notebook as Jupyter does: with its own metadata and layout, cells `edit` rewritten, one output."""

    def change(notebook):
        notebook["metadata"]["language_info"] = {"name": "python", "version": "3.12.1"}
        notebook["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
        notebook["cells"][0]["metadata"]["collapsed"] = True
        notebook["cells"][1]["execution_count"] = 7
        for i in edit:
            notebook["cells"][i]["source"] = "mean = 3"
        if output:
            notebook["cells"][5]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": output}]

    rewrite(path, change)


def test_a_notebook_that_was_only_opened_and_saved_is_up_to_date_for_a_person(built):
    for kind in (STUDENT, SOLUTION):
        save(built.path(built.manifest.labs[0], kind))
    assert told(built, strict=False) == []
    assert len(told(built)) == 2
    assert build(built, built.manifest.labs) == [] and told(built) == []  # there is nothing to lose


@pytest.mark.parametrize("kind", [STUDENT, SOLUTION])
@pytest.mark.parametrize(
    ("done", "says"),
    [
        ({"edit": [5, 6], "output": "/home/me"}, "2 cells changed, outputs saved"),
        ({"edit": [5]}, "1 cell changed"),
        ({"output": "mine"}, "outputs saved"),
    ],
)
def test_a_person_s_work_is_noted_and_left_and_refused_in_continuous_integration(built, kind, done, says):
    path = built.path(built.manifest.labs[0], kind)
    save(path, **done)
    mine = path.read_bytes()
    command = {STUDENT: "labs build 90 --fresh", SOLUTION: "labs build 90 --execute"}[kind]
    note = (
        f"note: {built.name(path)}: holds your own work ({says}), left as it is; "
        f"`{command}` would replace it, keeping a copy"
    )
    assert told(built, strict=False) == [note] and failures(built) == []
    assert [str(problem) for problem in build(built, built.manifest.labs)] == [note]
    assert path.read_bytes() == mine
    assert any(message.startswith(built.name(path)) for message in told(built))


def test_a_changed_source_fails_for_everyone_and_saved_work_on_the_old_one_is_left(built, edit):
    path = built.path(built.manifest.labs[0], STUDENT)
    save(path, edit=[5])
    mine = path.read_bytes()
    edit("The mean is", "A mean is")
    said = "notebooks/90_sums.ipynb: holds your own work on another version of the lab; "
    assert any(message.startswith(said) for message in failures(built))
    assert any(message.startswith("solutions/90_sums.ipynb, cell 3") for message in failures(built))
    (problem,) = build(built, built.manifest.labs)
    assert str(problem).startswith(said) and not problem.note
    assert path.read_bytes() == mine


def test_starting_over_keeps_a_copy(built):
    path = built.path(built.manifest.labs[0], STUDENT)
    save(path, edit=[5], output="mine")
    mine = path.read_bytes()
    (problem,) = build(built, built.manifest.labs, fresh=True)
    (copy,) = path.parent.glob("90_sums.mine-*.ipynb")
    assert problem.note and str(problem).endswith(f"what you had there is now notebooks/{copy.name}")
    assert copy.read_bytes() == mine
    assert told(built) == []


def test_notebooks_without_the_stamp_of_a_build_are_somebody_s(built):
    """As older versions of the course wrote them, or as a tool that drops metadata leaves them."""
    path = built.path(built.manifest.labs[0], STUDENT)
    rewrite(path, lambda nb: nb["metadata"].pop("labs"))
    assert "its metadata" in failures(built)[0]
    assert build(built, built.manifest.labs) == [] and told(built) == []  # the same cells: nothing to lose
    save(path, edit=[5])
    rewrite(path, lambda nb: nb["metadata"].pop("labs"))
    assert "on another version of the lab" in failures(built)[0]


@pytest.mark.parametrize(("words", "status"), [([], 0), (["--strict"], 1)])
def test_the_exit_status_tells_work_from_drift(built, monkeypatch, capsys, words, status):
    from labs_lib.build import notebooks

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(notebooks, "this_course", lambda: built)
    save(built.path(built.manifest.labs[0], STUDENT), edit=[5])

    def run():
        parser = argparse.ArgumentParser()
        notebooks.add_arguments(parser)
        return notebooks.main(parser.parse_args(["--check", *words]))

    assert run() == status
    assert ("2 labs: up to date" in capsys.readouterr().out) == (status == 0)
    monkeypatch.setenv("CI", "true")
    assert run() == 1


def test_the_readme_index_is_written_and_checked(built):
    readme = built.root / "README.md"
    readme.write_text("# Course\n\n<!-- index:begin -->\nold\n<!-- index:end -->\n\nThe end.\n")
    assert any(message.startswith("README.md: is not what the manifest") for message in told(built))
    build(built, built.manifest.labs)
    text = readme.read_text()
    assert "old" not in text and "The end." in text
    assert "| [90 Sums](notebooks/90_sums.ipynb) | What is a mean? | 1 / 2 / 3 |" in text
    assert told(built) == []
    readme.write_text("# Course without markers\n")
    assert any("needs a line <!-- index:begin -->" in message for message in told(built))


def test_stored_outputs_are_clean():
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "0%"}
    cleaned = clean_outputs(
        [
            {"output_type": "display_data", "data": view, "metadata": {}},
            {
                "output_type": "stream",
                "name": "stderr",
                "text": "  0%|   | 0/9\r100%|###| 9/9 [00:01<00:00]\n",
            },
            {"output_type": "stream", "name": "stdout", "text": "a"},
            {"output_type": "stream", "name": "stdout", "text": "\n"},
            {"output_type": "stream", "name": "stdout", "text": "was\ris b\n"},
            {
                "output_type": "execute_result",
                "data": {"text/plain": "<Axes at 0x7f0011223344>"},
                "metadata": {},
            },
        ]
    )
    assert [output.get("text") or output["data"]["text/plain"] for output in cleaned] == [
        "a\nis b\n",
        "<Axes>",
    ]


def test_executed_outputs_are_stored_and_current(executed):
    assert told(executed) == []
    notebook = read_notebook(executed.path(executed.manifest.labs[0], SOLUTION))
    printed = "".join(o.get("text", "") for cell in notebook["cells"] for o in cell.get("outputs", []))
    assert [line for line in printed.splitlines() if line[:4] in ("OK  ", "TODO", "FAIL")] == [
        "OK    mean",
        "OK    Scaler",
        "OK    dozen",
    ]
    assert "profile cpu" in printed
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_a_solution_that_fails_is_not_stored(course, edit):
    edit("many + 2", "many + 3")
    before = course.path(course.manifest.labs[0], SOLUTION)
    (problem,) = build(course, course.manifest.labs[:1], execute=True)
    assert "baker's dozen" in str(problem) and "lab90-08-code" in str(problem)
    assert not before.exists()


def test_unknown_labs_are_named(course):
    assert [e.number for e in course.manifest.select(["91", "sums"])] == ["90", "91"]
    assert [e.number for e in course.manifest.select(["solutions/91_after.py"])] == ["91"]
    with pytest.raises(LabsError, match="There is no lab '5': the labs are 90_sums, 91_after"):
        course.manifest.select(["5"])
