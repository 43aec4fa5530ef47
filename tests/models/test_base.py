"""load_base: the shipped family, a local folder, a hub id that cannot be reached, quantised weights, clear errors."""

import json
import shutil

import pytest
import torch

from labs_lib.errors import LabsError
from labs_lib.models.base import LAYERS, SIZES, base_folder, load_base
from labs_lib.paths import data

SHIPPED = [size for size in SIZES if (base_folder(size) / "model.safetensors").is_file()]


@pytest.mark.parametrize("size", SHIPPED)
def test_the_family_loads_and_is_what_its_card_says(size):
    model, tokenizer = load_base(size)
    assert model.config.hidden_size == SIZES[size] and model.config.num_hidden_layers == LAYERS
    assert not model.training and model.dtype == torch.float32
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == "<pad>"
    log = json.loads((base_folder(size) / "training_log.json").read_text())
    assert model.num_parameters() == log["parameters"]


def test_one_tokenizer_serves_every_size():
    contents = {(base_folder(size) / "tokenizer.json").read_bytes() for size in SHIPPED}
    assert len(contents) == 1


def test_the_family_stays_under_forty_megabytes():
    total = sum(path.stat().st_size for path in (data() / "base").rglob("*") if path.is_file())
    assert total < 40e6


def test_digits_are_tokens_of_their_own_and_any_text_survives():
    tokenizer = load_base("tiny")[1]
    ids = tokenizer("49.95 USD", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode(i) for i in ids][:5] == ["4", "9", ".", "9", "5"]
    for text in ("Zürich für 3 €", "a\n\n- b\t", "日本"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_folder_in_hub_layout_loads(tmp_path):
    shutil.copytree(base_folder("tiny"), tmp_path / "copy")
    model, _ = load_base(str(tmp_path / "copy"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_unknown_names_say_what_exists():
    with pytest.raises(LabsError, match="tiny, small, medium, large, xlarge, a folder, or a hub id"):
        load_base("smal")
    if "large" not in SHIPPED:
        with pytest.raises(LabsError, match="labs pretrain large"):
            load_base("large")
    with pytest.raises(LabsError, match="None, 'nf4' or 'int8'"):
        load_base("tiny", quantise="int3")


def test_an_unreachable_hub_model_falls_back_and_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.warns(UserWarning, match="could not be fetched.*going on with the shipped base 'small'"):
        model, _ = load_base("nobody/no-such-model")
    assert model.config.hidden_size == SIZES["small"]


def test_changed_weights_are_refused(tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(data(), home / "data", ignore=shutil.ignore_patterns("medium", "large", "measured"))
    weights = home / "data/base/tiny/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    monkeypatch.setenv("LABS_HOME", str(home))
    from labs_lib.world import build

    build._checksums.cache_clear()
    with pytest.raises(LabsError, match=r"data/base/tiny/model.safetensors is not the file.*git checkout"):
        load_base("tiny")
    monkeypatch.undo()
    build._checksums.cache_clear()


def test_four_bit_loading_is_four_bit():
    full, tokenizer = load_base("tiny")
    packed, _ = load_base("tiny", quantise="nf4")
    weight = packed.model.layers[0].mlp.up_proj.weight
    assert (
        weight.dtype == torch.uint8 and weight.numel() * 2 == full.model.layers[0].mlp.up_proj.weight.numel()
    )
    ids = tokenizer("Facts: Alder Arc kettle", return_tensors="pt")["input_ids"]
    assert torch.isfinite(packed(ids).logits).all()


def test_a_fresh_base_has_the_shape_and_nothing_of_the_training():
    from labs_lib.models.base import fresh_base

    trained, fresh, other = load_base("tiny")[0], fresh_base("tiny", 1), fresh_base("tiny", 2)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (trained, fresh)]
    assert shapes[0] == shapes[1] and not fresh.training
    weights = [
        model.model.layers[0].mlp.up_proj.weight for model in (trained, fresh, other, fresh_base("tiny", 1))
    ]
    assert torch.equal(weights[1], weights[3])
    assert not torch.allclose(weights[0], weights[1]) and not torch.allclose(weights[1], weights[2])
