"""Long work point by point: what is done is kept in a log, and the next call goes on where the last one stopped."""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

Row = dict
Key = Callable[[dict], object]


def run_points(
    log: Path,
    plan: Callable[[list[Row]], Iterable[dict]],
    run: Callable[[dict], Row],
    title: str,
    limit: int | None = None,
    until: float = math.inf,
) -> list[Row] | None:
    """Run every point of a plan once; returns their rows in the plan's order, None if it stopped before the last.

    Args:
        log: JSON lines, one row for each finished point.
        plan: from the rows so far to all points known by now; later ones may depend on earlier rows.
        run: a point to its row, which holds the point's own entries.
        title: of the progress bar.
        limit: stop after so many new points.
        until: begin no point after this time of time.monotonic().
    """

    def first(missing: list[dict]) -> list[dict]:
        return missing[:1]

    return run_waves(log, plan, first, lambda points: map(run, points), title, limit, until)


def run_waves(
    log: Path,
    plan: Callable[[list[Row]], Iterable[dict]],
    wave: Callable[[list[dict]], list[dict]],
    run: Callable[[list[dict]], Iterable[Row]],
    title: str,
    limit: int | None = None,
    until: float = math.inf,
    key: Key | None = None,
) -> list[Row] | None:
    """run_points, several at a time: `wave` chooses from the missing points, `run` gives their rows as they get ready.

    `key` is the same for a point and its row; None compares all of a point's entries.
    """
    from tqdm.std import tqdm

    log.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    bar = tqdm(unit="run", ncols=90, desc=title)
    while True:
        points = list(plan(rows))
        done = _finder(rows, key)
        missing = [point for point in points if done(point) is None]
        bar.total = len(points)
        bar.update(len(points) - len(missing) - bar.n)
        if not missing or limit == 0 or time.monotonic() >= until:
            break
        chosen = wave(missing)[:limit]
        for row in run(chosen):
            rows.append(row)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            bar.update()
        limit = None if limit is None else limit - len(chosen)
    bar.close()
    return None if missing else [done(point) for point in points]


def _finder(rows: list[Row], key: Key | None) -> Callable[[dict], Row | None]:
    if key is None:
        return lambda point: find(rows, point)
    by_key = {key(row): row for row in rows}
    return lambda point: by_key.get(key(point))


def find(rows: Iterable[Row], point: dict) -> Row | None:
    """The row of a point: the one that holds its entries."""
    return next((row for row in rows if all(row.get(key) == value for key, value in point.items())), None)
