"""A LoRA or DoRA adapter on disk in PEFT's format: what is saved here loads in PEFT, and the reverse, bit for bit.

An adapter is a folder: adapter_model.safetensors holds the tensors, adapter_config.json says how to use them.
"""

import json
from pathlib import Path

import torch
from torch import nn

from labs_lib.errors import LabsError
from labs_lib.methods.dora import dora_state_dict, inject_dora
from labs_lib.methods.lora import inject_lora, load_lora_state_dict, lora_layers, lora_state_dict
from labs_lib.methods.rslora import same_alpha

PREFIX = "base_model.model."


def save_lora(model: nn.Module, directory: str | Path, base: str | None = None) -> Path:
    """Write the model's LoRA layers as a PEFT adapter; returns the folder.

    `base` is what the config calls the base model (default: the model's own name_or_path). The tensors are
    written as they are: in float32, rank * (in + out) * 4 bytes per layer, plus a header.
    """
    if any(hasattr(layer, "lora_magnitude_vector") for layer in lora_layers(model).values()):
        raise LabsError(
            "This model carries DoRA layers: save_lora would drop their magnitudes, use save_dora."
        )
    return _write_adapter(model, directory, base, lora_state_dict(model))


def save_dora(model: nn.Module, directory: str | Path, base: str | None = None) -> Path:
    """Write the model's DoRA layers as a PEFT adapter; returns the folder. As save_lora, with the magnitudes."""
    if not all(hasattr(layer, "lora_magnitude_vector") for layer in lora_layers(model).values()):
        raise LabsError("This model carries LoRA layers without magnitudes: save them with save_lora.")
    return _write_adapter(model, directory, base, dora_state_dict(model), use_dora=True)


def _write_adapter(model: nn.Module, directory: str | Path, base: str | None, tensors: dict, **more) -> Path:
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
        "target_modules": short_names(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **more,
    }
    return write_folder(directory, config, tensors)


def write_folder(directory: str | Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    """Write any method's config and tensors the way PEFT lays them out; returns the folder."""
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return directory


def load_lora(model: nn.Module, directory: str | Path) -> nn.Module:
    """Wrap a plain base model in the adapter saved at `directory`, by us or by PEFT; returns the model.

    The layers come from the tensors' names, so any way of writing target_modules is understood. An adapter
    that does not fit is a LabsError that leaves the model as it was. The loaded A and B are trainable.
    """
    config, tensors = read_adapter(directory)
    names = _check_fit(model, directory, config, tensors)
    try:
        inject_lora(model, names, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    except ValueError as error:
        raise LabsError(str(error)) from error
    load_lora_state_dict(model, tensors)
    return model


def load_dora(model: nn.Module, directory: str | Path) -> nn.Module:
    """Wrap a plain base model in the DoRA adapter saved at `directory`, by us or by PEFT. As load_lora."""
    config, tensors = read_adapter(directory, dora=True)
    names = _check_fit(model, directory, config, tensors)
    try:
        inject_dora(model, names, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    except ValueError as error:
        raise LabsError(str(error)) from error
    with torch.no_grad():
        for key, tensor in dora_state_dict(model).items():
            tensor.copy_(tensors[key])
    return model


def _check_fit(model: nn.Module, directory: str | Path, config: dict, tensors: dict) -> list[str]:
    """The names of the layers that the adapter updates, once every tensor of it has the shape they need."""
    names = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors})
    layers = dict(model.named_modules())
    for name in names:
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear):
            raise LabsError(
                f"The adapter at {directory} updates {name}, which is no linear layer of this model: load "
                f"the base it was trained on ({config.get('base_model_name_or_path') or 'not recorded'})."
            )
        expected = {
            "lora_A.weight": (config["r"], layer.in_features),
            "lora_B.weight": (layer.out_features, config["r"]),
        }
        if config.get("use_dora"):
            expected["lora_magnitude_vector"] = (layer.out_features,)
        for factor, shape in expected.items():
            tensor = tensors.get(f"{PREFIX}{name}.{factor}")
            found = "missing" if tensor is None else tuple(tensor.shape)
            if found != shape:
                part = factor.removesuffix(".weight")
                raise LabsError(
                    f"The adapter at {directory} does not fit this model: {name}.{part} is {found}, "
                    f"expected {shape}."
                )
    return names


def read_adapter(directory: str | Path, dora: bool = False) -> tuple[dict, dict[str, torch.Tensor]]:
    """The config and the tensors of a plain LoRA adapter (of a DoRA adapter, if `dora`); anything else is refused."""
    config, tensors = read_folder(directory, "LORA")
    beyond = [switch for switch in _beyond_plain_lora(config) if not (dora and switch == "use_dora")]
    if beyond:
        kind = "DoRA" if dora else "plain LoRA"
        raise LabsError(
            f"The adapter at {directory} is more than {kind} ({', '.join(beyond)}): load it with PEFT."
        )
    if dora and not config.get("use_dora"):
        raise LabsError(
            f"The adapter at {directory} is plain LoRA, without magnitudes: load it with load_lora."
        )
    if "r" not in config or "lora_alpha" not in config:
        raise LabsError(f"The adapter at {directory} is damaged: its config gives no r or lora_alpha.")
    if config.get("use_rslora"):  # alpha / sqrt(r) is plain LoRA's alpha / r with another alpha
        config |= {"lora_alpha": same_alpha(config["lora_alpha"], config["r"]), "use_rslora": False}
    parts = (".lora_A.weight", ".lora_B.weight") + ((".lora_magnitude_vector",) if dora else ())
    odd = [key for key in tensors if not key.endswith(parts)]
    if odd or not tensors:
        kind = "DoRA" if dora else "LoRA"
        raise LabsError(
            f"The adapter at {directory} holds {odd[0] if odd else 'no tensors'}, which {kind} does not use."
        )
    return config, tensors


def read_folder(directory: str | Path, kind: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The config and the tensors of any method's adapter, which must be of the `kind` (peft_type) asked for."""
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
    if config.get("peft_type") != kind:
        raise LabsError(f"The adapter at {directory} is {config.get('peft_type')}, not {kind}.")
    return config, tensors


def _beyond_plain_lora(config: dict) -> list[str]:
    """The settings in a PEFT config, switched on, that change what a LoRA layer or its base computes."""
    switches = {"lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices"}
    switches |= {"target_parameters", "layer_replication", "fan_in_fan_out", "alora_invocation_tokens"}
    switches |= {"arrow_config", "kasa_config", "monteclora_config", "velora_config"}
    beyond = [key for key, value in config.items() if value and (key in switches or key.startswith("use_"))]
    beyond = [key for key in beyond if key != "use_rslora"]  # another alpha, see read_adapter
    if config.get("bias", "none") != "none":
        beyond.append("bias")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        beyond.append("init_lora_weights")  # pissa, olora, corda, loftq ... also change the base weights
    return beyond


def short_names(model: nn.Module, names: list[str]) -> list[str]:
    """The usual target_modules (q_proj, v_proj) where they mean exactly these layers, else full names."""
    short = sorted({name.rpartition(".")[2] for name in names})
    meant = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in short and (isinstance(module, nn.Linear) or name in names)
    ]
    return short if sorted(meant) == sorted(names) else sorted(names)
