"""A mixture of LoRA experts: trained adapters stay frozen, and a learned gate says, token by token, how much of each.

One gate per block reads what the block reads (MoLE, MixLoRA), so a forward pass is one pass and a cache works. A gate
with zero weights starts as the mean of all experts.

Sources: Wu, Huang and Wei 2024, "Mixture of LoRA Experts" (MoLE), arXiv:2404.13628; Li et al. 2024, MixLoRA,
arXiv:2404.15159; Buehler and Buehler 2024, X-LoRA, arXiv:2402.07148.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from labs_lib.methods.modules import replace


def gate_weights(logits: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
    """Shares of the experts, from a router's logits (..., experts): not negative, and 1 in sum.

    With `top_k`, only so many experts of each token get a share, and the others exactly zero: they need not be run.
    With top_k = 1 that share is 1 whatever the logits are, so a router learns nothing: train it with more.
    Source: Shazeer et al. 2017, arXiv:1701.06538, section 2.1 (keep the top k, then softmax).

    Steps:
    1. Without top_k: the softmax over the last dimension.
    2. With it: torch.topk finds the largest logits; put -inf in the place of all others (a full_like and a scatter).
    3. The softmax of that: exp(-inf) is zero.
    """
    if top_k is not None:
        values, chosen = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, chosen, values)
    return logits.softmax(dim=-1)


def mixture_delta(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What a mixture adds to a layer's output: the sum over experts e of weights_e * B_e A_e x.

    x is (..., in), A (experts, rank, in), B (experts, out, rank) with each expert's scale in it, `weights`
    (..., experts); returns (..., out). No expert's (out, in) update is ever formed.
    Source: Wu et al. 2024, section 3.2; where X-LoRA weights the input of A we weight its output, which is the same.

    Steps:
    1. Through all A at once: (..., experts, rank), by torch.einsum or a broadcast.
    2. Multiply each expert's `rank` numbers by its weight.
    3. Through all B, summed over experts and rank.
    """
    low = torch.einsum("...i,eri->...er", x, A) * weights.unsqueeze(-1)
    return torch.einsum("...er,eor->...o", low, B)


def balance_loss(weights: torch.Tensor) -> torch.Tensor:
    """How unevenly tokens are spread over experts: 1 if all experts get as much, up to their number if one gets all.

    `weights` is (..., experts), the gate's shares. Add a small multiple of it to the loss if every expert should work.
    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6, without the factor alpha.

    Steps:
    1. Flatten all but the last dimension: one row per token.
    2. f: the share of tokens whose largest weight is expert e's (no gradient flows through it: it only counts).
    3. P: the mean weight of expert e over the tokens.
    4. Number of experts times the sum of f * P.
    """
    weights = weights.flatten(0, -2)
    experts = weights.shape[-1]
    share = torch.bincount(weights.argmax(dim=-1), minlength=experts) / len(weights)
    return experts * (share.to(weights) * weights.mean(dim=0)).sum()


class Gate(nn.Module):
    """A router: from a hidden state (..., width) to weights (..., experts), which it keeps for the layers behind it.

    `weights` is None until it has seen something: the experts are silent then. `fixed`, if set, stands in for what it
    would say: (experts,), the same for every token, or (..., experts).
    """

    def __init__(self, width: int, experts: int, top_k: int | None = None) -> None:
        super().__init__()
        if top_k is not None and not 1 <= top_k <= experts:
            raise ValueError(f"top_k is between 1 and the number of experts, {experts}: got {top_k}.")
        self.router = nn.Linear(width, experts)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)
        self.top_k, self.weights, self.fixed = top_k, None, None

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        own = self.router.weight
        if self.fixed is None:
            self.weights = gate_weights(self.router(h.to(own.dtype)), self.top_k)
        else:
            self.weights = self.fixed.to(own)
        return self.weights


class MixtureLinear(nn.Module):
    """A frozen linear layer with frozen LoRA experts, weighted by a gate that it shares with others.

    A is (experts, rank, in), B (experts, out, rank), its scale included; experts of a smaller rank are filled up with
    zeros. The sum over the experts is taken in their dtype, float32 as a rule, whatever the base's is.
    """

    def __init__(self, base: nn.Linear, A: torch.Tensor, B: torch.Tensor, gate: Gate) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.register_buffer("A", A.to(base.weight.device))
        self.register_buffer("B", B.to(base.weight.device))
        self.__dict__["gate"] = gate  # not a submodule: the block owns it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.gate.weights is None:
            return y
        weights = self.gate.weights.to(self.A.dtype)
        return (y + mixture_delta(x.to(self.A.dtype), self.A, self.B, weights)).to(y.dtype)


def stack_experts(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor, float]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each expert's (A (rank, in), B (out, rank), scale), as two tensors: A (experts, rank, in), and B scaled."""
    rank = max(A.shape[0] for A, _, _ in factors)

    def padded(matrix: torch.Tensor, dim: int) -> torch.Tensor:
        missing = [*matrix.shape]
        missing[dim] = rank - matrix.shape[dim]
        return torch.cat([matrix, matrix.new_zeros(missing)], dim=dim)

    return (
        torch.stack([padded(A, 0) for A, _, _ in factors]),
        torch.stack([padded(B * scale, 1) for _, B, scale in factors]),
    )


def inject_mixture(
    model: nn.Module,
    experts: Sequence[Mapping[str, torch.Tensor]],
    scales: Sequence[float],
    top_k: int | None = None,
    blocks: str = "model.layers",
) -> nn.Module:
    """Freeze `model`, put every expert into it, and a gate in front of each block; only the gates train.

    `experts` are adapters' tensors under PEFT's names (lora_state_dict), all of the same layers; `scales` their
    alpha / rank. Returns the model, changed in place.

    Raises:
        ValueError: fewer than two experts, experts of different layers, or a layer outside of `blocks`.
    """
    if len(experts) < 2 or len(experts) != len(scales):
        raise ValueError(f"A mixture needs two experts or more, and a scale for each: got {len(experts)}.")
    if any(each.keys() != experts[0].keys() for each in experts):
        raise ValueError(
            "The experts adapt different layers: a mixture needs the same layers in all of them."
        )
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    names = [key.removeprefix(prefix).removesuffix(suffix) for key in experts[0] if key.endswith(suffix)]
    if outside := [name for name in names if not name.startswith(f"{blocks}.")]:
        raise ValueError(f"{outside[0]} is in no block of {blocks}, so no gate would reach it.")
    model.requires_grad_(False)
    for index, block in enumerate(model.get_submodule(blocks)):
        inside = [name for name in names if name.startswith(f"{blocks}.{index}.")]
        if not inside:
            continue
        first = next(part for part in block.modules() if isinstance(part, nn.Linear))
        gate = Gate(first.in_features, len(experts), top_k)
        block.gate = gate.to(first.weight.device, torch.promote_types(first.weight.dtype, torch.float32))
        block.register_forward_pre_hook(_ask_gate, with_kwargs=True)
        for name in inside:
            factors = [
                (each[f"{prefix}{name}{suffix}"], each[f"{prefix}{name}.lora_B.weight"], scale)
                for each, scale in zip(experts, scales, strict=True)
            ]
            replace(
                model, name, MixtureLinear(model.get_submodule(name), *stack_experts(factors), block.gate)
            )
    return model


def _ask_gate(block: nn.Module, args: tuple, kwargs: dict) -> None:
    block.gate(args[0] if args else kwargs["hidden_states"])


def gates_of(model: nn.Module) -> dict[str, Gate]:
    """The gates by name, in the order of the blocks."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Gate)}


def fix_gates(model: nn.Module, weights: Sequence[float] | torch.Tensor | None) -> nn.Module:
    """Let every gate say these weights instead of its own; None gives it its voice back. Returns the model."""
    for gate in gates_of(model).values():
        gate.fixed = None if weights is None else torch.as_tensor(weights)
    return model


def balance(model: nn.Module) -> torch.Tensor:
    """The mean balance_loss of the gates, after a forward pass."""
    return torch.stack([balance_loss(gate.weights) for gate in gates_of(model).values()]).mean()
