"""`labs book`: the course as a site to read, in build/book/, from the stored outputs; nothing is executed.

The front page is the scoreboard. Everything that a page needs lies beside it: the book is read without a network.
"""

import argparse
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from labs_lib.build.notebooks import FOLDERS, Course, Notebook, dumps, read_notebook, this_course
from labs_lib.build.report import with_alt
from labs_lib.build.source import SOLUTION, STUDENT
from labs_lib.errors import LabsError
from labs_lib.measure import scoreboard

EDITIONS = {
    SOLUTION: "Solution edition: every exercise solved, every cell with its output.",
    STUDENT: "Student edition: the exercises as a learner meets them.",
}


def front_page(course: Course, kind: str) -> str:
    """index.md: what the course is, the scoreboard, and the list of labs that the theme turns into a menu."""
    given = scoreboard.board()
    labs = "\n".join(entry.stem for entry in course.manifest.labs)
    return (
        "# PEFT Labs\n\n"
        "Every method of parameter-efficient fine-tuning built from scratch, proved equal to the field's library, "
        "trained on a real (small) language model; and a textbook chapter's claims put on trial. "
        f"{EDITIONS[kind]}\n\n"
        f"## The scoreboard\n\n{scoreboard.summary(given)}\n\n"
        f"![{scoreboard.summary(given)}](scoreboard.svg)\n\n"
        f"{scoreboard.markdown(given, course.manifest.link)}\n\n"
        f"```{{toctree}}\n:caption: Labs\n:hidden:\n\n{labs}\n```\n"
    )


def page(notebook: Notebook) -> Notebook:
    """A notebook as the book shows it: figures with their alt text; the menu stands for the footer's links."""
    cells = [dict(cell) for cell in notebook["cells"] if not cell["id"].endswith("-footer")]
    for cell in cells:
        if cell["cell_type"] == "code":
            cell["outputs"] = list(with_alt(cell["outputs"]))
        else:
            cell["source"] = cell["source"].replace("(README.md)", "(index.md)")
    return {**notebook, "cells": cells}


def settings(course: Course) -> dict:
    """Sphinx's configuration; buttons to run a page elsewhere where the course has an address."""
    theme: dict = {"use_download_button": True, "show_toc_level": 2, "home_page_in_toc": True}
    path = course.manifest.repository.removesuffix(".git")
    if path.startswith("https://github.com/"):
        theme |= {
            "repository_url": path,
            "repository_branch": course.manifest.release or "main",
            "path_to_docs": FOLDERS[STUDENT],
            "use_repository_button": True,
            "launch_buttons": {"colab_url": "https://colab.research.google.com"},
        }
    return {
        "project": "PEFT Labs",
        "author": "The PEFT Labs authors",
        "extensions": "myst_nb,labs_lib.build.mathml",
        "html_theme": "sphinx_book_theme",
        "html_title": "PEFT Labs",
        "html_theme_options": theme,
        "html_math_renderer": "mathml",
        "html_show_copyright": False,
        "myst_enable_extensions": ["dollarmath"],
        "myst_heading_anchors": 3,
        "nb_execution_mode": "off",
        "nb_merge_streams": True,
        "language": "en",
    }


def book(course: Course, kind: str = SOLUTION) -> Path:
    """Write the book and return its first page.

    Raises:
        LabsError: Sphinx is missing or warns, a notebook is missing, or a link leads nowhere.
    """
    if find_spec("sphinx") is None or find_spec("myst_nb") is None:
        raise LabsError("Sphinx is not installed: use `make book`, or `pip install -e '.[book]'`.")
    from sphinx.application import Sphinx

    folder = course.root / "build" / "book"
    pages, site = folder / "pages", folder / "site"
    shutil.rmtree(folder, ignore_errors=True)
    pages.mkdir(parents=True)
    for entry in course.manifest.labs:
        stored = read_notebook(course.path(entry, kind))
        if stored is None:
            raise LabsError(
                f"{course.name(course.path(entry, kind))} is missing: run `labs build {entry.number}`."
            )
        (pages / f"{entry.stem}.ipynb").write_text(dumps(page(stored)), encoding="utf-8")
    (pages / "index.md").write_text(front_page(course, kind), encoding="utf-8")
    (pages / "scoreboard.svg").write_text(scoreboard.svg(scoreboard.board()), encoding="utf-8")
    app = Sphinx(pages, None, site, folder / "doctrees", "html", settings(course), status=None)
    app.build()
    if app.statuscode or app._warncount:
        raise LabsError(f"Sphinx gave {app._warncount} warnings: they are above.")
    broken = list(broken_links(site))
    if broken:
        raise LabsError("The book has links that lead nowhere:\n" + "\n".join(broken))
    return site / "index.html"


class _Links(HTMLParser):
    """The links of a page, what it loads by itself, and the names that a link can lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for key, value in attributes:
            if key in ("href", "src") and value:
                (self.loads if key == "src" or tag == "link" else self.links).append(value)
            elif key in ("id", "name") and value:
                self.names.add(value)


def broken_links(site: Path) -> Iterator[str]:
    """Links within a site that lead to no file or to no name on its page, and what a page loads from elsewhere.

    A link that a reader may follow to another site is not tried: there may be no network.
    """
    found = {}
    for path in sorted(site.glob("*.html")):
        found[path] = _Links()
        found[path].feed(path.read_text(encoding="utf-8"))
    for path, page_ in found.items():
        for link in page_.links + page_.loads:
            parts = urlsplit(link)
            if parts.netloc and link in page_.loads:
                yield f"{path.relative_to(site)}: loads {link}"
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            name = unquote(parts.fragment)
            if not target.is_file():
                yield f"{path.relative_to(site)}: {link}"
            elif name and target in found and name not in found[target].names:
                yield f"{path.relative_to(site)}: {link} (no such place on that page)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--student", action="store_true", help="the student notebooks instead of the solutions"
    )


def main(args: argparse.Namespace) -> int:
    course = this_course()
    first = book(course, STUDENT if args.student else SOLUTION)
    print(f"The book: {course.name(first)}")
    return 0
