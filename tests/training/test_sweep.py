"""A sweep resumes where it stopped, tunes every arm alike, and records only what is complete."""

import dataclasses
import json
import math

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


@pytest.mark.parametrize(
    ("peak", "tried"),
    [
        (1e-2, [3e-3, 1e-2, 3e-2]),
        (1e-1, [3e-3, 1e-2, 3e-2, 9e-2, 0.27]),
        (9.0, [3e-3, 1e-2, 3e-2, 9e-2, 0.27]),  # two more at most
        (2e-3, [9e-4, 3e-3, 1e-2, 3e-2]),
    ],
)
def test_a_grid_grows_where_its_best_is_at_the_edge(peak, tried, monkeypatch):
    """An arm whose score is the higher the nearer (in log) the rate is to `peak`; finals run at the best of all."""
    monkeypatch.setattr(
        sweeping,
        "run_point",
        lambda point, size, device: point | {"score": -abs(math.log(point["lr"] / peak)), "loss": 1.0},
    )
    arm = Arm("a", rates=(3e-3, 1e-2, 3e-2))
    sweep = dataclasses.replace(SMALL, arms=(arm,), widen=2)
    assert sweeping.run_sweep(sweep)
    (record,) = load_records("sweep_test")
    assert sorted(r["lr"] for r in record.rows if r["stage"] == "sweep") == tried
    best = min(tried, key=lambda rate: abs(math.log(rate / peak)))
    assert {r["lr"] for r in record.rows if r["stage"] == "final"} == {best}


def test_a_sweep_with_a_fixed_grid_keeps_its_log():
    assert "widen" not in SMALL.to_dict() and dataclasses.replace(SMALL, widen=2).to_dict()["widen"] == 2


def test_more_seeds_run_only_what_is_new(monkeypatch):
    """Five could not tell: twenty for some arms, in the same log, at the rate that was chosen before."""
    ran = []
    monkeypatch.setattr(
        sweeping,
        "run_point",
        lambda point, size, device: ran.append(point) or point | {"score": point["lr"], "loss": 1.0},
    )
    assert sweeping.run_sweep(SMALL)
    ran.clear()
    more = dataclasses.replace(SMALL, more={("a", "facts"): 4})
    assert sweeping.log_path(more) == sweeping.log_path(SMALL)
    assert sweeping.run_sweep(more)
    assert [(p["arm"]["name"], p["stage"], p["seed"], p["lr"]) for p in ran] == [
        ("a", "final", 3, 1e-2),
        ("a", "final", 4, 1e-2),
    ]


def test_at_least_so_many_seeds_for_every_arm(monkeypatch):
    ran = []
    monkeypatch.setattr(
        sweeping,
        "run_point",
        lambda point, size, device: ran.append(point) or point | {"score": point["lr"], "loss": 1.0},
    )
    more = dataclasses.replace(SMALL, more={("a", "facts"): 4})
    assert sweeping.run_sweep(more, seeds=3)
    finals = [(p["arm"]["name"], p["seed"]) for p in ran if p["stage"] == "final"]
    assert sorted(finals) == [("a", 1), ("a", 2), ("a", 3), ("a", 4), ("b", 1), ("b", 2), ("b", 3)]
    assert sweeping.log_path(more) == sweeping.log_path(SMALL)


@pytest.mark.parametrize(
    ("more", "count"),
    [({}, 2), ({("*", "*"): 7}, 7), ({("*", "facts"): 7}, 7), ({("a", "*"): 7}, 7), ({("b", "*"): 7}, 2)],
)
def test_more_seeds_are_named_by_arm_and_task(more, count):
    assert dataclasses.replace(SMALL, more=more).fresh_seeds("a", "facts") == range(1, 1 + count)


def test_an_arm_s_own_entry_goes_before_a_star():
    sweep = dataclasses.replace(
        SMALL, more={("*", "*"): 3, ("*", "facts"): 5, ("a", "*"): 7, ("a", "facts"): 9}
    )
    assert len(sweep.fresh_seeds("a", "facts")) == 9
    assert len(sweep.fresh_seeds("a", "x")) == 7
    assert len(sweep.fresh_seeds("b", "facts")) == 5


def test_more_seeds_name_arms_and_tasks_that_exist():
    from labs_lib.training.bakeoff import BAKEOFF

    for sweep in (*SWEEPS.values(), BAKEOFF):
        arms, tasks = {arm.name for arm in sweep.arms}, {task.label for task in sweep.tasks}
        for arm, task in sweep.more:
            assert arm in arms | {"*"} and task in tasks | {"*"}, sweep.name


def test_rates_and_finals_that_the_plan_does_not_ask_for_are_left_out(monkeypatch):
    """As when the rows of a narrower or wider grid are copied into the log: nothing planned is run again."""
    monkeypatch.setattr(
        sweeping, "run_point", lambda point, size, device: point | {"score": point["lr"], "loss": 1.0}
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


@pytest.mark.parametrize(("stage", "split", "count"), [("sweep", "validation", 128), ("final", "test", 512)])
def test_classification_is_scored_on_the_stage_s_split_by_kind(stage, split, count, monkeypatch):
    from labs_lib.measure import quality
    from labs_lib.world.tasks import load_task

    scored = {}
    real = quality.accuracy
    monkeypatch.setattr(quality, "accuracy", lambda *a, **k: scored.update(rows=a[2]) or real(*a, **k))
    monkeypatch.setattr(sweeping, "KNOWN_FACTS_PROBED", 8)
    task = Task("reviews", "classification", steps=1, batch=4)
    point = task.settings() | {"arm": SMALL.arms[0].to_dict(), "stage": stage, "seed": 0, "lr": 1e-3}
    row = sweeping.run_point(point, "tiny")
    expected = load_task("classification")[split]
    assert scored["rows"]["prompt"] == expected["prompt"] and len(expected) == count
    shares = {kind: expected["kind"].count(kind) / count for kind in ("plain", "but", "not")}
    assert row["score"] == pytest.approx(sum(row[kind] * share for kind, share in shares.items()))


def test_of_tied_rates_the_lower_held_out_loss_wins_where_it_was_watched():
    """With few examples the training loss of a tie favours the rate that learned them by heart."""
    arm = Arm("a")
    rows = [
        {"stage": "sweep", "arm": arm.to_dict(), "label": "t", "lr": lr, "score": 0.0, "loss": loss}
        | {"held_loss": held}
        for lr, loss, held in ((1, 0.9, 0.3), (2, 0.1, 2.0))
    ]
    assert sweeping.best_rate(rows, arm, "t", (1, 2)) == 1


def test_few_examples_are_drawn_by_the_seed_and_more_of_them_contain_fewer():
    from labs_lib.world.tasks import load_task

    train = load_task("style", tenant="fathom-eleven")["train"]
    assert sweeping.few(train, None, 3)["prompt"] == train["prompt"]
    eight, four = (sweeping.few(train, n, 3)["prompt"] for n in (8, 4))
    assert eight[:4] == four and set(eight) <= set(train["prompt"]) and len(set(eight)) == 8
    assert sweeping.few(train, 4, 4)["prompt"] != four


@pytest.mark.parametrize(("stage", "steps"), [("sweep", [3]), ("final", [1, 3])])
def test_a_watched_run_is_scored_on_its_way_and_trains_as_without(stage, steps, monkeypatch):
    monkeypatch.setattr(sweeping, "KNOWN_FACTS_PROBED", 8)
    monkeypatch.setattr(sweeping, "STYLE_ROWS_SCORED", 4)
    task = Task("style", "style", steps=3, batch=4, tenant="fathom-eleven").settings()
    rows = [
        sweeping.run_point(
            task | {"arm": Arm("a", options=more).to_dict(), "stage": stage, "seed": 1, "lr": 1e-2}, "tiny"
        )
        for more in ({"examples": 2, "watch": (1,)}, {"examples": 2})
    ]
    assert rows[0]["loss"] == rows[1]["loss"]
    seen = rows[0]["watched"]
    assert [each["step"] for each in seen] == steps and rows[0]["held_loss"] == seen[-1]["loss"]
    assert (seen[-1]["exact"], seen[-1]["compliance"]) == (rows[0]["score"], rows[0]["compliance"])


@pytest.mark.parametrize(
    ("options", "inputs"), [({}, True), ({"feedforward": ()}, False), ({"feedforward": []}, False)]
)
def test_the_side_that_ia3_scales_is_the_arms_option(options, inputs):
    """A list is what JSON makes of a tuple."""
    from labs_lib.methods.ia3 import ia3_layers
    from labs_lib.models.base import load_base
    from labs_lib.training.adapt import METHODS

    model = METHODS["ia3"](load_base("tiny")[0], Arm("a", method="ia3", options=options), 0, 1).model
    layer = ia3_layers(model)["model.layers.0.mlp.down_proj"]
    assert layer.feedforward == inputs
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * model.config.num_hidden_layers and all("ia3_l" in name for name in trained)


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
