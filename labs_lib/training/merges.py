"""What merging a QLoRA adapter does to the model: the ways to do it, each as plain float weights, and how far off."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

#: The ways to merge, in words: the base that the update is added to, and how the sum is stored.
WAYS = {
    "float32": "dequantised, sum in float32",
    "bfloat16": "dequantised, sum in bfloat16",
    "nf4": "sum quantised to 4 bits again",
    "original": "original float weights plus the update",
}


def merged_weight(layer: "nn.Module", original: "torch.Tensor", way: str) -> "torch.Tensor":
    """The float32 values of one merged weight; `layer` is a LoRALinear on a bitsandbytes 4-bit layer."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from labs_lib.methods.lora import lora_delta

    packed = layer.base.weight
    in_four_bits = packed.dtype == torch.uint8  # else a layer that quantising left out
    start = original
    if in_four_bits and way != "original":
        start = dequantize_4bit(packed.data, packed.quant_state)
    total = (start + lora_delta(layer.lora_A, layer.lora_B, layer.alpha, layer.rank)).detach()
    if way == "bfloat16":
        return total.to(torch.bfloat16).float()
    if way == "nf4" and in_four_bits:
        return dequantize_4bit(*quantize_4bit(total, quant_type="nf4", compress_statistics=True))
    return total


def merged_model(model: "PreTrainedModel", way: str) -> "PreTrainedModel":
    """A float copy of a QLoRA model (our LoRA on `load_base(..., quantise="nf4")`) with its adapter merged one `way`.

    Every 4-bit layer must carry an adapter.
    """
    import torch

    from labs_lib.methods.lora import lora_layers
    from labs_lib.models.base import load_base

    merged, _ = load_base(model.name_or_path, device=str(model.device))
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            weight = merged.get_submodule(name).weight
            weight.copy_(merged_weight(layer, weight, way))
    return merged


def merge_report(model: "PreTrainedModel", tokenizer, texts: dict[str, dict]) -> dict:
    """For each way to merge: KL divergence from the unmerged model on each of `texts`, and the recall of its facts.

    `texts` maps a name to rows with prompt and completion; recall is taken on those called "facts".
    """
    from statistics import fmean

    from labs_lib.measure.quality import divergence, recall

    report = {}
    for way in WAYS:
        merged = merged_model(model, way)
        report[way] = {
            f"kl_{name}": divergence(model, merged, tokenizer, rows) for name, rows in texts.items()
        }
        if "facts" in texts:
            report[way]["recall"] = fmean(recall(merged, tokenizer, texts["facts"]))
    return report
