"""Counts against arithmetic done by hand, and against each other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labs_lib.measure import count_flops, count_parameters, held_bytes, optimizer_state_bytes, tensor_bytes


def mlp(bias=False, device=None):
    return nn.Sequential(
        nn.Linear(32, 64, bias=bias, device=device), nn.ReLU(), nn.Linear(64, 32, bias=bias, device=device)
    )


# ---- parameters


def test_parameters_total_and_trainable():
    model = mlp(bias=True)
    model[0].weight.requires_grad_(False)
    counted = count_parameters(model)
    assert counted.total == 32 * 64 * 2 + 64 + 32
    assert counted.trainable == counted.total - 32 * 64
    assert counted.percent == pytest.approx(100 * counted.trainable / counted.total)
    assert counted.percent_of_base == pytest.approx(100 * counted.trainable / (32 * 64))
    assert "trainable of 4,192 parameters" in str(counted)


def test_tied_weights_count_once():
    model = mlp()
    model[2].weight = nn.Parameter(torch.zeros(64, 32))
    model[0].weight = model[2].weight
    assert count_parameters(model).total == 64 * 32
    assert tensor_bytes(model) == 64 * 32 * 4


def test_a_model_on_the_meta_device_counts_like_a_real_one():
    assert count_parameters(mlp(device="meta")) == count_parameters(mlp())
    assert tensor_bytes(mlp(device="meta")) == tensor_bytes(mlp())


def test_lora_on_a_7b_model_counted_as_peft_prints_it():
    """The chapter's configuration: 39,976,960 parameters, 0.593 % of the base, 0.590 % of the sum."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008))
        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(base, LoraConfig(r=16, target_modules=linear), low_cpu_mem_usage=True)
    counted = count_parameters(model)
    assert counted.frozen == 6_738_415_616
    assert counted.trainable == 39_976_960
    assert (counted.trainable, counted.total) == model.get_nb_trainable_parameters()
    assert counted.percent_of_base == pytest.approx(0.593, abs=5e-4)


def test_four_bit_weights_count_unpacked():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compress_statistics=False)
    layer.weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, compress_statistics=False)
    layer = layer.to("cpu")
    assert layer.weight.numel() == 64 * 64 // 2
    assert count_parameters(layer).total == 64 * 64
    scales, codebook = 64 * 64 // 64 * 4, 16 * 4
    assert tensor_bytes(layer) == 64 * 64 // 2 + scales + codebook


# ---- bytes


def test_a_view_counts_the_storage_it_keeps_alive():
    whole = torch.zeros(100, 100)
    assert tensor_bytes(whole[:2]) == tensor_bytes(whole) == tensor_bytes(whole, whole.t()) == 40_000
    assert tensor_bytes(whole[:2].clone()) == 800


def test_bytes_are_found_in_containers_and_objects():
    class Holder:
        def __init__(self):
            self.inside = [torch.zeros(10), {"deep": (torch.zeros(20), "text", None)}]
            self.self = self

    assert tensor_bytes(Holder()) == 120
    assert tensor_bytes({"a": [torch.zeros(i) for i in range(1, 5)]}) == 40
    assert tensor_bytes() == tensor_bytes(None, 3, "text") == 0


@pytest.mark.parametrize("foreach", [True, False])
def test_adam_state_measured_is_state_computed(foreach):
    model = mlp(bias=True)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    assert optimizer_state_bytes(optimizer) == 0, "no state before the first step"
    model(torch.randn(2, 32)).sum().backward()
    optimizer.step()
    counters = 4 * 4  # a float32 step per tensor
    assert optimizer_state_bytes(optimizer) - counters == optimizer_state_bytes(model) == 2 * 4 * 4192


def test_states_of_7b_by_arithmetic():
    """The chapter's 42 GB are 53.9."""
    assert optimizer_state_bytes(6_738_415_616) / 1e9 == pytest.approx(53.9, abs=0.01)
    assert optimizer_state_bytes(6_738_415_616, dtype=torch.bfloat16) / 1e9 == pytest.approx(26.95, abs=0.01)
    assert optimizer_state_bytes(1000, states=1) == 4000


def test_only_trainable_parameters_have_states():
    model = mlp()
    model[0].weight.requires_grad_(False)
    assert optimizer_state_bytes(model) == 2 * 4 * 2048


def test_eight_bit_states():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Linear(128, 128, bias=False)
    optimizer = bnb.optim.AdamW8bit(model.parameters())
    model(torch.randn(2, 128)).sum().backward()
    optimizer.step()
    blocks, codebooks = 128 * 128 // 256, 2
    assert optimizer_state_bytes(optimizer) == 2 * 128 * 128 + 2 * blocks * 4 + codebooks * 256 * 4


def test_galore_state_shows_what_its_projector_keeps_alive():
    """In float32 galore_torch keeps a slice of the full singular vectors, and with it all of them."""
    galore = pytest.importorskip("galore_torch")
    model = nn.Linear(128, 128, bias=False)
    group = {
        "params": list(model.parameters()),
        "rank": 8,
        "update_proj_gap": 200,
        "scale": 1.0,
        "proj_type": "std",
    }
    with pytest.warns(FutureWarning):
        optimizer = galore.GaLoreAdamW([group])
    model(torch.randn(2, 128)).square().sum().backward()
    optimizer.step()
    moments, sliced, whole = 2 * 8 * 128 * 4, 8 * 128 * 4, 128 * 128 * 4
    assert optimizer_state_bytes(optimizer) in (moments + whole, moments + sliced)


def test_held_bytes():
    model = nn.Sequential(mlp(), nn.BatchNorm1d(32))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    weights = (32 * 64 * 2 + 64) * 4
    before = held_bytes(model, optimizer)
    assert (before.parameters, before.gradients, before.optimizer) == (weights, 0, 0)
    assert before.buffers == 2 * 32 * 4 + 8
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    after = held_bytes(model, optimizer)
    assert (after.gradients, after.optimizer) == (weights, weights)
    assert after.total == 3 * weights + after.buffers


# ---- FLOPs


def test_flops_of_linear_layers():
    model, x = mlp(), torch.randn(8, 32)
    forward = 2 * 8 * 32 * 64 * 2
    assert count_flops(model, x) == forward
    # backward: gradients of both weights, and of the hidden layer; the input needs none
    assert count_flops(lambda: model(x).sum().backward()) == forward + forward + forward // 2
    with torch.no_grad():
        assert count_flops(model, x) == forward


@pytest.mark.parametrize("backend", ["math", "fused"])
def test_attention_is_not_free_on_the_cpu(backend):
    """PyTorch's own counter misses the fused attention of the CPU."""
    q = torch.randn(2, 4, 16, 8, requires_grad=True)
    kind = getattr(torch.nn.attention.SDPBackend, "MATH" if backend == "math" else "FLASH_ATTENTION")

    def attend(backward):
        with torch.nn.attention.sdpa_kernel(kind):
            out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
            if backward:
                out.sum().backward()

    product = 2 * 2 * 4 * 16 * 16 * 8
    assert count_flops(attend, False) == 2 * product
    # the fused backward computes the scores again
    assert count_flops(attend, True) == (6 if backend == "math" else 7) * product


def test_grouped_heads_count_like_as_many_of_their_own():
    q, few = torch.randn(2, 4, 16, 8, requires_grad=True), torch.randn(2, 2, 16, 8, requires_grad=True)

    def attend(keys, grouped):
        F.scaled_dot_product_attention(q, keys, keys, is_causal=True, enable_gqa=grouped).sum().backward()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert count_flops(attend, few, True) == count_flops(attend, q, False)


def test_dropout_costs_dora_a_second_product():
    """What lab 04 measures: PEFT's DoRA takes a slow path as soon as there is dropout."""
    from peft import LoraConfig, get_peft_model

    def flops(**config):
        model = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["0", "2"], **config)).train()
        x = torch.randn(64, 32)
        return count_flops(lambda: model(x).sum().backward())

    assert flops(use_dora=True, lora_dropout=0.05) / flops(lora_dropout=0.05) > 1.3
    assert flops(use_dora=True) / flops() < flops(use_dora=True, lora_dropout=0.05) / flops(lora_dropout=0.05)
