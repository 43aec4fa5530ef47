"""The chapter's coding exercise does what it says, and a prompt may start from a tenant's guide."""

import pytest
import torch

from labs_lib.models.base import base_folder, load_base
from labs_lib.training.soft_prompt import soft_prompt

TEXTS = ("a travel radio", "two chairs from Bari, in wool and lilac")


@pytest.fixture
def losses():
    """Loss of a model on the texts, pads left out."""
    tokenizer = load_base("tiny")[1]
    batch = tokenizer(list(TEXTS), return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    @torch.no_grad()
    def loss(model):
        return model(**batch, labels=labels).loss.item()

    return loss


def test_the_prompt_alone_trains_and_the_loss_falls(losses):
    base = load_base("tiny")[0]
    before, after = (soft_prompt(base_folder("tiny"), TEXTS, steps=steps, lr=0.1) for steps in (0, 20))
    assert losses(after) < losses(before) - 1
    trainable = [each for each in after.parameters() if each.requires_grad]
    assert [tuple(each.shape) for each in trainable] == [(10, base.config.hidden_size)]
    kept = after.get_base_model().state_dict()
    assert all(torch.equal(kept[name], value) for name, value in base.state_dict().items())


def test_it_starts_from_rows_of_the_vocabulary():
    table = load_base("tiny")[0].get_input_embeddings().weight
    (prompt,) = (
        each
        for each in soft_prompt(base_folder("tiny"), TEXTS, 6, steps=0).parameters()
        if each.requires_grad
    )
    assert all((table == row).all(dim=1).any() for row in prompt)


def test_a_sweeps_prompt_may_start_from_the_guide():
    """Twenty tokens, the beginning of a text among them, are the guide's very rows."""
    from labs_lib.training.adapt import prompt
    from labs_lib.training.sweeps import SWEEPS, TENANT
    from labs_lib.world.tenants import load_tenant

    (arm,) = (arm for arm in SWEEPS["prompt_tokens"].arms if arm.name == "the guide")
    model, tokenizer = load_base("tiny")
    ids = tokenizer(f"Guide: {load_tenant(TENANT).guide}\n")["input_ids"]
    adapted = prompt(model, arm, seed=0, steps=1)
    assert len(ids) == arm.options["tokens"]
    assert torch.equal(adapted.model.prompt, model.get_input_embeddings().weight[ids])
    assert adapted.finish()["moved"] == 0
