"""Long work runs every point once, whatever interrupts it, and later points may wait for earlier rows."""

from labs_lib.training.resume import find, run_points


def test_it_stops_goes_on_and_runs_nothing_twice(tmp_path):
    log, ran = tmp_path / "folder" / "log.jsonl", []

    def plan(rows):
        yield {"stage": "first", "n": 1}
        yield {"stage": "first", "n": 2}
        if len(rows) >= 2:  # known only once the first stage is in
            yield {"stage": "last", "n": max(row["score"] for row in rows if row["stage"] == "first")}

    def run(point):
        ran.append(point)
        return point | {"score": 10 * point["n"]}

    assert run_points(log, plan, run, "test", limit=1) is None and len(ran) == 1
    rows = run_points(log, plan, run, "test")
    assert [row["score"] for row in rows] == [10, 20, 200] and len(ran) == 3
    assert run_points(log, plan, run, "test") == rows and len(ran) == 3
    assert find(rows, {"stage": "none"}) is None
