"""LoRA+ from scratch: the same two matrices as LoRA, with a larger learning rate for B than for A.

Nothing of the model changes, only the optimiser's parameter groups. Groups, their order and their weight decay are
those of PEFT's create_loraplus_optimizer, so both take the same steps.

Source: Hayou, Ghosh & Yu 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354.
"""

import torch
from torch import nn


def feature_change(
    A: torch.Tensor, B: torch.Tensor, dA: torch.Tensor, dB: torch.Tensor, x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What one optimiser step changes in the adapter's output B A x, split by who caused it.

    A (rank, in) and B (out, rank) are the factors before the step, dA and dB the step; x is (batch, in). Returns
    three tensors (batch, out) whose sum is (B + dB)(A + dA) x - B A x.
    Source: Hayou et al. 2024, section 3, where they are called delta 2, delta 1 and delta 3.

    Steps:
    1. "B": what the step of B does while A stays: dB A x.
    2. "A": what the step of A does while B stays: B dA x.
    3. "both": what only the two together do: dB dA x.
    """
    return {"B": x @ A.T @ dB.T, "A": x @ dA.T @ B.T, "both": x @ dA.T @ dB.T}


def lora_plus_groups(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    """Parameter groups for any torch optimiser: A learns at `lr`, B at `lr * ratio`.

    Only what requires a gradient is in a group. Vectors (DoRA's magnitudes, say) go with B, every other matrix goes
    with A, and biases do not decay.
    Source: Hayou et al. 2024, section 4; the groups are those of the authors' code and PEFT.

    Steps:
    1. Refuse a ratio that is not positive (ValueError).
    2. Go through model.named_parameters(), leaving out what is frozen.
    3. Sort: a name with "bias" in it goes into the third group; a vector, or a name with "lora_B" in it, into the
       second; the rest into the first.
    4. Give each group its "params", "lr" and "weight_decay": the second and third have B's rate, the third no decay.
       Leave out empty groups.
    """
    if ratio <= 0:
        raise ValueError(f"ratio is B's learning rate over A's, so above 0: got {ratio}.")
    first, second, biases = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with_b = "lora_B" in name or parameter.ndim == 1
            (biases if "bias" in name else second if with_b else first).append(parameter)
    groups = [
        {"params": first, "lr": lr, "weight_decay": weight_decay},
        {"params": second, "lr": lr * ratio, "weight_decay": weight_decay},
        {"params": biases, "lr": lr * ratio, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def lora_plus_optimizer(
    model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0, **arguments
) -> torch.optim.AdamW:
    """AdamW over lora_plus_groups; `arguments` (betas, eps) go to AdamW. At ratio 1 it is AdamW(lr, weight_decay)."""
    return torch.optim.AdamW(lora_plus_groups(model, lr, ratio, weight_decay), lr=lr, **arguments)
