"""What a method costs, counted on a shipped base and on a 7B that has no weights."""

import pytest
import torch

from labs_lib.measure.count import count_flops, count_parameters, tensor_bytes
from labs_lib.models.base import load_base
from labs_lib.models.twins import random_like
from labs_lib.training.costs import ANSWER, PROMPT, costs, twin_costs
from labs_lib.training.sweeps import Arm

LORA = Arm("LoRA")


@pytest.fixture(scope="module")
def tiny():
    return load_base("tiny")[0]


def test_full_fine_tuning_keeps_two_states_and_changes_no_request(tiny):
    found = costs(Arm("full", "full"), "tiny", rows=2, length=8)
    assert found["params"] == count_parameters(tiny).total
    assert (
        0 <= found["state_bytes"] - 8 * found["params"] < 4 * 100
    )  # two fp32 numbers each, a counter per tensor
    assert found["peak_bytes"] > 4 * 4 * found["params"]  # weights, gradients, states
    ids = torch.zeros((2, 8), dtype=torch.long)
    forward = count_flops(tiny, input_ids=ids)
    assert found["train_flops"] == pytest.approx(
        3 * forward, rel=0.02
    )  # the first layer passes no gradient on
    assert found["request_flops"] == found["base_request_flops"]


def test_unmerged_lora_adds_its_two_products_per_token(tiny):
    found = costs(LORA, "tiny", rows=2, length=8)
    tokens = PROMPT + ANSWER - 1  # the last token written is not read
    assert found["request_flops"] - found["base_request_flops"] == 2 * tokens * found["params"]
    assert found["train_flops"] < costs(Arm("full", "full"), "tiny", rows=2, length=8)["train_flops"]


def test_a_prefix_costs_attention_only_and_a_prompt_a_whole_pass():
    cost = {
        method: costs(Arm(method, method, options={"tokens": 10}), "tiny", rows=2, length=8)
        for method in ("prefix", "prompt")
    }
    base = cost["prefix"]["base_request_flops"]
    assert base < cost["prefix"]["request_flops"] < cost["prompt"]["request_flops"]


def test_a_quantised_base_is_weighed_packed_and_its_flops_are_counted_unpacked():
    found = costs(Arm("q", "qlora", rank=2, quantise="nf4"), "small", rows=2, length=8)
    plain = costs(Arm("l", rank=2), "small", rows=2, length=8)
    flops = ("train_flops", "request_flops", "base_request_flops")
    assert [found[name] for name in flops] == [plain[name] for name in flops]
    assert found["state_bytes"] == plain["state_bytes"] and found["peak_bytes"] < plain["peak_bytes"]


def test_7b_is_counted_without_a_weight():
    twin = random_like("llama-2-7b")
    weights = tensor_bytes(twin)
    lora, full = twin_costs(LORA, twin, length=64), twin_costs(Arm("full", "full"), twin, length=64)
    assert lora["params"] == 19_988_480  # r8 on all linear layers, PEFT's number
    assert 8 * lora["params"] <= lora["state_bytes"] < 1.001 * 8 * lora["params"]
    assert weights < lora["peak_bytes"] < 1.5 * weights
    assert full["peak_bytes"] > 4 * weights  # bf16 weights, gradients and two states
    assert 1.4 < full["train_flops"] / lora["train_flops"] < 1.6
    assert count_parameters(twin).trainable == count_parameters(twin).total  # left as it was
