"""The generated pages: what stands between the README's markers, notebooks/README.md, and the scoreboard's picture.

A marked part is `<!-- NAME:begin -->` ... `<!-- NAME:end -->`, NAME one of `index` and `scoreboard`.
"""

from pathlib import Path

from labs_lib.build.manifest import Manifest
from labs_lib.build.source import Problem
from labs_lib.errors import LabsError
from labs_lib.measure import scoreboard

PICTURE = Path("data") / "scoreboard.svg"


def pages(root: Path, manifest: Manifest, problems: list[Problem]) -> dict[Path, str]:
    """Generated files with their text. A README without its markers is a problem.

    The scoreboard is of the course's own records; a README without its markers has none.
    """
    made = {root / "notebooks" / "README.md": manifest.notebooks_page()}
    readme = root / "README.md"
    if not readme.is_file():
        return made
    try:
        text = between(readme.read_text(encoding="utf-8"), "index", manifest.index(), readme.name)
        if marker("scoreboard", "begin") in text:
            given = scoreboard.board()
            text = between(text, "scoreboard", _scoreboard(given, manifest), readme.name)
            made[root / PICTURE] = scoreboard.svg(given)
        made[readme] = text
    except LabsError as error:
        problems.append(Problem(readme.name, str(error)))
    return made


def _scoreboard(given: scoreboard.Board, manifest: Manifest) -> str:
    """The README's part: the headline, the picture, and the table folded away."""
    headline = scoreboard.summary(given)
    table = scoreboard.markdown(given, lambda number: manifest.link(number, "notebooks/"))
    return (
        f"{headline}\n\n![{headline}]({PICTURE.as_posix()})\n\n"
        f"<details><summary>Every claim: verdict, what was measured, and the lab</summary>\n\n{table}\n\n</details>"
    )


def marker(name: str, end: str) -> str:
    return f"<!-- {name}:{end} -->"


def between(page: str, name: str, text: str, file: str) -> str:
    """`page` with `text` between the markers of `name`."""
    begin, end = marker(name, "begin"), marker(name, "end")
    before, has_begin, rest = page.partition(begin)
    _, has_end, after = rest.partition(end)
    if not (has_begin and has_end):
        raise LabsError(f"{file} needs a line {begin} and, after it, a line {end}: {name} goes between.")
    return f"{before}{begin}\n{text}\n{end}{after}"
