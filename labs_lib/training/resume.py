"""Long work point by point: what is done is kept in a log, and the next call goes on where the last one stopped."""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def run_points(
    log: Path,
    plan: Callable[[list[dict]], Iterable[dict]],
    run: Callable[[dict], dict],
    title: str,
    limit: int | None = None,
    until: float = math.inf,
) -> list[dict] | None:
    """Run every point of a plan once; returns their rows in the plan's order, None if it stopped before the last.

    Args:
        log: JSON lines, one row for each finished point.
        plan: from the rows so far to all points known by now; later ones may depend on earlier rows.
        run: a point to its row, which holds the point's own entries.
        title: of the progress bar.
        limit: stop after so many new points.
        until: begin no point after this time of time.monotonic().
    """
    from tqdm.std import tqdm

    log.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    bar = tqdm(unit="run", ncols=90, desc=title)
    while True:
        points = list(plan(rows))
        missing = [point for point in points if find(rows, point) is None]
        bar.total = len(points)
        bar.update(len(points) - len(missing) - bar.n)
        if not missing or limit == 0 or time.monotonic() >= until:
            break
        rows.append(run(missing[0]))
        with log.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        limit = None if limit is None else limit - 1
    bar.close()
    return None if missing else [find(rows, point) for point in points]


def find(rows: Iterable[dict], point: dict) -> dict | None:
    """The row of a point: the one that holds its entries."""
    return next((row for row in rows if all(row.get(key) == value for key, value in point.items())), None)
