"""MODEL_ID may be a folder as the hub lays it out: each family loads, is adapted, is merged, and is weighed before."""

import pytest
import torch

from labs_lib.errors import LabsError
from labs_lib.methods.lora import inject_lora, lora_layers, merge_lora
from labs_lib.models import room
from labs_lib.models.base import base_folder, load_base

from .hub import FAMILIES, hub_folder


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return hub_folder(tmp_path_factory.mktemp("hub") / request.param, request.param)


def test_a_family_loads_from_shards_and_keeps_its_chat_template(folder):
    assert len(list(folder.glob("model-*.safetensors"))) > 1, "the weights are in several files"
    model, tokenizer = load_base(str(folder))
    assert tokenizer.padding_side == "left" and tokenizer.pad_token is not None
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert said == "user: hello\n"
    ids = tokenizer("Facts:", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.isfinite().all()


def test_our_lora_on_a_family_merges_and_equals_peft_s(folder):
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    from labs_lib.methods.lora import lora_state_dict

    ids = torch.arange(3, 20)[None]
    model = inject_lora(load_base(str(folder))[0], "all-linear", rank=4, alpha=8)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.1)
        ours = model(input_ids=ids).logits
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        theirs = get_peft_model(load_base(str(folder))[0], config)
        set_peft_model_state_dict(theirs, lora_state_dict(model))
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours, rtol=0, atol=1e-5)
        torch.testing.assert_close(merge_lora(model)(input_ids=ids).logits, ours, rtol=0, atol=1e-5)


def test_a_model_is_weighed_before_it_is_loaded(folder):
    model, _ = load_base(str(folder))
    exact = sum(parameter.nbytes for parameter in model.parameters())
    assert room.weight_bytes(folder, torch.float32) == exact
    assert room.weight_bytes(folder, torch.bfloat16) == exact // 2
    assert room.weight_bytes(folder, torch.bfloat16, "nf4") < exact // 2


def test_one_that_does_not_fit_is_refused_with_what_to_try(monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: 2**20)
    with pytest.raises(
        LabsError, match=r"needs .* GiB .* has 0.0 GiB free.*bfloat16 halves it; quantise='nf4'"
    ):
        load_base(str(base_folder("tiny")))
    load_base("tiny")  # the shipped family is small enough for anything


def test_a_quantised_model_weighs_what_is_counted(tmp_path):
    from labs_lib.measure.count import tensor_bytes

    packed, _ = load_base("small", quantise="nf4")
    counted = room.weight_bytes(base_folder("small"), torch.float32, "nf4")
    assert tensor_bytes(packed) == pytest.approx(counted, rel=0.03)  # and a kilobyte of codebooks per layer
