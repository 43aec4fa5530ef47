"""AdaLoRA from scratch: an update in the form of a singular value decomposition, and the budget that prunes it.

The update is B diag(E) A: LoRA's two factors with one number per rank between them. Zeroing a number takes a whole
rank out, and every number of the model competes for the same budget. Names and the order of operations are PEFT's:
outputs, gradients and the ranks that are pruned agree step by step.

Source: Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from labs_lib.methods.lora import target_names
from labs_lib.methods.modules import check_mergeable, replace

# PEFT divides by rank + 1e-5, so that a layer that is left with no rank does not divide by zero.
EPSILON = 1e-5
FACTORS = ("lora_A", "lora_E", "lora_B")


class SVDLinear(nn.Module):
    """A frozen linear layer plus a trainable update in SVD form: base(x) + alpha / (rank + EPSILON) * B diag(E) A x.

    `lora_A` is (rank, in), `lora_E` (rank, 1), `lora_B` (out, rank). Only E decides whether a rank exists at all.
    Source: Zhang et al. 2023, section 3.1; PEFT's names, start and scale.

    Steps:
    1. __init__ (kept): A and B random with standard deviation 0.02, E zero, so that the update starts as nothing.
    2. delta: the update as a matrix (out, in): B @ (A * E), scaled by alpha / (rank + EPSILON).
    3. forward: base(x) plus the scaled update of dropout(x): through (A * E) first, then B. While merged: base(x).
    4. merge: add delta() to the base weight, once.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0, generator=None):  # keep
        super().__init__()
        shapes = (rank, base.in_features), (base.out_features, rank)
        self.lora_A, self.lora_B = (nn.Parameter(0.02 * torch.randn(s, generator=generator)) for s in shapes)
        self.lora_E = nn.Parameter(torch.zeros(rank, 1))
        self.to(base.weight.device, torch.promote_types(base.weight.dtype, torch.float32))
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.rank, self.alpha, self.merged = rank, alpha, False

    def delta(self) -> torch.Tensor:
        return self.lora_B @ (self.lora_A * self.lora_E) * self.alpha / (self.rank + EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.merged:
            return y
        x = self.dropout(x.to(self.lora_A.dtype))
        update = x @ (self.lora_A * self.lora_E).T @ self.lora_B.T
        return (y + update * self.alpha / (self.rank + EPSILON)).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        if not self.merged:
            self.base.weight += self.delta()
            self.merged = True


def smoothed_importance(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    spread: torch.Tensor,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of the two running averages behind the importance score; returns the new mean and the new spread.

    The sensitivity |weight * gradient| estimates how much the loss changes if this number becomes zero. One batch
    says little, so its mean is smoothed, and so is its distance from that mean, the uncertainty.
    Source: Zhang et al. 2023, equations 8, 9 and 10. The score of a number is mean * spread.

    Steps:
    1. sensitivity: |weight * gradient|, number by number.
    2. new mean: beta1 of the old mean, 1 - beta1 of the sensitivity.
    3. new spread: beta2 of the old spread, 1 - beta2 of |sensitivity - new mean|.
    """
    sensitivity = (weight * gradient).abs()
    mean = beta1 * mean + (1 - beta1) * sensitivity
    spread = beta2 * spread + (1 - beta2) * (sensitivity - mean).abs()
    return mean, spread


def rank_budget(step: int, start: int, target: int, total: int, warmup: int = 0, final: int = 0) -> int:
    """How many ranks the whole model may have after `step` (counted from 1) of `total`.

    All `start` of them during `warmup`, `target` of them in the last `final` steps, and in between a cubic that falls
    fast at first.
    Source: Zhang et al. 2023, equation 12; PEFT calls warmup and final tinit and tfinal, and rounds down.

    Steps:
    1. Up to and including step `warmup`: start. From step total - final on: target.
    2. In between: left = 1 - (step - warmup) / (total - final - warmup), the share of the way still to go;
       return int((start - target) * left**3 + target).
    """
    if step <= warmup:
        return start
    if step >= total - final:
        return target
    left = 1 - (step - warmup) / (total - final - warmup)
    return int((start - target) * left**3 + target)


def keep_best(scores: Mapping[str, torch.Tensor], budget: int) -> dict[str, torch.Tensor]:
    """Which ranks survive: the `budget` best of the whole model, whatever layer they are in.

    `scores` holds a vector per layer, one number per rank. Returns a bool vector per layer, True where a rank is kept.
    Source: Zhang et al. 2023, equation 6. As in PEFT a tie at the threshold is pruned.

    Steps:
    1. Put all scores in one vector. If the budget is at least its length, keep everything.
    2. threshold: the k-th smallest score, k = number of scores - budget (torch.kthvalue(vector, k).values).
    3. A rank is kept where its score is above the threshold.
    """
    everything = torch.cat(list(scores.values()))
    if budget >= len(everything):
        return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    threshold = torch.kthvalue(everything, len(everything) - budget).values
    return {name: score > threshold for name, score in scores.items()}


def orthogonality(layers: Mapping[str, nn.Module]) -> torch.Tensor:
    """How far the rows of each A and the columns of each B are from orthonormal: mean Frobenius norm of the gap.

    With orthonormal factors B diag(E) A is a singular value decomposition and E alone says how much a rank weighs.
    Source: Zhang et al. 2023, equation 4, which sums squared norms; PEFT takes the mean of the norms, as here.
    """
    gaps = []
    for layer in layers.values():
        for gram in (layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B):
            gaps.append(torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    return torch.stack(gaps).mean()


@dataclass(frozen=True)
class Schedule:
    """When pruning starts, ends and happens, in optimiser steps; PEFT's names for the fields in the comments."""

    total: int  # total_step
    warmup: int = 0  # tinit
    final: int = 0  # tfinal
    interval: int = 1  # deltaT

    def __post_init__(self) -> None:
        if self.warmup >= self.total - self.final:
            raise ValueError(f"No step is left for pruning: {asdict(self)}.")


class RankAllocator:
    """Scores every rank of the model after each step, and zeroes the E of those over the budget.

    Call `step(number)`, counted from 1, after optimizer.step() and before zero_grad(): it reads the gradients.
    A rank that was zeroed still gets a gradient and may come back, until the last `final` steps. The three functions
    are its parts; a learner's own go in their place.
    """

    def __init__(
        self,
        model: nn.Module,
        target: int,
        schedule: Schedule,
        beta1: float = 0.85,
        beta2: float = 0.85,
        importance: Callable = smoothed_importance,
        budget: Callable = rank_budget,
        keep: Callable = keep_best,
    ):
        self.importance, self.budget, self.keep = importance, budget, keep
        self.layers, self.schedule, self.betas = svd_layers(model), schedule, (beta1, beta2)
        self.start = sum(layer.rank for layer in self.layers.values())
        self.target = target * len(self.layers)
        self.averages: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}
        self.kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, number: int) -> None:
        last = self.schedule.total - self.schedule.final
        if number < last:
            self._observe()
        total, warmup, final = self.schedule.total, self.schedule.warmup, self.schedule.final
        budget = self.budget(number, self.start, self.target, total, warmup, final)
        due = number > self.schedule.warmup and number % self.schedule.interval == 0
        if number == last or (number < last and due):
            self.kept = self.keep(self.scores(), budget)
        if self.kept and (number >= last or due):
            for name, kept in self.kept.items():
                self.layers[name].lora_E.masked_fill_(~kept[:, None], 0.0)

    def _observe(self) -> None:
        for name, layer in self.layers.items():
            for factor in FACTORS:
                weight = getattr(layer, factor)
                if weight.grad is None:
                    raise ValueError(f"{name}.{factor} has no gradient: call step() before zero_grad().")
                old = self.averages.get((name, factor)) or (torch.zeros_like(weight),) * 2
                self.averages[name, factor] = self.importance(weight, weight.grad, *old, *self.betas)

    def scores(self) -> dict[str, torch.Tensor]:
        """One number per rank: the score of its E plus the mean score of its row of A and of its column of B."""
        of = {key: mean * spread for key, (mean, spread) in self.averages.items()}
        return {
            name: of[name, "lora_E"][:, 0] + of[name, "lora_A"].mean(1) + of[name, "lora_B"].mean(0)
            for name in self.layers
        }


def svd_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The wrapped layers by name, told by what they carry: a learner's own SVDLinear counts."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_E", None), nn.Parameter)
    }


def ranks(model: nn.Module) -> dict[str, int]:
    """How many ranks each layer uses now: the numbers in E that are not zero."""
    return {name: int(torch.count_nonzero(layer.lora_E)) for name, layer in svd_layers(model).items()}


def inject_adalora(
    model: nn.Module,
    targets: str | Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    layer: Callable[..., nn.Module] = SVDLinear,
) -> nn.Module:
    """Freeze `model` and wrap its target layers in SVDLinear of the starting rank, in place; returns the model.

    `layer` is what wraps a linear layer: a learner's own SVDLinear, for instance.
    """
    if svd_layers(model):
        raise ValueError("This model already carries AdaLoRA layers: call merge_adalora first.")
    if rank < 1:
        raise ValueError(f"rank is the number of rows of A, so at least 1: got {rank}.")
    layers = {
        name: layer(model.get_submodule(name), rank, alpha, dropout, generator)
        for name in target_names(model, targets)
    }
    model.requires_grad_(False)
    for name, wrapped in layers.items():
        replace(model, name, wrapped)
    return model


def penalise(model: nn.Module, weight: float = 0.5) -> Callable[[], None]:
    """Add weight * orthogonality to the loss that `model` returns while it trains; returns what undoes it.

    Unlike PEFT the loss of a model in eval mode is left alone, so that it stays the cross-entropy. The cross-entropy
    of the last training batch is kept as `model.cross_entropy`.
    """
    layers = svd_layers(model)

    def add(module, args, output):
        if module.training and getattr(output, "loss", None) is not None:
            module.cross_entropy = output.loss.detach()
            output.loss = output.loss + weight * orthogonality(layers)
        return output

    return model.register_forward_hook(add).remove


def merge_adalora(model: nn.Module) -> nn.Module:
    """Fold every update into its base weight and take the wrappers away, in place; returns the plain model."""
    layers = svd_layers(model)
    check_mergeable(model, layers)
    for name, layer in layers.items():
        layer.merge()
        replace(model, name, layer.base)
    return model
