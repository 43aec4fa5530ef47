"""The scoreboard: every claim with its verdict, what was measured, where, and in which lab. Made from records alone.

`markdown` is the table for the README, the book and lab 19; `svg` is the picture: one tile per claim.
"""

import html
from collections.abc import Callable, Sequence
from typing import Any

from labs_lib.measure.claims import Claim, Part, register
from labs_lib.measure.rules import DEPENDS, FAILS, HOLDS, UNKNOWN, VERDICTS, combine, number
from labs_lib.measure.standings import Standing, in_words, standings

OPEN = "not measured yet"
MARKS = {HOLDS: "✓", FAILS: "✗", DEPENDS: "±", UNKNOWN: "?", OPEN: "·"}
#: Okabe and Ito's colours: told apart by eyes that see no red or no green
COLOURS = {HOLDS: "#009E73", FAILS: "#D55E00", DEPENDS: "#E69F00", UNKNOWN: "#5F5F5F", OPEN: "#BBBBBB"}
SPELLED_OUT = 3  # measurements of one part; more are counted

Board = Sequence[tuple[Claim, Sequence[Standing]]]


def board(mine: bool = False) -> Board:
    """All claims in the register's order, each with its standings: one per device that measured it."""
    found = standings(mine)
    return [(each, found.get(each.id, [])) for each in register().values()]


def verdict(stands: Sequence[Standing]) -> str:
    """One word for a claim; a GPU's verdict counts beside the CPU's, what no device could tell counts least."""
    told = [each.verdict for each in stands if each.verdict != UNKNOWN]
    return combine(told) if told else UNKNOWN if stands else OPEN


def tally(given: Board) -> dict[str, int]:
    """How many claims have which verdict; verdicts that no claim has are left out."""
    words = [verdict(stands) for _, stands in given]
    return {word: words.count(word) for word in (*VERDICTS, OPEN) if word in words}


def summary(given: Board) -> str:
    """The headline: "Of the chapter's 55 claims 4 hold, ..."."""
    says = {HOLDS: "hold", FAILS: "fail", DEPENDS: "depend on something the chapter does not say"}
    says |= {UNKNOWN: "can't be told at this scale", OPEN: "are not measured yet"}
    parts = [f"{count} {says[word]}" for word, count in tally(given).items()]
    listed = ", ".join(parts[:-1]) + (" and " if parts[:-1] else "") + "".join(parts[-1:])
    return f"Of the chapter's {len(given)} claims {listed}."


def evidence(stands: Sequence[Standing]) -> str:
    """What was measured, a line for each part and device: values with their intervals, or how many of them hold."""
    devices = []
    for standing in stands:
        parts: dict[str, list[dict[str, Any]]] = {
            name: [] for name in standing.claim.parts
        }  # the register's order
        for row in standing.rows:
            parts.setdefault(row["part"], []).append(row)
        texts = [_of_part(standing.claim.parts.get(name), rows) for name, rows in parts.items() if rows]
        devices.append("<br>".join(texts))
    if len(devices) < 2:
        return "".join(devices)
    return "<br>".join(f"{each.device}: {text}" for each, text in zip(stands, devices, strict=True))


def _of_part(part: Part | None, rows: list[dict[str, Any]]) -> str:
    label = f"{part.label}: " if part and part.name else ""
    if len(rows) <= SPELLED_OUT:
        texts = [f"{row['condition']}: " * bool(row["condition"]) + in_words(row, part) for row in rows]
        return label + "; ".join(texts)
    held = sum(row["verdict"] == HOLDS for row in rows)
    values = [row["value"] for row in rows if row["value"] is not None]
    spread = ""
    if values and not (part and part.rule.boolean):
        spread = f"{number(min(values))} to {number(max(values))} {rows[0]['unit']}".strip() + ", "
    return f"{label}{spread}{held} of {len(rows)} hold"


def markdown(given: Board, link: Callable[[str], str]) -> str:
    """The whole table; `link` turns a lab's number into a Markdown link."""
    head = "| # | The chapter says | Verdict | Measured | On | Lab |\n| --: | :-- | :-- | :-- | :-- | :-- |\n"
    return head + "\n".join(_line(each, stands, link) for each, stands in given)


def _line(each: Claim, stands: Sequence[Standing], link: Callable[[str], str]) -> str:
    word = verdict(stands)
    labs = sorted({lab for standing in stands for lab in standing.labs}) or each.labs
    cells = (
        str(each.id),
        each.says,
        f"{MARKS[word]} {word}",
        evidence(stands),
        ", ".join(standing.device for standing in stands),
        ", ".join(map(link, labs)),
    )
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def svg(given: Board, columns: int = 12) -> str:
    """A tile per claim, in the chapter's order: number, mark and colour of its verdict; pointing at it says the claim.

    Plain text without dates or random names: the same records make the same picture.
    """
    tile, gap, left, top = 58, 8, 16, 66
    rows = -(-len(given) // columns)
    width, height = left * 2 + columns * (tile + gap) - gap, top + rows * (tile + gap) + 44
    counts = tally(given)
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" role="img" aria-label="{len(given)} claims: {html.escape(told)}">',
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
        f'<text x="{left}" y="34" font-size="22" font-weight="700" fill="#222">'
        f"{len(given)} claims of one textbook chapter, measured</text>",
        f'<text x="{left}" y="55" font-size="13" fill="#555">Each tile is a claim, in the order of the register; '
        "each verdict is computed from a record in data/measured.</text>",
    ]
    for i, (each, stands) in enumerate(given):
        x, y = left + i % columns * (tile + gap), top + i // columns * (tile + gap)
        word = verdict(stands)
        parts.append(
            f'<g transform="translate({x} {y})"><title>Claim {each.id}, {word}: {html.escape(each.says)}</title>'
            f'<rect width="{tile}" height="{tile}" rx="6" fill="{COLOURS[word]}"/>'
            f'<text x="7" y="18" font-size="13" fill="#fff">{each.id}</text>'
            f'<text x="{tile // 2}" y="45" font-size="28" font-weight="700" fill="#fff" text-anchor="middle">'
            f"{MARKS[word]}</text></g>"
        )
    x, y = left, top + rows * (tile + gap) + 20
    for word, count in counts.items():
        text = f"{count} {word}"
        parts.append(f'<rect x="{x}" y="{y - 12}" width="14" height="14" rx="3" fill="{COLOURS[word]}"/>')
        parts.append(f'<text x="{x + 20}" y="{y}" font-size="14" fill="#222">{MARKS[word]} {text}</text>')
        x += 52 + round(7.4 * len(text))
    return "\n".join([*parts, "</svg>"]) + "\n"
