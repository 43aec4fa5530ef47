"""The checks of lab 02, tune LoRA first."""

import torch

from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant

SHAPES = [(8, 8), (8, 8), (20, 8)]  # one unit of rank: 16 + 16 + 28 = 60


@exercise(
    "rank_for_budget",
    reference="labs_lib.methods.tuning:rank_for_budget",
    hints=[
        "A is (rank, in) and B is (out, rank).",
        "Layers add up: every one gets the same rank.",
        "Use // to round down.",
    ],
)
def check_rank_for_budget(candidate, ref):
    got = candidate(SHAPES, 300)
    expect(
        got != 300 // 28 and got != 300 // 20,
        "that is one layer's rank: every layer pays, so sum over all of them",
    )
    expect(got != 300 // 288, "in * out is the full matrix: a rank costs in + out")
    expect(got == 5, f"60 parameters a rank and a budget of 300 make rank 5, not {got!r}")
    got = candidate(SHAPES, 359)
    expect(isinstance(got, int), f"a rank is a whole number, not {got!r}: round down")
    expect(got == 5, f"359 parameters pay for rank 5, not {got}: stay within the budget")
    try:
        low = candidate(SHAPES, 59)
    except ValueError as error:
        expect("60" in str(error), "name the smallest budget in the error: what should the reader do?")
    else:
        raise Diagnosis(f"59 parameters do not pay for rank 1, yet you returned {low}: raise ValueError")


@mutant("rank_for_budget", says="in + out")
def full_matrices(shapes, budget):
    return budget // sum(out * in_ for out, in_ in shapes)


@mutant("rank_for_budget", says="every layer pays")
def last_layer_only(shapes, budget):
    return budget // sum(shapes[-1])


@mutant("rank_for_budget", says="whole number")
def not_rounded(shapes, budget):
    rank = budget / sum(map(sum, shapes))
    return int(rank) if rank == int(rank) else rank


@mutant("rank_for_budget", says="within the budget")
def rounded_up(shapes, budget):
    return -(-budget // sum(map(sum, shapes)))


@mutant("rank_for_budget", says="do not pay for rank 1")
def rank_zero(shapes, budget):
    return budget // sum(map(sum, shapes))


def _first_change(lr: float, alpha: float, optimizer: str, rank: int = 4) -> torch.Tensor:
    """The weight's change after one step of a real optimizer on a random LoRA layer and a fixed loss."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, 8, generator=generator), torch.zeros(6, rank)
    x, target = torch.randn(16, 8, generator=generator), torch.randn(16, 6, generator=generator)
    a.requires_grad_(True), b.requires_grad_(True)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    steps = kind([a, b], lr=lr)
    ((x @ (alpha / rank * b @ a).T - target) ** 2).mean().backward()
    steps.step()
    return (alpha / rank * b @ a).detach()


@exercise(
    "equivalent_rate",
    reference="labs_lib.methods.tuning:equivalent_rate",
    hints=[
        "Write the weight's first change: s times the step of B, times A.",
        "How does the gradient of B depend on s? Use the chain rule on s B A x.",
        "Adam's first step is lr times the sign of the gradient: its size does not matter.",
    ],
)
def check_equivalent_rate(candidate, ref):
    for optimizer in ("sgd", "adam"):
        lr = candidate(0.01, 16, 64, optimizer)
        expect(lr is not None, f"no rate came back for {optimizer}")
        expect(
            lr < 0.01, f"a larger alpha needs a smaller rate with {optimizer}, yet you gave {lr:g} for 0.01"
        )
        if optimizer == "sgd" and abs(lr - 0.0025) < 1e-9:
            raise Diagnosis("with SGD the scale counts twice: once in the gradient of B, once in the weight")
        if optimizer == "adam" and abs(lr - 0.000625) < 1e-9:
            raise Diagnosis("Adam cancels the gradient's size: the scale counts once, not squared")
        close(
            _first_change(lr, 64, optimizer),
            _first_change(0.01, 16, optimizer),
            f"the weight's first change with {optimizer}",
        )
    try:
        candidate(0.01, 16, 64, "adafactor")
    except ValueError:
        return
    raise Diagnosis("an optimizer you know nothing about should raise ValueError, not get an answer")


@mutant("equivalent_rate", says="counts twice")
def always_linear(lr, alpha, new_alpha, optimizer):
    return lr * alpha / new_alpha


@mutant("equivalent_rate", says="counts once")
def always_squared(lr, alpha, new_alpha, optimizer):
    return lr * (alpha / new_alpha) ** 2


@mutant("equivalent_rate", says="needs a smaller rate")
def upside_down(lr, alpha, new_alpha, optimizer):
    return lr * (new_alpha / alpha) ** (2 if optimizer == "sgd" else 1)


@mutant("equivalent_rate", says="ValueError")
def any_optimizer(lr, alpha, new_alpha, optimizer):
    return lr * (alpha / new_alpha) ** (2 if optimizer == "sgd" else 1)


@exercise(
    "pick_rate",
    reference="labs_lib.methods.tuning:pick_rate",
    hints=[
        "max(scores, key=...) or sorted(...)",
        "min(scores) is the smallest rate tried, since a dict's keys are compared.",
    ],
)
def check_pick_rate(candidate, ref):
    inside = {1e-3: 0.2, 3e-3: 0.9, 1e-2: 0.7}
    got = candidate(inside)
    expect(isinstance(got, tuple) and len(got) == 2, f"return a pair (rate, at the edge?), not {got!r}")
    expect(got[0] != 1e-3, "1e-3 has the lowest score here: higher is better")
    expect(got[0] == 3e-3, f"the best rate of {inside} is 0.003, not {got[0]}")
    expect(got[1] is False, "0.003 lies inside the grid: not at the edge")
    expect(candidate({1e-3: 0.2, 3e-3: 0.7, 1e-2: 0.9})[1] is True, "the largest rate is an edge too")
    expect(candidate({1e-3: 0.9, 3e-3: 0.7, 1e-2: 0.2})[1] is True, "the smallest rate is an edge too")
    expect(
        candidate({1e-2: 0.9, 1e-3: 0.1, 3e-3: 0.9})[0] == 3e-3,
        "of equal scores take the lowest rate, in whatever order they come",
    )


@mutant("pick_rate", says="higher is better")
def lowest(scores):
    best = min(scores, key=scores.get)
    return best, best in (min(scores), max(scores))


@mutant("pick_rate", says="largest rate is an edge")
def one_edge(scores):
    best = min(scores, key=lambda lr: (-scores[lr], lr))
    return best, best == min(scores)


@mutant("pick_rate", says="lowest rate")
def first_of_equals(scores):
    best = max(scores, key=scores.get)
    return best, best in (min(scores), max(scores))


@mutant("pick_rate", says="pair")
def rate_only(scores):
    return max(scores, key=scores.get)


answer(
    "lab02.all_linear_rank",
    reference=lambda: 2,
    hints=[
        "Per unit of rank, q and v cost 2 * (128 + 128) in each of 4 layers.",
        "All linear layers cost 4 * 256 + 3 * 448 in each.",
    ],
    mistakes={
        9: "that is the rank on q and v",
        1: "rank 1 uses only half of the budget",
        3: "rank 3 goes over the budget",
    },
)
