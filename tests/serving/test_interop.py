"""The interop matrix: what it says of PEFT's mixed batches PEFT does when run, what it says of us we do."""

import copy
import dataclasses
import json
import re
import warnings

import peft
import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, get_peft_model

from labs_lib.serving import interop
from labs_lib.serving.adapter import preflight
from labs_lib.serving.interop_rules import (
    ACCEPTED,
    ENGINES,
    LORAX,
    MIXED_RAISES,
    MIXED_RIGHT,
    MIXED_WRONG,
    OURS,
    PEFT,
    PROMPTS,
    REFUSED,
    RULES,
    SGLANG,
    UNKNOWN,
    VLLM,
    WRONG,
)
from labs_lib.serving.types import Refused

IDS = torch.randint(6, 61, (3, 7), generator=torch.Generator().manual_seed(1))
IDS[:, 3] = 5


@pytest.fixture(scope="module")
def plain():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def lora(**settings):
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
        | settings
    )


def other(kind: str):
    """A small config of another PEFT type; skips if this PEFT does not have it."""
    classes = {key.value: value for key, value in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in classes:
        pytest.skip(f"{kind} is not in peft {peft.__version__}")
    special = {
        "ADALORA": {"total_step": 10, "inference_mode": True},
        "C3A": {"block_size": 8},
        "FOURIERFT": {"n_frequency": 20},
        "IA3": {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "MISS": {"r": 4},
        "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
        "OFT": {"r": 4, "oft_block_size": 0},
        "RANDLORA": {"r": 4},
        "ROAD": {"group_size": 8},
        "SHIRA": {"r": 4},
        "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5]},
        "VBLORA": {"vector_length": 8, "num_vectors": 16},
        "WAVEFT": {"n_frequency": 20},
    }
    names = {field.name for field in dataclasses.fields(classes[kind])}
    common = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "num_virtual_tokens": 4}
    return classes[kind](
        **{key: value for key, value in common.items() if key in names} | special.get(kind, {})
    )


def randomise(model, seed: int, old: frozenset[str] = frozenset()) -> frozenset[str]:
    """Random values for what trains and is not in `old`; returns the names of all parameters."""
    torch.manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.requires_grad and name not in old:
            torch.nn.init.normal_(parameter, std=0.3)
    return frozenset(parameters)


@torch.no_grad()
def mixed(plain, make, generate: bool = False) -> list[bool]:
    """Rows [adapter a, adapter b, base] in one batch with adapter_names: which rows are right.

    The truth of a row is the model with that adapter alone, or the base as it was.
    """
    warnings.simplefilter("ignore")
    task = (
        {"task_ids": torch.tensor([0])}
        if make().peft_type.value in ("POLY", "MULTITASK_PROMPT_TUNING")
        else {}
    )
    truth = []
    for seed in (1, 2):
        alone = get_peft_model(copy.deepcopy(plain), make())
        if make().peft_type.value == "ADALORA":
            alone.set_requires_grad("default")
        randomise(alone, seed)
        truth.append(alone.eval()(input_ids=IDS[seed - 1 : seed], **task).logits[0, -7:])
    truth.append(plain(input_ids=IDS).logits[2])
    assert all((truth[i] - plain(input_ids=IDS).logits[i]).abs().max() > 0.01 for i in range(2))

    model = get_peft_model(copy.deepcopy(plain), make(), adapter_name="a")
    old = randomise(model, 1)
    model.add_adapter("b", make())
    model.set_adapter("b")
    randomise(model, 2, old)
    model.set_adapter("a")
    model.eval()
    names = ["a", "b", "__base__"]
    if generate:
        model.generate(input_ids=IDS, adapter_names=names, max_new_tokens=1)
    tasks = {key: value.repeat(3) for key, value in task.items()}
    out = model(input_ids=IDS, adapter_names=names, **tasks).logits[:, -7:]
    return [bool((out[i] - truth[i]).abs().max() < 1e-4) for i in range(3)]


# --- PEFT, run for real

LORA_RIGHT = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "one layer": {"layers_to_transform": [1]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "lora_bias": {"lora_bias": True},
    "tokens": {"trainable_token_indices": [5]},
    "alora": {"alora_invocation_tokens": [5]},
    "velora": {"velora_config": {"num_groups": 4}},
    "bdlora": {
        "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"]}
    },
    "monteclora": {"monteclora_config": {"num_samples": 4}},
}
LORA_WRONG = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": {"beta": 0.1}},
    "replication": {"layer_replication": [[0, 2], [1, 2]]},
}
LORA_RAISES = {
    "dora": ({"use_dora": True}, "DoRA is enabled"),
    "bias": ({"bias": "all"}, "only 1 adapter with bias"),
    "parameters": ({"target_parameters": ["mlp.up_proj.weight"]}, "does not support mixed"),
}


def known_to_peft(settings: dict) -> dict:
    if missing := settings.keys() - {field.name for field in dataclasses.fields(LoraConfig)}:
        pytest.skip(f"{missing} is not in peft {peft.__version__}")
    return settings


@pytest.mark.parametrize("name", LORA_RIGHT)
def test_lora_settings_that_peft_mixes_right(plain, name):
    settings = known_to_peft(LORA_RIGHT[name])
    assert mixed(plain, lambda: lora(**settings)) == [True, True, True]
    assert interop.judge({"peft_type": "LORA", "r": 4, "lora_alpha": 4, **settings}, PEFT).outcome == ACCEPTED


@pytest.mark.parametrize("name", LORA_WRONG)
def test_lora_settings_that_peft_mixes_wrong(plain, name):
    settings = known_to_peft(LORA_WRONG[name])
    assert not all(mixed(plain, lambda: lora(**settings)))
    assert interop.judge({"peft_type": "LORA", "r": 4, "lora_alpha": 4, **settings}, PEFT).outcome == WRONG


@pytest.mark.parametrize("name", LORA_RAISES)
def test_lora_settings_that_peft_refuses_to_mix(plain, name):
    settings, words = LORA_RAISES[name]
    with pytest.raises(ValueError, match=words):
        mixed(plain, lambda: lora(**known_to_peft(settings)))
    assert interop.judge({"peft_type": "LORA", "r": 4, "lora_alpha": 4, **settings}, PEFT).outcome == REFUSED


OFTEN = ["IA3", "VERA", "LOHA", "LOKR", "OFT", "MISS", "RANDLORA", "SHIRA", "PROMPT_TUNING", "PREFIX_TUNING"]
SELDOM = [
    pytest.param(kind, marks=pytest.mark.slow) for kind in (*MIXED_WRONG, *PROMPTS) if kind not in OFTEN
]


@pytest.mark.parametrize("kind", [*OFTEN, *SELDOM])
def test_types_that_peft_mixes_wrong_without_a_word(plain, kind):
    right = mixed(plain, lambda: other(kind))
    assert right[1:] == [False, False]  # the second adapter's row and the base's
    assert interop.judge({"peft_type": kind}, PEFT).outcome == WRONG


@pytest.mark.parametrize("kind", [kind for kind in MIXED_RIGHT if kind != "LORA"])
def test_types_that_peft_mixes_right(plain, kind):
    assert mixed(plain, lambda: other(kind)) == [True, True, True]
    assert interop.judge({"peft_type": kind}, PEFT).outcome == ACCEPTED


@pytest.mark.parametrize("kind", MIXED_RAISES)
def test_types_that_peft_refuses_to_mix(plain, kind):
    with pytest.raises(TypeError, match="adapter_names"):
        mixed(plain, lambda: other(kind))
    assert interop.judge({"peft_type": kind}, PEFT).outcome == REFUSED


def test_prompt_tuning_raises_in_generate(plain):
    with pytest.raises(ValueError, match="adapter_names"):
        mixed(plain, lambda: other("PROMPT_TUNING"), generate=True)


def test_every_type_of_peft_is_judged():
    """A type that was not tried, or that a new PEFT adds, is unknown and not guessed."""
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        outcome = interop.judge({"peft_type": kind.value}, PEFT).outcome
        tried = kind.value in (*MIXED_RIGHT, *MIXED_WRONG, *MIXED_RAISES, *PROMPTS)
        assert (outcome != UNKNOWN) == tried, kind


# --- this engine


@pytest.mark.parametrize("name", [*LORA_RIGHT, "dora"])
def test_ours_is_what_preflight_says(plain, tmp_path, name):
    settings = known_to_peft(LORA_RIGHT.get(name) or LORA_RAISES.get(name, ({},))[0])
    model = get_peft_model(copy.deepcopy(plain), lora(**settings))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    try:
        preflight(tmp_path)
        expected = ACCEPTED
    except Refused:
        expected = REFUSED
    assert interop.judge(config, OURS).outcome == expected
    assert (expected == ACCEPTED) == (name in ("plain", "rslora", "patterns", "one layer", "dora"))


def test_names_of_tensors_count():
    config = interop.examples()["plain LoRA"]
    layer = "base_model.model.model.layers.{}.self_attn.{}.lora_A.weight"
    even = [layer.format(i, name) for i in range(2) for name in ("q_proj", "v_proj")]
    assert interop.judge(config, OURS, even).outcome == ACCEPTED
    assert interop.judge(config, LORAX, even).outcome == ACCEPTED
    assert interop.judge(config, LORAX, even[:3]).outcome == WRONG  # one v_proj is not adapted
    head = ["base_model.model.lm_head.lora_A.weight"]
    assert interop.judge(config, OURS, head).outcome == REFUSED


# --- the matrix


def test_the_matrix_of_the_examples():
    outcomes = {
        row.name: [row[engine].outcome for engine in ENGINES] for row in interop.matrix(interop.examples())
    }
    assert outcomes["plain LoRA"] == [ACCEPTED] * 5
    assert outcomes["rsLoRA"] == [ACCEPTED, ACCEPTED, ACCEPTED, WRONG, ACCEPTED]
    assert outcomes["alpha_pattern"] == [ACCEPTED, ACCEPTED, WRONG, WRONG, WRONG]
    assert outcomes["DoRA"] == [ACCEPTED, REFUSED, REFUSED, REFUSED, WRONG]
    assert outcomes["PiSSA, not converted"] == [REFUSED, WRONG, WRONG, WRONG, WRONG]
    assert outcomes["IA3"] == [REFUSED, WRONG, REFUSED, REFUSED, REFUSED]
    assert all(outcomes[name][0] != WRONG for name in outcomes)  # ours is never silently wrong


@pytest.mark.parametrize("engine", [PEFT, VLLM, SGLANG, LORAX])
def test_a_setting_that_nobody_checked_is_unknown(engine):
    config = interop.examples()["plain LoRA"] | {"use_new_thing": True}
    verdict = interop.judge(config, engine)
    assert verdict.outcome == UNKNOWN and "use_new_thing" in verdict.reason


def test_patterns_that_change_nothing_are_plain():
    config = interop.examples()["plain LoRA"]
    same = config | {
        "rank_pattern": {"q_proj": config["r"]},
        "alpha_pattern": {},
        "modules_to_save": None,
        "bias": "none",
    }
    assert [interop.judge(same, engine).outcome for engine in ENGINES] == [ACCEPTED] * 5


def test_every_fact_has_a_source():
    for engine, rules in RULES.items():
        for rule in rules:
            verdict = rule.verdict
            assert verdict.reason.endswith((".", ")")) and rule.keys, engine
            if verdict.outcome == UNKNOWN:
                continue
            assert verdict.known in ("run", "read", "reported"), verdict
            assert (verdict.known == "run") == verdict.source.startswith("tests/serving/test_interop.py")
            assert verdict.known == "run" or re.match(
                r"https://github\.com/[\w-]+/[\w-]+/(blob|issues|pull)/", verdict.source
            )


def test_the_table_in_text_and_in_html():
    matrix = interop.matrix({"a <b> & c": interop.examples()["DoRA"]})
    lines = str(matrix).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert lines[2].startswith("| a <b> & c | accepted ")
    page = matrix._repr_html_()
    assert "a &lt;b&gt; &amp; c" in page and page.count("<td") == 6 and "silently wrong" in page
    assert "a <b> & c, vLLM: refused." in matrix.reasons()
    assert "this engine" not in matrix.reasons() and "this engine: accepted" in matrix.reasons(ACCEPTED)
