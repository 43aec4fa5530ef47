"""Grid and fleet: every arm is right on adapters made in memory, and what was not measured is said."""

import pytest
import torch

from labs_lib.errors import LabsError
from labs_lib.serving import bench, bench_grid, bench_report
from labs_lib.serving.arms import Setup, build
from labs_lib.serving.bench_grid import Budget, grid_cases
from labs_lib.serving.oracle import TIES
from labs_lib.serving.payloads import Merging, Payloads
from labs_lib.serving.types import Request

from .conftest import small_model


def plan(**changes) -> bench.Plan:
    small = {
        "batches": (1, 3),
        "ranks": (4,),
        "counts": (1, 5),
        "rounds": 2,
        "steps": 1,
        "repeats": 2,
        "peft": (1, 3),
    }
    return bench.Plan(**(small | {"requests": 8, "batch": 4, "sections": ("grid", "fleet")} | changes))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "load", lambda plan: small_model())
    monkeypatch.setattr(bench_grid, "PAST", 20)


def test_payloads_are_adapters_of_the_asked_rank():
    model = small_model()
    made = Payloads(model, 5, 3, seed=1)
    assert len(set(made.names)) == 5 == made.distinct and all(len(name) == 64 for name in made.names)
    for path, (A, B) in made.matrices(made.names[2]).items():
        weight = model.get_submodule(path).weight
        assert (B @ A).shape == weight.shape and torch.linalg.matrix_rank(B @ A) == 3
        assert 0.2 < (B @ A).std() / weight.std() < 0.8
    assert made.pages(made.names[0]).shape == (3, made.layout.width)
    assert not torch.equal(made.pages(made.names[0]), made.pages(made.names[1]))


def test_few_sets_of_weights_serve_many_adapters():
    model = small_model()
    one = Payloads(model, 1, 3).nbytes
    made = Payloads(model, 7, 3, budget=2.5 * one)
    assert made.distinct == 2 and len(set(made.names)) == 7
    assert made.pages(made.names[0]) is made.pages(made.names[4]) is not made.pages(made.names[1])
    assert made.set_of(made.another(made.names[4])) == 1
    with pytest.raises(LabsError, match="--payload-gb"):
        Payloads(model, 7, 3, budget=one).another(made.names[0])


def test_all_arms_say_what_the_merged_weights_say():
    model = small_model()
    made = Payloads(model, 4, 3)
    truth = Merging(model)
    truth.known.append(made)
    requests = [Request([5, 6, 7 + k], "x", name, max_tokens=8) for k, name in enumerate(made.names)]
    setup = Setup(model, dict.fromkeys(made.names), batch=4, slots=2, rank=3, payloads=made)
    for arm in ("engine/graphs", "engine/eager", "engine:gather", "peft_mixed", "merged"):
        with build(arm, setup) as engine:
            for result in engine.generate(requests):
                assert result.error is None, (arm, result.error)
                ids = torch.tensor([result.request.prompt + result.tokens[:-1]])
                logits = truth.merged(result.request.adapter)(input_ids=ids).logits[0, 2:]
                best = logits.amax(-1) - logits[torch.arange(8), torch.tensor(result.tokens)]
                assert best.max() < TIES[torch.float32], arm
    with pytest.raises(LabsError, match="no way 'fast'"):
        build("engine/fast", setup)


def test_the_sections_and_what_is_said_of_them(small, tmp_path):
    rows = bench.run(plan(graphs="on"), tmp_path)
    grid = [row for row in rows if row["section"] == "grid"]
    arms = {"base", "engine", "base/eager", "engine/eager", "peft_mixed", "merged"}
    for batch in (1, 3):
        assert {row["arm"] for row in grid if row["batch"] == batch} == arms
    assert all(row["ms"] > 0 and row["of_base"] > 0 and row["distinct"] == row["batch"] for row in grid)
    assert all(row["added_ms"] == 0 for row in grid if row["arm"] == "base")
    (told,) = [row for row in rows if row["section"] == "oracle"]
    assert told["refused_for_another_tenant"] > 0
    fleet = [row for row in rows if row["section"] == "fleet"]
    assert [(row["adapters"], row["arm"]) for row in fleet] == [
        (1, "base"), (1, "engine"), (5, "base"), (5, "engine"),
    ]  # fmt: skip
    assert all(row["tokens_per_s"] > 0 and row["rank"] == 4 for row in fleet)
    text = bench_report.tables(rows)
    assert "rank 4, an adapter for each row" in text and "engine, not recorded" in text
    assert "ms that adapters add per token" in text and "Not reached" not in text
    assert bench_report.figure(rows, tmp_path / "x.png").stat().st_size > 10_000


def test_a_wrong_arm_is_not_timed(small, tmp_path, monkeypatch):
    right = Payloads.merge

    def wrong(self, into, model, name):
        right(self, into, model, self.another(name))

    monkeypatch.setattr(Payloads, "merge", wrong)
    with pytest.raises(LabsError, match="gives wrong answers"):
        bench.run(plan(), tmp_path)


def test_what_does_not_fit_is_said(small, tmp_path, monkeypatch):
    def needs(arm, *rest):
        return 1e9 if arm == "merged" else 0

    monkeypatch.setattr(bench_grid, "needs", needs)
    monkeypatch.setattr(bench_grid, "memory_left", lambda device: 5e8)
    rows = bench.run(plan(sections=("grid",)), tmp_path)
    missing = [row for row in rows if "missing" in row]
    assert {row["arm"] for row in missing} == {"merged"} and "1.0 GB more" in missing[0]["missing"]
    assert "no room" in bench_report.tables(rows)


def test_what_time_does_not_reach_is_said(small, tmp_path):
    rows = bench.run(plan(minutes=1e-9), tmp_path)
    assert [row["section"] for row in rows] == ["not reached"] * 2
    assert "grid: rank 4, batch 1; rank 4, batch 3" in bench_report.tables(rows)


def test_a_case_starts_only_if_its_like_would_fit():
    budget = Budget(1.0)
    assert budget.allows("grid")
    budget.took("grid", 61.0)
    assert not budget.allows("grid") and budget.allows("fleet")
    assert Budget(None).allows("grid") and Budget(None).share(0.5).end is None
    whole = Budget(10.0)
    assert whole.share(0.5).end < whole.end


def test_what_is_asked_about_most_comes_first():
    assert grid_cases((1, 64, 32), (16, 8)) == [(16, 32), (8, 32), (16, 1), (8, 1), (16, 64), (8, 64)]


def test_a_model_of_real_size_gets_these_sections(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(bench, "load", lambda plan: small_model())
    monkeypatch.setattr(bench, "REAL_SIZE", 1)
    monkeypatch.setattr(bench_grid, "grid", lambda *_: seen.append("grid") or [])
    monkeypatch.setattr(bench_grid, "fleet", lambda *_: seen.append("fleet") or [])
    assert bench.run(plan(sections=None), tmp_path) == [] and seen == ["grid", "fleet"]


def test_twins_are_models_too():
    model = bench.load(bench.Plan(model="smollm2-135m", device="meta", dtype="bfloat16"))
    assert model.config.num_hidden_layers == 30 and model.dtype == torch.bfloat16
