"""The memory formulas against real tensors: an optimizer's state, a cache's keys and values, a 7B model's shapes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from labs_lib.measure.budget import cache_bytes, training_bytes
from labs_lib.measure.count import count_parameters, held_bytes, tensor_bytes
from labs_lib.models.twins import random_like


def grouped(**changes):
    """A small Llama whose six heads share two keys and values."""
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 50}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, **changes)
    return LlamaForCausalLM(config)


def step(model, optimizer):
    tokens = torch.randint(50, (2, 7))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_training_holds_what_the_formula_says(dtype):
    model = grouped().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    held, width = held_bytes(model, optimizer), dtype.itemsize
    formula = training_bytes(count_parameters(model).total, weight=width, state=width)
    counters = 4 * len(list(model.parameters()))
    assert (held.parameters, held.gradients) == (formula.parameters, formula.gradients)
    assert held.optimizer - formula.optimizer == counters


def test_states_can_be_wider_than_weights():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = grouped().to(torch.bfloat16)
    optimizer = bitsandbytes.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    held = held_bytes(model, optimizer)
    assert held.optimizer == training_bytes(count_parameters(model).total, weight=2, state=4).optimizer
    assert held.optimizer == 4 * held.parameters


def test_frozen_weights_are_held_but_neither_their_gradients_nor_states():
    model = grouped().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step(model, optimizer)
    held, counted = held_bytes(model, optimizer), count_parameters(model)
    formula = training_bytes(counted.trainable, frozen=counted.frozen)
    assert (held.parameters, held.gradients) == (formula.parameters, formula.gradients)
    assert held.optimizer - formula.optimizer == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_grouped_heads_is_as_large_as_the_formula_says(dtype):
    model = grouped().to(dtype).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.randint(50, (1, 9)), use_cache=True).past_key_values
    kept = tensor_bytes([(layer.keys, layer.values) for layer in cache.layers])
    assert kept == cache_bytes(9, model.config, dtype.itemsize) == 2 * 9 * 3 * 2 * 8 * dtype.itemsize


def test_a_7b_model_by_hand():
    twin = random_like("llama-2-7b")
    n = count_parameters(twin).total
    assert n == 6_738_415_616
    assert training_bytes(n).optimizer == 53_907_324_928  # where the chapter says 42 GB
    assert training_bytes(n).total == 16 * n
    assert cache_bytes(1, twin.config) == 524_288
    assert cache_bytes(1, random_like("llama-3-8b").config) == 131_072  # eight key-value heads of 32
