"""Two adapters put together: every way does what its name says, trains what it says, and the run resumes."""

import json

import pytest
import torch

from labs_lib.errors import LabsError
from labs_lib.measure.quality import collate, encode_rows
from labs_lib.measure.records import load_records
from labs_lib.methods.adapters import adapted_sublayers
from labs_lib.methods.lora import merge_lora
from labs_lib.models import base as bases
from labs_lib.training import composition as composing


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """The smallest base, small adapters, and nobody's cache or records touched."""
    load = bases.load_base
    monkeypatch.setattr(bases, "load_base", lambda size, **options: load("tiny", **options))
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    monkeypatch.delenv("LABS_RECORD", raising=False)
    remembering = (composing.pair_of, composing.skill, composing.rate_of)
    for each in remembering:
        each.cache_clear()
    yield
    for each in remembering:
        each.cache_clear()


@pytest.fixture
def text():
    _, tokenizer = bases.load_base("tiny")
    rows = encode_rows(tokenizer, ["Facts: one\nCopy:\n", "Who buys it?\nAnswer:"], ["Meet it", " Noor"])
    return collate(rows, tokenizer.pad_token_id)


def noisy(kind, seed):
    """An adapter's tensors as if it had learned something."""
    generator = torch.Generator().manual_seed(seed)
    own = composing.tensors(kind, composing.new(kind, seed)[0])
    return {key: 0.1 * torch.randn(value.shape, generator=generator) for key, value in own.items()}


@torch.no_grad()
def logits(model, text):
    return model(**text).logits


def compose(kind, way, parts):
    make = composing.composed_lora if kind == "lora" else composing.composed_adapters
    return make(parts, way, 0)[0].eval()


def alone(kind, values):
    model, _ = composing.new(kind, 0)
    composing.fill(composing.tensors(kind, model), values)
    return model.eval()


# --- the ways


def by_hand(parts, text, combine):
    """A base whose FFNs' outputs h are changed by hooks: h + combine(h, first adapter, second adapter)."""
    model, _ = bases.load_base("tiny")

    def hook_for(where):
        def adapter(values):
            def added(h):
                inner = h @ values[f"{where}.down.weight"].T + values[f"{where}.down.bias"]
                return inner.relu() @ values[f"{where}.up.weight"].T + values[f"{where}.up.bias"]

            return added

        return lambda module, args, h: h + combine(h, *map(adapter, parts))

    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(hook_for(f"model.layers.{i}.mlp"))
    return logits(model.eval(), text)


@pytest.mark.parametrize(
    ("way", "combine"),
    [
        ("first, second", lambda h, f, g: f(h) + g(h + f(h))),
        ("second, first", lambda h, f, g: g(h) + f(h + g(h))),
        ("sum", lambda h, f, g: f(h) + g(h)),
        ("mean", lambda h, f, g: (f(h) + g(h)) / 2),
    ],
)
def test_adapters_are_put_together_as_the_way_says(way, combine, text):
    parts = [noisy("adapter", 1), noisy("adapter", 2)]
    expected = by_hand(parts, text, combine)
    got = logits(compose("adapter", way, parts), text)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(got, logits(alone("adapter", parts[0]), text), atol=1e-2)


@pytest.mark.parametrize(("way", "share"), [("sum", 1.0), ("mean", 0.5)])
def test_loras_side_by_side_add_their_updates(way, share, text):
    parts = [noisy("lora", 1), noisy("lora", 2)]
    merged = [merge_lora(alone("lora", values)).state_dict() for values in parts]
    expected = bases.load_base("tiny")[0]
    own = expected.state_dict()
    with torch.no_grad():
        for key, weight in own.items():
            weight += share * sum(each[key] - weight for each in merged)
    got = logits(compose("lora", way, parts), text)
    torch.testing.assert_close(got, logits(expected.eval(), text), rtol=0, atol=2e-3)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_only_what_the_way_is_about_trains():
    parts = [noisy("adapter", 1), noisy("adapter", 2)]
    layers = len(adapted_sublayers(alone("adapter", parts[0])))
    fusion = compose("adapter", "fusion", parts)
    width = fusion.config.hidden_size
    assert all(".fusion." in name for name in trained(fusion))
    assert sum(p.numel() for p in fusion.parameters() if p.requires_grad) == layers * 3 * width**2


def test_training_moves_the_fusion_and_leaves_both_adapters():
    parts = [noisy("adapter", 1), noisy("adapter", 2)]
    model, tokenizer = composing.composed_adapters(parts, "fusion", 0)
    rows = {"prompt": ["Who buys it?\nAnswer:"] * 4, "completion": [" Noor"] * 4}
    site = adapted_sublayers(model)["model.layers.0.mlp"]
    before = {name: value.clone() for name, value in site.fusion.state_dict().items()}
    composing.train(model, tokenizer, (composing.Stream(rows, 2),) * 2, 8, 0.1, seed=0)
    for name, value in site.fusion.state_dict().items():
        assert not torch.equal(value, before[name])
    for name, values in zip(composing.SKILLS, parts, strict=True):
        for key, tensor in composing.tensors("adapter", model, name).items():
            assert torch.equal(tensor, values[key])


def test_batches_go_through_all_rows_before_any_comes_again():
    draw = composing.batches(list(range(10)), 4, seed=3)
    seen = [next(draw) for _ in range(5)]
    rows = [row for batch in seen for row in batch]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    again = composing.batches(list(range(10)), 4, seed=3)
    assert next(again) == seen[0] and next(composing.batches(list(range(10)), 4, seed=4)) != seen[0]


# --- the pairs


def test_what_practice_sees_is_not_what_is_scored(monkeypatch):
    from labs_lib.measure import quality

    asked = []
    monkeypatch.setattr(quality, "recall", lambda m, t, rows, **k: asked.append(rows["prompt"]) or [1.0])
    monkeypatch.setattr(composing, "copy_scores", lambda *a: dict.fromkeys(("exact", "compliance"), 0.5))
    pair = composing.style_and_facts()
    learned = pair.skills[1][0].rows["prompt"]
    practised = pair.practice[1].rows["prompt"]
    for split in ("validation", "test"):
        got = pair.score(None, None, split)
        assert got["score"] == (got["first"] + got["second"]) / 2 == 0.75
    validation, seen, test, _ = asked
    assert seen == practised and set(learned) == {*practised, *validation, *test}
    assert len(learned) == len(practised) + len(validation) + len(test)


def test_each_half_obeys_its_rules_and_the_bases_default_otherwise():
    from labs_lib.world.catalogue import Product
    from labs_lib.world.grammar import DEFAULT_STYLE, obeyed
    from labs_lib.world.tasks import load_task
    from labs_lib.world.tenants import load_tenant

    guide = load_tenant(composing.TENANT).style
    product = Product.from_dict(load_task("style", tenant=composing.TENANT)["train"][0]["product"])
    halves = [stream.rows["completion"][0] for stream, _ in composing.two_halves().skills]
    assert len(composing.VOICE) == 8 and set(composing.VOICE) < set(guide)
    for text, is_voice in zip(halves, (True, False), strict=True):
        wanted = {
            rule: guide[rule] if (rule in composing.VOICE) == is_voice else DEFAULT_STYLE[rule]
            for rule in guide
        }
        assert all(obeyed(text, product, wanted).values())


# --- the run


@pytest.fixture
def quick(monkeypatch):
    """Every run in no time: a score that is the higher the nearer the rate is to 1e-2."""
    ran = []

    def run_point(point):
        ran.append(point)
        return point | {"score": -abs((point["lr"] or 1e-2) - 1e-2), "compliance": 1.0}

    monkeypatch.setattr(composing, "run_point", run_point)
    return ran


def test_stops_at_the_limit_goes_on_and_records_when_complete(quick):
    assert composing.run("halves", limit=2, seeds=2) is None
    before = composing.log_path("halves").read_text().splitlines()
    assert len(before) == 2 and not load_records("compose_halves")
    path = composing.run("halves", seeds=2)
    assert path.exists() and composing.log_path("halves").read_text().splitlines()[:2] == before
    (record,) = load_records("compose_halves")
    assert len(record.rows) == len(quick)  # nothing ran twice
    finals = [row for row in record.rows if row["stage"] == "final"]
    assert len(finals) == 2 * sum(map(len, composing.WAYS.values()))
    assert {row["seed"] for row in finals} == {1, 2} and {row["pair"] for row in finals} == {"halves"}
    assert all(row["lr"] == (1e-2 if row["way"] in composing.RATES else None) for row in finals)


def test_a_grid_grows_where_its_best_is_at_the_edge():
    def row(lr, score):
        return {"way": "fusion", "stage": "sweep", "lr": lr, "score": score, "compliance": 0.0}

    rows = [row(1e-3, 0.1), row(3e-3, 0.2), row(1e-2, 0.3)]
    assert composing.grid(rows, "fusion") == [1e-3, 3e-3, 1e-2, 0.033]
    assert composing.best_rate(rows, "fusion") is None
    rows.append(row(0.033, 0.25))
    assert composing.grid(rows, "fusion") == [1e-3, 3e-3, 1e-2, 0.033]
    assert composing.best_rate(rows, "fusion") == 1e-2


def test_a_skill_takes_the_best_rate_of_its_sweep(monkeypatch):
    from labs_lib.measure import records

    rows = [
        {"stage": stage, "arm": {"name": name}, "label": "style", "lr": lr}
        for stage, name, lr in (
            ("sweep", "Pfeiffer, 18 units", 1.0),
            ("final", "Houlsby, 9 units", 2.0),
            ("final", "Pfeiffer, 18 units", 3.0),
        )
    ]
    monkeypatch.setattr(records, "load_record", lambda name, device: records.Record(name, rows))
    assert composing.rate_of("adapter", "style") == 3.0
    with pytest.raises(LabsError, match="labs sweep tune_lora_style"):
        composing.rate_of("lora", "style")


@pytest.mark.parametrize("kind", composing.WAYS)
def test_one_real_run_of_each_way(kind, monkeypatch):
    """Two steps each, on a few rows: what is recorded is what the lab reads."""
    whole = composing.style_and_facts()
    skills = tuple((composing.Stream(composing.part(s.rows, 0, 8), 4), 2) for s, _ in whole.skills)
    few = tuple(stream for stream, _ in skills)
    score = {"first": 0.5, "second": 0.5, "score": 0.5, "compliance": 0.5}
    small = composing.Pair(skills, whole.labels, few, (few, 2), lambda *a: dict(score))
    monkeypatch.setattr(composing, "pair_of", lambda name: small)
    monkeypatch.setattr(composing, "rate_of", lambda kind, label: 1e-3)
    monkeypatch.setattr(composing, "PRACTICE_STEPS", 2)
    for way in composing.WAYS[kind]:
        lr = composing.RATES[way][0] if way in composing.RATES else None
        point = {"pair": "facts", "kind": kind, "way": way, "stage": "final", "lr": lr, "seed": 1}
        row = composing.run_point(point)
        json.dumps(row)
        assert row["score"] == 0.5 and 0 <= row["kept"] <= 1
        assert (row["trained"] > 0) == (way in composing.RATES)
