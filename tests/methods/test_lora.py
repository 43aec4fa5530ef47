"""Our LoRA is PEFT's, bit for bit: outputs, gradients, training, merging; and its edges give clear errors."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from labs_lib.methods.lora import (
    LoRALinear,
    init_lora,
    inject_lora,
    load_lora_state_dict,
    lora_delta,
    lora_layers,
    lora_state_dict,
    merge_lora,
    remove_lora,
    target_names,
    trainable_parameters,
)

from .parity import assert_same, quantised, weights

QV = ["q_proj", "v_proj"]


def fill_b(model, seed=3):
    """Give B numbers: with B = 0 the update is nothing and every comparison of it is vacuous."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    return model


# --- the pieces


def test_delta_by_hand():
    A = torch.tensor([[1.0, 2.0, 3.0]])
    B = torch.tensor([[10.0], [20.0]])
    expected = torch.tensor([[20.0, 40.0, 60.0], [40.0, 80.0, 120.0]])
    assert torch.equal(lora_delta(A, B, alpha=2, rank=1), expected)


def test_delta_has_the_weights_shape_and_at_most_the_rank():
    delta = lora_delta(torch.randn(3, 20), torch.randn(10, 3), alpha=6, rank=3)
    assert delta.shape == (10, 20)
    assert torch.linalg.matrix_rank(delta) == 3


def test_init_is_uniform_within_one_over_sqrt_in_and_b_is_zero():
    A, B = init_lora(400, 30, rank=8, generator=torch.Generator().manual_seed(0))
    assert A.shape == (8, 400) and B.shape == (30, 8)
    assert A.abs().max() <= 0.05
    assert A.std().item() == pytest.approx(
        0.05 / 3**0.5, rel=0.03
    )  # a uniform's standard deviation: bound / sqrt 3
    assert torch.count_nonzero(B) == 0


def test_init_draws_from_its_generator_only():
    state = torch.get_rng_state()
    draws = [init_lora(5, 5, 2, torch.Generator().manual_seed(4))[0] for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_an_error(rank, tiny_llama):
    with pytest.raises(ValueError, match="at least 1"):
        init_lora(4, 4, rank)
    model = tiny_llama()
    with pytest.raises(ValueError, match="at least 1"):
        inject_lora(model, QV, rank, alpha=8)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layer_equals_the_matrix_it_stands_for():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(12, 7), rank=3, alpha=5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 12)
    weight = layer.base.weight + lora_delta(layer.lora_A, layer.lora_B, alpha=5, rank=3)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.base.bias))


def test_a_full_rank_can_express_any_update():
    """At rank = min(in, out), B @ A reaches an arbitrary matrix: LoRA then contains full fine-tuning."""
    target = torch.randn(4, 6)
    A, B = target, torch.eye(4)
    assert torch.equal(lora_delta(A, B, alpha=4, rank=4), target)


def test_half_precision_base_keeps_its_output_dtype_and_trains_in_float32():
    layer = LoRALinear(nn.Linear(8, 8).bfloat16(), rank=2, alpha=4)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    y = layer(torch.randn(3, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32


def test_merging_twice_adds_once_and_unmerging_restores():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 5), rank=2, alpha=3)
    nn.init.normal_(layer.lora_B)
    before, x = layer.base.weight.clone(), torch.randn(4, 6)
    y = layer(x)
    layer.merge()
    merged = layer.base.weight.clone()
    layer.merge()
    assert torch.equal(layer.base.weight, merged)
    torch.testing.assert_close(layer(x), y)
    layer.unmerge()
    layer.unmerge()
    torch.testing.assert_close(layer.base.weight, before)
    torch.testing.assert_close(layer(x), y)


# --- into a model


def test_injecting_changes_nothing_until_b_moves(tiny_llama, batch):
    plain = tiny_llama()
    model = inject_lora(tiny_llama(), "all-linear", rank=4, alpha=8)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
        assert not torch.equal(fill_b(model)(**batch).logits, plain(**batch).logits)


def test_only_a_and_b_train(tiny_llama, batch):
    model = fill_b(inject_lora(tiny_llama(), QV, rank=4, alpha=8))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 2 * 2
    assert all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in trainable)
    assert sum(parameter.numel() for parameter in trainable_parameters(model)) == 2 * (
        4 * (32 + 32) + 4 * (32 + 16)
    )
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trainable)


def test_at_init_only_b_gets_a_gradient(tiny_llama, batch):
    """dL/dA carries a factor B, and B is zero: A waits one step for B."""
    model = inject_lora(tiny_llama(), QV, rank=4, alpha=8)
    model(**batch).loss.backward()
    for layer in lora_layers(model).values():
        assert torch.count_nonzero(layer.lora_A.grad) == 0
        assert torch.count_nonzero(layer.lora_B.grad) > 0


def test_all_linear_is_every_linear_layer_but_the_head(tiny_llama):
    model = tiny_llama()
    assert len(target_names(model, "all-linear")) == 2 * 7
    assert "lm_head" not in target_names(model, "all-linear")
    assert target_names(model, "lm_head") == ["lm_head"]


def test_targets_by_suffix_full_name_and_order(tiny_llama):
    model = tiny_llama()
    assert target_names(model, ["v_proj", "layers.1.self_attn.q_proj"]) == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    with pytest.raises(ValueError):  # a suffix of names, not of letters
        target_names(model, ["proj"])


def test_targets_inside_a_sequential_and_at_the_top():
    model = inject_lora(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), ["0"], rank=1, alpha=1)
    assert list(lora_layers(model)) == ["0"]
    assert model(torch.randn(5, 3)).shape == (5, 2)


def test_a_missing_target_names_the_closest_and_leaves_the_model_alone(tiny_llama):
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"'qproj'.*q_proj"):
        inject_lora(model, ["v_proj", "qproj"], rank=4, alpha=8)
    with pytest.raises(
        ValueError, match="down_proj, gate_proj, k_proj"
    ):  # nothing is close: all names are listed
        inject_lora(model, ["c_attn"], rank=4, alpha=8)
    assert not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_to_adapt_is_an_error(tiny_llama):
    with pytest.raises(ValueError, match="Nothing to adapt"):
        inject_lora(tiny_llama(), [], rank=4, alpha=8)
    with pytest.raises(ValueError, match="Nothing to adapt"):
        inject_lora(nn.Sequential(nn.Embedding(3, 3)), "all-linear", rank=4, alpha=8)


def test_injecting_twice_is_an_error(tiny_llama):
    model = inject_lora(tiny_llama(), QV, rank=4, alpha=8)
    with pytest.raises(ValueError, match="already"):
        inject_lora(model, "all-linear", rank=4, alpha=8)


def test_merge_gives_a_plain_model_with_the_same_outputs(tiny_llama, batch):
    model = fill_b(inject_lora(tiny_llama(), "all-linear", rank=4, alpha=8)).eval()
    with torch.no_grad():
        logits = model(**batch).logits
        merged = merge_lora(model)
        torch.testing.assert_close(merged(**batch).logits, logits, rtol=0, atol=1e-5)
    assert not lora_layers(merged)
    assert weights(merged).keys() == weights(tiny_llama()).keys()


def test_remove_gives_the_base_back(tiny_llama):
    model = fill_b(inject_lora(tiny_llama(), "all-linear", rank=4, alpha=8))
    assert_same(weights(remove_lora(model)), weights(tiny_llama()))


def test_merging_into_a_tied_weight_is_refused(tiny_llama):
    model = fill_b(inject_lora(tiny_llama(tied=True), ["q_proj", "lm_head"], rank=2, alpha=4))
    before = weights(model)
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        merge_lora(model)
    assert_same(weights(model), before)


def test_a_learners_own_layer_class_counts(tiny_llama, batch):
    """Notebooks define LoRALinear again; the helpers must see those layers too."""

    class Mine(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.rank, self.alpha, self.merged = base, 2, 4, False
            self.lora_A = nn.Parameter(torch.zeros(2, base.in_features))
            self.lora_B = nn.Parameter(torch.zeros(base.out_features, 2))

    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj = Mine(model.model.layers[0].self_attn.q_proj)
    assert list(lora_layers(model)) == ["model.layers.0.self_attn.q_proj"]
    assert_same(weights(remove_lora(model)), weights(tiny_llama()))


def test_state_dict_must_fit(tiny_llama):
    model = inject_lora(tiny_llama(), QV, rank=4, alpha=8)
    tensors = {key: torch.ones_like(value) for key, value in lora_state_dict(model).items()}
    load_lora_state_dict(model, tensors)
    assert all(layer.lora_B.eq(1).all() for layer in lora_layers(model).values())
    key = next(iter(tensors))
    with pytest.raises(ValueError, match="differ in 1 tensors"):
        load_lora_state_dict(model, {name: value for name, value in tensors.items() if name != key})
    with pytest.raises(ValueError, match=r"\(2, 32\) in the adapter, \(4, 32\) in the model"):
        load_lora_state_dict(model, {**tensors, key: torch.ones(2, 32)})


# --- equal to PEFT


def peft_lora(base, targets, rank, alpha, dropout=0.0):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)


def pair(tiny_llama, targets, rank, alpha, dropout=0.0, **kwargs):
    """Our model and PEFT's on equal bases with equal, non-zero A and B."""
    from peft import set_peft_model_state_dict

    ours = fill_b(inject_lora(tiny_llama(**kwargs), targets, rank, alpha, dropout))
    theirs = peft_lora(tiny_llama(**kwargs), targets, rank, alpha, dropout)
    set_peft_model_state_dict(theirs, lora_state_dict(ours))
    return ours.train(), theirs.train()


def peft_factors(model):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def peft_gradients(model):
    return {
        name.replace(".default.weight", ".weight"): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def our_gradients(model):
    return {
        f"base_model.model.{name}.{factor}.weight": getattr(layer, factor).grad
        for name, layer in lora_layers(model).items()
        for factor in ("lora_A", "lora_B")
    }


CASES = [(QV, 4, 8), (["gate_proj", "down_proj"], 1, 1), ("all-linear", 16, 32), ("all-linear", 3, 7.5)]


@pytest.mark.parametrize("targets, rank, alpha", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_equal_pefts(tiny_llama, batch, targets, rank, alpha, dtype):
    ours, theirs = pair(tiny_llama, targets, rank, alpha, dtype=dtype)
    outputs = [model(**batch) for model in (ours, theirs)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    gradients = our_gradients(ours)
    assert_same(gradients, peft_gradients(theirs))
    assert all(torch.count_nonzero(gradient) > 0 for gradient in gradients.values())


@pytest.mark.parametrize("targets, rank, alpha", CASES)
def test_merged_weights_equal_pefts(tiny_llama, targets, rank, alpha):
    ours, theirs = pair(tiny_llama, targets, rank, alpha)
    assert_same(weights(merge_lora(ours)), weights(theirs.merge_and_unload()))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_ten_training_steps_equal_pefts(tiny_llama, batch, dropout):
    ours, theirs = pair(tiny_llama, "all-linear", 4, 8, dropout)
    before = {key: value.clone() for key, value in lora_state_dict(ours).items()}
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(0)  # the same dropout masks
        optimiser = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
        losses.append([])
        for _ in range(10):
            loss = model(**batch).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert_same(lora_state_dict(ours), peft_factors(theirs))
    assert all(not torch.equal(before[key], value) for key, value in lora_state_dict(ours).items())


def test_the_frozen_base_is_untouched_by_training(tiny_llama, batch):
    model = inject_lora(tiny_llama(), QV, rank=4, alpha=8)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-1)  # everything is offered to the optimiser
    for _ in range(3):
        model(**batch).loss.backward()
        optimiser.step()
    assert_same(weights(remove_lora(model)), weights(tiny_llama()))


@pytest.mark.parametrize("targets", [QV, "all-linear", ["layers.1.self_attn.q_proj", "up_proj"]])
def test_the_same_layers_as_peft(tiny_llama, targets):
    ours = lora_state_dict(inject_lora(tiny_llama(), targets, 2, 4))
    assert ours.keys() == peft_factors(peft_lora(tiny_llama(), targets, 2, 4)).keys()


def test_the_same_random_stream_gives_pefts_a(tiny_llama):
    """PEFT draws three times per layer: nn.Linear's own A and B, then A again, which is the one kept."""
    base = tiny_llama()
    torch.manual_seed(11)
    theirs = peft_factors(peft_lora(copy.deepcopy(base), QV, rank=4, alpha=8))
    torch.manual_seed(11)
    for name in target_names(base, QV):
        layer = base.get_submodule(name)
        nn.Linear(layer.in_features, 4, bias=False), nn.Linear(4, layer.out_features, bias=False)
        A, B = init_lora(layer.in_features, layer.out_features, rank=4)
        torch.testing.assert_close(A, theirs[f"base_model.model.{name}.lora_A.weight"], rtol=1e-6, atol=0)
        assert torch.equal(B, theirs[f"base_model.model.{name}.lora_B.weight"])


def test_on_a_quantised_base_it_is_qlora_and_merging_is_refused(tiny_llama, batch):
    from peft import set_peft_model_state_dict

    ours = fill_b(inject_lora(quantised(tiny_llama()), QV, rank=4, alpha=8))
    theirs = peft_lora(quantised(tiny_llama()), QV, rank=4, alpha=8)
    set_peft_model_state_dict(theirs, lora_state_dict(ours))
    assert {layer.base.weight.dtype for layer in lora_layers(ours).values()} == {torch.uint8}
    outputs = [model.train()(**batch) for model in (ours, theirs)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    assert_same(our_gradients(ours), peft_gradients(theirs))
    with pytest.raises(ValueError, match="quantised"):
        merge_lora(ours)


# --- the house


def test_methods_import_torch_only():
    code = (
        "import sys, labs_lib.methods.lora, labs_lib.methods.io\n"
        "heavy = {'transformers', 'peft', 'datasets', 'safetensors', 'matplotlib', 'bitsandbytes'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
