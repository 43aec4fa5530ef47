"""Each rule of the house, broken once: the message names the file, the cell and what is wrong."""

import pytest

from labs_lib.build.lint import count_words, lint_outputs
from labs_lib.build.notebooks import generate
from labs_lib.build.source import SOLUTION, STUDENT

LONG_CODE = "\n".join(f"x{i} = {i}" for i in range(46))
LONG_TEXT = "\n# ".join(["word"] * 121)
METHOD = "from fixture_methods import mean\n"
CHECK = "mean = check(mean)\n"


def problems(course):
    return [str(problem) for problem in generate(course, course.manifest.labs[0]).problems]


def test_the_fixture_is_clean(course):
    assert problems(course) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("many = 10\n", f"many = 10\n{LONG_CODE}\n", "lines of code in the student notebook, at most 45"),
        ("# Write here why.", f"# {LONG_TEXT}", "121 words, at most 120"),
        ('MODEL_ID = ""\n', 'MODEL_ID = "x"\n', 'the first code cell is tagged "parameters"'),
        ('setup(lab="90"', 'setup(lab="91"', 'calls setup(lab="90"'),
        ('tags=["setup"]', 'tags=["hide-input"]', 'the second code cell is tagged "setup"'),
        ('# %% [markdown] tags=["takeaway"]', "# %% [markdown]", 'tagged "takeaway"'),
        ("\nprogress()\n", "\n", "a lab ends in progress()"),
        (CHECK, "mean\n", "exercise 'mean' is not followed by `mean = check(mean)`"),
        (CHECK, f"{CHECK}{CHECK}", "'mean' is checked already, in cell 5"),
        ("import Scaler\n", "import Scaler, mean\n", "exercise 'mean' is there already, in cell 4"),
        ("many = 10\n", 'many = len(open("/tmp/x").read())\n', "absolute path '/tmp'"),
        ("# Because of", "# See /home/me/notes: because of", "absolute path '/home'"),
        ("show(fig, alt=", "plt.show(fig, alt=", "show a figure with `show(fig, alt=...)`"),
        (
            'show(fig, alt="A line from half an egg at step 1 to a dozen at step 2.")',
            "show(fig)",
            "`show` needs alt",
        ),
        ("many = 10\n", "many = = 10\n", "does not parse"),
        ("### STUB: dozen = ...", "### STUB: dozen = 12", "no ### STUB: line sets it"),
        ("# %%\nmany = 10", '# %% tags=["takeaway"]\nmany = 10', "are for text cells"),
        ("# %% [markdown]\n# ## 1", '# %% [markdown] tags=["exercise"]\n# ## 1', "are for code cells"),
    ],
)
def test_broken_rules(course, edit, old, new, says):
    edit(old, new)
    told = problems(course)
    assert any(says in message for message in told), told
    assert all(message.startswith("solutions/90_sums.py") for message in told)
    if "takeaway" not in says and "progress" not in says:
        assert any(says in message and ", cell " in message for message in told)


def test_a_long_library_function_counts_in_the_solution(course, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    body = "\n".join(f"    x += {i}" for i in range(45))
    (tmp_path / "long_method.py").write_text(
        f'def mean(x):\n    """Steps:\n    1. Add."""\n{body}\n    return x\n'
    )
    path = course.root / "solutions" / "90_sums.py"
    path.write_text(
        path.read_text().replace("from fixture_methods import mean", "from long_method import mean")
    )
    assert any("49 lines of code in the solution notebook" in told for told in problems(course))


def test_install_lines_leave_room_in_the_setup_cell(course, edit):
    edit('lab = setup(lab="90"', 'import os\nimport sys\nimport re\nlab = setup(lab="90"')
    assert any("the setup cell has" in told for told in problems(course))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one two", 2),
        ("$a + b + c$ is $$d\ne f$$", 3),
        ("see [the long way](https://x.y/a_b) <b>now</b>", 5),
        ("| a | b |\n| :-- | --- |\n", 2),
        ("before\n```\nnot counted\n```\nafter", 2),
    ],
)
def test_words(text, words):
    assert count_words(text) == words


def stream(text):
    return {"output_type": "stream", "name": "stdout", "text": text}


def display(data, metadata=None):
    return {"output_type": "display_data", "data": data, "metadata": metadata or {}}


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (stream("saved to /root/x.bin"), "absolute path '/root'"),
        (stream(r"C:\Users\me"), "absolute path"),
        (display({"text/plain": "'/work/x'"}), "absolute path '/work'"),
        (display({"image/png": "abc"}), "a figure without alt text"),
        (display({"image/png": "abc"}, {"image/png": {"alt": ""}}), "a figure without alt text"),
        (display({"text/html": '<img src="data:image/png;base64,AA">'}), "an image without alt text"),
        (
            {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []},
            "failed: ValueError: no",
        ),
    ],
)
def test_outputs_that_may_not_be_stored(output, says):
    (problem,) = lint_outputs("solutions/x.ipynb", [{"id": "lab90-05-code", "outputs": [output]}], SOLUTION)
    assert says in problem.message
    assert str(problem).startswith("solutions/x.ipynb, cell 0 (lab90-05-code): ")


@pytest.mark.parametrize(
    "output",
    [
        stream("and/or/home/work, https://x.y/home/a, 3/work/4 and ~/work/x"),
        display({"image/png": "abc"}, {"image/png": {"alt": "A line."}}),
        display({"text/html": '<img alt="A line." src="data:image/png;base64,AA/tmp/B\n/home/C">'}),
    ],
)
def test_outputs_that_may(output):
    assert lint_outputs("x", [{"outputs": [output]}], SOLUTION) == []


def test_no_outputs_for_students():
    (problem,) = lint_outputs("x", [{"outputs": [stream("hello")]}], STUDENT)
    assert problem.message == "outputs in a student notebook"
