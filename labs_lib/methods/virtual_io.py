"""Soft prompts and prefixes on disk in PEFT's format: what is saved here loads in PEFT, and the reverse, bit for bit.

Both are one tensor, prompt_embeddings: (tokens, width) of a soft prompt, (tokens, 2 x layers x width) of a prefix.
A projection is never written: what is saved is what it gives.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from labs_lib.errors import LabsError
from labs_lib.methods.io import read_folder, write_folder
from labs_lib.methods.prefix_tuning import DirectPrefix, PrefixTuning, prefix_shape
from labs_lib.methods.prompt_tuning import PromptTuning, check_base, leave_base_out


def save_prompt(model: nn.Module, directory: str | Path, base: str | None = None) -> Path:
    """Write the soft prompt of a PromptTuning as a PEFT adapter; returns the folder.

    `base` is what the config calls the base model (default: the model's own name_or_path).
    """
    if not isinstance(getattr(model, "prompt", None), nn.Parameter):
        raise LabsError(
            "This model carries no soft prompt, so there is nothing to save: call add_prompt first."
        )
    config = {"token_dim": model.prompt.shape[1], "num_attention_heads": model.config.num_attention_heads}
    more = {"prompt_tuning_init": "RANDOM"}  # how it began is history: on loading, the numbers are read
    return _write(model, directory, base, "PROMPT_TUNING", model.prompt, config | more)


def save_prefix(model: nn.Module, directory: str | Path, base: str | None = None) -> Path:
    """Write the prefix of a PrefixTuning as a PEFT adapter, without its projection; returns the folder."""
    if not isinstance(getattr(model, "prefix", None), nn.Module):
        raise LabsError("This model carries no prefix, so there is nothing to save: call add_prefix first.")
    _, heads, size = prefix_shape(model.config)
    config = {"token_dim": heads * size, "num_attention_heads": heads}
    more = {"prefix_projection": False, "encoder_hidden_size": heads * size}
    with torch.no_grad():
        return _write(model, directory, base, "PREFIX_TUNING", model.prefix(), config | more)


def load_prompt(base: nn.Module, directory: str | Path) -> nn.Module:
    """Give a plain base model the soft prompt saved at `directory`, by us or by PEFT; returns a PromptTuning.

    A prompt that does not fit is a LabsError that leaves the model as it was. What is loaded can be trained on,
    which PEFT refuses (is_trainable=True raises).
    """
    embedding = _plain(base).get_input_embeddings().weight
    prompt = _read(base, directory, "PROMPT_TUNING", embedding.shape[1])
    return leave_base_out(PromptTuning(base, prompt.to(embedding.device)))


def load_prefix(base: nn.Module, directory: str | Path, cache: Callable) -> nn.Module:
    """Give a plain base model the prefix saved at `directory`, by us or by PEFT; returns a PrefixTuning.

    As load_prompt; `cache` is transformers.DynamicCache. A projection is gone: training goes on without one.
    """
    layers, heads, size = prefix_shape(_plain(base).config)
    prefix = _read(base, directory, "PREFIX_TUNING", 2 * layers * heads * size)
    device = base.get_input_embeddings().weight.device
    return leave_base_out(PrefixTuning(base, DirectPrefix(prefix.to(device)), cache))


def _plain(base: nn.Module) -> nn.Module:
    """The model itself, once it is one that virtual tokens can stand before."""
    try:
        check_base(base, 1)
    except ValueError as error:
        raise LabsError(str(error)) from error
    return base


def _write(model, directory, base: str | None, kind: str, tensor: torch.Tensor, more: dict) -> Path:
    config = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model.base, "name_or_path", "") if base is None else base,
        "num_virtual_tokens": len(tensor),
        "num_layers": model.config.num_hidden_layers,
        "num_transformer_submodules": 1,
        "inference_mode": True,
        **more,
    }
    return write_folder(directory, config, {"prompt_embeddings": tensor.detach()})


def _read(base: nn.Module, directory: str | Path, kind: str, width: int) -> torch.Tensor:
    """The one tensor of an adapter of this kind, once it fits: (tokens, width)."""
    config, tensors = read_folder(directory, kind)
    if config.get("num_transformer_submodules", 1) != 1 or set(tensors) != {"prompt_embeddings"}:
        raise LabsError(
            f"The adapter at {directory} is more than one tensor for a causal model: load it with PEFT."
        )
    tensor, trained = tensors["prompt_embeddings"], config.get("num_layers")
    found, expected = tuple(tensor.shape), (config.get("num_virtual_tokens"), width)
    if found != expected or trained not in (None, base.config.num_hidden_layers):
        raise LabsError(
            f"The adapter at {directory} does not fit this model: {found} for {trained} layers, expected {expected} "
            f"for {base.config.num_hidden_layers}. Load the base it was trained on "
            f"({config.get('base_model_name_or_path') or 'not recorded'})."
        )
    if found[0] >= getattr(base.config, "max_position_embeddings", found[0] + 1):
        raise LabsError(f"The {found[0]} virtual tokens at {directory} leave this model no room for text.")
    return tensor
