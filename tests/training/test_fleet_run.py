"""`labs fleet`: resumes, spreads over Ray or goes on without it, publishes what passes and nothing else."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from labs_lib.cli import main
from labs_lib.errors import LabsError
from labs_lib.serving.registry import Registry
from labs_lib.training import fleet_run
from labs_lib.training.fleet import Recipe
from labs_lib.training.fleet_run import Work, publish, run_fleet, spread
from labs_lib.world.tasks import load_task

TENANTS = ("ampersea", "fathom-eleven", "quillfeather-post")
RECIPE = Recipe(steps=2, batch=4)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few texts to read: what they say is not the question here."""
    monkeypatch.setattr(fleet_run, "ROWS", {"validation": 1, "test": 1})


def test_it_resumes_where_it_stopped(tmp_path, capsys, monkeypatch):
    first = run_fleet(TENANTS, RECIPE, "tiny", tmp_path, together=2, here=True, limit=1)
    assert [row["tenant"] for row in first] == list(TENANTS[:2])
    before = {slug: (tmp_path / slug / "adapter_model.safetensors").read_bytes() for slug in TENANTS[:2]}
    trained = []
    real = fleet_run.run_batch
    monkeypatch.setattr(
        fleet_run, "run_batch", lambda work, watch=None: trained.append(work.tenants) or real(work, watch)
    )
    rows = run_fleet(TENANTS, RECIPE, "tiny", tmp_path, together=2, here=True)
    assert [row["tenant"] for row in rows] == list(TENANTS) and trained == [TENANTS[2:]]
    assert all(
        (tmp_path / slug / "adapter_model.safetensors").read_bytes() == old for slug, old in before.items()
    )
    assert {path.name for path in (tmp_path / TENANTS[0]).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    said = capsys.readouterr().out
    assert "2 of 3 tenants are trained already" in said and "[ 3/3] quillfeather-post" in said
    assert run_fleet(TENANTS, RECIPE, "tiny", tmp_path, here=True) == rows  # nothing is left to do
    assert len(trained) == 1


def test_without_ray_it_says_so_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (row,) = run_fleet(TENANTS[:1], RECIPE, "tiny", tmp_path)
    assert "Ray is not installed" in capsys.readouterr().out and row["tenant"] == TENANTS[0]


@pytest.mark.slow
def test_over_ray_the_adapters_are_the_same(capsys, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    works = [Work(TENANTS[:2], RECIPE, "tiny"), Work(TENANTS[2:], RECIPE, "tiny")]
    far = {slug: trained for _, trained in spread(works) for slug in trained.adapters}
    said = capsys.readouterr().out
    if "Ray did not start" in said:
        pytest.skip(said)
    assert "on this machine" in said
    for work in works:
        ((_, near),) = spread([work], here=True)
        for slug in work.tenants:
            for key, tensor in near.adapters[slug].items():
                assert (far[slug].adapters[slug][key] - tensor).abs().max() < 1e-6


def test_a_ray_that_does_not_start_stops_nobody(capsys, monkeypatch):
    def init(**settings):
        raise RuntimeError("no node")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(fleet_run, "run_batch", lambda work, watch=None: work.tenants)
    works = [Work(TENANTS[:1], RECIPE, "tiny")]
    assert (
        list(spread(works)) == [TENANTS[:1]] and "Ray did not start here (no node)" in capsys.readouterr().out
    )
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:1")
    with pytest.raises(LabsError, match="RAY_ADDRESS=nowhere:1"):
        list(spread(works))


def test_only_what_passed_is_published(tmp_path):
    rows = run_fleet(TENANTS[:2], RECIPE, "tiny", tmp_path / "fleet", here=True)
    rows[0] = rows[0] | {"refused": []}
    rows[1] = rows[1] | {"refused": ["compliance 0.100 is below 0.95"]}
    with Registry(tmp_path / "registry") as registry:
        keys = publish(rows, tmp_path / "fleet", registry, "test")
        assert list(keys) == [TENANTS[0]] and registry.authenticate(keys[TENANTS[0]]).name == TENANTS[0]
        assert [tenant.name for tenant in registry.tenants()] == [TENANTS[0]]
        assert registry.current(TENANTS[0]).note == "test"
        assert publish(rows, tmp_path / "fleet", registry, "again") == {}  # the tenant keeps its key


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fleet_run, "gate", lambda score: [])
    words = ["fleet", TENANTS[0], "--base", "tiny", "--steps", "2", "--here", "--out", str(tmp_path / "out")]
    words += ["--publish", "--registry", str(tmp_path / "registry"), "--keys", str(tmp_path / "keys")]
    assert main(words) == 0
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600
    slug, key = (tmp_path / "keys").read_text().split()
    with Registry(tmp_path / "registry") as registry:
        assert registry.authenticate(key).name == slug == TENANTS[0]
    row = json.loads((tmp_path / "out" / "fleet.jsonl").read_text())
    assert row["tenant"] == TENANTS[0] and row["together"] == 1
    assert "1 of 1 trained, 1 passed the gate" in capsys.readouterr().out


def test_a_fleet_that_the_gate_refuses_is_told_by_the_exit_status(tmp_path):
    words = ["fleet", TENANTS[0], "--base", "tiny", "--steps", "1", "--here", "--out", str(tmp_path)]
    assert main(words) == 1


def test_mistakes_are_told(tmp_path, capsys):
    assert main(["fleet", "nobody"]) == 2 and "No tenant 'nobody'" in capsys.readouterr().err
    assert main(["fleet", "--device", "tpu"]) == 2 and "no device 'tpu'" in capsys.readouterr().err
    assert main(["fleet", "--publish"]) == 2 and "--keys" in capsys.readouterr().err
    with pytest.raises(LabsError, match="at least 1"):
        run_fleet(TENANTS, RECIPE, "tiny", tmp_path, together=0)


def test_what_it_would_train_alone_is_what_the_tasks_are():
    """All tenants have equally many rows, so that any of them can share a batch."""
    from labs_lib.world.tenants import load_tenants

    counts = {len(load_task("style", tenant=tenant.slug)["train"]) for tenant in load_tenants()[::10]}
    assert counts == {128} and 128 % Recipe().batch == 0 and replace(Recipe()) == Recipe()


def test_step_costs_compares_three_ways():
    rows = fleet_run.step_costs("tiny", RECIPE, batches=(1,), together=2, rounds=1)
    assert [row["arm"] for row in rows] == ["fit", "fleet of 1", "fleet of 2"]
    assert all(row["rows"] == 1 and row["cpu_ms_per_tenant"] > 0 for row in rows)
