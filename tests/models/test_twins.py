"""Twins have exactly the published sizes; PEFT's counts on the Llama-2-7B twin are the reference numbers."""

import pytest
import torch

from labs_lib.errors import LabsError
from labs_lib.methods.lora import inject_lora, trainable_parameters
from labs_lib.models.twins import TWINS, peft_parameter_count, random_like

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def llama():
    return random_like("llama-2-7b")


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_has_as_many_parameters_as_the_published_weights(name):
    twin = random_like(name)
    assert sum(parameter.numel() for parameter in twin.parameters()) == TWINS[name]["parameters"]
    assert {parameter.device.type for parameter in twin.parameters()} == {"meta"}


def lora(**kwargs):
    from peft import LoraConfig

    return LoraConfig(r=16, task_type="CAUSAL_LM", **kwargs)


def ia3():
    from peft import IA3Config

    return IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )


def prefix(projection):
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        num_virtual_tokens=30, prefix_projection=projection, encoder_hidden_size=1024, task_type="CAUSAL_LM"
    )


def prompt():
    from peft import PromptTuningConfig

    return PromptTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    "config, expected",
    [
        (lambda: lora(target_modules=["q_proj", "v_proj"]), 8_388_608),
        (lambda: lora(target_modules=ATTENTION), 16_777_216),
        (lambda: lora(target_modules="all-linear"), 39_976_960),
        (lambda: lora(target_modules="all-linear", use_dora=True), 41_336_832),
        (lambda: prefix(projection=True), 273_015_808),
        (lambda: prefix(projection=False), 7_864_320),
        (ia3, 614_400),
        (prompt, 40_960),
    ],
    ids=[
        "lora q,v",
        "lora attention",
        "lora all-linear",
        "dora",
        "prefix projected",
        "prefix",
        "ia3",
        "prompt",
    ],
)
def test_peft_counts_on_llama_2_7b(llama, config, expected):
    assert peft_parameter_count(llama, config()) == expected


def test_counting_leaves_model_and_config_alone(llama):
    config = lora(target_modules="all-linear")
    names = [name for name, _ in llama.named_modules()]
    peft_parameter_count(llama, config)
    assert config.target_modules == "all-linear"
    assert [name for name, _ in llama.named_modules()] == names
    assert all(parameter.requires_grad for parameter in llama.parameters())


@pytest.mark.parametrize(
    "targets, expected",
    [(["q_proj", "v_proj"], 8_388_608), (ATTENTION, 16_777_216), ("all-linear", 39_976_960)],
)
def test_our_own_lora_counts_the_same(targets, expected):
    twin = inject_lora(random_like("llama-2-7b"), targets, rank=16, alpha=32)
    assert sum(parameter.numel() for parameter in trainable_parameters(twin)) == expected


def test_ia3_on_llama_3_8b():
    assert peft_parameter_count(random_like("llama-3-8b"), ia3()) == 524_288


def test_random_weights_on_a_real_device_are_finite_and_run():
    twin = random_like("smollm2-135m", device="cpu", dtype=torch.float32)
    assert not twin.training
    assert twin.dtype == torch.float32
    with torch.no_grad():
        logits = twin(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 49152)
    assert torch.isfinite(logits).all()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(LabsError, match="llama-2-7b, llama-2-13b"):
        random_like("llama-2-8b")
