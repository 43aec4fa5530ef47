"""A sweep resumes where it stopped, tunes every arm alike, and records only what is complete."""

import json

import pytest

from labs_lib import paths
from labs_lib.measure.records import load_records
from labs_lib.training import sweep as sweeping
from labs_lib.training.sweeps import SWEEPS, Arm, Sweep, Task

SMALL = Sweep(
    name="test",
    note="",
    arms=(Arm("a", rank=1, targets=("q_proj",)), Arm("b", method="ia3", rates=(1e-2,))),
    tasks=(Task("facts", "knowledge", steps=2, batch=8, facts=16),),
    rates=(1e-3, 1e-2),
    seeds=2,
    size="tiny",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    monkeypatch.delenv("LABS_RECORD", raising=False)


def test_stops_at_the_limit_and_goes_on(tmp_path):
    assert sweeping.run_sweep(SMALL, limit=2) is None
    (log,) = (paths.cache() / "sweeps").glob("test-*.jsonl")
    before = log.read_text().splitlines()
    assert len(before) == 2
    path = sweeping.run_sweep(SMALL)
    after = log.read_text().splitlines()
    assert (
        after[:2] == before and len(after) == 3 + 4
    )  # three first-stage points, two seeds for each of two arms
    (record,) = load_records("sweep_test")
    assert path.exists() and len(record.rows) == len(after)
    assert sweeping.run_sweep(SMALL) and len(log.read_text().splitlines()) == 7  # nothing runs twice


def test_final_seeds_run_at_the_arms_own_best_rate():
    sweeping.run_sweep(SMALL)
    (record,) = load_records("sweep_test")
    for arm in SMALL.arms:
        rows = [r for r in record.rows if r["arm"]["name"] == arm.name]
        best = sweeping.best_rate(rows, arm, "facts", arm.rates or SMALL.rates)
        finals = [r for r in rows if r["stage"] == "final"]
        assert {r["lr"] for r in finals} == {best} and [r["seed"] for r in finals] == [1, 2]


def test_best_rate_waits_for_every_rate_and_breaks_ties_by_loss():
    arm = Arm("a")

    def row(lr, score, loss):
        return {"stage": "sweep", "arm": arm.to_dict(), "label": "t", "lr": lr, "score": score, "loss": loss}

    assert sweeping.best_rate([row(1, 0.5, 1.0)], arm, "t", (1, 2)) is None
    assert sweeping.best_rate([row(1, 0.5, 1.0), row(2, 0.5, 0.5)], arm, "t", (1, 2)) == 2
    assert sweeping.best_rate([row(1, 0.5, 1.0), row(2, 0.0, None)], arm, "t", (1, 2)) == 1


def test_rates_and_finals_that_the_plan_does_not_ask_for_are_left_out(monkeypatch):
    """As when the rows of a narrower or wider grid are copied into the log: nothing planned is run again."""
    monkeypatch.setattr(
        sweeping, "run_point", lambda point, size: point | {"score": point["lr"], "loss": 1.0}
    )
    assert sweeping.run_sweep(SMALL)
    log = sweeping.log_path(SMALL)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    extra = [row | {"lr": 7.0, "score": 1.0} for row in rows if row["arm"]["name"] == "a"]
    assert {row["stage"] for row in extra} == {"sweep", "final"}
    log.write_text("".join(json.dumps(row) + "\n" for row in [*extra, *reversed(rows)]))
    assert sweeping.run_sweep(SMALL)
    before, after = load_records("sweep_test")
    assert after.rows == before.rows
    assert len(log.read_text().splitlines()) == len(extra) + len(rows)


@pytest.mark.parametrize(("stage", "split"), [("sweep", "validation"), ("final", "test")])
def test_a_style_s_rate_is_chosen_on_validation_and_reported_on_test(stage, split, monkeypatch):
    from labs_lib.measure import quality
    from labs_lib.world.tasks import load_task

    scored = {}
    real = quality.style_quality
    monkeypatch.setattr(quality, "style_quality", lambda *a, **k: scored.update(rows=a[2]) or real(*a, **k))
    monkeypatch.setattr(sweeping, "KNOWN_FACTS_PROBED", 8)
    monkeypatch.setattr(sweeping, "STYLE_ROWS_SCORED", 4)
    task = Task("style", "style", steps=1, batch=4, tenant="fathom-eleven")
    point = task.settings() | {"arm": SMALL.arms[0].to_dict(), "stage": stage, "seed": 0, "lr": 1e-3}
    assert "compliance" in sweeping.run_point(point, "tiny")
    expected = load_task("style", tenant="fathom-eleven")[split][:4]
    assert scored["rows"]["prompt"] == expected["prompt"]


def test_a_divergent_rate_is_a_result(tmp_path):
    point = next(sweeping.points(SMALL, []))
    row = sweeping.run_point(point | {"lr": 1e30, "steps": 6}, "tiny")
    assert row["diverged"] and row["score"] == 0.0
    json.dumps(row)


def test_one_point_reproduces_itself():
    point = next(sweeping.points(SMALL, []))
    first, second = (sweeping.run_point(point, "tiny") for _ in range(2))
    assert first["loss"] == second["loss"] and first["score"] == second["score"]


@pytest.mark.parametrize("sweep", SWEEPS.values(), ids=SWEEPS)
def test_shipped_sweeps_are_well_formed(sweep):
    assert len({arm.name for arm in sweep.arms}) == len(sweep.arms)
    for arm in sweep.arms:
        assert Arm(**json.loads(json.dumps(arm.to_dict()))) == arm
