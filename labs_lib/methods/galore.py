"""GaLore from scratch: every weight trains, but Adam keeps its two averages of a projected gradient only.

A gradient (out, in) is projected onto its first `rank` singular directions, Adam takes its step there, and the step is
projected back onto the weight. The basis is computed anew every `update_proj_gap` steps; the averages stay as they are,
in coordinates that no longer mean the same. Names, defaults and the order of operations are galore_torch 1.0's, and so
are the steps.

Source: Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv:2403.03507.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from labs_lib.methods.lora import target_names

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
# What a parameter group says of its projection, and what it means if it says only the rank.
DEFAULTS = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}


def projection_side(shape: Sequence[int], proj_type: str = "std") -> str:
    """Which side of a gradient (out, in) is projected: "left" its rows, "right" its columns, or "full", both.

    "std" projects the smaller side, the columns if both are alike; "reverse_std" the other one; the rest say it.
    """
    if proj_type in ("left", "right", "full"):
        return proj_type
    return "right" if (shape[0] >= shape[1]) == (proj_type == "std") else "left"


class Projector:
    """From a gradient (out, in) onto its first `rank` singular directions, and back.

    `left` is (out, rank), `right` is (rank, in); what projection_side does not ask for is None.
    Source: Zhao et al. 2024, section 4; galore_torch's GaLoreProjector.

    Steps:
    1. refresh: U, S, Vh = torch.linalg.svd(gradient, full_matrices=False), in float32 at least. Of the first rank
       columns of U and rows of Vh keep what the side asks for, in the gradient's type, as a copy: .clone(), since a
       slice would keep the whole matrix in memory.
    2. project: refresh if there is no basis yet or if step is a multiple of update_proj_gap. Then left.T @ gradient,
       (rank, in); or gradient @ right.T, (out, rank); or with both, (rank, rank).
    3. project_back: left @ update and/or update @ right, times scale.
    """

    def __init__(
        self, rank: int, update_proj_gap: int = 200, scale: float = 1.0, proj_type: str = "std"
    ):  # keep
        self.rank, self.update_proj_gap, self.scale, self.proj_type = rank, update_proj_gap, scale, proj_type
        self.left = self.right = None

    def refresh(self, gradient: torch.Tensor) -> None:
        exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        U, _, Vh = torch.linalg.svd(exact, full_matrices=False)
        side = projection_side(gradient.shape, self.proj_type)
        self.left = None if side == "right" else U[:, : self.rank].to(gradient.dtype).clone()
        self.right = None if side == "left" else Vh[: self.rank].to(gradient.dtype).clone()

    def project(self, gradient: torch.Tensor, step: int) -> torch.Tensor:
        if (self.left is None and self.right is None) or step % self.update_proj_gap == 0:
            self.refresh(gradient)
        gradient = gradient if self.left is None else self.left.T @ gradient
        return gradient if self.right is None else gradient @ self.right.T

    def project_back(self, update: torch.Tensor) -> torch.Tensor:
        update = update if self.left is None else self.left @ update
        update = update if self.right is None else update @ self.right
        return update * self.scale


torch.serialization.add_safe_globals([Projector])  # a saved optimiser loads with torch.load's defaults


@torch.no_grad()
def galore_step(weight: torch.Tensor, gradient: torch.Tensor, state: dict, group: dict) -> None:
    """One step of AdamW on `weight`, in place; behind a projection if the parameter group has a "rank".

    `state` is this weight's: empty before its first step. `group` holds lr, betas, eps, weight_decay, correct_bias and,
    with a rank, update_proj_gap, scale and proj_type.
    Source: Zhao et al. 2024, section 4; the order of operations is galore_torch's.

    Steps:
    1. state["step"] is 0 at first. With a rank: make state["projector"] once (a Projector), and let it project the
       gradient at this step.
    2. exp_avg and exp_avg_sq start as zeros of the (projected) gradient's shape: here the memory is saved.
    3. Count the step. exp_avg: beta1 of itself, 1 - beta1 of the gradient; exp_avg_sq the same with beta2 and the
       squared gradient.
    4. direction = exp_avg / (sqrt(exp_avg_sq) + eps); with a rank, project it back.
    5. Subtract lr * direction; with correct_bias times sqrt(1 - beta2**step) / (1 - beta1**step).
    6. Then decay: subtract lr * weight_decay * weight.
    """
    step, (beta1, beta2) = state.setdefault("step", 0), group["betas"]
    if "rank" in group:
        if "projector" not in state:
            state["projector"] = Projector(group["rank"], *(group[name] for name in DEFAULTS))
        gradient = state["projector"].project(gradient, step)
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    state["step"] = step = step + 1
    mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    direction = mean / (square.sqrt() + group["eps"])
    if "rank" in group:
        direction = state["projector"].project_back(direction)
    lr = group["lr"]
    if group["correct_bias"]:
        lr = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    weight.sub_(direction, alpha=lr)
    if group["weight_decay"]:
        weight.sub_(weight, alpha=group["lr"] * group["weight_decay"])


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW that projects the gradients of every parameter group with a "rank": galore_step, weight by weight.

    Without any rank it is AdamW as transformers had it: eps is added before the bias correction, and the weights decay
    after the step. (torch.optim.AdamW does both the other way round, which hardly shows.)
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True):
        settings = {"lr": lr, "betas": betas, "eps": eps}
        super().__init__(params, settings | {"weight_decay": weight_decay, "correct_bias": correct_bias})
        for group in self.param_groups:
            if "rank" in group:
                group.update(DEFAULTS | group)
                if group["rank"] < 1 or group["update_proj_gap"] < 1 or group["proj_type"] not in PROJ_TYPES:
                    raise ValueError(
                        f"Rank and gap are at least 1, the type is one of {', '.join(PROJ_TYPES)}."
                    )
                if any(each.ndim != 2 for each in group["params"]):
                    raise ValueError(
                        "Only a matrix can be projected: put vectors into a group without a rank."
                    )

    def step(self, closure: Callable | None = None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    galore_step(weight, weight.grad, self.state[weight], group)
        return loss


def galore_groups(
    model: nn.Module, targets: str | Sequence[str], rank: int, **projection: float | str
) -> list[dict]:
    """Parameter groups for a GaLore optimiser, ours or galore_torch's: the rest, and the projected matrices.

    `targets` as target_names takes them ("all-linear": every linear layer but the head). `projection` replaces one of
    DEFAULTS. Frozen parameters are left out; so is an empty group.

    Steps:
    1. Collect the weights of the target layers.
    2. The first group: every other parameter that requires a gradient (embeddings, norms, biases, the head).
    3. The second: the target weights that require one, with "rank" and DEFAULTS | projection.
    """
    if unknown := set(projection) - set(DEFAULTS):
        raise ValueError(f"A projection has {', '.join(DEFAULTS)}; not {', '.join(unknown)}.")
    chosen = {id(model.get_submodule(name).weight) for name in target_names(model, targets)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [each for each in trained if id(each) not in chosen]},
        {"params": [each for each in trained if id(each) in chosen], "rank": rank} | DEFAULTS | projection,
    ]
    return [group for group in groups if group["params"]]


def update_in_backward(
    groups: Sequence[dict], make: Callable[[list[dict]], torch.optim.Optimizer]
) -> tuple[dict[nn.Parameter, torch.optim.Optimizer], Callable[[], None]]:
    """Per-layer updates: a parameter steps within backward(), as soon as its gradient is complete, and drops it.

    Then one gradient exists at a time instead of all. `make` turns parameter groups into an optimiser. Returns each
    parameter's optimiser (to change its lr) and a function that takes the hooks off again. backward() is all that the
    loop still calls; the gradients' norm over the whole model is never there to be clipped.
    Source: Zhao et al. 2024, section 4 (per-layer weight updates), after Lv et al. 2023, arXiv:2306.09782.

    Steps:
    1. Go through the groups' parameters that require a gradient: make a group of this parameter alone with the
       settings of its group, and an optimiser of that group.
    2. Write a hook that takes the parameter: step its optimiser, then set parameter.grad to None.
    3. Register it with parameter.register_post_accumulate_grad_hook; keep what that returns.
    4. Return the optimisers, and a function that calls remove() on everything that was kept.
    """
    optimizers, handles = {}, []

    def update(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for group in groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                optimizers[parameter] = make([{**group, "params": [parameter]}])
                handles.append(parameter.register_post_accumulate_grad_hook(update))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return optimizers, remove


def energy_curve(gradient: torch.Tensor) -> torch.Tensor:
    """The share of a matrix's energy (squared Frobenius norm) in its first 1, 2, 3, ... singular directions.

    Returns a vector as long as the matrix's smaller side, ending in 1: entry k - 1 is the most that any projection of
    rank k can keep. All zeros for a matrix of zeros.

    Steps:
    1. The singular values, torch.linalg.svdvals, in float32 at least; square them.
    2. Their running sum, over the whole sum.
    """
    matrix = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
    energy = torch.linalg.svdvals(matrix).square()
    total = energy.sum()
    return energy.cumsum(0) / total if total > 0 else energy


def energy_kept(gradient: torch.Tensor, projector: Projector) -> float:
    """The share of this gradient's energy that the projector's present basis keeps; its own basis would keep the most.

    Between two refreshes the basis belongs to an older gradient of another batch.
    """
    low = gradient.detach()
    low = low if projector.left is None else projector.left.T @ low
    low = low if projector.right is None else low @ projector.right.T
    return (low.square().sum() / gradient.detach().square().sum()).item()


def gradient_energy(model: nn.Module, targets: str | Sequence[str] = "all-linear") -> dict[str, torch.Tensor]:
    """energy_curve of every target layer's gradient, by name, after a backward(); layers without one are left out."""
    weights = {name: model.get_submodule(name).weight for name in target_names(model, targets)}
    return {name: energy_curve(weight.grad) for name, weight in weights.items() if weight.grad is not None}


# --- arithmetic


def galore_numbers(shape: Sequence[int], rank: int, proj_type: str = "std") -> tuple[int, int]:
    """How many numbers GaLore keeps for a weight (out, in): in one of Adam's two averages, and in the basis.

    Source: Zhao et al. 2024, table 1: with m <= n the smaller and larger side, n * rank and m * rank for "std".

    Steps:
    1. A basis has no more directions than the smaller side: rank = min(rank, out, in).
    2. projection_side says what is projected. "left": the average is (rank, in), the basis (out, rank). "right": the
       average (out, rank), the basis (rank, in). "full": the average (rank, rank), and both bases.
    """
    out, in_ = shape
    rank = min(rank, out, in_)
    left, right, both = (rank * in_, out * rank), (out * rank, rank * in_), (rank * rank, rank * (out + in_))
    return {"left": left, "right": right, "full": both}[projection_side(shape, proj_type)]


def adam_bytes(numbers: int, state: int) -> int:
    """Bytes of Adam's two averages of so many numbers each, at `state` bytes a number.

    state = 1 is bitsandbytes' 8 bits: a byte each and a float32 scale for every started block of 256; below 4,096
    numbers it stays with float32. (Its two codebooks, 2 KB in all, are shared and not counted here.)
    """
    if state == 1 and numbers < 4096:
        state = 4
    return 2 * (numbers * state + (4 * math.ceil(numbers / 256) if state == 1 else 0))


@dataclass(frozen=True)
class GaLoreBytes:
    """What a training step holds, in bytes; activations come on top, and so does what an SVD needs for a moment."""

    weights: int
    gradients: int  # the most that exist at once
    projected: int  # Adam's averages of the projected matrices
    plain: int  # Adam's averages of the rest: embeddings, head, norms
    projectors: int

    @property
    def optimizer(self) -> int:
        return self.projected + self.plain + self.projectors

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def galore_bytes(
    model: nn.Module,
    rank: int | None,
    *,
    targets: str | Sequence[str] = "all-linear",
    weight: int = 2,
    state: int = 2,
    projector: int | None = None,
    proj_type: str = "std",
    per_layer: bool = False,
) -> GaLoreBytes:
    """Bytes that GaLore (or plain Adam: rank None) holds while it trains `model`; a meta-device model will do.

    `weight`, `state` and `projector` are the bytes of a number: 4 for float32, 2 for bfloat16, 1 for 8-bit states
    (`state` only). A basis is as wide as the weight's gradient unless `projector` says otherwise.

    Steps:
    1. weights: every parameter, once. gradients: every parameter that trains; with `per_layer` the largest one alone.
    2. plain: adam_bytes of each trained parameter that is no target (with rank None: of each).
    3. projected: adam_bytes of galore_numbers' average for each trained target.
    4. projectors: galore_numbers' basis of each, at `projector` bytes a number.
    """
    chosen = set()
    if rank is not None:
        chosen = {id(model.get_submodule(name).weight) for name in target_names(model, targets)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() * weight for parameter in trained]
    counts = [galore_numbers(each.shape, rank, proj_type) for each in trained if id(each) in chosen]
    return GaLoreBytes(
        weights=weight * sum(parameter.numel() for parameter in model.parameters()),
        gradients=max(sizes, default=0) if per_layer else sum(sizes),
        projected=sum(adam_bytes(average, state) for average, _ in counts),
        plain=sum(adam_bytes(each.numel(), state) for each in trained if id(each) not in chosen),
        projectors=(projector or weight) * sum(basis for _, basis in counts),
    )
