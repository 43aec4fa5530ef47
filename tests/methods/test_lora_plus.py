"""LoRA+: the groups, their effect, and equality with PEFT's optimiser, its surprises included."""

import pytest
import torch
from torch import nn

from labs_lib.methods.lora import inject_lora, load_lora_state_dict, lora_state_dict, trainable_parameters
from labs_lib.methods.lora_plus import feature_change, lora_plus_groups, lora_plus_optimizer

QV = ["q_proj", "v_proj"]


def ours(tiny_llama):
    model = inject_lora(tiny_llama(), QV, rank=4, alpha=8, generator=torch.Generator().manual_seed(3))
    return model.train()


def theirs(tiny_llama, like=None, **options):
    """PEFT's model; with `like`, holding that model's A and B."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config = LoraConfig(r=4, lora_alpha=8, target_modules=QV, task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny_llama(), config)
    if like is not None:
        set_peft_model_state_dict(model, lora_state_dict(like))
    return model.train()


def train(model, optimizer, batch, steps=10):
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def peft_optimizer(model, cls=torch.optim.AdamW, lr=1e-2, ratio=8, **kwargs):
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, cls, lr=lr, loraplus_lr_ratio=ratio, **kwargs)


def factors(model):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


# --- the pieces


def test_a_steps_contributions_add_up_to_the_change():
    torch.manual_seed(0)
    A, dA = torch.randn(2, 3, 10, dtype=torch.float64)
    B, dB = torch.randn(2, 6, 3, dtype=torch.float64)
    x = torch.randn(5, 10, dtype=torch.float64)
    parts = feature_change(A, B, dA, dB, x)
    assert set(parts) == {"A", "B", "both"} and all(part.shape == (5, 6) for part in parts.values())
    torch.testing.assert_close(sum(parts.values()), x @ ((B + dB) @ (A + dA) - B @ A).T)
    still = feature_change(A, torch.zeros_like(B), dA, dB, x)
    assert torch.count_nonzero(still["A"]) == 0  # where B is zero, only the step of B shows


def test_every_trainable_parameter_is_in_one_group(tiny_llama):
    model = ours(tiny_llama)
    groups = lora_plus_groups(model, lr=1e-3, ratio=16, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1.6e-2, 0.1)]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainable_parameters(model))
    assert {p.shape[0] for p in groups[0]["params"]} == {4}  # A is (rank, in)
    assert {p.shape[1] for p in groups[1]["params"]} == {4}  # B is (out, rank)


def test_vectors_go_with_b_and_biases_do_not_decay():
    model = nn.Module()
    model.lora_A, model.lora_B = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(4, 2))
    model.magnitude, model.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    groups = lora_plus_groups(model, lr=1e-3, ratio=4, weight_decay=0.5)
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
        (1, 1e-3, 0.5),
        (2, 4e-3, 0.5),
        (1, 4e-3, 0.0),
    ]


@pytest.mark.parametrize("ratio", [0, -2.0])
def test_a_ratio_that_is_not_positive_is_an_error(tiny_llama, ratio):
    with pytest.raises(ValueError, match="above 0"):
        lora_plus_groups(ours(tiny_llama), 1e-3, ratio)


# --- what it does


def test_adams_first_step_moves_b_by_the_ratio_times_the_rate(tiny_llama, batch):
    model = ours(tiny_llama)
    before = {key: value.clone() for key, value in lora_state_dict(model).items()}
    train(model, lora_plus_optimizer(model, lr=1e-3, ratio=16), batch, steps=1)
    moved = {key: (value - before[key]).abs().max().item() for key, value in lora_state_dict(model).items()}
    assert all(step == pytest.approx(1.6e-2, rel=1e-3) for key, step in moved.items() if "lora_B" in key)
    assert all(step == 0 for key, step in moved.items() if "lora_A" in key)  # A's gradient is zero while B is


def test_ratio_one_is_adamw_without_decay_bit_for_bit(tiny_llama, batch):
    plus, plain, default = (ours(tiny_llama) for _ in range(3))
    losses = [
        train(plus, lora_plus_optimizer(plus, lr=1e-2, ratio=1), batch),
        train(plain, torch.optim.AdamW(trainable_parameters(plain), lr=1e-2, weight_decay=0), batch),
        train(default, torch.optim.AdamW(trainable_parameters(default), lr=1e-2), batch),
    ]
    assert losses[0] == losses[1]
    ends = [lora_state_dict(model) for model in (plus, plain, default)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert not all(
        torch.equal(ends[0][key], ends[2][key]) for key in ends[0]
    )  # AdamW's default decays by 0.01


# --- equal to PEFT


@pytest.mark.parametrize("ratio, decay", [(1, 0.0), (16, 0.0), (4, 0.1)])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_ten_steps_equal_pefts_optimizer(tiny_llama, batch, ratio, decay, kind):
    mine = ours(tiny_llama)
    peft = theirs(tiny_llama, like=mine)
    losses = [
        train(mine, kind(lora_plus_groups(mine, 1e-2, ratio, decay), lr=1e-2), batch),
        train(peft, peft_optimizer(peft, kind, ratio=ratio, loraplus_weight_decay=decay), batch),
    ]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    end = lora_state_dict(mine)
    assert end.keys() == factors(peft).keys()
    assert all(torch.equal(value, factors(peft)[key]) for key, value in end.items())


@pytest.mark.parametrize(
    "options, groups", [({"use_dora": True}, 2), ({"lora_bias": True}, 3), ({"bias": "all"}, 2)]
)
def test_the_same_groups_as_peft_beyond_plain_lora(tiny_llama, options, groups):
    """DoRA's magnitudes are vectors: B's rate, and they decay; biases take B's rate and do not."""
    model = theirs(tiny_llama, **options)
    mine = lora_plus_groups(model, 1e-3, 8, 0.1)
    optimizer = peft_optimizer(model, lr=1e-3, loraplus_weight_decay=0.1)
    peft = [group for group in optimizer.param_groups if group["params"]]
    assert len(mine) == len(peft) == groups
    for our_group, their_group in zip(mine, peft, strict=True):
        assert list(map(id, our_group["params"])) == list(map(id, their_group["params"]))
        assert (our_group["lr"], our_group["weight_decay"]) == (
            their_group["lr"],
            their_group["weight_decay"],
        )


def test_a_saved_adapter_is_a_lora_adapter(tiny_llama, batch, tmp_path):
    from peft import PeftModel

    from labs_lib.methods.io import load_lora, save_lora

    mine = ours(tiny_llama)
    train(mine, lora_plus_optimizer(mine, 1e-2, 8), batch, steps=3)
    save_lora(mine, tmp_path / "mine")
    peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mine")
    peft.save_pretrained(tmp_path / "theirs")
    back = load_lora(tiny_llama(), tmp_path / "theirs")
    with torch.no_grad():
        logits = mine.eval()(**batch).logits
        assert torch.equal(peft.eval()(**batch).logits, logits)
        assert torch.equal(back.eval()(**batch).logits, logits)
    fresh = inject_lora(tiny_llama(), QV, 4, 8)
    load_lora_state_dict(fresh, lora_state_dict(back))


# --- today's behaviour of the library: hazards


def test_peft_ignores_weight_decay_without_a_word(tiny_llama, recwarn):
    """Regression: `weight_decay=` reaches the optimiser's defaults only; every group overrides it with 0."""
    model = theirs(tiny_llama)
    recwarn.clear()
    optimizer = peft_optimizer(model, weight_decay=0.1)
    assert optimizer.defaults["weight_decay"] == 0.1
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    assert not recwarn.list
    meant = peft_optimizer(model, loraplus_weight_decay=0.1)
    assert {g["weight_decay"] for g in meant.param_groups if g["params"]} == {0.1}


def test_pefts_adapters_on_embeddings_get_a_rate_of_their_own(tiny_llama):
    """Regression: whatever lr and ratio are, LoRA on an embedding learns at 1e-6 unless told otherwise."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    rates = {
        name: group["lr"]
        for group in peft_optimizer(model, lr=1e-2, ratio=16).param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is each for each in group["params"])
    }
    assert {rate for name, rate in rates.items() if "embed" in name} == {1e-6}
    assert {rate for name, rate in rates.items() if "embed" not in name} == {1e-2, 0.16}


def test_what_is_trained_in_full_learns_at_as_rate(tiny_llama):
    """Regression: modules_to_save are matrices without lora_B in their name, so the ratio does not reach them."""
    model = theirs(tiny_llama, modules_to_save=["lm_head"])
    (first, *_) = peft_optimizer(model, lr=1e-2, ratio=16).param_groups
    head = next(p for name, p in model.named_parameters() if "lm_head" in name and p.requires_grad)
    assert first["lr"] == 1e-2 and any(head is each for each in first["params"])
