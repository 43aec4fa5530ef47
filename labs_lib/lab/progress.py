"""`progress()`: the table at the end of a lab. Each exercise TODO, FAIL or OK, each claim observed with its verdict."""

import html
import sys
from dataclasses import dataclass

from labs_lib.lab.check import OK, TODO, Attempt, attempts, load_checks
from labs_lib.measure import context


@dataclass(frozen=True)
class Progress:
    """Rows of (what, how it stands, remark); text in a terminal, a table in a notebook."""

    exercises: list[tuple[str, str, str]]
    claims: list[tuple[str, str, str]]

    @property
    def headline(self) -> str:
        done = sum(status == OK for _, status, _ in self.exercises)
        parts = [f"{done} of {len(self.exercises)} exercises OK"] if self.exercises else []
        if self.claims:
            parts.append(f"{len(self.claims)} claim{'s' * (len(self.claims) > 1)} put on trial")
        return ", ".join(parts) or "nothing to report: this lab has no exercises yet"

    def __repr__(self) -> str:
        rows = self.exercises + self.claims
        widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
        lines = [
            f"  {what:<{widths[0]}}  {status:<{widths[1]}}  {remark}".rstrip()
            for what, status, remark in rows
        ]
        return "\n".join([self.headline, *lines])

    def _repr_html_(self) -> str:
        cell = '<td style="text-align:left">{}</td>'.format
        rows = "".join(
            "<tr>" + "".join(cell(html.escape(text)) for text in row) + "</tr>"
            for row in self.exercises + self.claims
        )
        return f"<b>{html.escape(self.headline)}</b><table><tbody>{rows}</tbody></table>"


def report() -> Progress:
    """The current lab's exercises, in their order, and the claims observed in this kernel."""
    entries = load_checks(context.current().lab)
    rows = []
    for entry in entries:
        attempt = attempts().get(entry.name, Attempt())
        rows.append((entry.title, attempt.status, _remark(attempt)))
    return Progress(rows, _claims())


def progress() -> None:
    """Show how this lab stands."""
    table = report()
    ipython = sys.modules.get("IPython")
    if ipython and ipython.get_ipython():
        ipython.display.display(table)
    else:
        print(table)


def _remark(attempt: Attempt) -> str:
    if attempt.calls == 0:
        return "not checked yet"
    if attempt.status == TODO or attempt.calls == 1:
        return ""
    return f"after {attempt.calls} checks"


def _claims() -> list[tuple[str, str, str]]:
    """One row per claim and part observed; a cell that ran twice counts once, by its last verdict."""
    from labs_lib.measure.claims import observed

    last = {(v.claim.id, tuple(item.label for item in v.items)): v for v in observed()}
    return [
        (f"claim {v.claim.id}: {v.claim.says}", v.word or "no verdict", "smoke run" if v.smoke else "")
        for v in last.values()
    ]
