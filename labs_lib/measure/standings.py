"""Where the claims stand: the latest recorded verdict of each, per device, as `labs claims` lists them."""

import argparse
import math
from dataclasses import dataclass
from typing import Any

from labs_lib.measure import records
from labs_lib.measure.claims import Claim, Part, claim, register
from labs_lib.measure.rules import UNKNOWN, VERDICTS, combine, measured
from labs_lib.measure.verdicts import as_cited


@dataclass(frozen=True)
class Standing:
    """One claim on one device: the rows of the newest run of each lab that measured it, and those labs' numbers."""

    claim: Claim
    device: str
    date: str
    rows: list[dict[str, Any]]
    labs: tuple[str, ...]

    @property
    def verdict(self) -> str:
        return combine([row["verdict"] for row in self.rows])

    def __str__(self) -> str:
        done, of = len({row["part"] for row in self.rows}), len(self.claim.parts)
        return f"{self.device}: {self.verdict}" + (f" ({done} of {of} parts)" if done < of else "")


def standings(mine: bool = False) -> dict[int, list[Standing]]:
    """Recorded verdicts by claim, the CPU's first; `mine` adds the learner's own runs from the cache.

    Only the newest run (process) of a lab counts for each part it measured: what an older run alone reported,
    a condition since renamed for instance, is left out.
    """
    newest: dict[tuple, list[records.Record]] = {}  # claim, part, device, lab -> records of one run
    recorded = records.stored("claims_lab*", recorded=True)
    for record in [*recorded, *(records.stored("claims_lab*", recorded=False) if mine else [])]:
        for id_, part in dict.fromkeys((row["claim"], row["part"]) for row in record.rows):
            run = newest.setdefault((id_, part, record.device, record.name), [])
            if run and run[-1].provenance.get("run") != record.provenance.get("run"):
                if record.date < run[-1].date:
                    continue
                run.clear()
            run.append(record)

    rows: dict[tuple[int, str], dict[tuple, dict]] = {}
    dates: dict[tuple[int, str], str] = {}
    labs: dict[tuple[int, str], set[str]] = {}
    for (id_, part, device, lab), run in newest.items():
        slot = rows.setdefault((id_, device), {})
        labs.setdefault((id_, device), set()).add(lab.removeprefix("claims_lab"))
        for record in run:
            for row in record.rows:
                if (row["claim"], row["part"]) == (id_, part):
                    slot[lab, part, row["condition"]] = row
            dates[id_, device] = max(dates.get((id_, device), ""), record.date)

    found: dict[int, list[Standing]] = {}
    for id_, device in sorted(rows, key=lambda key: (key[0], key[1] != "cpu", key[1])):
        key = (id_, device)
        each = Standing(claim(id_), device, dates[key], list(rows[key].values()), tuple(sorted(labs[key])))
        found.setdefault(id_, []).append(each)
    return found


def mismatches() -> list[str]:
    """Recorded verdicts that today's rules would not give: a rule was changed after the measurement."""
    wrong = []
    for standing in (each for per_claim in standings().values() for each in per_claim):
        for row in standing.rows:
            part = standing.claim.parts.get(row["part"])
            name = " ".join(filter(None, (f"claim {row['claim']}", row["part"], row["condition"])))
            if part is None:
                wrong.append(f"{name} ({standing.device}): the register has no such part")
            elif row["verdict"] != UNKNOWN:
                today = part.rule.judge(_value(row), _interval(row))
                if today != row["verdict"]:
                    wrong.append(f"{name} ({standing.device}): recorded {row['verdict']!r}, now {today!r}")
    return wrong


def _value(row: dict) -> float:
    return math.nan if row["value"] is None else row["value"]


def _interval(row: dict) -> tuple[float, float] | None:
    """JSON has no infinity: an open end is stored as null."""
    if row["ci"] is None:
        return None
    lo, hi = row["ci"]
    return (-math.inf if lo is None else lo, math.inf if hi is None else hi)


def main(args: argparse.Namespace) -> int:
    """See `labs_lib.measure.claims.add_arguments` for the options."""
    if args.check:
        wrong = mismatches()
        print("\n".join(wrong) or "Every recorded verdict is what its rule says.")
        return 1 if wrong else 0
    stand = standings(mine=args.mine)
    if args.ids:
        chosen = [claim(id_) for id_ in args.ids]
        print("\n\n".join(in_full(each, stand.get(each.id, [])) for each in chosen))
        return 0
    chosen = [each for each in register().values() if not args.lab or args.lab.zfill(2) in each.labs]
    if args.open:
        chosen = [each for each in chosen if each.id not in stand]
    words = {each.id: ", ".join(map(str, stand.get(each.id, []))) or "not measured yet" for each in chosen}
    width = max(map(len, words.values()), default=0)
    for each in chosen:
        print(f"{each.id:>2}  labs {' '.join(each.labs):<9} {words[each.id]:<{width}}  {each.says}")
    told = [stand[each.id][0].verdict for each in chosen if each.id in stand]
    tally = ", ".join(f"{told.count(word)} {word}" for word in VERDICTS if word in told)
    print(f"\n{len(chosen)} claims, {len(told)} measured" + (f": {tally}" if tally else ""))
    return 0


def in_words(row: dict, part: Part | None) -> str:
    """A recorded measurement with its interval and unit; yes or no where the rule asks for that."""
    return measured(_value(row), _interval(row), row["unit"], part is not None and part.rule.boolean)


def in_full(each: Claim, stands: list[Standing]) -> str:
    """Everything the register and the records know of one claim."""
    lines = [f'Claim {each.id}, {each.where}: "{each.quote}"', f"  says     {each.says}"]
    lines.append(f"  test     {each.test} (labs {', '.join(each.labs)})")
    for part in each.parts.values():
        name = f"{part.label}: " if part.name else ""
        lines.append(f"  rule     {name}{part.measures}: {part.rule.says(part.unit)}")
    for title, text in (("reading", each.reading), ("limits", each.limits), ("to tell", each.would_tell)):
        lines += [f"  {title:<8} {text}"] if text else []
    lines += [f"  {as_cited(report)}" for report in each.reported]
    for standing in stands:
        lines.append(f"  {standing} ({standing.date[:10]})")
        for row in standing.rows:
            part = each.parts.get(row["part"])
            label = ", ".join(filter(None, (row["part"].replace("_", " "), row["condition"])))
            lines.append(f"    {label or 'measured'}: {in_words(row, part)}, {row['verdict']}")
    return "\n".join(lines if stands else [*lines, "  not measured yet"])
