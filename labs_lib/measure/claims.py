"""The claims register: what the chapter says, what was measured, and the verdict a rule draws from the two.

    claim(8).observe(0.593)                                     exact: counted or computed
    claim(10).observe(differences)                              one number per seed; the interval is computed
    claim(10).observe(paired_difference(a, b))                  or given, as an Estimate
    claim(9).observe(conditions={"q, v": 8.4e6, "all": 40e6})   one quantity under several conditions
    claim(14).observe(parts={"share": 0.12})                    one of several things the claim asserts

No verdict is typed anywhere: `data/claims.yaml` holds a rule per claim, and the rule judges the measurement.
"""

import argparse
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from labs_lib import paths
from labs_lib.errors import LabsError
from labs_lib.measure import context, records
from labs_lib.measure.rules import UNKNOWN, Rule, parse_rule
from labs_lib.measure.verdicts import Item, Verdict

EVIDENCE = ("exact", "sampled", "text")
REACH = ("anywhere", "base", "gpu", "elsewhere")

Interval = tuple[float, float]
Measurement = tuple[float, Interval | None, int | None]  # value, interval, number of seeds


@dataclass(frozen=True)
class Part:
    """One thing a claim asserts; a simple claim has one part with an empty name."""

    name: str
    measures: str
    unit: str
    rule: Rule
    evidence: str
    reach: str
    min_n: int

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Claim:
    """One claim of the chapter, as `data/claims.yaml` has it; `observe` puts a measurement to it."""

    id: int
    where: str
    quote: str
    says: str
    test: str
    labs: tuple[str, ...]
    parts: Mapping[str, Part]
    reading: str = ""
    limits: str = ""
    would_tell: str = ""
    reported: tuple[Mapping[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"<claim {self.id} ({self.where}): {self.says}>"

    def observe(
        self,
        value: Any = None,
        *,
        ci: Interval | None = None,
        n: int | None = None,
        conditions: Mapping[str, Any] | None = None,
        parts: Mapping[str, Any] | None = None,
        part: str | None = None,
        note: str = "",
        seeds: Sequence[int] | None = None,
        on: records.Record | None = None,
    ) -> Verdict:
        """Judge a measurement, print the verdict in one line, keep a record of it, and return it.

        A measurement is a number or a bool; a list with one number per seed; an `Estimate`, `TimeRatio` or
        `Equivalence`; or a dict with `value`, `ci` and `n`. The arguments `ci` and `n` belong to `value`.

        `conditions` maps a condition to a measurement; verdicts that disagree make it "depends". `parts` maps
        the name of a part to a measurement, or to such a dict of conditions; `part` names the part that
        `value` and `conditions` are about. Neither is needed when all parts judge the same quantity: then
        each part judges it.

        `on` is the record that the numbers were read from, where it was made on another device than this: the
        verdict is that device's, about the model of that record, and is kept among that device's verdicts.
        """
        now = context.current()
        if on is not None:
            device = "cpu" if on.device == "cpu" else "cuda"
            now = replace(now, device=device, model=on.rows[0].get("model", now.model))
        given = self._given(value, ci, n, conditions, parts, part)
        items = [judge(part_, condition, measurement, now) for part_, condition, measurement in given]
        verdict = Verdict(self, items, now, note)
        _observed.append(verdict)
        print(verdict)
        if not verdict.smoke:
            _record(verdict, seeds, on)
        return verdict

    def _given(self, value, ci, n, conditions, parts, part) -> Iterator[tuple[Part, str, Measurement]]:
        if parts is not None:
            if value is not None or conditions is not None or part is not None:
                raise LabsError(f"Claim {self.id}: give either parts or a value with conditions, not both.")
            for name, each in parts.items():
                yield from _under_conditions(self._part(name), each)
            return
        targets = [self._part(part)] if part is not None else list(self.parts.values())
        if len({target.measures for target in targets}) > 1:
            raise LabsError(
                f"Claim {self.id} asserts several things: say which with part= or parts={{...}} "
                f"(there are {', '.join(self.parts)})."
            )
        if value is None and not conditions:
            raise LabsError(f"Claim {self.id}: nothing was observed; give a value or conditions.")
        for target in targets:
            if value is not None:
                yield target, "", measurement(value, target.rule.level, ci, n)
            if conditions:
                yield from _under_conditions(target, conditions)

    def _part(self, name: str) -> Part:
        if name not in self.parts:
            known = ", ".join(filter(None, self.parts)) or "none"
            raise LabsError(f"Claim {self.id} has no part {name!r}; its parts: {known}.")
        return self.parts[name]


def _under_conditions(part: Part, given: Any) -> Iterator[tuple[Part, str, Measurement]]:
    if isinstance(given, Mapping) and "value" not in given:
        for condition, each in given.items():
            yield part, str(condition), measurement(each, part.rule.level)
    else:
        yield part, "", measurement(given, part.rule.level)


def measurement(given: Any, level: float, ci: Interval | None = None, n: int | None = None) -> Measurement:
    """Value, interval and number of seeds from any form `observe` takes; `level` is for a list of numbers."""
    if isinstance(given, Mapping):
        given, ci, n = given["value"], given.get("ci", ci), given.get("n", n)
    for wrapped in ("ratio", "difference"):  # a TimeRatio, an Equivalence
        given = getattr(given, wrapped, given)
    if isinstance(given, numbers.Number) or getattr(given, "ndim", None) == 0:
        value = float(given)
    elif hasattr(given, "value") and hasattr(given, "ci"):
        value, ci, n = float(given.value), ci or given.ci, n or given.n
    elif not isinstance(given, str) and (isinstance(given, Sequence) or hasattr(given, "__array__")):
        from labs_lib.measure.stats import mean_ci

        if len(given) == 0:
            raise LabsError("Nothing was observed: the list of measurements is empty.")
        estimate = mean_ci(given, level=level)
        value, ci, n = estimate.value, ci or estimate.ci, n or estimate.n
    else:
        raise LabsError(f"A measurement is a number, a list of numbers or an Estimate, not {given!r}.")
    if ci is None:
        return value, None, n
    lo, hi = (float(end) for end in ci)
    if lo > hi:
        raise LabsError(f"The interval ({lo:g}, {hi:g}) is upside down: give (low, high).")
    return value, (lo, hi), n


def judge(part: Part, condition: str, measured: Measurement, now: context.Context) -> Item:
    """The rule's verdict, unless this machine or this much data cannot give one."""
    value, ci, n = measured
    verdict, why = UNKNOWN, ""
    if math.isnan(value):
        why = "the measured value is not a number"
    elif part.reach == "elsewhere":
        why = "nothing that this course runs can tell"
    elif part.reach == "gpu" and not now.device.startswith("cuda"):
        why = "only a GPU can tell"
    elif part.evidence == "sampled" and ci is None:
        why = "one number without an interval; measure several seeds"
    elif part.evidence == "sampled" and n is not None and n < part.min_n:
        why = f"n = {n}, and this claim asks for at least {part.min_n}"
    else:
        verdict = part.rule.judge(value, ci)
        why = "the interval reaches across the border" if verdict == UNKNOWN else ""
    return Item(part, condition, value, ci, n, verdict, why)


# Register ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def register() -> dict[int, Claim]:
    """All claims by id, read once from `data/claims.yaml`."""
    path = paths.data() / "claims.yaml"
    if not path.exists():
        raise LabsError(f"The claims register is missing: restore it with `git checkout -- {path}`.")
    raw = records.read_yaml(path)
    claims = {}
    for entry in raw["claims"]:
        try:
            claims[entry["id"]] = parse_claim(entry, raw["sources"])
        except (KeyError, TypeError, ValueError) as error:
            raise LabsError(f"data/claims.yaml, claim {entry.get('id', '?')}: {error!r}.") from error
    return claims


def parse_claim(entry: Mapping[str, Any], sources: Mapping[str, Any]) -> Claim:
    """A `Claim` from its YAML form. What is unknown or missing raises KeyError, TypeError or ValueError."""
    rest = dict(entry)
    shared = {key: rest.pop(key) for key in ("measures", "unit", "evidence", "reach", "min_n") if key in rest}
    own = rest.pop("parts") if "parts" in rest else {"": {"rule": rest.pop("rule")}}
    parts = {}
    for name, fields in own.items():
        fields = {"min_n": 2, **shared, **fields}
        if fields["evidence"] not in EVIDENCE or fields["reach"] not in REACH:
            raise ValueError(f"unknown evidence or reach: {fields['evidence']}, {fields['reach']}")
        parts[name] = Part(name=name, **{**fields, "rule": parse_rule(fields["rule"])})
    reported = tuple({**each, "source": sources[each["source"]]} for each in rest.pop("reported", ()))
    return Claim(parts=parts, reported=reported, labs=tuple(rest.pop("labs")), **rest)


def claim(id: int | str) -> Claim:
    """The claim with this number."""
    claims = register()
    try:
        return claims[int(id)]
    except (KeyError, ValueError, TypeError):
        raise LabsError(
            f"There is no claim {id!r}: the register has {min(claims)} to {max(claims)}."
        ) from None


# Records ----------------------------------------------------------------------------------------------------

_observed: list[Verdict] = []


def observed() -> list[Verdict]:
    """The verdicts of this process, in order: what a lab's progress table lists."""
    return list(_observed)


def _record(verdict: Verdict, seeds: Sequence[int] | None, on: records.Record | None) -> None:
    rows = [
        {
            "claim": verdict.claim.id,
            "part": item.part.name,
            "condition": item.condition,
            "value": item.value,
            "ci": item.ci,
            "n": item.n,
            "unit": item.part.unit,
            "verdict": item.verdict,
        }
        for item in verdict.items
    ]
    extra: dict[str, Any] = {} if seeds is None else {"seeds": list(seeds)}
    device = verdict.context.device
    if on is not None:  # where the numbers were measured, not where they are judged
        device = "cpu"
        kept = {key: on.provenance[key] for key in ("device", "machine", "versions") if key in on.provenance}
        extra |= kept | {"model": verdict.context.model, "from": f"{on.name}, {on.date}"}
    record = records.Record(f"claims_lab{verdict.context.lab or '_none'}", rows, verdict.note, extra)
    try:
        records.save_record(record, device=device)
    except LabsError as error:
        if records.recording():
            raise
        print(f"(not kept: {error})")  # a full disk must not stop a learner's notebook


# `labs claims` ----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="show these claims in full")
    parser.add_argument("--lab", help="only the claims a lab tests, for instance 01")
    parser.add_argument("--open", action="store_true", help="only claims without a recorded verdict")
    parser.add_argument("--mine", action="store_true", help="with your own runs from the cache")
    parser.add_argument(
        "--check", action="store_true", help="fail if a recorded verdict is not what its rule says"
    )


def main(args: argparse.Namespace) -> int:
    """List the chapter's claims with their latest recorded verdicts."""
    from labs_lib.measure import standings

    return standings.main(args)
