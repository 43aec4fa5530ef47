"""The book: made from stored outputs, whole without a network, and no link in it leads nowhere."""

import pytest

from labs_lib.build import book
from labs_lib.build.source import SOLUTION, STUDENT
from labs_lib.errors import LabsError


@pytest.fixture(scope="module")
def site(executed):
    return book.book(executed, SOLUTION).parent


def test_front_page_is_the_scoreboard_and_leads_to_each_lab(site, executed):
    front = (site / "index.html").read_text()
    assert 'id="the-scoreboard"' in front and "scoreboard.svg" in front
    for entry in executed.manifest.labs:
        assert f'href="{entry.stem}.html"' in front
        assert (site / f"{entry.stem}.html").is_file()
    assert (site / "search.html").is_file() and (site / "searchindex.js").is_file()


def test_pages_show_outputs_formulas_and_the_way_on(site):
    page = (site / "90_sums.html").read_text()
    assert "<math" in page and "MathJax" not in page
    assert 'class="next-page"' in page or "right-next" in page
    assert "Previous:" not in page, "the footer of the notebook is the menu's business"


def test_the_student_edition_has_no_solution(executed, tmp_path):
    pages = book.page(book.read_notebook(executed.path(executed.manifest.labs[0], STUDENT)))
    assert not any(cell.get("outputs") for cell in pages["cells"])


def test_a_missing_notebook_is_a_sentence(course):
    with pytest.raises(LabsError, match="is missing: run `labs build"):
        book.book(course)


def test_launch_buttons_need_an_address(executed, monkeypatch):
    from dataclasses import replace

    assert "launch_buttons" not in book.settings(executed)["html_theme_options"]
    there = replace(executed, manifest=replace(executed.manifest, repository="https://github.com/a/b.git"))
    options = book.settings(there)["html_theme_options"]
    assert options["repository_url"] == "https://github.com/a/b" and "colab_url" in options["launch_buttons"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            '<a href="b.html#here">fine</a><p id="x"><a href="#x">fine</a><a href="https://a.org/">fine</a>',
            [],
        ),
        ('<a href="c.html">x</a>', ["a.html: c.html"]),
        ('<a href="b.html#gone">x</a>', ["a.html: b.html#gone (no such place on that page)"]),
        ('<script src="https://cdn.org/x.js"></script>', ["a.html: loads https://cdn.org/x.js"]),
        ('<link rel="stylesheet" href="//cdn.org/x.css">', ["a.html: loads //cdn.org/x.css"]),
    ],
)
def test_broken_links_are_found(tmp_path, body, told):
    (tmp_path / "a.html").write_text(body)
    (tmp_path / "b.html").write_text('<h1 id="here">b</h1>')
    assert list(book.broken_links(tmp_path)) == told


@pytest.mark.parametrize(
    "formula", [r"a, \dots, b", r"\big( \tfrac{1}{2} \bigr)", "½ + ¼ + ¾", r"\frac{\alpha}{r} BA"]
)
def test_formulas_that_docutils_does_not_know_are_put_in_its_words(formula):
    from labs_lib.build.mathml import mathml

    assert mathml(formula).startswith("<math")
