"""Our LoRA and PEFT's side by side: the same weights in both, and how far apart what comes out of them is."""

import copy
from typing import TYPE_CHECKING

from torch import nn

from labs_lib.methods.lora import lora_layers, lora_state_dict, remove_lora

if TYPE_CHECKING:
    from peft import PeftModel


def peft_twin(model: nn.Module) -> "PeftModel":
    """PEFT's version of a model that carries our LoRA layers: a copy of the base, the same targets, A and B.

    All layers must share rank and alpha. Memory: one more copy of the base.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    layers = lora_layers(model)
    first = next(iter(layers.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=getattr(getattr(first, "dropout", None), "p", 0.0),
        target_modules=list(layers),
        task_type="CAUSAL_LM",
    )
    twin = get_peft_model(remove_lora(copy.deepcopy(model)), config)
    set_peft_model_state_dict(twin, lora_state_dict(model))
    return twin.train(model.training)


def lora_differences(model: nn.Module, twin: "PeftModel", batch: dict) -> dict[str, float]:
    """Largest absolute differences between our model and PEFT's on one batch with labels; 0.0 is bit for bit.

    Compares logits, the gradients of A and B, and merged weights (made on copies). Clears both models'
    gradients.
    """
    names = list(lora_layers(model))
    pairs = [(model.get_submodule(name), twin.base_model.model.get_submodule(name)) for name in names]
    outputs = [each(**batch) for each in (model, twin)]
    differences = {"logits": _largest([tuple(output.logits for output in outputs)])}
    for each, output in zip((model, twin), outputs, strict=True):
        each.zero_grad()
        output.loss.backward()
    for factor in ("lora_A", "lora_B"):
        differences[f"gradient of {factor[-1]}"] = _largest(
            [
                (getattr(ours, factor).grad, getattr(theirs, factor).default.weight.grad)
                for ours, theirs in pairs
            ]
        )
    for each in (model, twin):
        each.zero_grad()
    differences["merged weight"] = _largest(
        [(_merged(ours).base.weight, _merged(theirs).base_layer.weight) for ours, theirs in pairs]
    )
    return differences


def _merged(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    layer.merge()
    return layer


def _largest(pairs: list[tuple]) -> float:
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)
