"""DoRA from scratch: a weight taken apart into magnitude and direction, and LoRA on the direction alone.

Shapes are PyTorch's: a weight is (out, in), and one row of it makes one output. Each row has a length, its
magnitude, and a direction. LoRA's update goes into W + s B A, whose rows are then set to trained magnitudes m:
W' = m (W + s B A) / ||W + s B A||, with s = alpha / rank. Names on disk and the order of operations are PEFT's.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, sections 3 and 4.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from labs_lib.methods.lora import LoRALinear, lora_delta, lora_layers, target_names


def decompose(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight's magnitude and direction: the length of each row, and the rows scaled to length one.

    `weight` is (out, in); returns magnitude (out,) and direction (out, in), with magnitude * direction = weight.
    Source: Liu et al. 2024, equation 2. The paper writes the weight the other way round and says "column"; its
    authors' code and PEFT take the rows of the stored (out, in) weight, one number per output.

    Steps:
    1. magnitude: the square root of the sum of squares of each row, one number per output.
    2. direction: every row divided by its own magnitude.
    """
    magnitude = torch.linalg.norm(weight, dim=1)
    return magnitude, weight / magnitude[:, None]


def dora_weight(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor, alpha: float, rank: int
) -> torch.Tensor:
    """The weight that DoRA stands for: the direction of W + (alpha / rank) B A, at the trained magnitudes.

    `weight` is (out, in), A (rank, in), B (out, rank), magnitude (out,); returns (out, in).
    Source: Liu et al. 2024, equation 5.

    Steps:
    1. V = weight + lora_delta(A, B, alpha, rank).
    2. Scale every row of V to the length that `magnitude` says.
    """
    V = weight + lora_delta(A, B, alpha, rank)
    return (magnitude / torch.linalg.norm(V, dim=1))[:, None] * V


class DoRAParts(LoRALinear):
    """What a DoRA layer keeps, and how it merges; DoRALinear, below, computes with it.

    lora_A, lora_B and lora_magnitude_vector (out,) train. `kept_gain` is the gain while it must not be computed
    again: after merging, and inside kept_gains.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        detach: bool = True,
    ) -> None:
        super().__init__(base, rank, alpha, dropout, generator)
        lengths = torch.linalg.norm(base.weight.detach().to(self.lora_A.dtype), dim=1)
        self.lora_magnitude_vector = nn.Parameter(lengths)
        self.detach, self.kept_gain = detach, None

    @torch.no_grad()
    def merge(self) -> None:
        """Put the weight that DoRA stands for in the base's place: gain * (W + (alpha / rank) B A)."""
        if not self.merged:
            self.kept_gain, self.merged = self.gain(), True
            update = lora_delta(self.lora_A, self.lora_B, self.alpha, self.rank)
            self.base.weight.copy_(self.kept_gain[:, None] * (self.base.weight + update))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Divide by that gain and take the update out: equal to rounding, unless a magnitude is zero."""
        if self.merged:
            update = lora_delta(self.lora_A, self.lora_B, self.alpha, self.rank)
            self.base.weight.copy_(self.base.weight / self.kept_gain[:, None] - update)
            self.kept_gain, self.merged = None, False


class DoRALinear(DoRAParts):
    """A frozen linear layer whose rows turn by a low-rank update and have trained lengths.

    Takes x (..., in) to (..., out), as `base` does. The layer keeps base, lora_A (rank, in), lora_B (out, rank),
    lora_magnitude_vector (out,), rank, alpha, dropout (a module), detach, merged and kept_gain.
    Source: Liu et al. 2024, equation 5; `detach` is section 4.3: in backward a row's length is a constant.

    Steps:
    1. gain: magnitude / length of each row of V = W + (alpha / rank) B A. With `detach`, detach the length.
    2. forward: base(x) + (gain - 1) * plain + gain * (alpha / rank) B A x, where plain is W x without the bias;
       while merged, base(x) alone; where kept_gain is not None, it stands in for the gain.
    3. Dropout acts on the x of both added terms: while it does, plain takes a pass through W of its own.
    """

    def gain(self) -> torch.Tensor:
        V = self.base.weight + lora_delta(self.lora_A, self.lora_B, self.alpha, self.rank)
        length = torch.linalg.norm(V, dim=1)
        return self.lora_magnitude_vector / (length.detach() if self.detach else length)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.merged:
            return y
        x = self.dropout(x.to(self.lora_A.dtype))
        if self.training and isinstance(self.dropout, nn.Dropout):
            plain = F.linear(x, self.base.weight.to(x.dtype))
        else:
            plain = y if self.base.bias is None else y - self.base.bias
        update = F.linear(F.linear(x, self.lora_A), self.lora_B) * (self.alpha / self.rank)
        gain = self.gain() if self.kept_gain is None else self.kept_gain
        return (y + (gain - 1) * plain + gain * update).to(y.dtype)


def inject_dora(
    model: nn.Module,
    targets: str | Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    detach: bool = True,
    kind: type[nn.Module] = DoRALinear,
) -> nn.Module:
    """Freeze `model` and put a DoRALinear (or your own `kind`) in place of each target layer; returns the model.

    As inject_lora, whose helpers also serve here: lora_layers finds these layers, merge_lora and remove_lora take
    them out. A quantised layer is an error: the length of its rows needs its weights (PEFT dequantises them in
    every forward pass).
    """
    if lora_layers(model):
        raise ValueError("This model already carries adapter layers: call merge_lora or remove_lora first.")
    names = target_names(model, targets)
    for name in names:
        weight = model.get_submodule(name).weight
        if not weight.is_floating_point():
            raise ValueError(f"{name} is quantised: DoRA on a quantised base is PEFT's (use_dora=True).")
        if not weight.is_meta and not weight.any(dim=1).all():
            raise ValueError(f"{name} has a row of zeros, which has no direction: leave that layer out.")
    layers = {
        name: kind(model.get_submodule(name), rank, alpha, dropout, generator, detach) for name in names
    }
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


@contextmanager
def kept_gains(model: nn.Module) -> Iterator[None]:
    """While it lasts, every DoRA layer uses the gain that it had at the start: for inference only.

    One number per output is all that has to be kept: given the gain, a forward pass is LoRA's. PEFT's DoraCaching
    keeps the product B A as well, a second copy of the weights. Training meanwhile would use stale gains.
    """
    layers = [layer for layer in lora_layers(model).values() if not layer.merged]
    try:
        for layer in layers:
            layer.kept_gain = layer.gain().detach()
        yield
    finally:
        for layer in layers:
            layer.kept_gain = None


def dora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's names on disk: <layer>.lora_A.weight, ..., <layer>.lora_magnitude_vector."""
    return {
        f"base_model.model.{name}.{tensor}": getattr(layer, tensor.partition(".")[0]).detach()
        for name, layer in lora_layers(model).items()
        for tensor in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    }


def weight_change(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """How far a weight moved: in magnitude, and in direction; both are means over its rows.

    Source: Liu et al. 2024, equations 3 and 4 (section 3.2).

    Steps:
    1. Decompose both weights.
    2. Magnitude: the mean absolute difference of the two magnitudes.
    3. Direction: the mean of 1 - cosine, where the cosine of two rows is the sum of the products of their directions.
    """
    (magnitude, direction), (new_magnitude, new_direction) = decompose(before), decompose(after)
    turned = 1 - (direction * new_direction).sum(dim=1)
    return (new_magnitude - magnitude).abs().mean().item(), turned.mean().item()
