"""A LoRA adapter on disk in PEFT's format: what is saved here loads in PEFT, and the reverse, bit for bit.

An adapter is a folder: adapter_model.safetensors holds the tensors, adapter_config.json says how to use them.
"""

import json
from pathlib import Path

import torch
from torch import nn

from labs_lib.errors import LabsError
from labs_lib.methods.lora import inject_lora, load_lora_state_dict, lora_layers, lora_state_dict

PREFIX = "base_model.model."


def save_lora(model: nn.Module, directory: str | Path, base: str | None = None) -> Path:
    """Write the model's LoRA layers as a PEFT adapter; returns the folder.

    `base` is what the config calls the base model (default: the model's own name_or_path). The tensors are
    written as they are: in float32, rank * (in + out) * 4 bytes per layer, plus a header.
    """
    from safetensors.torch import save_file

    layers = lora_layers(model)
    if not layers:
        raise LabsError(
            "This model carries no LoRA layers, so there is nothing to save: call inject_lora first."
        )
    if len({(layer.rank, layer.alpha) for layer in layers.values()}) > 1:
        raise LabsError("The layers differ in rank or alpha; an adapter file holds one of each.")
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model, "name_or_path", "") if base is None else base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": getattr(getattr(first, "dropout", None), "p", 0.0),
        "target_modules": _short_names(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.cpu().contiguous() for key, tensor in lora_state_dict(model).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return directory


def load_lora(model: nn.Module, directory: str | Path) -> nn.Module:
    """Wrap a plain base model in the adapter saved at `directory`, by us or by PEFT; returns the model.

    The layers come from the tensors' names, so any way of writing target_modules is understood. An adapter
    that does not fit is a LabsError that leaves the model as it was. The loaded A and B are trainable.
    """
    config, tensors = read_adapter(directory)
    names = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors})
    layers = dict(model.named_modules())
    for name in names:
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear):
            raise LabsError(
                f"The adapter at {directory} updates {name}, which is no linear layer of this model: load "
                f"the base it was trained on ({config.get('base_model_name_or_path') or 'not recorded'})."
            )
        expected = {"lora_A": (config["r"], layer.in_features), "lora_B": (layer.out_features, config["r"])}
        for factor, shape in expected.items():
            tensor = tensors.get(f"{PREFIX}{name}.{factor}.weight")
            found = "missing" if tensor is None else tuple(tensor.shape)
            if found != shape:
                raise LabsError(
                    f"The adapter at {directory} does not fit this model: {name}.{factor} is {found}, "
                    f"expected {shape}."
                )
    try:
        inject_lora(model, names, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    except ValueError as error:
        raise LabsError(str(error)) from error
    load_lora_state_dict(model, tensors)
    return model


def read_adapter(directory: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The config and the tensors of a plain LoRA adapter; what plain LoRA cannot express is refused."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = Path(directory)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / name).is_file():
            raise LabsError(f"{directory} is not a saved adapter: {name} is missing.")
    try:
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors = load_file(directory / "adapter_model.safetensors")
    except (ValueError, SafetensorError) as error:
        raise LabsError(f"The adapter at {directory} is damaged ({error}): save or copy it again.") from error
    if config.get("peft_type") != "LORA":
        raise LabsError(f"The adapter at {directory} is {config.get('peft_type')}, not LORA.")
    if beyond := _beyond_plain_lora(config):
        raise LabsError(
            f"The adapter at {directory} is more than plain LoRA ({', '.join(beyond)}): load it with PEFT."
        )
    if "r" not in config or "lora_alpha" not in config:
        raise LabsError(f"The adapter at {directory} is damaged: its config gives no r or lora_alpha.")
    odd = [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if odd or not tensors:
        raise LabsError(
            f"The adapter at {directory} holds {odd[0] if odd else 'no tensors'}, which LoRA does not use."
        )
    return config, tensors


def _beyond_plain_lora(config: dict) -> list[str]:
    """The settings in a PEFT config, switched on, that change what a LoRA layer or its base computes."""
    switches = {"lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices"}
    switches |= {"target_parameters", "layer_replication", "fan_in_fan_out", "alora_invocation_tokens"}
    switches |= {"arrow_config", "kasa_config", "monteclora_config", "velora_config"}
    beyond = [key for key, value in config.items() if value and (key in switches or key.startswith("use_"))]
    if config.get("bias", "none") != "none":
        beyond.append("bias")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        beyond.append("init_lora_weights")  # pissa, olora, corda, loftq ... also change the base weights
    return beyond


def _short_names(model: nn.Module, names: list[str]) -> list[str]:
    """The usual target_modules (q_proj, v_proj) where they mean exactly these layers, else full names."""
    short = sorted({name.rpartition(".")[2] for name in names})
    meant = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in short and (isinstance(module, nn.Linear) or name in names)
    ]
    return short if sorted(meant) == sorted(names) else sorted(names)
