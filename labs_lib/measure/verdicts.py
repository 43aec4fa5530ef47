"""Verdicts: a judged measurement, in one line for the terminal and as a table for the notebook."""

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from labs_lib.measure.context import Context
from labs_lib.measure.rules import HOLDS, UNKNOWN, combine, measured

if TYPE_CHECKING:
    from labs_lib.measure.claims import Claim, Part

ONE_LINE = 4  # measurements that one line has room for; more are counted


@dataclass(frozen=True)
class Item:
    """One measurement of one part of a claim under one condition. `why` explains a "can't be told here"."""

    part: "Part"
    condition: str
    value: float
    ci: tuple[float, float] | None
    n: int | None
    verdict: str
    why: str = ""

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.part.label, self.condition)))

    @property
    def short(self) -> str:
        """Label for one line; a yes or no says what is so, since "no" alone says nothing."""
        if self.part.rule.boolean:
            return ", ".join(filter(None, (self.part.measures, self.condition)))
        return self.label

    @property
    def measured(self) -> str:
        return measured(self.value, self.ci, self.part.unit, self.part.rule.boolean)


@dataclass(frozen=True)
class Verdict:
    """What `observe` returns. `word` is one of VERDICTS, or None for a smoke run."""

    claim: "Claim"
    items: list[Item]
    context: Context = field(default_factory=Context)
    note: str = ""

    @property
    def smoke(self) -> bool:
        return self.context.profile == "smoke"

    @property
    def word(self) -> str | None:
        return None if self.smoke else combine([item.verdict for item in self.items])

    @property
    def scope(self) -> str:
        """ " on the small base" where the verdict reaches no further than the model it was measured on."""
        bound = any(item.part.reach == "base" and item.verdict != UNKNOWN for item in self.items)
        if not bound or self.smoke:
            return ""
        model = self.context.model or "shipped"
        return f" on {model}" if "/" in model else f" on the {model} base"

    def __repr__(self) -> str:
        """Short, since `observe` has printed the line and a notebook shows the table."""
        return f"<claim {self.claim.id}: {self.word or 'no verdict (smoke run)'}>"

    def __str__(self) -> str:
        head = f"Claim {self.claim.id} ({self.claim.where}): "
        if len(self.items) > ONE_LINE:
            if self.smoke:
                return f"{head}smoke run, no verdict ({len(self.items)} measurements)"
            return f"{head}{self.word}{self.scope}: " + "; ".join(self._by_part())
        plain = "; ".join(": ".join(filter(None, (item.short, item.measured))) for item in self.items)
        if self.smoke:
            return f"{head}smoke run, no verdict (measured {plain})"
        if len({item.verdict for item in self.items}) > 1:
            each = (f"{item.short or 'this run'}: {item.verdict} ({item.measured})" for item in self.items)
            return f"{head}{self.word}{self.scope}: " + "; ".join(each)
        why = next((f" ({item.why})" for item in self.items if item.why), "") if self.word == UNKNOWN else ""
        return f"{head}{self.word}{self.scope}{why}: measured {plain}{self._right_if()}"

    def _by_part(self) -> Iterator[str]:
        """Each part's verdict, and how many of its measurements hold."""
        for part in dict.fromkeys(item.part for item in self.items):
            items = [item for item in self.items if item.part == part]
            held = sum(item.verdict == HOLDS for item in items)
            count = f"{held} of {len(items)} hold" if len(items) > 1 else items[0].measured
            yield f"{part.label or 'this run'}: {combine([item.verdict for item in items])} ({count})"

    def _right_if(self) -> str:
        parts = [item.part for item in self.items if not item.part.rule.boolean]
        rules = {part.label: part.rule.says(part.unit) for part in parts}
        if not rules:
            return ""
        named = (f"{label}: {text}" for label, text in rules.items())
        return "; the chapter is right if " + (
            "; ".join(named) if len(rules) > 1 else next(iter(rules.values()))
        )

    def _repr_html_(self) -> str:
        word = "no verdict (smoke run)" if self.smoke else f"{self.word}{self.scope}"
        titles = ("quantity", "chapter is right if", "measured here", "verdict")
        head = "".join(f'<th style="text-align:left">{title}</th>' for title in titles)
        rows = "".join(self._row(item) for item in self.items)
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self._notes())
        notes = notes and f'<div style="font-size:90%;opacity:.8">{notes}</div>'
        return (
            f'<div style="margin:.4em 0"><b>Claim {self.claim.id}</b> '
            f"({html.escape(self.claim.where)}): &ldquo;{html.escape(self.claim.quote)}&rdquo; "
            f"&mdash; <b>{html.escape(word)}</b>"
            f'<table style="margin:.3em 0"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
            f"{notes}</div>"
        )

    def _row(self, item: Item) -> str:
        quantity = item.part.measures + (f" ({item.condition})" if item.condition else "")
        value = item.measured + (f", n = {item.n}" if item.n else "")
        verdict = "none" if self.smoke else item.verdict
        cells = (quantity, item.part.rule.says(item.part.unit), value, verdict)
        return "<tr>" + "".join(f'<td style="text-align:left">{html.escape(c)}</td>' for c in cells) + "</tr>"

    def _notes(self) -> list[str]:
        notes = [self.note, self.claim.reading]
        if self.word == UNKNOWN:
            whys = dict.fromkeys(item.why for item in self.items if item.why)
            notes += [f"Can't be told: {why}." for why in whys]
        if self.word == UNKNOWN or self.scope:
            notes += [
                self.claim.limits,
                self.claim.would_tell and f"What would tell: {self.claim.would_tell}",
            ]
        return [note for note in notes if note] + [as_cited(each) for each in self.claim.reported]


def as_cited(report: Mapping[str, Any]) -> str:
    """A figure of others with its source, marked where the original was not rechecked."""
    mark = "As reported" if report.get("as_reported") else "Published"
    return f"{mark}: {report['text']} ({report['source']['cite']})."
