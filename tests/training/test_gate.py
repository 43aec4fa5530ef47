"""The gate: what it lets pass, and that it reads what the server writes with each tenant's own adapter."""

from types import SimpleNamespace

import pytest

from labs_lib.models.base import load_base
from labs_lib.training.fleet import Recipe, save_adapter, train
from labs_lib.training.gate import Bar, Candidate, gate, read_by_rules
from labs_lib.world.scorers import score_style
from labs_lib.world.tasks import load_task
from labs_lib.world.tenants import load_tenant


def score(compliance=1.0, fidelity=1.0, leakage=0.0):
    return SimpleNamespace(compliance=compliance, fidelity=fidelity, leakage=leakage)


def test_every_reason_is_told():
    assert gate(score()) == [] and gate(score(0.95, 0.95)) == []
    assert gate(score(compliance=0.9)) == ["compliance 0.900 is below 0.95"]
    assert len(gate(score(0.1, 0.1, 0.1))) == 3
    assert gate(score(compliance=0.9), Bar(compliance=0.8)) == []
    assert len(gate(score(float("nan"), 1.0, float("nan")))) == 2


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


def test_the_texts_are_each_tenants_own_merged_models(base, tmp_path):
    from peft import PeftModel

    from labs_lib.measure.quality import generate

    model, tokenizer = base
    slugs = ("fathom-eleven", "ampersea")
    data = {slug: load_task("style", tenant=slug)["train"][:16] for slug in slugs}
    recipe = Recipe(rank=4, alpha=64, steps=4, batch=4, lr=3e-2)
    trained = train(model, tokenizer, data, recipe)
    folders = {slug: save_adapter(tmp_path / slug, trained.adapters[slug], recipe) for slug in slugs}
    read = read_by_rules(
        model, tokenizer, {slug: Candidate.of(folders[slug], slug, rows=3) for slug in slugs}
    )
    for slug in slugs:
        alone = PeftModel.from_pretrained(load_base("tiny")[0], folders[slug]).merge_and_unload()
        rows = load_task("style", tenant=slug)["validation"][:3]
        texts = generate(alone, tokenizer, rows["prompt"], max_new_tokens=80)
        assert read[slug] == score_style(texts, rows["product"], load_tenant(slug)), slug
