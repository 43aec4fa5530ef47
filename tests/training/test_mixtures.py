"""Every way to answer with two experts is the model that it says it is; the plan tunes what trains, and resumes."""

import pytest
import torch

from labs_lib.measure.records import load_records
from labs_lib.methods.lora import load_lora_state_dict, lora_layers, lora_state_dict, merge_lora
from labs_lib.methods.mixture import gates_of
from labs_lib.models import base as bases
from labs_lib.training import mixtures

IDS = torch.arange(3, 19)[None]


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """The smallest base, and nobody's cache or records touched."""
    load = bases.load_base
    monkeypatch.setattr(bases, "load_base", lambda size, **options: load("tiny", **options))
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    monkeypatch.delenv("LABS_RECORD", raising=False)


@pytest.fixture
def experts(monkeypatch):
    """Nobody is trained: two LoRAs of random numbers stand for the experts."""
    states = []
    for which in (0, 1):
        model, _ = mixtures.fresh(mixtures.RANK, seed=which)
        generator = torch.Generator().manual_seed(10 + which)
        for layer in lora_layers(model).values():
            layer.lora_B.data = 0.1 * torch.randn(layer.lora_B.shape, generator=generator)
        states.append({key: value.clone() for key, value in lora_state_dict(model).items()})
    monkeypatch.setattr(mixtures, "expert", lambda pair, which, seed: states[which])
    return states


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@torch.no_grad()
def base_plus(states, shares):
    """The base with these shares of the experts' updates in its weights."""
    model, _ = bases.load_base("tiny")
    plain = {name: weight.clone() for name, weight in model.named_parameters()}
    for state, share in zip(states, shares, strict=True):
        adapted, _ = mixtures.fresh(mixtures.RANK, seed=0)
        load_lora_state_dict(adapted, state)
        for name, weight in merge_lora(adapted).named_parameters():
            model.get_parameter(name).add_(share * (weight - plain[name]))
    return model


@pytest.mark.parametrize(
    ("way", "shares"),
    [
        ("first", (1, 0)),
        ("second", (0, 1)),
        ("sum", (1, 1)),
        ("gate", (0.5, 0.5)),  # before it is trained, a gate gives each expert the same
        ("balanced", (0.5, 0.5)),
    ],
)
def test_a_way_starts_as_the_updates_that_it_says(way, shares, experts):
    model, _ = mixtures.build("tasks", way, seed=1)
    wanted = logits(base_plus(experts, shares))
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    assert (wanted - logits(bases.load_base("tiny")[0])).abs().max() > 1e-2, "the experts do something"


def test_linear_is_peft_s_merge_of_the_factors(experts):
    """PEFT's "linear" adds A to A and B to B, each times the root of its weight: not half of each update."""
    model, _ = mixtures.build("tasks", "linear", seed=1)
    factors = {}
    for key in experts[0]:
        factors[key] = sum((0.5 * 2.0) ** 0.5 * state[key] for state in experts)  # alpha / rank is 2
    adapted, _ = mixtures.fresh(mixtures.RANK, seed=0)
    load_lora_state_dict(adapted, {key: value / 2**0.5 for key, value in factors.items()})
    torch.testing.assert_close(logits(model), logits(adapted), rtol=0, atol=1e-4)


@pytest.mark.parametrize("way", ["ties", "dare"])
def test_peft_s_other_merges_are_neither_expert(way, experts):
    merged = logits(mixtures.build("tasks", way, seed=1)[0])
    again = logits(mixtures.build("tasks", way, seed=1)[0])
    torch.testing.assert_close(merged, again)
    for shares in ((0, 0), (1, 0), (0, 1)):
        assert (merged - logits(base_plus(experts, shares))).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("way", "parts"),
    [
        ("gate", ("router",)),
        ("xlora", ("xlora",)),
        ("few", ("lora_A", "lora_B")),
        ("one", ("lora_A", "lora_B")),
    ],
)
def test_only_what_a_way_trains_has_gradients(way, parts, experts):
    model, _ = mixtures.build("tasks", way, seed=1)
    training = [name for name, p in model.named_parameters() if p.requires_grad]
    assert training and all(any(part in name for part in parts) for name in training)
    if way in ("few", "one"):
        ranks = {layer.lora_A.shape[0] for layer in lora_layers(model).values()}
        assert ranks == {2 * mixtures.RANK}


def test_a_point_is_trained_and_scored(experts, monkeypatch):
    """One gate step on the real tasks; top-1 then runs one expert of each token."""
    monkeypatch.setattr(mixtures, "PRACTICE_STEPS", 1)
    monkeypatch.setattr(mixtures, "ROWS", 4)
    mixtures.needs_of.cache_clear()
    built, build = [], mixtures.build
    monkeypatch.setattr(mixtures, "build", lambda *args: built.append(build(*args)) or built[-1])
    point = {"pair": "tasks", "way": "top-1", "stage": "final", "lr": 1e-2, "seed": 1}
    row = mixtures.run_point(point)
    assert row.items() >= point.items()
    assert all(0 <= row[key] <= 1 for key in ("first", "second", "score", "kept"))
    gates = gates_of(built[0][0])
    assert row["trained"] == sum(p.numel() for gate in gates.values() for p in gate.parameters())
    assert all(gate.top_k == 1 for gate in gates.values())
    assert all((gate.weights == 1).sum(-1).eq(1).all() for gate in gates.values())
    mixtures.needs_of.cache_clear()


def fake(point):
    """Scores by which the middle rate of every way is the best, the outer two being equal."""
    rates = mixtures.RATES.get(point["way"], (point["lr"],))
    middle = point["lr"] is None or point["lr"] == rates[len(rates) // 2]
    return point | {"score": float(middle)}


def test_every_way_that_trains_is_tuned_and_the_rest_runs_as_it_is(monkeypatch):
    monkeypatch.setattr(mixtures, "run_point", fake)
    assert mixtures.run("tenants", limit=2) is None
    assert mixtures.run("tenants")
    record = load_records("mix_tenants")[-1]
    for way in set(mixtures.MEANS) - {"xlora"}:
        finals = [row for row in record.rows if (row["way"], row["stage"]) == (way, "final")]
        tuned = mixtures.LIKE.get(way, way)
        rates = mixtures.RATES.get(tuned, (None,))
        assert [row["seed"] for row in finals] == [1, 2, 3]
        assert {row["lr"] for row in finals} == {rates[len(rates) // 2]}
    assert not any(row["way"] == "xlora" for row in record.rows), "only where a request is short"


def test_of_equal_rates_the_lowest_wins_once_all_are_in():
    rows = [{"way": "gate", "stage": "sweep", "lr": lr, "score": 0.5} for lr in mixtures.RATES["gate"]]
    assert mixtures.best_rate(rows[:-1], "gate") is None
    assert mixtures.best_rate(rows, "gate") == min(mixtures.RATES["gate"])
