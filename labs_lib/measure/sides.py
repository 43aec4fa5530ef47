"""Side by side: the same quantity as the CPU's record has it, each GPU's, and the literature, one column each.

A record that nobody has made yet is told in one line, with the command that makes it; nothing stands in for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labs_lib.measure import records

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sides:
    """`rows` for a table, as texts by column title; `note` names the records, and what would make a missing one."""

    rows: list[dict[str, str]]
    note: str

    def __str__(self) -> str:
        return self.note


def newest(name: str, device: str | None = None, **where: Any) -> "records.Record | records.NoRecord":
    """The newest record of a name that has rows with these entries: the course's own, else the learner's.

    `device` is a slug, or "gpu" for any that is not the CPU. The record has those rows only.
    """
    for recorded in (True, False):
        for record in sorted(records.stored(name, recorded), key=lambda each: each.date, reverse=True):
            rows = [row for row in record.rows if where.items() <= row.items()]
            if rows and (device in (None, record.device) or (device == "gpu" and record.device != "cpu")):
                return records.Record(record.name, rows, record.note, record.provenance)
    return records.NoRecord(name, device)


def side_by_side(
    name: str,
    arms: Sequence[str],
    show: Callable[[Row], str],
    command: str,
    published: Mapping[str, Mapping[str, str]] | None = None,
    **where: Any,
) -> Sides:
    """A row for each arm, a column for each device and model that a record is of, then the published figures.

    Args:
        arms: names in the records' rows; one that no record has is left out unless it is published.
        show: the quantity of a row as text; a row of what did not fit is told as that.
        command: what makes the record, for the note.
        published: column title to figures by arm.
        where: entries that a row must have.
    """
    found: dict[tuple[str, str], records.Record] = {}
    for recorded in (True, False):
        for record in sorted(records.stored(name, recorded), key=lambda each: each.date, reverse=True):
            for row in record.rows:
                if where.items() <= row.items():
                    found.setdefault((record.device, row["model"]), record)
    columns: dict[str, dict[str, str]] = {}
    for (device, model), record in sorted(found.items(), key=lambda each: (each[0][0] != "cpu", each[0])):
        rows = [row for row in record.rows if where.items() <= row.items() and row["model"] == model]
        columns[f"{device}, {model}{_shape(rows[0])}"] = {row["arm"]: _cell(row, show) for row in rows}
    columns |= {title: dict(figures) for title, figures in (published or {}).items()}
    table = [
        {"": arm} | {title: cells.get(arm, "") for title, cells in columns.items()}
        for arm in arms
        if any(arm in cells for cells in columns.values())
    ]
    return Sides(table, _note(name, found, command))


def _shape(row: Row) -> str:
    """What a step or a request of this row was, where it says so."""
    if "length" in row:
        return f", {row['rows']} x {row['length']} tokens"
    return f", batch {row['batch']}" if "batch" in row else ""


def _cell(row: Row, show: Callable[[Row], str]) -> str:
    if row.get("out_of_memory"):
        return "does not fit"
    if "missing" in row:
        return f"needs {row['missing']}"
    return "-" if {"refused", "failed"} & set(row) else show(row)


def _note(name: str, found: Mapping[tuple[str, str], records.Record], command: str) -> str:
    devices = {device for device, _ in found}
    said = [
        f"{device}: {max(record.date[:10] for (d, _), record in found.items() if d == device)}"
        for device in sorted(devices)
    ]
    words = f"Records of {name!r}: {', '.join(said)}." if said else f"There is no record of {name!r} yet."
    absent = [
        where for where, there in (("CPU", "cpu" in devices), ("GPU", bool(devices - {"cpu"}))) if not there
    ]
    return words + "".join(
        f" No {where} record yet: `{command}` makes one on such a machine." for where in absent
    )


def interval(row: Row, name: str, digits: int = 2) -> str:
    """ "1.24 [1.20, 1.34]" of a row's `name`, `name_lo` and `name_hi`; alone where it has no interval."""
    if row.get(name) is None:
        return "-"
    ends = [row.get(f"{name}_{end}") for end in ("lo", "hi")]
    tail = "" if None in ends else f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
    return f"{row[name]:.{digits}f}{tail}"


def step_cost(row: Row) -> str:
    """Peak memory of a training step, and its time over LoRA's: "0.038 GB, 1.24 [1.20, 1.34] x"."""
    return f"{row['peak_bytes'] / 1e9:.3g} GB, {interval(row, 'ratio')} x"


def token_cost(row: Row) -> str:
    """Time of a decoded token, and over the base's: "1.21 ms, 1.62 [1.60, 1.68] x"."""
    return f"{row['ms']:.3g} ms, {interval(row, 'ratio')} x"


def ratio_of(row: Row) -> dict[str, Any]:
    """A row's time ratio as `claim(...).observe` takes it."""
    return {"value": row["ratio"], "ci": (row["ratio_lo"], row["ratio_hi"]), "n": row["rounds"]}


def peft_benchmark(labels: Mapping[str, str], against: str = "LoRA r32") -> dict[str, dict[str, str]]:
    """PEFT's own benchmark as a column of published figures: peak memory, and time over its LoRA r32.

    `labels` maps an arm here to the label of a run there, which may have another rank.
    """
    rows = {row["label"]: row for row in records.load_published("method_comparison")["rows"]}
    figures = {
        arm: f"{rows[label]['peak_gib']} GiB, {rows[label]['train_s'] / rows[against]['train_s']:.2f} x ({label})"
        for arm, label in labels.items()
    }
    return {"published: PEFT, 3B, L40S": figures}
