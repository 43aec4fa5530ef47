"""Adapters on disk: ours load in PEFT, PEFT's load in ours, bit for bit; a misfit says why."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from labs_lib.errors import LabsError
from labs_lib.methods.io import load_lora, read_adapter, save_lora
from labs_lib.methods.lora import inject_lora, lora_layers, lora_state_dict

from .parity import logits

TARGETS = [["q_proj", "v_proj"], "all-linear", ["layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"]]


def adapted(tiny_llama, targets=("q_proj", "v_proj"), rank=4, alpha=8, dropout=0.0):
    """A model whose adapter does something: every factor random."""
    model = inject_lora(tiny_llama(), targets, rank, alpha, dropout)
    torch.manual_seed(2)
    for tensor in lora_state_dict(model).values():
        tensor.normal_(std=0.2)
    return model.eval()


def peft_adapted(tiny_llama, **kwargs):
    from peft import LoraConfig, get_peft_model

    config = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        **kwargs,
    }
    model = get_peft_model(tiny_llama(), LoraConfig(**config))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_ours_loads_in_peft(tiny_llama, batch, tmp_path, targets):
    from peft import PeftModel, get_peft_model_state_dict

    ours = adapted(tiny_llama, targets)
    save_lora(ours, tmp_path)
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(ours, batch), logits(theirs, batch))
    loaded, saved = get_peft_model_state_dict(theirs), lora_state_dict(ours)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


@pytest.mark.parametrize("targets", [*TARGETS, r".*layers\.1.*_proj"], ids=str)
def test_pefts_loads_in_ours(tiny_llama, batch, tmp_path, targets):
    theirs = peft_adapted(tiny_llama, target_modules=targets, r=3, lora_alpha=7, lora_dropout=0.1)
    theirs.save_pretrained(tmp_path)
    ours = load_lora(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(ours, batch), logits(theirs, batch))
    assert {layer.dropout.p for layer in lora_layers(ours).values()} == {0.1}


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_there_and_back_gives_the_same_file(tiny_llama, tmp_path, targets):
    from peft import PeftModel

    save_lora(adapted(tiny_llama, targets), tmp_path / "ours")
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    save_lora(load_lora(tiny_llama(), tmp_path / "theirs"), tmp_path / "again")
    files = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ours", "theirs", "again")
    ]
    assert files[0] == files[1] == files[2]


def test_the_config_is_the_usual_one(tiny_llama, tmp_path):
    save_lora(adapted(tiny_llama, "all-linear", rank=4, alpha=8), tmp_path, base="data/base/small")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "data/base/small"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert config["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    ]  # fmt: skip


def test_target_names_are_spelt_out_when_the_short_ones_would_reach_further(tiny_llama, tmp_path):
    save_lora(adapted(tiny_llama, ["layers.1.self_attn.q_proj"]), tmp_path)
    config, _ = read_adapter(tmp_path)
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_a_file_is_four_bytes_per_parameter(tiny_llama, tmp_path):
    model = adapted(tiny_llama)
    save_lora(model, tmp_path)
    numbers = sum(tensor.numel() for tensor in lora_state_dict(model).values())
    assert 0 < (tmp_path / "adapter_model.safetensors").stat().st_size - 4 * numbers < 2000  # the header


def test_nothing_to_save(tiny_llama, tmp_path):
    with pytest.raises(LabsError, match="inject_lora"):
        save_lora(tiny_llama(), tmp_path)


def test_loading_continues_training(tiny_llama, batch, tmp_path):
    save_lora(adapted(tiny_llama), tmp_path)
    model = load_lora(tiny_llama(), tmp_path)
    model(**batch).loss.backward()
    assert all(layer.lora_A.grad is not None for layer in lora_layers(model).values())


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True, "alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
)
def test_more_than_plain_lora_is_refused_by_name(tiny_llama, tmp_path, settings, named):
    peft_adapted(tiny_llama, **settings).save_pretrained(tmp_path)
    model = tiny_llama()
    with pytest.raises(LabsError, match=named):
        load_lora(model, tmp_path)
    assert not lora_layers(model)


def test_another_method_is_refused_by_name(tiny_llama, tmp_path):
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    with pytest.raises(LabsError, match="IA3, not LORA"):
        load_lora(tiny_llama(), tmp_path)


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def half_config(folder):
    path = folder / "adapter_config.json"
    path.write_text(path.read_text()[:40])


def rewrite(change):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors, next(iter(sorted(tensors))))
        save_file(tensors, path)

    return damage


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            "adapter_model.safetensors is missing",
        ),
        (truncate, "damaged"),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
            "r or lora_alpha",
        ),
        (half_config, "damaged"),
        (rewrite(lambda tensors, key: tensors.pop(key)), "lora_A is missing"),
        (
            rewrite(lambda tensors, key: tensors.update({key: torch.ones(4, 5)})),
            r"is \(4, 5\), expected \(4, 32\)",
        ),
        (rewrite(lambda tensors, key: tensors.update({"stray": torch.ones(1)})), "holds stray"),
        (
            rewrite(lambda tensors, key: tensors.update({key.replace("q_proj", "a_proj"): tensors.pop(key)})),
            "base it was",
        ),
        (rewrite(lambda tensors, key: tensors.clear()), "no tensors"),
    ],
)
def test_a_damaged_adapter_says_what_is_wrong_and_leaves_the_model_alone(tiny_llama, tmp_path, damage, says):
    save_lora(adapted(tiny_llama), tmp_path)
    damage(tmp_path)
    model = tiny_llama()
    with pytest.raises(LabsError, match=says):
        load_lora(model, tmp_path)
    assert not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_loading_onto_an_adapted_model_is_an_error(tiny_llama, tmp_path):
    save_lora(adapted(tiny_llama), tmp_path)
    with pytest.raises(LabsError):
        load_lora(adapted(tiny_llama), tmp_path)
