"""Our (IA)3 is PEFT's: outputs, gradients, training, merging, files; and where PEFT goes wrong without a word."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from labs_lib.errors import LabsError
from labs_lib.methods.adapters_io import load_ia3, save_ia3
from labs_lib.methods.ia3 import (
    IA3Linear,
    count_ia3,
    ia3_layers,
    ia3_state_dict,
    ia3_targets,
    inject_ia3,
    merge_ia3,
    remove_ia3,
    rescaling_share,
)
from labs_lib.methods.lora import trainable_parameters

from .parity import assert_close, assert_same, logits, quantised, weights

KV = ["k_proj", "v_proj"]
USUAL = (["k_proj", "v_proj", "down_proj"], ["down_proj"])
CASES = [USUAL, (KV, []), ("all-linear", ["down_proj", "o_proj"])]
ONE_DOWN = "layers.1.mlp.down_proj"
DOWN = "model.layers.0.mlp.down_proj"


def fill(model, seed=3):
    """Factors around 1: with ones every comparison is vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in ia3_state_dict(model).values():
            tensor.copy_(1 + 0.5 * torch.randn(tensor.shape, generator=generator))
    return model


@pytest.fixture
def biased_llama():
    """A tiny Llama with biases everywhere, none of them zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, attention_bias=True, mlp_bias=True, **sizes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return lambda: copy.deepcopy(model)


# --- the pieces


def test_outputs_and_inputs_by_hand():
    base = nn.Linear(2, 3)
    base.weight.data, base.bias.data = torch.tensor([[1.0, 2], [3, 4], [5, 6]]), torch.tensor([10.0, 20, 30])
    x = torch.tensor([[1.0, 1.0]])
    outputs, inputs = IA3Linear(base), IA3Linear(base, feedforward=True)
    assert outputs.ia3_l.shape == (3, 1) and inputs.ia3_l.shape == (1, 2)
    outputs.ia3_l.data, inputs.ia3_l.data = torch.tensor([[1.0], [2], [0]]), torch.tensor([[10.0, 0]])
    assert outputs(x).tolist() == [[13, 54, 0]]  # 1 * 13, 2 * 27, 0 * 41: the bias is scaled too
    assert inputs(x).tolist() == [[20, 50, 80]]  # W (10, 0) + b: the bias is not


@pytest.mark.parametrize("feedforward", [False, True])
def test_merging_twice_scales_once_and_unmerging_comes_near(feedforward):
    torch.manual_seed(0)
    layer = IA3Linear(nn.Linear(6, 5), feedforward)
    layer.ia3_l.data = 1 + 0.5 * torch.rand(layer.ia3_l.shape)
    before, x = weights(layer.base), torch.randn(4, 6)
    y = layer(x)
    layer.merge()
    merged = weights(layer.base)
    layer.merge()
    assert_same(weights(layer.base), merged)
    assert torch.equal(merged["bias"], before["bias"]) == feedforward
    torch.testing.assert_close(layer(x), y)
    layer.unmerge()
    layer.unmerge()
    assert not torch.equal(layer.base.weight, before["weight"])
    assert_close(weights(layer.base), before, atol=1e-6)


def test_half_precision_base_keeps_its_output_dtype_and_trains_in_float32():
    for feedforward in (False, True):
        layer = IA3Linear(nn.Linear(8, 8).bfloat16(), feedforward)
        y = layer(torch.randn(3, 8, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert layer.ia3_l.dtype == layer.ia3_l.grad.dtype == torch.float32


# --- into a model


def test_injecting_changes_nothing_until_a_factor_moves(tiny_llama, batch):
    model = inject_ia3(tiny_llama())
    assert torch.equal(logits(model, batch), logits(tiny_llama(), batch))
    assert not torch.equal(logits(fill(model), batch), logits(tiny_llama(), batch))


def test_only_the_vectors_train_and_all_get_a_gradient_at_once(tiny_llama, batch):
    """Unlike LoRA's A, whose gradient is zero while B is zero."""
    model = inject_ia3(tiny_llama())
    assert len(trainable_parameters(model)) == 6
    assert (
        sum(p.numel() for p in trainable_parameters(model)) == count_ia3(tiny_llama()) == 2 * (16 + 16 + 48)
    )
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith("ia3_l")
        assert parameter.grad is None or torch.count_nonzero(parameter.grad) > 0


def test_which_layers_and_which_side(tiny_llama):
    assert ia3_targets(tiny_llama(), ["v_proj", "down_proj"]) == {
        "model.layers.0.self_attn.v_proj": False,
        "model.layers.0.mlp.down_proj": True,
        "model.layers.1.self_attn.v_proj": False,
        "model.layers.1.mlp.down_proj": True,
    }


@pytest.mark.parametrize(
    "targets, feedforward, says",
    [
        (KV, ["down_proj"], r"down_proj, which is not among the targets.*feedforward=\(\)"),
        (["k_proj", "downproj"], [], "'downproj'; the closest are: down_proj"),
        (["k_proj", "down_proj"], ["c_fc"], "'c_fc'"),  # PEFT says nothing
        ([], [], "Nothing to adapt"),
    ],
)
def test_bad_targets_are_an_error_and_leave_the_model_alone(tiny_llama, targets, feedforward, says):
    model = tiny_llama()
    for attempt in (inject_ia3, count_ia3):
        with pytest.raises(ValueError, match=says):
            attempt(model, targets, feedforward)
    assert not ia3_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_injecting_twice_is_an_error(tiny_llama):
    with pytest.raises(ValueError, match="already"):
        inject_ia3(inject_ia3(tiny_llama()), KV, ())


def test_merge_gives_a_plain_model_with_the_same_outputs(biased_llama, batch):
    model = fill(inject_ia3(biased_llama(), "all-linear"))
    expected = logits(model, batch)
    merged = merge_ia3(model)
    assert not ia3_layers(merged)
    assert weights(merged).keys() == weights(biased_llama()).keys()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=1e-5)


def test_remove_gives_the_base_back(tiny_llama, batch):
    model = fill(inject_ia3(tiny_llama()))
    assert_same(weights(remove_ia3(model)), weights(tiny_llama()))
    model = fill(inject_ia3(model))
    for layer in ia3_layers(model).values():
        layer.merge()
    assert_close(weights(remove_ia3(model)), weights(tiny_llama()))


def test_a_merged_factor_of_zero_cannot_be_taken_out(tiny_llama):
    model = fill(inject_ia3(tiny_llama()))
    layer = ia3_layers(model)[DOWN]
    layer.ia3_l.data[0, 5] = 0
    assert_same(weights(remove_ia3(copy.deepcopy(model))), weights(tiny_llama()))  # unmerged it is no matter
    layer.merge()
    with pytest.raises(ValueError, match="load the base again"):
        remove_ia3(model)
    assert len(ia3_layers(model)) == 6


def test_merging_into_a_tied_weight_is_refused(tiny_llama):
    model = fill(inject_ia3(tiny_llama(tied=True), ["k_proj", "lm_head"], []))
    before = weights(model)
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        merge_ia3(model)
    assert_same(weights(model), before)


def test_a_learners_own_layer_class_counts(tiny_llama):
    class Mine(nn.Module):
        def __init__(self, base, feedforward):
            super().__init__()
            self.base, self.feedforward = base, feedforward
            self.ia3_l = nn.Parameter(
                torch.ones(1, base.in_features) if feedforward else torch.ones(base.out_features, 1)
            )

    model = inject_ia3(tiny_llama(), kind=Mine)
    assert len(ia3_layers(model)) == 6 and len(trainable_parameters(model)) == 6
    assert_same(weights(remove_ia3(model)), weights(tiny_llama()))


@pytest.mark.parametrize("feedforward", [False, True])
def test_the_share_of_a_change_that_rescaling_reaches(feedforward):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(80, 50, generator=generator)
    scale = torch.rand((1, 50) if feedforward else (80, 1), generator=generator)
    rescaled = before * scale
    assert rescaling_share(before, rescaled, feedforward) == pytest.approx(1)
    # rescaling the other side is, row by row, a change in a random direction plus what all its factors share
    assert rescaling_share(before, rescaled, not feedforward) < 0.9
    change = torch.randn(80, 50, generator=generator)
    along = (change * before).sum(0 if feedforward else 1, keepdim=True)
    dim = 0 if feedforward else 1
    sideways = change - along / before.square().sum(dim, keepdim=True) * before
    assert rescaling_share(before, before + sideways, feedforward) == pytest.approx(0, abs=1e-6)
    assert rescaling_share(before, before + change, feedforward) == pytest.approx(
        1 / before.shape[dim], rel=0.4
    )


def test_no_other_factors_come_closer_to_a_change():
    generator = torch.Generator().manual_seed(1)
    before, after = torch.randn(2, 6, 9, generator=generator).unbind()
    factors = torch.ones(6, 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([factors], max_iter=50)

    def missed():
        optimiser.zero_grad()
        loss = (factors * before - after).square().sum()
        loss.backward()
        return loss

    optimiser.step(missed)
    reached = 1 - (missed() / (after - before).square().sum()).item()
    assert rescaling_share(before, after) == pytest.approx(reached, abs=1e-5)


# --- equal to PEFT


def peft_ia3(base, targets=USUAL[0], feedforward=USUAL[1], **more):
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=targets, feedforward_modules=feedforward, task_type="CAUSAL_LM", **more)
    return get_peft_model(base, config)


def pair(make, targets, feedforward, **kwargs):
    """Our model and PEFT's on equal bases with equal factors."""
    from peft import set_peft_model_state_dict

    ours = fill(inject_ia3(make(**kwargs), targets, feedforward))
    theirs = peft_ia3(make(**kwargs), targets, feedforward)
    set_peft_model_state_dict(theirs, ia3_state_dict(ours))
    return ours.train(), theirs.train()


def peft_vectors(model):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def gradients(model):
    return {
        name.removesuffix(".default").removeprefix("base_model.model."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("targets, feedforward", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_equal_pefts(tiny_llama, batch, targets, feedforward, dtype):
    ours, theirs = pair(tiny_llama, targets, feedforward, dtype=dtype)
    outputs = [model(**batch) for model in (ours, theirs)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    assert_same(gradients(ours), gradients(theirs))
    assert all(torch.count_nonzero(gradient) > 0 for gradient in gradients(ours).values())


@pytest.mark.parametrize("targets, feedforward", CASES)
def test_merged_and_unmerged_weights_equal_pefts(tiny_llama, biased_llama, targets, feedforward):
    for make in (tiny_llama, biased_llama):
        ours, theirs = pair(make, targets, feedforward)
        assert_same(
            weights(merge_ia3(copy.deepcopy(ours))), weights(copy.deepcopy(theirs).merge_and_unload())
        )
        for layer in ia3_layers(ours).values():
            layer.merge()
        theirs.merge_adapter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Unmerge result can be inaccurate"
            theirs.unmerge_adapter()
        assert_same(weights(remove_ia3(ours)), weights(theirs.unload()))


def test_ten_training_steps_equal_pefts(biased_llama, batch):
    ours, theirs = pair(biased_llama, "all-linear", ["down_proj"])
    before = {key: value.clone() for key, value in ia3_state_dict(ours).items()}
    losses = []
    for model in (ours, theirs):
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
    assert_same(ia3_state_dict(ours), peft_vectors(theirs))
    assert all(not torch.equal(before[key], value) for key, value in ia3_state_dict(ours).items())
    assert_same(weights(remove_ia3(ours)), weights(biased_llama()))  # the base is untouched


def test_on_a_quantised_base_ours_is_pefts_and_merging_is_refused(tiny_llama, batch):
    from peft import set_peft_model_state_dict

    ours, theirs = fill(inject_ia3(quantised(tiny_llama()))), peft_ia3(quantised(tiny_llama()))
    set_peft_model_state_dict(theirs, ia3_state_dict(ours))
    outputs = [model.train()(**batch) for model in (ours, theirs)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    assert_same(gradients(ours), gradients(theirs))
    with pytest.raises(ValueError, match="quantised"):
        merge_ia3(ours)
    with pytest.raises(ValueError, match="4-bit"):
        theirs.merge_and_unload()


@pytest.mark.parametrize("twin, expected", [("llama-2-7b", 614_400), ("llama-3-8b", 524_288)])
def test_as_many_parameters_as_peft_trains_on_a_public_model(twin, expected):
    from peft import IA3Config

    from labs_lib.models.twins import peft_parameter_count, random_like

    model = random_like(twin)
    assert count_ia3(model) == expected
    assert sum(p.numel() for p in trainable_parameters(inject_ia3(model))) == expected
    config = IA3Config(task_type="CAUSAL_LM", target_modules=USUAL[0], feedforward_modules=USUAL[1])
    assert peft_parameter_count(remove_ia3(model), config) == expected


# --- on disk


@pytest.mark.parametrize("targets, feedforward", [*CASES, ([ONE_DOWN, "k_proj"], [ONE_DOWN])])
def test_ours_loads_in_peft_and_pefts_in_ours(tiny_llama, batch, tmp_path, targets, feedforward):
    from peft import PeftModel

    ours = fill(inject_ia3(tiny_llama(), targets, feedforward)).eval()
    save_ia3(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    assert_same(ia3_state_dict(ours), peft_vectors(theirs))
    assert torch.equal(logits(ours, batch), logits(theirs, batch))
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_ia3(tiny_llama(), tmp_path / "theirs").eval()
    assert torch.equal(logits(again, batch), logits(ours, batch))
    save_ia3(again, tmp_path / "again")
    files = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ours", "theirs", "again")
    ]
    assert files[0] == files[1] == files[2]
    again.train()(**batch).loss.backward()  # what is loaded can be trained on
    assert all(parameter.grad is not None for parameter in trainable_parameters(again))


def test_one_block_scaled_on_its_inputs_and_the_other_on_its_outputs(tiny_llama, batch, tmp_path):
    """Names are then written in full: PEFT wants the two lists to agree word by word."""
    from peft import PeftModel

    ours = fill(inject_ia3(tiny_llama(), ["down_proj"], [ONE_DOWN])).eval()
    save_ia3(ours, tmp_path)
    assert torch.equal(logits(ours, batch), logits(PeftModel.from_pretrained(tiny_llama(), tmp_path), batch))
    assert torch.equal(logits(ours, batch), logits(load_ia3(tiny_llama(), tmp_path).eval(), batch))


def change(edit):
    def damage(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


def setting(**more):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    return damage


KEY = f"base_model.model.{DOWN}.ia3_l"


@pytest.mark.parametrize(
    "damage, says",
    [
        (change(lambda tensors: tensors.update({KEY: torch.ones(1, 7)})), r"is \(1, 7\), expected one of"),
        (change(lambda tensors: tensors.update({"a.b.ia3_l": torch.ones(1, 7)})), "a.b.ia3_l"),
        (change(lambda tensors: tensors.clear()), "Nothing to adapt"),
        (setting(fan_in_fan_out=True), "more than plain"),
        (setting(peft_type="LORA"), "LORA, not IA3"),
    ],
)
def test_a_misfit_says_why_and_leaves_the_model_alone(tiny_llama, tmp_path, damage, says):
    save_ia3(inject_ia3(tiny_llama()), tmp_path)
    damage(tmp_path)
    model = tiny_llama()
    with pytest.raises(LabsError, match=says):
        load_ia3(model, tmp_path)
    assert not ia3_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_to_save(tiny_llama, tmp_path):
    with pytest.raises(LabsError, match="inject_ia3"):
        save_ia3(tiny_llama(), tmp_path)


# --- what PEFT 0.21 does that a learner will meet


def down(model):
    return model.base_model.model.get_submodule(DOWN)


@pytest.mark.parametrize("wrong", [[], "down_proj"])
def test_peft_without_feedforward_modules_scales_the_other_side(tiny_llama, wrong):
    """An empty list, or the bare name, which is read as a regular expression and matches no full name."""
    right, mistaken = peft_ia3(tiny_llama()), peft_ia3(tiny_llama(), feedforward=wrong)
    assert down(right).ia3_l["default"].shape == (1, 48)
    assert down(mistaken).ia3_l["default"].shape == (32, 1)


def test_peft_knows_the_feedforward_of_a_llama_if_it_is_not_given(tiny_llama):
    assert down(peft_ia3(tiny_llama(), feedforward=None)).is_feedforward


def test_with_all_linear_peft_does_not_notice_a_feedforward_module_that_is_not_there(tiny_llama):
    assert not down(peft_ia3(tiny_llama(), "all-linear", ["dwn_proj"])).is_feedforward
    with pytest.raises(ValueError, match="subset of `target_modules`"):  # with a list of targets it does
        peft_ia3(tiny_llama(), USUAL[0], ["dwn_proj"])


def test_a_second_adapter_in_peft_gets_the_firsts_feedforward(tiny_llama):
    from peft import IA3Config

    model = peft_ia3(tiny_llama())
    config = IA3Config(target_modules=USUAL[0], feedforward_modules=[], task_type="CAUSAL_LM")
    model.add_adapter("other", config)
    assert down(model).ia3_l["other"].shape == (1, 48)  # asked for: (32, 1)


def two_adapters(tiny_llama):
    """PEFT's model with "default", which does something, and "other", which does not."""
    from peft import IA3Config

    model = pair(tiny_llama, *USUAL)[1].eval()
    model.add_adapter("other", IA3Config(target_modules=USUAL[0], feedforward_modules=USUAL[1]))
    return model


def test_peft_ignores_adapter_names_in_a_batch(tiny_llama, batch):
    model = two_adapters(tiny_llama)
    with torch.no_grad():
        mixed = model(input_ids=batch["input_ids"], adapter_names=["default", "other", "__base__"]).logits
    assert torch.equal(mixed, logits(model, batch))  # every row got the active adapter
    model.set_adapter("other")
    assert not torch.allclose(mixed[1], logits(model, batch)[1])  # what row 1 should have been


def test_a_weighted_sum_of_vectors_in_peft_is_no_sum_of_their_effects(tiny_llama):
    """An adapter that does nothing is all ones, so adding it with weight 1 adds 1 to every factor."""
    model = two_adapters(tiny_llama)
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    vectors = down(model).ia3_l
    assert torch.equal(vectors["sum"], vectors["default"] + 1)


def test_pefts_unmerge_drifts_and_does_not_bring_back_what_a_zero_erased(tiny_llama):
    model = pair(tiny_llama, *USUAL)[1]
    before = down(model).base_layer.weight.clone()
    factors = down(model).ia3_l["default"].data
    factors[0, :3] = torch.tensor([0.0, 1e-6, -1e-8])
    with pytest.warns(UserWarning, match="inaccurate"):
        model.merge_adapter()
        model.unmerge_adapter()
    after = down(model).base_layer.weight
    assert torch.count_nonzero(after[:, 0]) == 0  # gone
    error = (after / before - 1).abs()
    assert error[:, 1].min() > 0.009  # a factor of 1e-6 comes back 1 % off
    assert not after[:, 2].isfinite().any()  # minus EPSILON divides by zero
    assert error[:, 3:].max() < 1e-5


def test_peft_merges_into_a_tied_weight_and_gets_another_model(tiny_llama, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it does warn
        model = peft_ia3(tiny_llama(tied=True), ["lm_head"], [])
        torch.nn.init.normal_(model.base_model.model.lm_head.ia3_l["default"], mean=1, std=0.5)
        expected = logits(model, batch)
        merged = model.merge_and_unload()
    assert (logits(merged, batch) - expected).abs().max() > 1e-2
