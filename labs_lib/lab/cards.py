"""Cards: a customer's style guide, texts side by side, a small table. HTML in a notebook, plain text in a terminal."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labs_lib.world.tenants import Tenant

_LEFT = "text-align:left;vertical-align:top"
_TEXT = "margin:0;white-space:pre-wrap;word-break:normal"  # Jupyter's own style would break words


@dataclass(frozen=True)
class Card:
    """Something to look at, in two forms; a cell that ends in one shows it."""

    text: str
    html: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def tenant_card(tenant: "Tenant") -> Card:
    """A customer's style guide: name, sector, voice, and each rule with its word in the guide and what it asks for."""
    from labs_lib.world.grammar import DIMENSIONS

    rows = [(rule, value, DIMENSIONS[rule][value]) for rule, value in tenant.style.items()]
    lines = [f"{tenant.name}, {tenant.sector}", f"  {tenant.voice}"]
    lines += [f"  {rule:10s} {value:14s} {meaning}" for rule, value, meaning in rows]
    head = "".join(f'<th style="{_LEFT}">{title}</th>' for title in ("Rule", "Word in the guide", "Asks for"))
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return Card(
        "\n".join(lines),
        f"<b>{html.escape(tenant.name)}</b>, {html.escape(tenant.sector)}"
        f'<blockquote style="max-width:46em">{html.escape(tenant.voice)}</blockquote>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
    )


def side_by_side(texts: Mapping[str, str]) -> Card:
    """Texts in columns under their titles, line breaks kept; one under the other in a terminal."""
    plain = "\n\n".join(f"--- {title}\n{text}" for title, text in texts.items())
    head = "".join(f'<th style="{_LEFT}">{html.escape(title)}</th>' for title in texts)
    body = "".join(
        f'<td style="{_LEFT}"><pre style="{_TEXT}">{html.escape(text)}</pre></td>' for text in texts.values()
    )
    return Card(plain, f"<table><thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table>")


def table(rows: Sequence[Mapping[str, object]]) -> Card:
    """A table of a few results, one mapping per row with the same keys; format numbers before. First column left."""
    columns = list(rows[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    plain = "\n".join(
        "  ".join(f"{text:{'>' if i else '<'}{widths[i]}}" for i, text in enumerate(line)).rstrip()
        for line in cells
    )
    head, *body = ("<tr>" + "".join(map(_aligned, range(len(line)), line)) + "</tr>" for line in cells)
    head = head.replace("<td", "<th").replace("</td>", "</th>")
    return Card(plain, f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>")


def _aligned(column: int, text: str) -> str:
    side = "right" if column else "left"
    return f'<td style="text-align:{side};vertical-align:top">{html.escape(text)}</td>'


def _cell(text: str) -> str:
    return f'<td style="{_LEFT}">{html.escape(text)}</td>'
