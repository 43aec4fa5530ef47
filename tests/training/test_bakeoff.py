"""The bake-off's protocol is the same for everybody; it stops and goes on; its counts hold what they say."""

import argparse
import dataclasses

import pytest
import torch

from labs_lib.measure.records import load_records
from labs_lib.models.base import load_base
from labs_lib.training import bakeoff
from labs_lib.training import sweep as sweeping
from labs_lib.training.adapt import METHODS
from labs_lib.training.costs import NO_FORMAT, after_merging, peft_config, servable, stored
from labs_lib.training.sweeps import Arm, Sweep, Task

TINY = dataclasses.replace(
    bakeoff.BAKEOFF,
    name="bakeoff_test",
    arms=tuple(arm for arm in bakeoff.ARMS if arm.name in ("IA3", "LoRA r2")),
    tasks=(Task("facts", "knowledge", steps=2, batch=8, facts=16),),
    seeds=2,
    size="tiny",
    widen=0,
    refine=0.0,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    monkeypatch.delenv("LABS_RECORD", raising=False)


# ---- the protocol


def test_every_method_of_the_course_is_there():
    methods = {arm.method for arm in bakeoff.ARMS}
    assert methods <= set(METHODS)
    assert methods >= set("full lora qlora dora lora_plus rslora adalora prompt prefix bottleneck".split())
    assert methods >= set("llama_adapter ia3 galore zoo mix_and_match".split())
    kinds = {arm.options["method"] for arm in bakeoff.ARMS if arm.method == "zoo"}
    assert kinds == {"vera", "tied_lora", "loha", "lokr", "oft", "boft", "miss"}


def test_the_effort_is_equal():
    """Three rates half a decade apart, one middle of its own, for every arm; all else belongs to the task."""
    names = [arm.name for arm in bakeoff.ARMS]
    assert len(set(names)) == len(names)
    for arm in bakeoff.ARMS:
        low, middle, high = arm.rates
        assert 2.9 < middle / low < 3.4 and 2.9 < high / middle < 3.4
        assert not {"examples", "watch", "fresh"} & set(arm.options)
    sweep = bakeoff.BAKEOFF
    assert (sweep.seeds, sweep.widen, sweep.refine, sweep.gentle) == (5, 2, 0.99, True)
    assert [task.facts for task in bakeoff.TASKS if task.facts] == [32, 128, 512]


def test_of_equally_good_rates_the_lowest_wins():
    arm = Arm("a")

    def row(lr, score, loss):
        return {"stage": "sweep", "arm": arm.to_dict(), "label": "t", "lr": lr, "score": score, "loss": loss}

    rows = [row(1, 0.5, 0.9), row(2, 0.5, 0.1), row(3, 0.4, 0.0)]
    assert sweeping.best_rate(rows, arm, "t", (1, 2, 3)) == 2
    assert sweeping.best_rate(rows, arm, "t", (1, 2, 3), gentle=True) == 1
    nothing = [row(1, 0.0, 0.9), row(2, 0.0, 0.1), row(3, 0.0, 0.4)]
    assert sweeping.best_rate(nothing, arm, "t", (1, 2, 3), gentle=True) == 2, "the lowest rate learned least"


@pytest.mark.parametrize(
    ("scores", "more"),
    [
        (
            {1e-3: 0.5, 1e-2: 0.8, 1e-1: 0.2},
            {3.2e-3, 3.2e-2},
        ),  # something to be gained: both sides of the best
        ({1e-3: 0.5, 1e-2: 1.0, 1e-1: 0.2}, set()),
        ({1e-3: 0.9, 1e-2: 0.8, 1e-1: 0.2}, {3.2e-3}),  # at the edge there is one side only
    ],
)
def test_a_grid_is_refined_around_a_best_that_is_not_perfect(scores, more):
    def choose(rates):
        known = [{"lr": lr, "score": scores[lr]} for lr in rates]
        return max(known, key=lambda row: row["score"])

    assert set(sweeping.grid(choose, tuple(scores), refine=0.99)) - set(scores) == more


def test_the_names_of_earlier_logs_do_not_change():
    plain = Sweep("s", "", (Arm("a"),), TINY.tasks, (1e-3,), 1)
    assert not {"widen", "refine", "gentle"} & set(plain.to_dict())
    assert dataclasses.replace(plain, gentle=True).to_dict()["gentle"]


# ---- the command


def test_it_stops_goes_on_and_records(monkeypatch, capsys):
    monkeypatch.setattr(bakeoff, "BAKEOFF", TINY)
    parser = argparse.ArgumentParser()
    bakeoff.add_arguments(parser)
    assert bakeoff.main(parser.parse_args(["--limit", "7"])) == 0
    assert "run the same command" in capsys.readouterr().out and not load_records("sweep_bakeoff_test")
    log = sweeping.log_path(TINY)
    half = log.read_text()
    assert half.count("\n") == 7  # six rates, then the first seed of one arm
    bakeoff.main(parser.parse_args([]))
    assert log.read_text().startswith(half)
    (record,) = load_records("sweep_bakeoff_test")
    assert len(record.rows) == 6 + 4
    assert all(row["cpu_seconds"] > 0 for row in record.rows)


def test_seed_by_seed(monkeypatch):
    """Stopped early, the arms have got equally far: nobody's second seed before everybody's first."""
    ran = []

    def fake(point, size, device):
        ran.append(point["seed"])
        return point | {"score": 0.5, "loss": 1.0, "kept": 1.0, "seconds": 1.0}

    monkeypatch.setattr(sweeping, "run_point", fake)
    sweeping.run_sweep(TINY)
    assert ran == sorted(ran) == [0] * 6 + [1] * 2 + [2] * 2


# ---- what the arms are


def test_the_unpacked_base_computes_what_the_packed_one_does():
    arm = next(arm for arm in bakeoff.ARMS if arm.method == "qlora")
    ids = torch.arange(5, 29).view(1, -1)
    logits = []
    for options in ({}, arm.options):
        model = load_base("small", quantise="nf4")[0]
        model = METHODS["qlora"](model, dataclasses.replace(arm, options=options), 1, 10).model.eval()
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert torch.allclose(*logits, atol=1e-4)
    assert not any("4bit" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("arm", bakeoff.ARMS, ids=lambda arm: arm.name)
def test_folding_in_changes_nothing_and_costs_nothing(arm):
    found = after_merging(arm, "small" if arm.quantise else "tiny")
    outside = ("prompt", "prefix", "bottleneck", "llama_adapter", "mix_and_match")
    assert found["mergeable"] == (arm.method not in outside)
    if found["mergeable"]:
        assert found["merge_error"] < 1e-4


def test_a_file_holds_what_trains_but_adaloras_pruned_ranks():
    for name in ("AdaLoRA r12 to r8", "LoRA r8"):
        arm = next(arm for arm in bakeoff.ARMS if arm.name == name)
        model = METHODS[arm.method](load_base("tiny")[0], arm, 0, 60).model
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert stored(model, arm) == (round(trained * 8 / 12) if arm.method == "adalora" else trained)


def test_engines_are_asked_with_what_peft_would_write():
    arms = {arm.name: arm for arm in bakeoff.ARMS}
    assert set(servable(arms["LoRA r8"]).values()) == {"accepted"}
    assert servable(arms["LoRA+ r8"]) == servable(arms["LoRA r8"])
    assert servable(arms["DoRA r8"])["vLLM"] == "refused"
    assert servable(arms["rsLoRA r8"])["SGLang"] == "silently wrong"
    assert servable(arms["IA3"])["PEFT adapter_names"] == "silently wrong"
    assert peft_config(arms["full fine-tuning"]) is None
    assert set(servable(arms["Tied-LoRA r29"]).values()) == {NO_FORMAT}
