"""Every arm answers as the merged models do, a wrong one is never timed, and the whole bench runs."""

import json
import time
from dataclasses import replace

import pytest

from labs_lib.errors import LabsError
from labs_lib.measure.records import load_record
from labs_lib.serving import arms, bench, bench_report, profiler
from labs_lib.serving.replay import replay
from labs_lib.serving.workload import closed, poisson, random_adapters, uniform, zipf

from .conftest import VOCABULARY, small_model

COUNT = 5
ARMS = ["base", "engine", "engine:gather", *(name for name in arms.FOREIGN if name != "base")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return random_adapters(small_model(), COUNT, tmp_path_factory.mktemp("adapters"), rank=4)


@pytest.fixture
def setup(folders):
    return arms.Setup(small_model(), folders, batch=4, slots=3, rank=4, kv_tokens=512)


def play(name, setup, trace):
    engine = arms.build(name, setup)
    trace = trace.base_only() if name == "base" else trace
    try:
        return engine, replay(engine, trace.requests(list(setup.folders), VOCABULARY), outstanding=8)
    finally:
        engine.close()


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_gives_the_answers_of_the_merged_models(name, setup):
    trace = closed(14, zipf(COUNT), prompt=(2, 20), output=(2, 7), base_share=0.2, seed=1)
    _, run = play(name, setup, trace)
    verdict = arms.Oracle(setup.model, setup.folders).verify(run.results)
    assert verdict.right and verdict.requests == 14 and verdict.tokens == trace.summary()["output_tokens"]


def test_the_oracle_refuses_another_tenants_answers(setup):
    shas, oracle = list(setup.folders), arms.Oracle(setup.model, setup.folders, keep=2)
    _, run = play("engine", setup, closed(10, uniform(COUNT), output=6))
    assert oracle.verify(run.results).right
    for result in run.results:
        other = shas[(shas.index(result.request.adapter) + 1) % COUNT]
        swapped = replace(result, request=replace(result.request, adapter=other))
        assert not oracle.verify([swapped]).right
    assert not oracle.verify([]).right  # nothing compared is no proof
    failed = replace(run.results[0], error="broken", tokens=[])
    assert oracle.verify([failed]).failed == 1


@pytest.mark.parametrize("name, alone", [("peft_switch", True), ("peft_mixed", False), ("engine", False)])
def test_only_switching_runs_one_adapter_at_a_time(name, alone, setup):
    engine, seen = arms.build(name, setup), []
    decode = engine.executor.decode

    def watched(rows):
        seen.append(len({row.request.adapter for row in rows}))
        return decode(rows)

    engine.executor.decode = watched
    requests = closed(12, uniform(COUNT), output=4).requests(list(setup.folders), VOCABULARY)
    replay(engine, requests, outstanding=8)
    engine.close()
    assert (max(seen) == 1) == alone


def test_arms_share_weights_but_not_modules(setup):
    second = arms.share(setup.model)
    for name, weight in setup.model.named_parameters():
        assert second.get_parameter(name) is weight
    assert second.model.layers[0].self_attn.q_proj is not setup.model.model.layers[0].self_attn.q_proj
    before = {name: weight.clone() for name, weight in setup.model.named_parameters()}
    arms.merged(setup.model, next(iter(setup.folders.values())))
    play("merged", setup, closed(4, uniform(COUNT), output=2))
    assert all((weight == before[name]).all() for name, weight in setup.model.named_parameters())


def test_an_unknown_arm_is_refused(setup):
    with pytest.raises(LabsError, match="no arm 'vllm'"):
        arms.build("vllm", setup)


def test_open_loop_waits_for_arrivals(setup):
    trace = poisson(200, 10, uniform(COUNT), output=3)
    engine = arms.build("engine", setup)
    at = [arrival.at for arrival in trace]
    run = replay(engine, trace.requests(list(setup.folders), VOCABULARY), at)
    engine.close()
    assert all(a.stamps[0] >= a.at and a.ttft > 0 for a in run.answers) and run.seconds >= at[-1]
    summary = run.summary(slo_ttft=1e9, slo_tpot=1e9)
    assert summary["goodput"] == summary["requests_per_s"] > 0 == run.summary(slo_ttft=0.0)["goodput"]
    assert summary["hits"] + summary["moved"] == 10


def test_refused_requests_are_counted(setup):
    engine = arms.build("engine", replace(setup, queue=2))
    requests = closed(9, uniform(COUNT), output=2).requests(list(setup.folders), VOCABULARY)
    run = replay(engine, requests)
    engine.close()
    assert run.summary()["failed"] == 7 and len(run.results) == 2


def plan(**changes) -> bench.Plan:
    small = {
        "adapters": 4,
        "many": 6,
        "rank": 4,
        "batch": 3,
        "slots": 3,
        "repeats": 2,
        "rounds": 3,
        "steps": 1,
    }
    return bench.Plan(**(small | {"requests": 6} | changes))


def test_a_wrong_arm_is_not_timed(monkeypatch, tmp_path):
    """PEFT's arm gets the names of its rows in the wrong order."""
    monkeypatch.setattr(bench, "load", lambda plan: small_model())
    call = arms._Named.__call__

    def turned(self, **inputs):
        self.names = self.names[::-1]
        return call(self, **inputs)

    monkeypatch.setattr(arms._Named, "__call__", turned)
    with pytest.raises(LabsError, match="'peft_mixed' gives wrong answers"):
        bench.run(plan(sections=("decode",)), tmp_path)


def test_adapters_too_alike_are_refused(monkeypatch, tmp_path):
    """With adapters that change nothing the oracle could not fail, so nothing would be proved."""
    monkeypatch.setattr(bench, "load", lambda plan: small_model())
    from labs_lib.serving import workload

    monkeypatch.setattr(
        workload, "random_adapters", lambda *a, **k: random_adapters(*a, **(k | {"strength": 1e-6}))
    )
    with pytest.raises(LabsError, match="too much alike"):
        bench.run(plan(sections=()), tmp_path)


def test_the_whole_bench(monkeypatch, tmp_path, capsys):
    from labs_lib.cli import main

    monkeypatch.setattr(bench, "load", lambda plan: small_model())
    monkeypatch.setattr(bench.Plan, "quick", classmethod(lambda cls, **changes: plan(**changes)))
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    monkeypatch.delenv("LABS_RECORD", raising=False)
    assert main(["bench", "serving", "--quick", "--adapters", "4", "--requests", "6"]) == 0
    said = capsys.readouterr().out
    for words in ("Decode step, batch 3", "4 adapters, uniform", "Zipf exponent 1", "Open loop", "The twin"):
        assert words in said
    record = load_record("bench_serving")
    sections = {row["section"] for row in record.rows}
    assert sections == {"oracle", *bench.SECTIONS}
    assert record.provenance["settings"]["exponent"] == 1.0 and "load_average" in record.provenance
    steps = {row["arm"]: row for row in record.rows if row["section"] == "decode"}
    assert {"base", "engine", "engine:gather", "engine:segments", "peft_mixed", "merged"} <= set(steps)
    assert steps["base"]["of_base"] == steps["peft_mixed"]["of_peft"] == 1.0
    files = {path.name for path in (tmp_path / "measured").iterdir()}
    assert {"cpu.bench_serving.json", "cpu.bench_serving.png"} <= files
    picture = (tmp_path / "measured" / "cpu.bench_serving.png").read_bytes()
    assert b"Milliseconds of a decode step" in picture  # the alt text
    json.dumps(record.rows, allow_nan=False)


def test_a_figure_needs_something_to_draw(tmp_path):
    assert bench_report.figure([{"section": "oracle"}], tmp_path / "f.png") is None


def test_unknown_sections_and_models_are_refused(tmp_path):
    with pytest.raises(LabsError, match="no section 'speed'"):
        bench.run(plan(model="tiny", sections=("speed",)), tmp_path)
    with pytest.raises(LabsError, match="4096x32"):
        bench.load(plan(model="random:huge"))
    assert bench.load(plan(model="random:128x1")).config.num_hidden_layers == 1


def test_the_profiler_sees_where_the_time_is(setup):
    def spin(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    assert profiler.shares(lambda: spin(0.001), 0.05)[profiler.SCHEDULE] == 1.0
    for name, adapted in (("base", False), ("engine", True)):
        engine = arms.build(name, setup)
        sha = next(iter(setup.folders)) if adapted else None
        request = arms_request(sha)
        found = profiler.shares(lambda e=engine, r=request: e.generate([r]), 0.3)
        engine.close()
        assert sum(found.values()) == pytest.approx(1)
        assert (found[profiler.ADAPTER] > 0) == adapted
        assert found[profiler.REST] > 0


def arms_request(sha):
    return closed(1, uniform(1), output=20).requests([sha], VOCABULARY)[0]


def test_operations_and_floor_count_by_hand():
    import torch

    x = torch.ones(3)
    assert profiler.operations(lambda: x + x + x) == 2
    model = small_model()
    layout = arms.Layout.of(model)
    found = profiler.floor(model, layout, rows=4, rank=2, adapters=3, past=10)
    weights = sum(spec.in_features * spec.out_features for spec in layout.linears) + VOCABULARY * 32
    both = sum(spec.in_features + spec.out_features for spec in layout.linears)
    assert found["base_flops"] == 2 * 4 * weights and found["weight_bytes"] == 4 * weights
    assert found["adapter_flops"] == 2 * 4 * 2 * both and found["adapter_bytes"] == 3 * 2 * both * 4
    assert found["kv_bytes"] == 4 * 10 * (2 * 2 * 2 * 8) * 4
