"""The checks of lab 07, AdaLoRA, and the mistakes that each must tell apart."""

import torch
from torch import nn
from torch.nn import functional as F

from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant
from labs_lib.methods.adalora import EPSILON, SVDLinear, keep_best, rank_budget, smoothed_importance

# --- SVDLinear


@exercise(
    "SVDLinear",
    reference="labs_lib.methods.adalora:SVDLinear",
    hints=[
        "A * E multiplies row i of A by number i of E: (rank, in) times (rank, 1).",
        "forward: x @ (A * E).T goes to the ranks, @ B.T from there to the outputs.",
        "The scale is alpha / (rank + EPSILON), in delta and in forward alike.",
    ],
)
def check_svd_linear(candidate, ref):
    base, x, rank, alpha = nn.Linear(6, 4), torch.randn(2, 5, 6), 3, 7.0
    weight, expected = base.weight.detach().clone(), base(x).detach()
    layer = candidate(base, rank, alpha)
    got = layer(x)
    expect(got is not None, "forward returns None: is a `return` missing?")
    close(got, expected, "E is zero at first, so the output should be base(x), but it")
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_E, layer.lora_B):
            factor.normal_()
    A, E, B = (f.detach() for f in (layer.lora_A, layer.lora_E, layer.lora_B))
    scale = alpha / (rank + EPSILON)
    right = B @ (A * E) * scale
    _one_of(
        layer.delta().detach(),
        right,
        {
            "E is missing: each rank is weighed by its own number.": B @ A * scale,
            "The scale is missing: alpha / (rank + EPSILON).": B @ (A * E),
            "The scale is alpha; where is the rank? It is alpha / (rank + EPSILON).": B @ (A * E) * alpha,
            "Did you forget a transpose? This is (in, out); a weight is (out, in).": right.T,
        },
        "delta()",
    )
    _one_of(
        layer(x).detach(),
        expected + F.linear(x, right),
        {
            "The update comes out alone: add it to base(x).": F.linear(x, right),
            "forward leaves E out: use A * E.": expected + F.linear(x, B @ A * scale),
            "forward leaves the scale out.": expected + F.linear(x, B @ (A * E)),
            "The update never arrives: the output is still base(x).": expected,
        },
        "the output",
    )
    layer(x).sum().backward()
    expect(
        layer.lora_E.grad is not None, "No gradient reaches lora_E: use it itself, not its .data or detach()."
    )
    before = layer(x).detach()
    layer.merge()
    close(layer.base.weight.detach(), weight + right, "the merged weight")
    close(layer(x).detach(), before, "while merged, forward is base(x) alone; the output after merging")
    layer.merge()
    close(layer.base.weight.detach(), weight + right, "merging twice should add the update once. The weight")


def _one_of(got, expected, mistakes, what) -> None:
    """Like `close`, but a result that equals a known mistake gets that mistake's words."""
    if isinstance(got, torch.Tensor):
        for says, wrong in mistakes.items():
            if got.shape == wrong.shape and torch.allclose(got.float(), wrong, rtol=1e-4, atol=1e-5):
                raise Diagnosis(says)
    close(got, expected, what, 1e-4)


@mutant("SVDLinear", says="E is missing")
class DeltaWithoutE(SVDLinear):
    def delta(self):
        return self.lora_B @ self.lora_A * self.alpha / (self.rank + EPSILON)


@mutant("SVDLinear", says="scale is missing")
class DeltaWithoutScale(SVDLinear):
    def delta(self):
        return self.lora_B @ (self.lora_A * self.lora_E)


@mutant("SVDLinear", says="where is the rank")
class ScaleWithoutRank(SVDLinear):
    def delta(self):
        return self.lora_B @ (self.lora_A * self.lora_E) * self.alpha


@mutant("SVDLinear", says="transpose")
class TransposedDelta(SVDLinear):
    def delta(self):
        return super().delta().T


@mutant("SVDLinear", says="E is zero at first")
class ForwardWithoutE(SVDLinear):
    def forward(self, x):
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T * self.alpha / (self.rank + EPSILON)


@mutant("SVDLinear", says="leaves the scale out")
class ForwardWithoutScale(SVDLinear):
    def forward(self, x):
        return self.base(x) + x @ (self.lora_A * self.lora_E).T @ self.lora_B.T


@mutant("SVDLinear", says="never arrives")
class BaseOnly(SVDLinear):
    def forward(self, x):
        return self.base(x)


@mutant("SVDLinear", says="No gradient reaches lora_E")
class UsesData(SVDLinear):
    def forward(self, x):
        if self.merged:
            return self.base(x)
        scaled = self.lora_A * self.lora_E.data
        return self.base(x) + x @ scaled.T @ self.lora_B.T * self.alpha / (self.rank + EPSILON)


@mutant("SVDLinear", says="forward is base(x) alone")
class ForwardIgnoresMerged(SVDLinear):
    def forward(self, x):
        scaled = self.lora_A * self.lora_E
        return self.base(x) + x @ scaled.T @ self.lora_B.T * self.alpha / (self.rank + EPSILON)


@mutant("SVDLinear", says="merging twice")
class MergesAgain(SVDLinear):
    def merge(self):
        self.merged = False
        super().merge()


# --- smoothed_importance


@exercise(
    "smoothed_importance",
    reference="labs_lib.methods.adalora:smoothed_importance",
    hints=[
        "The sensitivity is |weight * gradient|, number by number.",
        "A running average keeps beta of the old value and takes 1 - beta of the new one.",
        "The spread looks at the distance from the new mean.",
    ],
)
def check_smoothed_importance(candidate, ref):
    weight, gradient = torch.tensor([2.0, -3.0, 0.5]), torch.tensor([1.0, 0.5, -4.0])
    mean, spread = torch.tensor([0.3, 0.1, 4.0]), torch.tensor([0.2, 0.7, 0.4])
    got = candidate(weight, gradient, mean, spread, 0.9, 0.6)
    expect(
        isinstance(got, tuple | list) and len(got) == 2, "Return two tensors: the new mean, the new spread."
    )
    sensitivity = (weight * gradient).abs()
    right = ref(weight, gradient, mean, spread, 0.9, 0.6)
    if torch.allclose(got[0], right[1]) and torch.allclose(got[1], right[0]):
        raise Diagnosis("Mean and spread are swapped: return the mean first.")
    _one_of(
        got[0],
        right[0],
        {
            "The sign is left in: it does not matter which way the loss would go, take abs().": 0.9 * mean
            + 0.1 * weight * gradient,
            "The weights of old and new are swapped: beta1 of the old mean.": 0.1 * mean + 0.9 * sensitivity,
            "That is the gradient alone: a large gradient on a zero weight costs nothing to remove.": 0.9
            * mean
            + 0.1 * gradient.abs(),
            "That is the weight alone: a large weight that the loss ignores is not important.": 0.9 * mean
            + 0.1 * weight.abs(),
            "Nothing is smoothed: that is this step's sensitivity.": sensitivity,
            "That is the mean's beta2: beta1 is for the mean.": 0.6 * mean + 0.4 * sensitivity,
        },
        "the new mean",
    )
    new = right[0]
    _one_of(
        got[1],
        right[1],
        {
            "The distance is taken from the old mean: take it from the new one.": 0.6 * spread
            + 0.4 * (sensitivity - mean).abs(),
            "The distance keeps its sign: take abs(), or ups and downs cancel.": 0.6 * spread
            + 0.4 * (sensitivity - new),
            "That is beta1: the spread has its own beta2.": 0.9 * spread + 0.1 * (sensitivity - new).abs(),
            "The spread is not smoothed: keep beta2 of the old one.": (sensitivity - new).abs(),
            "The spread is squared: it is a mean distance, not a variance.": 0.6 * spread
            + 0.4 * (sensitivity - new).square(),
        },
        "the new spread",
    )


def _importance(sensitivity=lambda w, g: (w * g).abs(), distance=lambda s, old, new: (s - new).abs()):
    """A variant of the right answer: another sensitivity, another distance."""

    def wrong(weight, gradient, mean, spread, beta1=0.85, beta2=0.85):
        now = sensitivity(weight, gradient)
        new = beta1 * mean + (1 - beta1) * now
        return new, beta2 * spread + (1 - beta2) * distance(now, mean, new)

    return wrong


mutant("smoothed_importance", says="sign is left in")(_importance(lambda w, g: w * g))
mutant("smoothed_importance", says="gradient alone")(_importance(lambda w, g: g.abs()))
mutant("smoothed_importance", says="weight alone")(_importance(lambda w, g: w.abs()))
mutant("smoothed_importance", says="old mean")(_importance(distance=lambda s, old, new: (s - old).abs()))
mutant("smoothed_importance", says="keeps its sign")(_importance(distance=lambda s, old, new: s - new))
mutant("smoothed_importance", says="squared")(_importance(distance=lambda s, old, new: (s - new).square()))


@mutant("smoothed_importance", says="old and new are swapped")
def swapped_betas(weight, gradient, mean, spread, beta1=0.85, beta2=0.85):
    return smoothed_importance(weight, gradient, mean, spread, 1 - beta1, beta2)


@mutant("smoothed_importance", says="beta1: the spread has its own")
def one_beta(weight, gradient, mean, spread, beta1=0.85, beta2=0.85):
    return smoothed_importance(weight, gradient, mean, spread, beta1, beta1)


@mutant("smoothed_importance", says="return the mean first")
def spread_first(weight, gradient, mean, spread, beta1=0.85, beta2=0.85):
    return smoothed_importance(weight, gradient, mean, spread, beta1, beta2)[::-1]


# --- rank_budget


@exercise(
    "rank_budget",
    reference="labs_lib.methods.adalora:rank_budget",
    hints=[
        "Three phases: all ranks, a falling budget, the target.",
        "The falling phase lasts total - final - warmup steps; step - warmup of them are over.",
        "int((start - target) * left**3 + target)",
    ],
)
def check_rank_budget(candidate, ref):
    settings = (120, 40, 100, 10, 20)  # start, target, total, warmup, final
    got = {step: candidate(step, *settings) for step in (1, 10, 11, 30, 60, 79, 80, 81, 100)}
    expect(all(g is not None for g in got.values()), "rank_budget returns None: is a `return` missing?")
    expect(got[1] == 120 and got[10] == 120, "During the warm-up, step 10 included, no rank is pruned.")
    expect(got[100] == 40 and got[81] == 40, "In the last steps the budget is the target.")
    expect(
        all(isinstance(g, int) for g in got.values()),
        "A budget is a whole number of ranks: round down with int().",
    )
    left = 1 - (30 - 10) / 70
    mistakes = {
        "That falls in a straight line; the schedule is a cubic: left**3.": 80 * left + 40,
        "That is a square; the schedule is a cubic: left**3.": 80 * left**2 + 40,
        "That rises: left is the share of the way still to go, not the share that is over.": 80
        * (1 - left) ** 3
        + 40,
        "The target is added to everything: only start - target shrinks.": 120 * left**3 + 40,
        "The warm-up is not taken off the way: step - warmup of it are over.": 80 * (1 - 30 / 80) ** 3 + 40,
        "The final phase is not taken off the way: divide by total - final - warmup.": 80 * (1 - 20 / 90) ** 3
        + 40,
        "It falls to zero: add the target.": 80 * left**3,
    }
    for says, wrong in mistakes.items():
        expect(got[30] != int(wrong), says)
    for step, value in got.items():
        close(value, ref(step, *settings), f"the budget at step {step}")


def _falling(share):
    def wrong(step, start, target, total, warmup=0, final=0):
        if step <= warmup or step >= total - final:
            return rank_budget(step, start, target, total, warmup, final)
        return int(share(step, start, target, total, warmup, final))

    return wrong


def _left(step, total, warmup, final):
    return 1 - (step - warmup) / (total - final - warmup)


mutant("rank_budget", says="straight line")(
    _falling(lambda s, a, b, t, w, f: (a - b) * _left(s, t, w, f) + b)
)
mutant("rank_budget", says="share that is over")(
    _falling(lambda s, a, b, t, w, f: (a - b) * (1 - _left(s, t, w, f)) ** 3 + b)
)
mutant("rank_budget", says="final phase is not taken off")(
    _falling(lambda s, a, b, t, w, f: (a - b) * (1 - (s - w) / (t - w)) ** 3 + b)
)
mutant("rank_budget", says="warm-up is not taken off")(
    _falling(lambda s, a, b, t, w, f: (a - b) * (1 - s / (t - f)) ** 3 + b)
)
mutant("rank_budget", says="falls to zero")(
    _falling(lambda s, a, b, t, w, f: (a - b) * _left(s, t, w, f) ** 3)
)


@mutant("rank_budget", says="no rank is pruned")
def no_warmup(step, start, target, total, warmup=0, final=0):
    return rank_budget(step, start, target, total, 0, final)


@mutant("rank_budget", says="the budget is the target")
def never_final(step, start, target, total, warmup=0, final=0):
    return rank_budget(step, start, target, total + 200, warmup, 0)


@mutant("rank_budget", says="whole number")
def not_rounded(step, start, target, total, warmup=0, final=0):
    if step <= warmup or step >= total - final:
        return rank_budget(step, start, target, total, warmup, final)
    return (start - target) * _left(step, total, warmup, final) ** 3 + target


# --- keep_best


@exercise(
    "keep_best",
    reference="labs_lib.methods.adalora:keep_best",
    hints=[
        "One threshold for the whole model: torch.cat(list(scores.values())).",
        "With 10 scores and a budget of 4, the 6th smallest and everything below it goes.",
        "{name: score > threshold for name, score in scores.items()}",
    ],
)
def check_keep_best(candidate, ref):
    scores = {
        "q": torch.tensor([0.9, 0.8, 0.7]),
        "v": torch.tensor([0.6, 0.1, 0.2]),
        "o": torch.tensor([0.05, 0.3, 0.4]),
    }
    for budget in (3, 5, 9):
        got = candidate(scores, budget)
        expect(
            isinstance(got, dict) and got.keys() == scores.keys(),
            "Return a dict with a mask for every layer.",
        )
        expect(
            all(isinstance(m, torch.Tensor) and m.dtype == torch.bool for m in got.values()),
            "Each mask should be a bool tensor: score > threshold is one.",
        )
        kept = sum(int(mask.sum()) for mask in got.values())
        each = {name: int(mask.sum()) for name, mask in got.items()}
        if budget == 3 and len(set(each.values())) == 1:
            raise Diagnosis("Every layer keeps the same number: that is LoRA. Put all scores in one vector.")
        if budget != 9:
            lowest = torch.cat(list(scores.values())).sort().values[:budget].max()
            inverted = all(torch.equal(got[n], s <= lowest) for n, s in scores.items())
            expect(not inverted, "That keeps the worst: the high scores are what the loss would miss.")
            expect(
                kept != budget + 1,
                f"One too many is kept: the {9 - budget}-th smallest score goes as well, so use >, not >=.",
            )
        expect(kept == budget, f"With a budget of {budget} of 9 ranks, {kept} are kept.")
        for name, mask in ref(scores, budget).items():
            expect(
                torch.equal(got[name], mask), f"The wrong ranks of {name} are kept with a budget of {budget}."
            )
    tied = candidate({"q": torch.tensor([1.0, 1.0, 2.0])}, 2)["q"].tolist()
    expect(
        tied == [False, False, True], "A tie at the threshold is pruned, as in PEFT: keep what is above it."
    )


@mutant("keep_best", says="that is LoRA")
def layer_by_layer(scores, budget):
    each = budget // len(scores)
    return {n: keep_best({n: s}, each)[n] for n, s in scores.items()}


@mutant("keep_best", says="One too many")
def threshold_included(scores, budget):
    everything = torch.cat(list(scores.values()))
    if budget >= len(everything):
        return keep_best(scores, budget)
    threshold = torch.kthvalue(everything, len(everything) - budget).values
    return {name: score >= threshold for name, score in scores.items()}


@mutant("keep_best", says="keeps the worst")
def keeps_the_worst(scores, budget):
    return keep_best({name: -score for name, score in scores.items()}, budget)


@mutant("keep_best", says="bool tensor")
def numbers(scores, budget):
    return {name: mask.float() for name, mask in keep_best(scores, budget).items()}


@mutant("keep_best", says="kthvalue")
def no_full_budget(scores, budget):
    everything = torch.cat(list(scores.values()))
    threshold = torch.kthvalue(everything, len(everything) - budget).values
    return {name: score > threshold for name, score in scores.items()}


@mutant("keep_best", says="tie")
def top_k(scores, budget):
    everything = torch.cat(list(scores.values()))
    mask = torch.zeros(len(everything), dtype=torch.bool)
    mask[everything.topk(min(budget, len(everything))).indices] = True
    return dict(zip(scores, mask.split([len(s) for s in scores.values()]), strict=True))


# --- short answers


answer(
    "lab07.first_penalty",
    reference=1.0,
    unit="nats",
    tolerance=0.1,
    mistakes={
        2.0: "that is the norm itself: the loss gets 0.5 times it",
        4.0: "that is the sum of the squares: the Frobenius norm is its root, and the loss gets half of it",
        0.0: "factors that are almost zero are far from orthonormal: the gap is the identity",
    },
    hints=[
        "If A A^T is about 0, the gap A A^T - I is about -I.",
        "The Frobenius norm of I of size r is sqrt(r).",
    ],
)
answer("lab07.predict_planted", reference=2.0, within=(0, 4), unit="ranks")
