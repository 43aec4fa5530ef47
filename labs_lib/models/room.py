"""Does a model fit? Its bytes are counted from its config alone, before a single weight is read."""

from pathlib import Path
from typing import TYPE_CHECKING

from labs_lib.errors import LabsError

if TYPE_CHECKING:
    import torch

GIB = 2**30
RESERVE = 0.1  # of the free memory, for what is not weights
# Bytes of a number in a linear layer: NF4 has a scale per block of 64, itself in 8 bits (0.5 + 1/64 + 4/(64 * 256)).
PACKED = {"nf4": 0.516, "int8": 1.0}


def weight_bytes(source: Path | str, dtype: "torch.dtype", quantise: str | None = None) -> int:
    """Bytes of a model's weights once loaded, counted on the meta device; tied weights count once.

    Quantised, the linear layers shrink; embeddings, norms and the head stay in `dtype`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    head = model.get_output_embeddings()
    packed = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    rest = sum(parameter.numel() for parameter in model.parameters()) - packed
    return round(rest * dtype.itemsize + packed * PACKED.get(quantise or "", dtype.itemsize))


def check_device(device: str) -> None:
    """Raise LabsError if torch knows no such device, or sees none of its kind here."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise LabsError(f"There is no device {device!r}: cpu, cuda, or cuda:1 for a second GPU.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise LabsError(
            f"Device {device!r} was asked for, and torch sees no GPU here: use cpu, or install a CUDA build of torch "
            "(`labs doctor` says what there is)."
        )


def free_bytes(device: str) -> int:
    """Memory that can be had now, on a GPU or on this machine."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def check_room(source: Path | str, dtype: "torch.dtype", device: str, quantise: str | None = None) -> None:
    """Raise LabsError if the weights of `source` will not fit: what is needed, what is free, what to try."""
    needed, free = weight_bytes(source, dtype, quantise), free_bytes(device)
    if needed <= free * (1 - RESERVE):
        return
    ways = []
    if dtype.itemsize > 2:
        ways.append("dtype=torch.bfloat16 halves it")
    if quantise is None:
        ways.append("quantise='nf4' takes a quarter of bfloat16")
    ways.append("choose a smaller model, such as HuggingFaceTB/SmolLM2-135M")
    where = "GPU" if device.startswith("cuda") else "machine"
    raise LabsError(
        f"{source} needs {needed / GIB:.1f} GiB for its weights alone, and this {where} has {free / GIB:.1f} GiB free. "
        f"Try: {'; '.join(ways)}."
    )
