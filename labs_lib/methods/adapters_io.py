"""Bottleneck adapters, LLaMA-Adapter and (IA)3 on disk; the last two in PEFT's format, which both sides read.

PEFT has no bottleneck adapters: their folder has the same two files, of a kind that PEFT refuses by name.
"""

from pathlib import Path

import torch
from torch import nn

from labs_lib.errors import LabsError
from labs_lib.methods.adapters import (
    ACTIVATIONS,
    PLACEMENTS,
    BottleneckAdapter,
    adapted_sublayers,
    adapter_state_dict,
    inject_adapters,
    sublayer_names,
)
from labs_lib.methods.ia3 import IA3Linear, ia3_layers, ia3_state_dict, inject_ia3
from labs_lib.methods.io import PREFIX, read_folder, short_names, write_folder
from labs_lib.methods.llama_adapter import (
    attention_layers,
    inject_llama_adapter,
    llama_adapter_state_dict,
    prompted_layers,
)


def save_ia3(model: nn.Module, directory: str | Path, base: str | None = None) -> Path:
    """Write the model's (IA)3 vectors as a PEFT adapter; returns the folder. `base` as in io.save_lora."""
    layers = ia3_layers(model)
    if not layers:
        raise LabsError(
            "This model carries no (IA)3 layers, so there is nothing to save: call inject_ia3 first."
        )
    inputs = [name for name, layer in layers.items() if layer.feedforward]
    targets, feedforward = (
        short_names(model, list(layers)),
        sorted({name.rpartition(".")[2] for name in inputs}),
    )
    meant = [name for name in layers if name.endswith(tuple(feedforward))]
    if sorted(meant) != sorted(inputs) or not set(feedforward) <= set(targets):
        targets, feedforward = sorted(layers), sorted(inputs)  # PEFT compares the two lists word by word
    config = _config(model, "IA3", base)
    config |= {"target_modules": targets, "feedforward_modules": feedforward, "fan_in_fan_out": False}
    return write_folder(directory, config, ia3_state_dict(model))


def load_ia3(model: nn.Module, directory: str | Path, kind: type[nn.Module] = IA3Linear) -> nn.Module:
    """Put the vectors saved at `directory`, by us or by PEFT, on a plain base model; returns the model.

    The layers, and which side of them is scaled, come from the tensors. What does not fit is a LabsError that leaves
    the model as it was. The loaded vectors are trainable.
    """
    config, tensors = read_folder(directory, "IA3")
    if config.get("fan_in_fan_out") or config.get("modules_to_save"):
        raise LabsError(f"The adapter at {directory} is more than plain (IA)3: load it with PEFT.")
    layers, inputs = dict(model.named_modules()), {}
    for key, tensor in tensors.items():
        name, _, rest = key.removeprefix(PREFIX).rpartition(".")
        layer = layers.get(name)
        if rest != "ia3_l" or not isinstance(layer, nn.Linear):
            raise _misfit(directory, config, f"it has {key}, which is no linear layer's vector")
        sides = {(layer.out_features, 1): False, (1, layer.in_features): True}
        if tuple(tensor.shape) not in sides:
            raise _misfit(directory, config, f"{key} is {tuple(tensor.shape)}, expected one of {list(sides)}")
        inputs[name] = sides[tuple(tensor.shape)]
    _inject(inject_ia3, model, list(inputs), [name for name in inputs if inputs[name]], kind)
    _fill(ia3_state_dict(model), tensors)
    return model


def save_llama_adapter(model: nn.Module, directory: str | Path, base: str | None = None) -> Path:
    """Write the model's prompts and gates as a PEFT AdaptionPrompt; returns the folder. `base` as in io.save_lora."""
    layers = prompted_layers(model)
    if not layers:
        raise LabsError("This model carries no LLaMA-Adapter: call inject_llama_adapter first.")
    name, layer = next(iter(layers.items()))
    config = _config(model, "ADAPTION_PROMPT", base)
    config |= {"adapter_len": layer.adaption_prompt.shape[1], "adapter_layers": len(layers)}
    config["target_modules"] = name.rpartition(".")[2]
    return write_folder(directory, config, llama_adapter_state_dict(model))


def load_llama_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Put the AdaptionPrompt saved at `directory`, by us or by PEFT, on a plain base model; returns the model.

    What does not fit is a LabsError that leaves the model as it was. Unlike PEFT we refuse a model with more layers
    than the adapter was trained on.
    """
    config, tensors = read_folder(directory, "ADAPTION_PROMPT")
    prompts, count = config.get("adapter_len"), config.get("adapter_layers")
    try:
        top = list(attention_layers(model).items())[-(count or len(tensors)) :]
    except ValueError as error:
        raise LabsError(str(error)) from error
    expected = {}
    for name, layer in top:
        expected[f"{PREFIX}{name}.adaption_prompt"] = (1, prompts, layer.q_proj.in_features)
        expected[f"{PREFIX}{name}.adaption_gate"] = (1,)
    _compare(directory, config, expected, tensors)
    _inject(inject_llama_adapter, model, prompts, len(top))
    _fill(llama_adapter_state_dict(model), tensors)
    return model


def save_adapter(
    model: nn.Module, directory: str | Path, name: str = "default", base: str | None = None
) -> Path:
    """Write one bottleneck adapter; returns the folder. PEFT cannot read it: load it with load_adapter."""
    sites = {
        where: site.adapters[name]
        for where, site in adapted_sublayers(model).items()
        if name in site.adapters
    }
    if not sites:
        raise LabsError(f"This model carries no adapter called {name!r}, so there is nothing to save.")
    first, ends = next(iter(sites.values())), sorted({where.rpartition(".")[2] for where in sites})
    placement = "houlsby" if len(ends) == 2 else "parallel" if first.parallel else "pfeiffer"
    config = _config(model, "BOTTLENECK", base)
    config |= {"bottleneck": first.down.out_features, "placement": placement, "scale": first.scale}
    config["activation"] = next(key for key, value in ACTIVATIONS.items() if value is first.activation)
    return write_folder(directory, config, adapter_state_dict(model, name))


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    name: str = "default",
    kind: type[nn.Module] = BottleneckAdapter,
    attention: str = "self_attn",
    ffn: str = "mlp",
) -> nn.Module:
    """Add the adapter saved at `directory` to a model, under any name; returns the model. It alone acts and trains.

    The model may carry adapters of other names. What does not fit is a LabsError that leaves the model as it was.
    """
    config, tensors = read_folder(directory, "BOTTLENECK")
    if config.get("placement") not in PLACEMENTS or config.get("activation") not in ACTIVATIONS:
        raise LabsError(
            f"The adapter at {directory} is damaged: its config gives no placement or activation."
        )
    width, bottleneck = getattr(model.config, "hidden_size", None), config.get("bottleneck")
    try:
        places = sublayer_names(model, PLACEMENTS[config["placement"]][0], attention, ffn)
    except ValueError as error:
        raise LabsError(str(error)) from error
    shapes = {"down.weight": (bottleneck, width), "down.bias": (bottleneck,)}
    shapes |= {"up.weight": (width, bottleneck), "up.bias": (width,)}
    expected = {f"{place}.{part}": shape for place in places for part, shape in shapes.items()}
    _compare(directory, config, expected, tensors)
    options = {"activation": config["activation"], "scale": config.get("scale", 1.0), "kind": kind}
    options |= {"attention": attention, "ffn": ffn}
    _inject(inject_adapters, model, bottleneck, config["placement"], name, **options)
    _fill(adapter_state_dict(model, name), tensors)
    return model


def _config(model: nn.Module, kind: str, base: str | None) -> dict:
    name = getattr(model, "name_or_path", "") if base is None else base
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "inference_mode": True,
    }


def _misfit(directory: str | Path, config: dict, what: str) -> LabsError:
    base = config.get("base_model_name_or_path") or "not recorded"
    return LabsError(
        f"The adapter at {directory} does not fit this model: {what}. Load the base it was trained on ({base})."
    )


def _compare(directory: str | Path, config: dict, expected: dict[str, tuple], tensors: dict) -> None:
    """Every expected tensor is there, in its shape, and no other."""
    for key in sorted(expected.keys() | tensors.keys()):
        found = tuple(tensors[key].shape) if key in tensors else "missing"
        if key not in expected:
            raise _misfit(directory, config, f"it has {key}, which this model has no place for")
        if found != expected[key]:
            raise _misfit(directory, config, f"{key} is {found}, expected {expected[key]}")


def _inject(inject, *args, **kwargs) -> None:
    try:
        inject(*args, **kwargs)
    except ValueError as error:
        raise LabsError(str(error)) from error


@torch.no_grad()
def _fill(own: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in own.items():
        tensor.copy_(tensors[key])
