"""LoRA from scratch: the low-rank update, the layer that carries it, and the way into and out of a model.

Shapes are PyTorch's: a linear layer's weight is (out, in), so A is (rank, in), B is (out, rank) and the
update is (alpha / rank) * B @ A. Names and the order of operations are PEFT's: outputs, gradients and files
agree bit for bit.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
"""

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import nn
from torch.nn import functional as F


def lora_delta(A: torch.Tensor, B: torch.Tensor, alpha: float, rank: int) -> torch.Tensor:
    """The update that LoRA adds to a frozen weight: (alpha / rank) * B @ A.

    A is (rank, in) and B is (out, rank); returns (out, in), a matrix of rank at most `rank`.
    Source: Hu et al. 2021, equation 3, with the scaling of section 4.1.

    Steps:
    1. Multiply B by A, in that order, so that the result has the shape of the weight.
    2. Scale it by alpha / rank.
    """
    return (B @ A) * (alpha / rank)


def init_lora(
    in_features: int, out_features: int, rank: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh factors of an update that starts as exactly nothing: A random, B zero.

    Returns A (rank, in), uniform between -1/sqrt(in) and 1/sqrt(in), and B (out, rank), zeros; both float32.
    Source: Hu et al. 2021, section 4.1, where A is Gaussian; the authors' code and PEFT draw this uniform.

    Steps:
    1. A: uniform numbers from `generator` between -bound and bound, where bound = 1 / sqrt(in_features).
    2. B: zeros, so that B @ A is zero and training starts from the base model itself.
    """
    if rank < 1:
        raise ValueError(f"rank is the number of rows of A, so at least 1: got {rank}.")
    bound = in_features**-0.5
    A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
    B = torch.zeros(out_features, rank)
    return A, B


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update: base(x) + (alpha / rank) * B A x.

    Takes x (..., in) to (..., out), as `base` does. Only `lora_A` (rank, in) and `lora_B` (out, rank) train.
    Source: Hu et al. 2021, equation 3; dropout acts on the update's input, as in the authors' code and PEFT.

    Steps:
    1. __init__: freeze `base`; lora_A, lora_B are parameters from init_lora; keep dropout, rank, alpha, merged.
    2. forward: add the scaled update to base(x): through A first, then B, never forming the (out, in) matrix.
    3. merge: add lora_delta to the base weight, once; unmerge: take it out. While merged, forward is base(x).
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0, generator=None) -> None:
        super().__init__()
        A, B = init_lora(base.in_features, base.out_features, rank, generator)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)  # never train in half precision
        self.lora_A, self.lora_B = (nn.Parameter(each.to(base.weight.device, dtype)) for each in (A, B))
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.rank, self.alpha, self.merged = rank, alpha, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.merged:
            return y
        x = self.dropout(x.to(self.lora_A.dtype))
        return (y + F.linear(F.linear(x, self.lora_A), self.lora_B) * (self.alpha / self.rank)).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        if not self.merged:
            self.base.weight += lora_delta(self.lora_A, self.lora_B, self.alpha, self.rank)
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged:
            self.base.weight -= lora_delta(self.lora_A, self.lora_B, self.alpha, self.rank)
            self.merged = False


def target_names(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers that `targets` means, in the model's own order.

    `targets` is "all-linear" (every nn.Linear but the output head, as in PEFT), or names: "q_proj" stands for
    each layer whose name ends in ".q_proj", a full name for that layer. A name that matches nothing is an
    error.
    """
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if not linear or not targets:
        raise ValueError("Nothing to adapt: the model has no nn.Linear, or targets is empty.")
    if targets == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return [name for name, layer in linear.items() if layer is not head]
    targets = [targets] if isinstance(targets, str) else list(targets)
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            close = get_close_matches(target, [*known, *linear], n=3) or known
            raise ValueError(f"No linear layer is called {target!r}; the closest are: {', '.join(close)}.")
    return [name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)]


def inject_lora(
    model: nn.Module,
    targets: str | Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` and wrap its target layers in LoRALinear, in place; returns the model.

    `targets` as in target_names. A model that already carries LoRA layers, or a target that does not exist,
    is an error that leaves the model as it was.

    Steps:
    1. Wrap each layer that target_names(model, targets) lists in a LoRALinear.
    2. Freeze every parameter of the model.
    3. Put each wrapper in its layer's place: setattr on the parent, model.get_submodule(name of the parent).
    """
    if lora_layers(model):
        raise ValueError("This model already carries LoRA layers: call merge_lora or remove_lora first.")
    layers = {
        name: LoRALinear(model.get_submodule(name), rank, alpha, dropout, generator)
        for name in target_names(model, targets)
    }
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The wrapped layers by name, told by what they carry, not class: a learner's own LoRALinear counts."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_A", None), nn.Parameter)
    }


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimiser should get: those with requires_grad."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold every update into its base weight and take the wrappers away, in place; returns the plain model.

    Refuses a weight that two modules share (tied embeddings: merging would change both) and a quantised one.

    Steps:
    1. For each layer of lora_layers(model): merge it.
    2. Put its `base` back in its place, as inject_lora put the wrapper there.
    """
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    layers = lora_layers(model)
    for name, layer in layers.items():
        if owners[id(layer.base.weight)] > 1:
            raise ValueError(
                f"{name} shares its weight with another module: merging would change both. Untie them."
            )
        if not layer.base.weight.is_floating_point():
            raise ValueError(f"{name} is quantised: dequantise the base model before merging into it.")
    for layer in layers.values():
        layer.merge()
    return _unwrap(model)


def remove_lora(model: nn.Module) -> nn.Module:
    """Take the wrappers away without their updates, in place: the (still frozen) base model, returned."""
    for layer in lora_layers(model).values():
        if getattr(layer, "merged", False):
            layer.unmerge()
    return _unwrap(model)


def _unwrap(model: nn.Module) -> nn.Module:
    for name, layer in lora_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
    return model


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's names for them on disk: base_model.model.<layer>.lora_A.weight."""
    return {
        f"base_model.model.{name}.{factor}.weight": getattr(layer, factor).detach()
        for name, layer in lora_layers(model).items()
        for factor in ("lora_A", "lora_B")
    }


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors, named as in lora_state_dict, into the LoRA layers; names and shapes must match."""
    own = lora_state_dict(model)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise ValueError(f"The adapter and the model differ in {len(odd)} tensors, the first being {odd[0]}.")
    for key, tensor in tensors.items():
        if own[key].shape != tensor.shape:
            raise ValueError(
                f"{key} is {tuple(tensor.shape)} in the adapter, {tuple(own[key].shape)} in the model."
            )
    for key, tensor in tensors.items():
        own[key].copy_(tensor)
