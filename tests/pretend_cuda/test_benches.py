"""`labs bench training` and `labs bench inference` on a card: every arm's tensors, its allocator, its graphs."""

import json

import pytest

from labs_lib.measure.records import stored
from labs_lib.training import bench, bench_inference
from labs_lib.training.bench_arms import arms_for

from . import pretend

TWIN = "random:64x2"
ARMS = {arm.name: arm for arm in arms_for(bench.config_of(TWIN), half=True)}


@pytest.fixture(autouse=True)
def card(monkeypatch, tmp_path):
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    monkeypatch.delenv("LABS_RECORD", raising=False)
    with pretend("gpu"):
        yield


def plan(**changes) -> bench.Plan:
    small = {"model": TWIN, "device": "cuda", "dtype": "bfloat16", "length": 12, "seconds": 0.0, "least": 2}
    return bench.Plan(**(small | changes))


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_measured_on_the_card(name):
    bases = bench.Bases(plan())
    row = bench.measure(ARMS[name], plan(), bases)
    assert row.get("step_s"), bench.obstacle(row)
    assert row["paired"] and row["finite"] and not row["exact"]
    assert row["base_bytes"] <= row["weight_bytes"] + row["state_bytes"] < row["peak_bytes"]


def test_a_record_of_training_names_the_card():
    names = ("LoRA r16", "GaLore, 8-bit, layer by layer", "AdaLoRA r24 to r16", "QLoRA r16")
    rows, complete = bench.run(plan(arms=names), bench.log_of("training", plan(arms=names)))
    assert complete and rows[1]["refresh_s"] > 0
    assert all(abs(row["left_bytes"]) < 10_000 for row in rows)  # nothing of an arm stays behind
    bench.save("bench_training", rows, plan(), "", 0.0)
    (record,) = stored("bench_training", recorded=False)
    assert record.device == "pretend24gb" and record.provenance["gpu"].startswith("NVIDIA Pretend")
    json.dumps(record.rows, allow_nan=False)


def test_every_arm_decodes_and_is_replayed_as_a_graph(tmp_path):
    small = bench_inference.Plan(TWIN, "cuda", "bfloat16", (2,), prompt=6, tokens=2, seconds=0.0, least=2)
    rows, complete = bench_inference.run(small, tmp_path / "log.jsonl")
    assert complete and not [row for row in rows if row["what"] == "none"]
    by = {what: {row["arm"] for row in rows if row["what"] == what} for what in bench_inference.WHAT}
    assert (
        by["decode"]
        == by["prefill"]
        == by["graph"]
        == set(bench_inference.methods(bench.config_of(TWIN), half=True))
    )
