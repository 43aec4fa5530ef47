"""Rules: the region in which the chapter is right, and how an interval is judged against it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HOLDS, FAILS, DEPENDS, UNKNOWN = "holds", "fails", "depends", "can't be told here"
VERDICTS = (HOLDS, FAILS, DEPENDS, UNKNOWN)


@dataclass(frozen=True)
class Rule:
    """From `lo` to `hi`, ends included if `closed`; a `boolean` rule asks for 1 (true).

    `level` is that of the interval the rule expects: 0.95, or 0.90 for an equivalence (two one-sided tests at
    5 %).
    """

    text: str
    lo: float = -math.inf
    hi: float = math.inf
    closed: bool = True
    boolean: bool = False
    level: float = 0.95

    def judge(self, value: float, ci: tuple[float, float] | None = None) -> str:
        """Holds if all of the interval lies in the region, fails if none of it does; else it can't be told.

        Without an interval the value stands for itself.
        """
        lo, hi = ci if ci is not None else (value, value)
        if math.isnan(value) or math.isnan(lo) or math.isnan(hi):
            return UNKNOWN
        if self._contains(lo) and self._contains(hi):
            return HOLDS
        outside = (hi < self.lo or lo > self.hi) if self.closed else (hi <= self.lo or lo >= self.hi)
        return FAILS if outside else UNKNOWN

    def _contains(self, x: float) -> bool:
        return self.lo <= x <= self.hi if self.closed else self.lo < x < self.hi

    def says(self, unit: str = "") -> str:
        return "yes" if self.boolean else f"{self.text} {unit}".strip()


def parse_rule(spec: Any) -> Rule:
    """A `Rule` from its YAML form (data/claims.yaml lists the kinds); ValueError says what is wrong."""
    if spec == "true":
        return Rule("true", lo=1, hi=1, boolean=True)
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise ValueError(f'a rule is "true" or one of between, at_least, ...: {spec!r}')
    ((kind, arg),) = spec.items()
    if kind == "between":
        lo, hi = arg
        if not lo < hi:
            raise ValueError(f"between needs two increasing numbers: {arg}")
        return Rule(f"{number(lo)} to {number(hi)}", lo, hi)
    if kind == "at_least":
        return Rule(f"at least {number(arg)}", lo=arg)
    if kind == "at_most":
        return Rule(f"at most {number(arg)}", hi=arg)
    if kind == "above":
        return Rule(f"above {number(arg)}", lo=arg, closed=False)
    if kind == "below":
        return Rule(f"below {number(arg)}", hi=arg, closed=False)
    if kind == "equals":
        value = arg["value"]
        slack = arg["abs"] if "abs" in arg else abs(value) * arg["rel"]
        text = f"{number(value)} +- {number(slack)}" if slack else number(value)
        return Rule(text, value - slack, value + slack)
    if kind == "times":
        value, factor = arg["value"], arg["factor"]
        if factor <= 1 or value <= 0:
            raise ValueError(f"times needs a positive value and a factor above 1: {arg}")
        return Rule(f"within a factor {number(factor)} of {number(value)}", value / factor, value * factor)
    if kind == "equivalent":
        margin = arg["margin"]
        if margin <= 0:
            raise ValueError(f"equivalent needs a positive margin: {arg}")
        return Rule(f"0 +- {number(margin)}", -margin, margin, closed=False, level=0.90)
    raise ValueError(f"unknown rule {kind!r}")


def combine(verdicts: Sequence[str]) -> str:
    """One verdict of several: disagreement is "depends"; agreement needs every one of them to be told."""
    told = set(verdicts) - {UNKNOWN}
    if DEPENDS in told or len(told) > 1:
        return DEPENDS
    if UNKNOWN in verdicts or not told:
        return UNKNOWN
    return told.pop()


def number(x: float) -> str:
    """Three significant digits, thousands separated, integers in full: 614,400; 0.593; 1e-05."""
    if math.isnan(x):
        return "nan"
    if math.isinf(x):
        return "-inf" if x < 0 else "inf"
    if x == int(x) and abs(x) < 1e15:
        return f"{int(x):,}"
    return f"{x:,.0f}" if 10000 <= abs(x) < 1e15 else f"{x:.3g}"


def measured(value: float, ci: tuple[float, float] | None, unit: str = "", boolean: bool = False) -> str:
    """A measurement in words: "0.593 %", "1.2 [0.8, 1.6] points", "no"."""
    if boolean:
        return "yes" if value == 1 else "no"
    interval = "" if ci is None else f" [{number(ci[0])}, {number(ci[1])}]"
    return f"{number(value)}{interval} {unit}".strip()
