"""rsLoRA from scratch: LoRA with the update scaled by alpha / sqrt(rank) instead of alpha / rank.

That is all of it, so an rsLoRA layer of alpha is a LoRA layer of alpha * sqrt(rank): same outputs, same gradients,
same training. The rest of the file measures how a size moves with the rank, which is what the scaling is about.

Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from labs_lib.methods.lora import inject_lora


def adapter_scale(alpha: float, rank: int, rslora: bool = False) -> float:
    """The factor in front of B @ A: alpha / rank for LoRA, alpha / sqrt(rank) for rsLoRA.

    Source: Hu et al. 2021, section 4.1; Kalajdzievski 2023, theorem 3.2.

    Steps:
    1. Divide alpha by the rank, or by its square root if `rslora`.
    """
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def same_alpha(alpha: float, rank: int) -> float:
    """The alpha with which plain LoRA of this rank computes what rsLoRA computes with `alpha`.

    Steps:
    1. LoRA divides by rank where rsLoRA divides by sqrt(rank): make up for the difference.
    """
    return alpha * math.sqrt(rank)


def inject_rslora(
    model: nn.Module,
    targets: str | Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` and give its target layers rsLoRA of this alpha, in place: LoRA with alpha * sqrt(rank).

    Arguments as inject_lora takes them. Saved with save_lora, it is a LoRA adapter that any LoRA loader reads.
    """
    return inject_lora(model, targets, rank, same_alpha(alpha, rank), dropout, generator)


def log_slope(ranks: Sequence[float], sizes: Sequence[float]) -> float:
    """The power p in `size ~ rank ** p`: the least-squares slope of log size against log rank.

    0 means that the rank does not matter (stable), 0.5 that the size grows like sqrt(rank), -1 that it shrinks like
    1 / rank.

    Steps:
    1. Take logs of both, and subtract the mean from each.
    2. The slope is the sum of their products over the sum of the squared log ranks.
    """
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (ranks, sizes))
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def best_between(losses: Mapping[float, float]) -> float:
    """The learning rate of the lowest loss, read between the points of a geometric grid.

    `losses` maps rate to loss. The best grid point alone is off by up to half a grid step, too coarse to see whether
    the best rate moved with the rank.

    Steps:
    1. Find the grid point with the lowest loss. At the grid's edge return it as it is.
    2. Else lay a parabola through (log rate, loss) of it and its two neighbours, and return the rate at the bottom.
       With equal steps h of log rate and losses l, m, r (left, middle, right) the bottom lies
       h / 2 * (l - r) / (l - 2 m + r) to the right of the middle. If l - 2 m + r is 0, return the middle.
    """
    rates = sorted(losses)
    i = min(range(len(rates)), key=lambda k: losses[rates[k]])
    if i in (0, len(rates) - 1):
        return rates[i]
    left, middle, right = (losses[rates[k]] for k in (i - 1, i, i + 1))
    bend = left - 2 * middle + right
    if bend <= 0:
        return rates[i]
    step = math.log(rates[i + 1] / rates[i - 1]) / 2
    return rates[i] * math.exp(step / 2 * (left - right) / bend)
