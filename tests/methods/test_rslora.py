"""rsLoRA: LoRA with another alpha, equal to PEFT's use_rslora, and what the two scalings do to one step."""

import copy
import math

import pytest
import torch

from labs_lib.methods.io import load_lora, save_lora
from labs_lib.methods.lora import (
    inject_lora,
    lora_layers,
    lora_state_dict,
    merge_lora,
    trainable_parameters,
)
from labs_lib.methods.rslora import adapter_scale, best_between, inject_rslora, log_slope, same_alpha

QV = ["q_proj", "v_proj"]


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def fill_b(model):
    for layer in lora_layers(model).values():
        layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=seeded(9)))
    return model


def peft_rslora(base, rank, alpha, rslora=True, **options):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=QV, task_type="CAUSAL_LM", **options
    )
    return get_peft_model(base, config)


def train(model, batch, steps=10):
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def factors(model):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


# --- the pieces


def test_scales_by_hand():
    assert adapter_scale(16, 4) == 4 and adapter_scale(16, 4, rslora=True) == 8
    assert adapter_scale(16, 1) == adapter_scale(16, 1, rslora=True) == 16
    assert adapter_scale(same_alpha(16, 64), 64) == adapter_scale(16, 64, rslora=True)


def test_slope_of_a_power_law():
    ranks = [2, 8, 32, 128]
    for power in (-1, 0, 0.5):
        assert log_slope(ranks, [3 * r**power for r in ranks]) == pytest.approx(power, abs=1e-12)


def test_bottom_of_a_parabola_in_log_rate():
    rates, bottom = [1e-3 * 2**k for k in range(5)], 5e-3
    assert best_between({lr: math.log(lr / bottom) ** 2 for lr in rates}) == pytest.approx(bottom)
    assert best_between({lr: lr for lr in reversed(rates)}) == rates[0]  # the edge, in whatever order
    assert best_between({lr: -lr for lr in rates}) == rates[-1]
    assert best_between(dict.fromkeys(rates, 1.0)) == rates[0]
    assert best_between({1.0: 2.0, 2.0: 1.0, 4.0: 1.0, 8.0: 2.0}) == pytest.approx(2 * math.sqrt(2))


# --- LoRA of another alpha


@pytest.mark.parametrize("rank, alpha", [(4, 8), (3, 7.5), (16, 16)])
def test_training_equals_peft_and_lora_of_alpha_root_r_bit_for_bit(tiny_llama, batch, rank, alpha):
    from peft import set_peft_model_state_dict

    mine = inject_rslora(tiny_llama(), QV, rank, alpha, generator=seeded())
    lora = inject_lora(tiny_llama(), QV, rank, alpha * math.sqrt(rank), generator=seeded())
    peft = peft_rslora(tiny_llama(), rank, alpha)
    peft_lora = peft_rslora(tiny_llama(), rank, alpha * math.sqrt(rank), rslora=False)
    for each in (peft, peft_lora):
        set_peft_model_state_dict(each, lora_state_dict(mine))
    runs = [train(each.train(), batch) for each in (mine, lora, peft, peft_lora)]
    assert runs[0] == runs[1] == runs[2] == runs[3] and runs[0][-1] < runs[0][0]
    ends = [lora_state_dict(mine), lora_state_dict(lora), factors(peft), factors(peft_lora)]
    assert all(torch.equal(ends[0][key], end[key]) for end in ends[1:] for key in ends[0])


def test_at_rank_one_the_flag_changes_nothing(tiny_llama, batch):
    pair = [inject(tiny_llama(), QV, 1, 4, generator=seeded()) for inject in (inject_lora, inject_rslora)]
    assert train(pair[0], batch, 3) == train(pair[1], batch, 3)


def test_a_fresh_adapter_changes_nothing(tiny_llama, batch):
    with torch.no_grad():
        fresh = inject_rslora(tiny_llama(), "all-linear", 4, 8)(**batch).logits
        assert torch.equal(fresh, tiny_llama()(**batch).logits)


def test_gradients_and_merged_weights_equal_pefts(tiny_llama, batch):
    from peft import set_peft_model_state_dict

    mine = fill_b(inject_rslora(tiny_llama(), QV, 4, 8)).train()
    peft = peft_rslora(tiny_llama(), 4, 8).train()
    set_peft_model_state_dict(peft, lora_state_dict(mine))
    outputs = [each(**batch) for each in (mine, peft)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    theirs = {n.replace(".default", ""): p.grad for n, p in peft.named_parameters() if p.requires_grad}
    for name, layer in lora_layers(mine).items():
        for factor in ("lora_A", "lora_B"):
            key = f"base_model.model.{name}.{factor}.weight"
            assert torch.equal(getattr(layer, factor).grad, theirs[key])
    merged, expected = merge_lora(mine).state_dict(), peft.merge_and_unload().state_dict()
    assert all(torch.equal(merged[key], expected[key]) for key in expected)


def test_files_go_both_ways(tiny_llama, batch, tmp_path):
    """Ours is saved as the LoRA it is; PEFT's, with use_rslora in its config, loads as that LoRA."""
    from peft import PeftModel

    mine = fill_b(inject_rslora(tiny_llama(), QV, 3, 7.5)).eval()
    save_lora(mine, tmp_path / "mine")
    there = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mine").eval()
    peft = peft_rslora(tiny_llama(), 3, 7.5)
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(peft, lora_state_dict(mine))
    peft.save_pretrained(tmp_path / "theirs")
    back = load_lora(tiny_llama(), tmp_path / "theirs").eval()
    with torch.no_grad():
        logits = mine(**batch).logits
        assert torch.equal(there(**batch).logits, logits)
        assert torch.equal(back(**batch).logits, logits)
    assert next(iter(lora_layers(back).values())).alpha == 7.5 * math.sqrt(3)


def test_parameters_on_the_7b_config_equal_pefts_with_and_without_the_flag():
    from peft import LoraConfig

    from labs_lib.models.twins import peft_parameter_count, random_like

    twin = random_like("llama-2-7b")
    config = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with torch.device("meta"):
        mine = inject_rslora(copy.deepcopy(twin), "all-linear", 16, 32)
    count = sum(parameter.numel() for parameter in trainable_parameters(mine))
    assert count == peft_parameter_count(twin, LoraConfig(use_rslora=True, **config)) == 39_976_960


# --- what the scalings do to one step


def one_step(rank, scale, kind, seed):
    """How far one step moves the output of a linear layer, rms over a batch."""
    generator = seeded(seed)
    x, target = torch.randn(2, 256, generator=generator), torch.randn(2, 4, generator=generator)
    A = ((2 * torch.rand(rank, 256, generator=generator) - 1) / 16).requires_grad_()
    B = torch.zeros(4, rank, requires_grad=True)
    optimizer = kind([A, B], lr=1e-4)
    (scale * x @ A.T @ B.T - target).square().mean().backward()
    optimizer.step()
    return (scale * x @ A.T @ B.T).square().mean().sqrt().item()


@pytest.mark.parametrize(
    "kind, rslora, power",
    [
        (torch.optim.SGD, False, -1),
        (torch.optim.SGD, True, 0),
        (torch.optim.Adam, False, 0),
        (torch.optim.Adam, True, 0.5),
    ],
)
def test_sgd_is_stable_with_the_root_and_adam_without(kind, rslora, power):
    ranks = [4, 16, 64, 256]
    sizes = [
        sum(one_step(rank, adapter_scale(16, rank, rslora), kind, seed) for seed in range(4))
        for rank in ranks
    ]
    assert log_slope(ranks, sizes) == pytest.approx(power, abs=0.12)


# --- today's behaviour of the library: hazards


@pytest.mark.parametrize("way, options", [("linear", {}), ("cat", {}), ("svd", {"svd_rank": 4})])
@pytest.mark.parametrize("rslora, factor", [(False, 1), (True, 2)])
def test_pefts_weighted_adapter_is_root_r_too_strong(tiny_llama, way, options, rslora, factor):
    """Regression: a copy with weight 1 inherits use_rslora but gets alpha = r, so its scale is sqrt(r), not 1."""
    model = peft_rslora(tiny_llama(), 4, 8, rslora, init_lora_weights=False)
    model.add_weighted_adapter(["default"], [1.0], "copy", combination_type=way, **options)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    updates = [layer.get_delta_weight(name) for name in ("default", "copy")]
    torch.testing.assert_close(updates[1], factor * updates[0], rtol=1e-4, atol=1e-6)


def test_switching_the_flag_multiplies_the_update_by_root_r(tiny_llama):
    """Regression: the same file read with and without use_rslora is a different adapter; nothing tells them apart."""
    pair = [peft_rslora(tiny_llama(), 16, 32, rslora, init_lora_weights=False) for rslora in (False, True)]
    scales = [each.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] for each in pair]
    assert scales == [2.0, 8.0]
    assert factors(pair[0]).keys() == factors(pair[1]).keys()
