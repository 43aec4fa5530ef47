"""Our DoRA is PEFT's to rounding: outputs, gradients, training, merging, files; and what PEFT's does today."""

import copy

import pytest
import torch
from torch import nn

from labs_lib.errors import LabsError
from labs_lib.methods.dora import (
    DoRALinear,
    decompose,
    dora_state_dict,
    dora_weight,
    inject_dora,
    kept_gains,
    weight_change,
)
from labs_lib.methods.io import load_dora, load_lora, save_dora, save_lora
from labs_lib.methods.lora import (
    inject_lora,
    lora_delta,
    lora_layers,
    merge_lora,
    remove_lora,
    trainable_parameters,
)

from .parity import logits, weights

QV = ["q_proj", "v_proj"]


def shake(model, seed=3):
    """Give B numbers and move the magnitudes: at its start DoRA is its base and a comparison is vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
            layer.lora_magnitude_vector.mul_(
                1 + 0.2 * torch.rand(layer.lora_magnitude_vector.shape, generator=generator)
            )
    return model


def close(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# --- the pieces


def test_decompose_by_hand():
    magnitude, direction = decompose(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    assert magnitude.tolist() == [5.0, 2.0]
    close(direction, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


def test_the_rows_have_the_trained_lengths_and_loras_directions():
    torch.manual_seed(0)
    W, A, B, m = torch.randn(6, 9), torch.randn(2, 9), torch.randn(6, 2), torch.rand(6) + 0.5
    magnitude, direction = decompose(dora_weight(W, A, B, m, alpha=3, rank=2))
    close(magnitude, m)
    close(direction, decompose(W + lora_delta(A, B, 3, 2))[1])


def test_a_negative_magnitude_turns_the_row_around():
    W = torch.tensor([[3.0, 4.0]])
    nothing = torch.zeros(1, 2), torch.zeros(1, 1)
    close(dora_weight(W, *nothing, torch.tensor([-5.0]), 1, 1), -W)


def test_weight_change_separates_length_from_direction():
    W = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    longer, turned = weight_change(W, 2 * W)
    assert longer == pytest.approx(W.norm(dim=1).mean().item(), rel=1e-6)
    assert turned == pytest.approx(0, abs=1e-6)
    longer, turned = weight_change(W, -W)
    assert longer == pytest.approx(0, abs=1e-6) and turned == pytest.approx(2, rel=1e-6)
    quarter = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert weight_change(*quarter) == pytest.approx((0, 1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_layer_is_exactly_its_base(bias, dropout, dtype):
    torch.manual_seed(0)
    base, x = nn.Linear(9, 6, bias=bias).to(dtype), torch.randn(4, 9).to(dtype)
    expected = base(x)
    layer = DoRALinear(base, 2, 4, dropout)
    assert torch.equal(layer(x), expected)  # in training too: dropout acts on terms that are zero


def test_the_layer_computes_its_weight():
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(9, 6), 2, 4)
    nn.init.normal_(layer.lora_B)
    nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 2)
    weight = dora_weight(
        layer.base.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, layer.alpha, layer.rank
    )
    x = torch.randn(4, 9)
    expected = nn.functional.linear(x, weight, layer.base.bias)
    close(layer(x), expected)
    original = layer.base.weight.clone()
    layer.merge()
    layer.merge()  # twice is once
    close(layer(x), expected)
    close(layer.base.weight, weight)
    layer.unmerge()
    layer.unmerge()
    close(layer.base.weight, original)
    close(layer(x), expected)


def test_detached_norm_leaves_the_part_of_the_gradient_along_each_row():
    """With the norm in the graph the gradient of V is at right angles to V; detached, it is m / ||V|| times G."""
    torch.manual_seed(0)
    base, x, g = nn.Linear(9, 6, bias=False), torch.randn(50, 9), torch.randn(50, 6)
    gradients = {}
    for detach in (True, False):
        torch.manual_seed(1)
        layer = DoRALinear(
            copy.deepcopy(base), 9, 9, detach=detach
        )  # full rank and scale 1: B A is any matrix
        with torch.no_grad():
            layer.lora_A.copy_(torch.eye(9))
            layer.lora_B.copy_(0.1 * torch.randn(6, 9))
        (layer(x) * g).sum().backward()
        gradients[detach] = layer.lora_B.grad  # A is the identity: this is the gradient of V
        magnitude_gradient = layer.lora_magnitude_vector.grad
        V = (layer.base.weight + layer.lora_B).detach()
    length, direction = decompose(V)
    along = (gradients[True] * direction).sum(dim=1, keepdim=True) * direction
    close(gradients[True], (layer.lora_magnitude_vector.detach() / length)[:, None] * (g.T @ x), 1e-5)
    close(gradients[False], gradients[True] - along, 1e-5)
    close((gradients[False] * direction).sum(dim=1), torch.zeros(6), 1e-4)
    close(magnitude_gradient, ((g.T @ x) * direction).sum(dim=1), 1e-5)
    assert along.norm() > 0.1 * gradients[True].norm()


def test_dropout_falls_on_both_terms_of_what_is_added():
    torch.manual_seed(0)
    base, x = nn.Linear(9, 6), torch.randn(4, 9)
    layer = DoRALinear(base, 2, 4, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 2)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(5)
    added = layer(x) - base(x)
    gain = layer.gain()
    expected = (gain - 1) * (dropped @ base.weight.T) + gain * 2 * (dropped @ layer.lora_A.T @ layer.lora_B.T)
    close(added, expected, 1e-5)


# --- the model


def test_only_the_adapter_trains_and_the_base_stays(tiny_llama, batch):
    model = inject_dora(tiny_llama(), "all-linear", 2, 4)
    kinds = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert kinds == {"lora_A", "lora_B", "lora_magnitude_vector"}
    optimiser = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    for _ in range(3):
        model(**batch).loss.backward()
        optimiser.step()
    before, after = weights(tiny_llama()), weights(remove_lora(model))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_fresh_model_is_its_base(tiny_llama, batch):
    assert torch.equal(
        logits(tiny_llama(), batch), logits(inject_dora(tiny_llama(), "all-linear", 4, 8), batch)
    )


def test_it_starts_from_loras_own_a(tiny_llama):
    models = [
        inject(tiny_llama(), "all-linear", 4, 8, generator=torch.Generator().manual_seed(5))
        for inject in (inject_lora, inject_dora)
    ]
    for ours, theirs in zip(*(lora_layers(model).values() for model in models), strict=True):
        assert torch.equal(ours.lora_A, theirs.lora_A)


def test_kept_gains_change_nothing_but_the_work(tiny_llama, batch):
    from labs_lib.measure import count_flops

    model = shake(inject_dora(tiny_llama(), "all-linear", 4, 8)).eval()
    one = {"input_ids": batch["input_ids"][:1, :1]}
    expected, work = logits(model, batch), count_flops(model, **one)
    lora = count_flops(inject_lora(tiny_llama(), "all-linear", 4, 8).eval(), **one)
    with kept_gains(model):
        assert torch.equal(logits(model, batch), expected)
        assert count_flops(model, **one) == lora < work
    assert count_flops(model, **one) == work


def test_refusals(tiny_llama):
    model = inject_dora(tiny_llama(), QV, 2, 4)
    with pytest.raises(ValueError, match="already carries"):
        inject_dora(model, QV, 2, 4)
    dead = tiny_llama()
    dead.model.layers[0].self_attn.q_proj.weight.data[3] = 0
    with pytest.raises(ValueError, match="row of zeros"):
        inject_dora(dead, QV, 2, 4)
    assert not lora_layers(dead)


def test_a_quantised_base_is_refused(tiny_llama):
    from bitsandbytes.nn import Linear4bit

    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj = Linear4bit(32, 32, bias=False).to("cpu")
    with pytest.raises(ValueError, match="quantised"):
        inject_dora(model, QV, 2, 4)


# --- equal to PEFT


def peft_dora(base, targets, rank, alpha, dropout=0.0, **more):
    from peft import LoraConfig, get_peft_model

    settings = {"r": rank, "lora_alpha": alpha, "target_modules": targets, "lora_dropout": dropout, **more}
    return get_peft_model(base, LoraConfig(use_dora=True, task_type="CAUSAL_LM", **settings))


def pair(tiny_llama, targets, rank, alpha, dropout=0.0):
    from peft import set_peft_model_state_dict

    ours = shake(inject_dora(tiny_llama(), targets, rank, alpha, dropout))
    theirs = peft_dora(tiny_llama(), targets, rank, alpha, dropout)
    loaded = set_peft_model_state_dict(theirs, dora_state_dict(ours))
    assert not loaded.unexpected_keys
    return ours.train(), theirs.train()


def peft_gradients(model):
    return {
        name.replace(".default.weight", "" if "magnitude" in name else ".weight"): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def our_gradients(model):
    return {
        f"base_model.model.{name}.{tensor}": getattr(layer, tensor.partition(".")[0]).grad
        for name, layer in lora_layers(model).items()
        for tensor in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    }


CASES = [(QV, 4, 8), (["gate_proj", "down_proj"], 1, 1), ("all-linear", 3, 7.5)]


@pytest.mark.parametrize("targets, rank, alpha", CASES)
def test_logits_gradients_and_merged_weights_equal_pefts(tiny_llama, batch, targets, rank, alpha):
    ours, theirs = pair(tiny_llama, targets, rank, alpha)
    outputs = [model(**batch) for model in (ours, theirs)]
    close(outputs[0].logits, outputs[1].logits)
    assert (outputs[0].logits - logits(tiny_llama(), batch)).abs().max() > 1e-3
    for output in outputs:
        output.loss.backward()
    mine, other = our_gradients(ours), peft_gradients(theirs)
    assert mine.keys() == other.keys()
    for name, gradient in mine.items():
        close(gradient, other[name])
        assert gradient.abs().max() > 0
    merged = weights(theirs.merge_and_unload())
    for name, weight in weights(merge_lora(ours)).items():
        close(weight, merged[name])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_ten_training_steps_equal_pefts(tiny_llama, batch, dropout):
    from peft import get_peft_model_state_dict

    ours, theirs = pair(tiny_llama, "all-linear", 4, 8, dropout)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(0)  # the same dropout masks
        optimiser = torch.optim.AdamW(trainable_parameters(model), lr=1e-3)
        losses.append([])
        for _ in range(10):
            loss = model(**batch).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    theirs = get_peft_model_state_dict(theirs)
    for name, tensor in dora_state_dict(ours).items():
        close(tensor, theirs[name], 1e-5)


@pytest.mark.parametrize("targets", [QV, "all-linear", ["layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"]])
def test_files_go_both_ways(tiny_llama, batch, tmp_path, targets):
    from peft import PeftModel

    ours = shake(inject_dora(tiny_llama(), targets, 4, 8)).eval()
    save_dora(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    close(logits(theirs, batch), logits(ours, batch))
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_dora(tiny_llama(), tmp_path / "theirs").eval()
    assert torch.equal(logits(again, batch), logits(ours, batch))
    save_dora(again, tmp_path / "again")
    files = [
        (tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "theirs", "again")
    ]
    assert files[0] == files[1] == files[2]


def test_a_file_of_the_other_kind_is_refused(tiny_llama, tmp_path):
    dora, lora = inject_dora(tiny_llama(), QV, 4, 8), inject_lora(tiny_llama(), QV, 4, 8)
    with pytest.raises(LabsError, match="save_dora"):
        save_lora(dora, tmp_path / "no")
    with pytest.raises(LabsError, match="save_lora"):
        save_dora(lora, tmp_path / "no")
    save_dora(dora, tmp_path / "dora")
    save_lora(lora, tmp_path / "lora")
    with pytest.raises(LabsError, match="use_dora"):
        load_lora(tiny_llama(), tmp_path / "dora")
    with pytest.raises(LabsError, match="load_lora"):
        load_dora(tiny_llama(), tmp_path / "lora")


def test_parameters_on_7b_equal_pefts():
    from peft import LoraConfig

    from labs_lib.models.twins import peft_parameter_count, random_like

    llama = random_like("llama-2-7b")
    config = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    counts = [peft_parameter_count(llama, LoraConfig(**config, use_dora=dora)) for dora in (False, True)]
    ours = inject_dora(llama, "all-linear", 16, 32)
    assert counts == [39_976_960, 41_336_832]
    assert sum(parameter.numel() for parameter in trainable_parameters(ours)) == counts[1]


# --- what PEFT's DoRA does today: the lab's warnings rest on these


def test_pefts_magnitudes_are_the_lengths_of_the_rows(tiny_llama):
    theirs = peft_dora(tiny_llama(), ["up_proj"], 4, 8)
    layer = theirs.base_model.model.model.layers[0].mlp.up_proj
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert torch.equal(magnitude, layer.base_layer.weight.norm(dim=1))
    assert magnitude.shape != layer.base_layer.weight.norm(dim=0).shape


def test_pefts_dora_on_a_half_precision_base_is_no_exact_start(tiny_llama, batch):
    """PEFT rounds the magnitudes to the base's dtype and divides by lengths in float32: the gain is not 1."""
    base, half = tiny_llama().eval(), torch.bfloat16
    expected = logits(copy.deepcopy(base).to(half), batch)
    theirs = peft_dora(copy.deepcopy(base).to(half), "all-linear", 4, 8).eval()
    ours = inject_dora(copy.deepcopy(base).to(half), "all-linear", 4, 8).eval()
    assert not torch.equal(logits(theirs, batch), expected)
    assert torch.equal(logits(ours, batch), expected)


def test_pefts_cache_goes_stale_when_weights_are_loaded(tiny_llama, batch):
    from peft import set_peft_model_state_dict
    from peft.helpers import DoraCaching

    ours, theirs = pair(tiny_llama, "all-linear", 4, 8)
    theirs.eval()
    new = {name: 3 * tensor if "lora_B" in name else tensor for name, tensor in dora_state_dict(ours).items()}
    with DoraCaching():
        logits(theirs, batch)
        set_peft_model_state_dict(theirs, new)
        stale = logits(theirs, batch)
    right = logits(theirs, batch)
    assert (stale - right).abs().max() > 1e-2


def test_pefts_cache_holds_more_than_the_weights_and_stays(tiny_llama, batch):
    from peft.helpers import DoraCaching

    model = pair(tiny_llama, "all-linear", 4, 8)[1].eval()
    with DoraCaching():
        logits(model, batch)
    held = sum(
        tensor.numel() for module in model.modules() for tensor in getattr(module, "_dora_cache", {}).values()
    )
    assert held > sum(p.numel() for name, p in model.named_parameters() if "base_layer" in name)


def test_pefts_mixed_batch_raises_with_dora(tiny_llama, batch):
    from peft import LoraConfig

    model = pair(tiny_llama, QV, 4, 8)[1].eval()
    model.add_adapter("other", LoraConfig(r=4, target_modules=QV, use_dora=True))
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=batch["input_ids"], adapter_names=["default", "other", "default"])


def test_pefts_unmerge_divides_by_a_magnitude_of_zero(tiny_llama, batch):
    model = pair(tiny_llama, QV, 4, 8)[1].eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_magnitude_vector["default"].weight.data[0] = 0
    model.merge_adapter()
    model.unmerge_adapter()
    assert not layer.base_layer.weight.isfinite().all()


def test_pefts_layer_is_nan_where_a_row_is_zero(tiny_llama):
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.weight.data[3] = 0
    layer = peft_dora(model, QV, 4, 8).base_model.model.model.layers[0].self_attn.q_proj
    output = layer(torch.ones(1, 32))[0]
    assert output[3].isnan() and output.isnan().sum() == 1


def test_pefts_dora_on_an_8_bit_base_breaks_in_training_on_a_cpu(tiny_llama, batch):
    from bitsandbytes.nn import Linear8bitLt
    from peft import LoraConfig, get_peft_model

    def trained(dora):
        model = tiny_llama()
        for block in model.model.layers:
            old = block.self_attn.q_proj
            new = Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
            new.load_state_dict(old.state_dict())
            block.self_attn.q_proj = new.to("cpu")
        config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=dora, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        for _ in range(2):
            model(**batch).loss.backward()

    trained(False)
    with pytest.raises(AttributeError, match="unsqueeze"):
        trained(True)
