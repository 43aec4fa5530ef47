"""The checks of lab 18, mixture of LoRA experts."""

import torch
from torch.nn import functional as F

from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant
from labs_lib.methods.mixture import balance_loss, mixture_delta

# --- gate_weights


@exercise(
    "gate_weights",
    reference="labs_lib.methods.mixture:gate_weights",
    hints=[
        "softmax(dim=-1): the experts are the last dimension.",
        "torch.full_like(logits, -torch.inf).scatter(-1, chosen, values) keeps only the chosen ones.",
    ],
)
def check_gate_weights(candidate, ref):
    logits = torch.randn(3, 5, 4)
    got = candidate(logits)
    expect(got is not None, "no shares came back: return them")
    expect(got.shape == (3, 5, 4), f"logits (3, 5, 4) have as many shares, not {tuple(got.shape)}")
    if torch.allclose(got, logits.softmax(1), atol=1e-5):
        raise Diagnosis(
            "the softmax is over the tokens: the shares of the experts, the last dimension, add up to 1"
        )
    close(got, ref(logits), "the shares without top_k")
    got = candidate(logits, top_k=2)
    values, chosen = logits.topk(2, dim=-1)
    if torch.allclose(got, torch.zeros_like(logits).scatter(-1, chosen, values).softmax(-1), atol=1e-5):
        raise Diagnosis("a logit of zero is a logit like any other: put -inf in the place of the others")
    expect(
        bool(((got > 0).sum(-1) == 2).all()),
        "with top_k=2 two experts of each token have a share and the others exactly zero",
    )
    if torch.allclose(got.sum(-1), torch.ones(3, 5), atol=1e-5) is False:
        raise Diagnosis(
            "with top_k the shares no longer add up to 1: take the softmax after the others are out"
        )
    close(got, ref(logits, 2), "the shares with top_k=2")


@mutant("gate_weights", says="over the tokens")
def over_tokens(logits, top_k=None):
    return logits.softmax(dim=1)


@mutant("gate_weights", says="exactly zero")
def top_k_ignored(logits, top_k=None):
    return logits.softmax(dim=-1)


@mutant("gate_weights", says="no longer add up")
def softmax_first(logits, top_k=None):
    shares = logits.softmax(dim=-1)
    if top_k is None:
        return shares
    values, chosen = shares.topk(top_k, dim=-1)
    return torch.zeros_like(shares).scatter(-1, chosen, values)


@mutant("gate_weights", says="like any other")
def zeros_for_infinity(logits, top_k=None):
    if top_k is not None:
        values, chosen = logits.topk(top_k, dim=-1)
        logits = torch.zeros_like(logits).scatter(-1, chosen, values)
    return logits.softmax(dim=-1)


# --- mixture_delta


@exercise(
    "mixture_delta",
    reference="labs_lib.methods.mixture:mixture_delta",
    hints=[
        'torch.einsum("...i,eri->...er", x, A) sends x through every A.',
        "weights (..., experts) needs a last dimension of 1 to multiply (..., experts, rank): unsqueeze(-1).",
    ],
)
def check_mixture_delta(candidate, ref):
    x, A, B = torch.randn(2, 3, 6), torch.randn(4, 2, 6), torch.randn(4, 5, 2)
    weights = torch.rand(2, 3, 4)
    got, right = candidate(x, A, B, weights), ref(x, A, B, weights)
    expect(got is not None, "no update came back: return it")
    expect(got.shape == (2, 3, 5), f"x (2, 3, 6) gives an update (2, 3, 5), not {tuple(got.shape)}")
    if torch.allclose(got, ref(x, A, B, torch.ones_like(weights)), atol=1e-4):
        raise Diagnosis("the weights are not used: every expert counts in full")
    if torch.allclose(got, right / 4, atol=1e-4):
        raise Diagnosis("that is the mean over the experts: the weights are shares already, so sum")
    if torch.allclose(got, ref(x, A, B, weights.mean((0, 1), keepdim=True).expand_as(weights)), atol=1e-4):
        raise Diagnosis("every token gets the same weights: each token has its own")
    close(got, right, "the update", tolerance=1e-4)


@mutant("mixture_delta", says="not used")
def unweighted(x, A, B, weights):
    return mixture_delta(x, A, B, torch.ones_like(weights))


@mutant("mixture_delta", says="mean over the experts")
def mean_of_experts(x, A, B, weights):
    return mixture_delta(x, A, B, weights) / len(A)


@mutant("mixture_delta", says="its own")
def one_weight_for_all_tokens(x, A, B, weights):
    return mixture_delta(x, A, B, weights.mean((0, 1), keepdim=True).expand_as(weights))


# --- balance_loss


@exercise(
    "balance_loss",
    reference="labs_lib.methods.mixture:balance_loss",
    hints=[
        "torch.bincount(weights.argmax(-1), minlength=experts) counts how often each expert is the largest.",
        "Both f and P are shares over the tokens: divide the counts by the number of tokens.",
    ],
)
def check_balance_loss(candidate, ref):
    even, one = torch.eye(4).repeat(2, 1).reshape(2, 4, 4), torch.eye(4)[[2] * 6].reshape(2, 3, 4)
    got = candidate(even)
    expect(got is not None, "no number came back: return it")
    got, all_to_one = float(got), float(candidate(one))
    expect(abs(got - 0.25) > 1e-4, "for even gates it is 1/4 so far: multiply by the number of experts")
    expect(abs(got - 8) > 1e-4, "f is a share: divide the counts by the number of tokens")
    expect(abs(got - 1) < 1e-4, f"for even gates it is 1, not {got:.4g}")
    expect(abs(all_to_one - 4) < 1e-4, f"if one of 4 experts gets everything it is 4, not {all_to_one:.4g}")
    logits = torch.randn(3, 7, 4, requires_grad=True)
    loss = candidate(F.softmax(logits, -1))
    expect(
        loss.requires_grad,
        "no gradient reaches the gate: counting has none, so the mean weights P must be a factor",
    )
    close(loss, ref(F.softmax(logits, -1)), "the loss of uneven gates")


@mutant("balance_loss", says="multiply by the number")
def without_experts(weights):
    return balance_loss(weights) / weights.shape[-1]


@mutant("balance_loss", says="f is a share")
def counts_for_shares(weights):
    return balance_loss(weights) * weights.flatten(0, -2).shape[0]


@mutant("balance_loss", says="no gradient")
def counts_twice(weights):
    weights = weights.flatten(0, -2)
    share = torch.bincount(weights.argmax(-1), minlength=weights.shape[-1]) / len(weights)
    return weights.shape[-1] * (share * share).sum()


# --- short answers

answer(
    "lab18.gate_numbers",
    reference=1032,
    tolerance=0,
    mistakes={
        1024: "the router has a bias, too: one number per expert and block",
        516: "that is one expert: each has its own row",
        258: "that is one block: each has its own gate",
    },
    hints=["A linear layer from 128 to 2 in each block.", "(128 + 1) * 2 per block."],
)
