"""Reading a source: cells, tags, markers, and what each notebook shows of them."""

import pytest

from labs_lib.build.source import SOLUTION, STUDENT, code_hash, read_source


def texts(course, kind):
    source = read_source(course.root / "solutions" / "90_sums.py")
    shown = source.texts(kind)
    assert source.problems == []
    return shown


def test_the_author_note_is_no_cell_and_lines_are_the_markers(course):
    cells = read_source(course.root / "solutions" / "90_sums.py").cells
    lines = (course.root / "solutions" / "90_sums.py").read_text().splitlines()
    assert "parameters" in cells[0].tags
    assert [cell.index for cell in cells] == list(range(1, len(cells) + 1))
    assert all(lines[cell.line - 1].startswith("# %%") for cell in cells)


def test_student_sees_the_stub_and_instructor_the_answer(course):
    student = next(t for c, t in texts(course, STUDENT) if "dozen = " in t)
    solution = next(t for c, t in texts(course, SOLUTION) if "dozen = " in t)
    assert student == 'many = 10\ndozen = ...  # how many eggs?\ndozen = check(dozen, "lab90.dozen")'
    assert solution == 'many = 10\ndozen = many + 2\ndozen = check(dozen, "lab90.dozen")'


def test_stub_keeps_its_indentation(course, edit):
    edit("### BEGIN", "if many:\n    ### BEGIN")
    for line in ("### STUB:", "dozen = many + 2", "### END"):
        edit(line, f"    {line}")
    shown = next(text for _, text in texts(course, STUDENT) if "dozen = " in text)
    assert "if many:\n    dozen = ...  # how many eggs?\n" in shown


def test_an_exercise_takes_earlier_ones_from_the_notebook(course):
    scaler = next(t for c, t in texts(course, SOLUTION) if "class Scaler" in t)
    assert scaler.startswith(
        "from torch import nn\n\n\nclass Scaler"
    )  # neither mean nor Numbers a second time


def test_one_sided_cells_and_takeaways(course):
    student, solution = (" ".join(t for _, t in texts(course, kind)) for kind in (STUDENT, SOLUTION))
    assert "Write here" in student and "Write here" not in solution
    assert "Because" in solution and "Because" not in student
    assert "> **Takeaway.** A mean is a sum over a count.\n>\n> No more." in student


def test_the_hash_follows_the_code_and_not_the_prose(course, edit):
    before = code_hash(texts(course, SOLUTION))
    edit("The mean is", "A mean is")
    assert code_hash(texts(course, SOLUTION)) == before
    edit("many + 2", "2 + many")
    assert code_hash(texts(course, SOLUTION)) != before


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("### END SOLUTION\n", "", "BEGIN SOLUTION without ### END"),
        ("### BEGIN SOLUTION\n", "", "stands outside"),
        ("### STUB: dozen = ...  # how many eggs?\n", "", "needs a `### STUB:"),
        ("### BEGIN SOLUTION\n", "### BEGIN SOLUTION\n### BEGIN SOLUTION\n", "inside another one"),
        ("### END SOLUTION\n", "### END SOLUTION\n### END SOLUTION\n", "END SOLUTION without"),
        ("### END SOLUTION\n", "### end solution\n### END SOLUTION\n", "is no marker"),
        ("from fixture_methods import mean\n", "from fixture_methods import mean\nx = 1\n", "nothing else"),
        ("from fixture_methods import mean\n", "from fixture_methods import mean as m\n", "its own name"),
        ("from fixture_methods import mean\n", "from fixture_methods import median\n", "defines no function"),
        ('tags=["hide-input"]', 'tags=["hidden"]', "unknown tag 'hidden'"),
    ],
)
def test_mistakes_name_file_and_cell(course, edit, old, new, says):
    edit(old, new)
    source = read_source(course.root / "solutions" / "90_sums.py")
    source.texts(STUDENT)
    assert len(source.problems) == 1
    told = str(source.problems[0])
    assert says in told
    assert told.startswith("90_sums.py, cell ") and "(line " in told
