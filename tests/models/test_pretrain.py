"""Pretraining: what a row holds, that tenants' styles stay unseen, and that a killed run goes on where it was."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch

from labs_lib.models import base, corpus, pretrain
from labs_lib.models.base import load_base
from labs_lib.world.catalogue import names
from labs_lib.world.grammar import DIMENSIONS, guide_line
from labs_lib.world.tenants import load_tenants


@pytest.fixture(scope="module")
def tokenizer():
    return load_base("tiny")[1]


@pytest.mark.parametrize("mixture", [corpus.WRITING, corpus.FACTS])
def test_rows_are_whole_documents_and_loss_is_on_completions(tokenizer, mixture):
    for tokens, labels in islice(pretrain.packed_rows(tokenizer, 3, mixture), 50):
        assert len(tokens) == len(labels) == pretrain.ROW
        text = tokenizer.decode([t for t in tokens if t != tokenizer.pad_token_id])
        documents = text.split("<bos>")[1:]
        assert all(document.endswith("<eos>") for document in documents)
        learned = tokenizer.decode([label for label in labels if label != -100])
        assert learned.count("<eos>") == len(documents)
        assert "Facts:" not in learned and "Guide:" not in learned and "?" not in learned


def test_the_corpus_keeps_held_out_names_and_tenants_unseen():
    documents = list(islice(corpus.documents(5), 3000))
    text = "\n".join(prompt + completion for prompt, completion in documents)
    assert not [
        name for name in names("held_out") + names("new_facts") if f" {name} " in text or f"{name}?" in text
    ]
    guides = {guide_line({d: t.style[d] for d in DIMENSIONS}) for t in load_tenants()}
    assert not [guide for guide in guides if guide in text]


def test_the_mixture_has_the_shares_it_says():
    documents = list(islice(corpus.documents(6, corpus.FACTS), 4000))
    share = sum("?" in prompt for prompt, _ in documents) / len(documents)
    assert share == pytest.approx(corpus.FACTS["fact"], abs=0.03)


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """A recipe of seconds, storing beside the real family, not over it."""
    monkeypatch.setattr(
        pretrain,
        "STAGES",
        [replace(s, steps=s.steps // 450, schedule=s.schedule // 450) for s in pretrain.STAGES],
    )
    monkeypatch.setattr(pretrain, "base_folder", lambda size: tmp_path / size)
    monkeypatch.setenv("LABS_CACHE", str(tmp_path / "cache"))
    real = base.base_folder("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tiny").mkdir(exist_ok=True)
        (tmp_path / "tiny" / name).write_bytes((real / name).read_bytes())
    return tmp_path


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_killed_pretraining_resumes_and_ends_the_same(miniature, monkeypatch):
    whole = weights(pretrain.pretrain("tiny", batch=4))
    log = json.loads((miniature / "tiny/training_log.json").read_text())
    assert [stage["name"] for stage in log["stages"]] == ["writing", "facts"]
    assert all(stage["loss"][-1][0] == stage["steps"] for stage in log["stages"])

    monkeypatch.setenv("LABS_CACHE", str(miniature / "second"))
    real_loss, calls = pretrain.completion_loss, []

    def dies_in_the_second_stage(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real_loss(*args)

    monkeypatch.setattr(pretrain, "completion_loss", dies_in_the_second_stage)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain("tiny", batch=4)
    monkeypatch.setattr(pretrain, "completion_loss", real_loss)
    again = weights(pretrain.pretrain("tiny", batch=4))
    assert all(torch.allclose(again[key], whole[key], atol=1e-6) for key in whole)


def test_completion_loss_is_the_models_own_loss(tokenizer):
    model = load_base("tiny")[0]
    tokens, labels = (torch.tensor([column]) for column in next(pretrain.packed_rows(tokenizer, 1)))
    ours, theirs = (
        pretrain.completion_loss(model, tokens, labels),
        model(input_ids=tokens, labels=labels).loss,
    )
    assert torch.allclose(ours, theirs, atol=1e-5)
