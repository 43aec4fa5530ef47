"""An AdaLoRA adapter on disk in PEFT's format: pruned ranks are left out of the file, and the config says which."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from labs_lib.errors import LabsError
from labs_lib.methods.adalora import FACTORS, inject_adalora, svd_layers
from labs_lib.methods.io import PREFIX, read_folder, short_names, write_folder


def save_adalora(
    model: nn.Module,
    directory: str | Path,
    kept: Mapping[str, torch.Tensor] | None = None,
    target: int | None = None,
    base: str | None = None,
) -> Path:
    """Write the model's AdaLoRA layers as a PEFT adapter; returns the folder.

    `kept` is RankAllocator.kept, the ranks that survived; without it all are written. `target` is the average rank
    that was asked for, which the config only reports.
    """
    layers = svd_layers(model)
    if not layers:
        raise LabsError("This model carries no AdaLoRA layers: call inject_adalora first.")
    first = next(iter(layers.values()))
    kept = kept or {}
    tensors = {}
    for name, layer in layers.items():
        mask = kept.get(name, torch.ones(layer.rank, dtype=torch.bool))
        tensors |= {f"{PREFIX}{name}.{f}": getattr(layer, f).detach()[mask] for f in ("lora_A", "lora_E")}
        tensors[f"{PREFIX}{name}.lora_B"] = layer.lora_B.detach()[:, mask]
    config = {
        "peft_type": "ADALORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model, "name_or_path", "") if base is None else base,
        "init_r": first.rank,
        "target_r": first.rank if target is None else target,
        "lora_alpha": first.alpha,
        "lora_dropout": getattr(first.dropout, "p", 0.0),
        "target_modules": short_names(model, list(layers)),
        "rank_pattern": {f"{name}.lora_E": mask.tolist() for name, mask in kept.items()} or None,
        "total_step": 1,  # PEFT refuses a config without it; only training reads it
        "bias": "none",
        "inference_mode": True,
    }
    return write_folder(directory, config, tensors)


def load_adalora(model: nn.Module, directory: str | Path) -> nn.Module:
    """Wrap a plain base model in the AdaLoRA adapter saved at `directory`, by us or by PEFT; returns the model.

    The layers come back with the ranks that were kept; the scale is still that of the rank they started from.
    """
    config, tensors = read_folder(directory, "ADALORA")
    names = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors})
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name in names:
        if name not in linear:
            raise LabsError(
                f"The adapter at {directory} updates {name}, which is no linear layer of this model."
            )
        found = [tuple(tensors[f"{PREFIX}{name}.{factor}"].shape) for factor in FACTORS]
        rank, layer = found[1][0], linear[name]
        if found != [(rank, layer.in_features), (rank, 1), (layer.out_features, rank)]:
            raise LabsError(
                f"The adapter at {directory} does not fit this model: {name} has factors {found}."
            )
    inject_adalora(model, names, config["init_r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    for name, layer in svd_layers(model).items():
        for factor in FACTORS:
            old = getattr(layer, factor)
            setattr(layer, factor, nn.Parameter(tensors[f"{PREFIX}{name}.{factor}"].to(old)))
    return model
