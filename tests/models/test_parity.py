"""The side-by-side that notebooks show: zero where the two agree, and not zero where they do not."""

import pytest
import torch

from labs_lib.methods.lora import inject_lora, lora_layers, lora_state_dict
from labs_lib.models.parity import lora_differences, peft_twin


@pytest.fixture
def ours():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = inject_lora(LlamaForCausalLM(config), ["q_proj", "down_proj"], rank=2, alpha=4)
    for tensor in lora_state_dict(model).values():
        tensor.normal_(std=0.2)
    return model


@pytest.fixture
def batch():
    tokens = torch.arange(20).view(2, 10)
    return {"input_ids": tokens, "labels": tokens}


def test_equal_everywhere_and_both_left_as_they_were(ours, batch):
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    differences = lora_differences(ours, peft_twin(ours), batch)
    assert differences == {"logits": 0.0, "gradient of A": 0.0, "gradient of B": 0.0, "merged weight": 0.0}
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_a_wrong_scale_shows_everywhere(ours, batch):
    twin = peft_twin(ours)
    for layer in lora_layers(ours).values():
        layer.alpha *= layer.rank  # alpha without 1/r
    assert min(lora_differences(ours, twin, batch).values()) > 1e-4
