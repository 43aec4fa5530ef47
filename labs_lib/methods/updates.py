"""What a method did to a weight, whatever the method: the update as a matrix, and its rank and spectrum.

Every layer that a method puts in a linear layer's place is a function of x. If that function is W' x + b', then W' can
be read off by showing it the identity, and W' - W is the update that merging would add.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn


@torch.no_grad()
def update_of(model: nn.Module, name: str) -> torch.Tensor:
    """The dense update of one linear layer, (out, in) in float64: the weight it stands for, minus that of its `base`.

    `name` is the layer's full name. The layer is any wrapper of this course (LoRA, DoRA, (IA)3, the zoo) or PEFT's;
    a layer that nobody has wrapped has an update of zero. A wrapper that is not linear in x is a ValueError. A change
    of the bias, as (IA)3 makes, is no part of the update.

    Steps:
    1. A copy of the layer in float64, in eval mode, so that nothing is rounded or dropped.
    2. Show it the identity (in, in) and zero: layer(I) - layer(0) is the transposed weight that it stands for.
    3. Do the same with its base, and subtract. Minus twice the identity must give minus twice as much: it is linear.
    """
    layer = copy.deepcopy(model.get_submodule(name)).double().eval()
    base = getattr(layer, "base", getattr(layer, "base_layer", layer))
    eye = torch.eye(base.in_features, dtype=torch.float64, device=base.weight.device)

    def weight(module, scale=1.0):
        return (module(scale * eye) - module(torch.zeros_like(eye[:1]))).T / scale

    adapted = weight(layer)
    if not torch.allclose(weight(layer, -2.0), adapted):
        raise ValueError(f"{name} is not linear in its input: no update of the weight stands for it.")
    return adapted - weight(base)


class Spectrum(NamedTuple):
    """A matrix by its singular values.

    Attributes:
        values: the singular values, largest first.
        rank: how many of them are not zero to rounding.
        effective_rank: the exponential of the entropy of their shares, p = value / sum: how many matter.
        stable_rank: sum of squares over the largest square; never above the rank, and blind to a long thin tail.
    """

    values: torch.Tensor
    rank: int
    effective_rank: float
    stable_rank: float


def spectrum(delta: torch.Tensor, tolerance: float = 1e-6) -> Spectrum:
    """Singular values of an update, and three ways to count them. A matrix of zeros has rank 0 in each.

    Sources: effective rank Roy and Vetterli 2007; stable rank Rudelson and Vershynin 2007, arXiv:math/0503442.

    Steps:
    1. The singular values, in float64: torch.linalg.svdvals.
    2. rank: those above `tolerance` times the largest.
    3. effective_rank: exp of minus the sum of p log p, over the p that are not zero.
    4. stable_rank: the sum of squares, over the largest square.
    """
    values = torch.linalg.svdvals(delta.double())
    if not values.numel() or values[0] == 0:
        return Spectrum(values, 0, 0.0, 0.0)
    rank = int((values > tolerance * values[0]).sum())
    shares = values / values.sum()
    effective = torch.special.entr(shares).sum().exp().item()
    return Spectrum(values, rank, effective, (values.square().sum() / values[0] ** 2).item())
