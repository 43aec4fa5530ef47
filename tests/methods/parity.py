"""What every comparison of a method with PEFT needs: the numbers of two models, and whether they are the same."""

import torch

from labs_lib.methods.lora import target_names
from labs_lib.methods.modules import replace


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_close(ours, theirs, atol=1e-6):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=atol, msg=name)


@torch.no_grad()
def logits(model, batch):
    return model(input_ids=batch["input_ids"]).logits


def quantised(model):
    """The model with its attention and MLP weights in NF4, as load_base(quantise="nf4") has them."""
    from bitsandbytes.nn import Linear4bit

    for name in target_names(model, "all-linear"):
        old = model.get_submodule(name)
        new = Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
        new.load_state_dict(old.state_dict())
        replace(model, name, new.to("cpu"))  # .to() is what quantises
    model.is_loaded_in_4bit = True
    return model
