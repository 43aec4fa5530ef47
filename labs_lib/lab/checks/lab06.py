"""The checks of lab 06, rsLoRA."""

import math

from labs_lib.lab.check import Diagnosis, answer, exercise, expect, mutant
from labs_lib.methods.rslora import adapter_scale, best_between, log_slope, same_alpha

# --- adapter_scale


@exercise(
    "adapter_scale",
    reference="labs_lib.methods.rslora:adapter_scale",
    hints=["alpha is on top in both.", "math.sqrt(rank), or rank ** 0.5."],
)
def check_adapter_scale(candidate, ref):
    plain, root = candidate(16, 64), candidate(16, 64, rslora=True)
    expect(plain is not None and root is not None, "no scale came back: return it")
    if (plain, root) == (2, 0.25):
        raise Diagnosis("the two are swapped: rsLoRA is the one with the root")
    expect(plain != 16 and root != 16, "the scale must depend on the rank")
    expect(plain == 0.25, f"LoRA of alpha 16 at rank 64 has scale 16 / 64 = 0.25, not {plain}")
    expect(root != math.sqrt(16 / 64), "the root is of the rank alone: alpha / sqrt(rank)")
    expect(math.isclose(root, 2), f"rsLoRA of alpha 16 at rank 64 has scale 16 / 8 = 2, not {root}")


@mutant("adapter_scale", says="swapped")
def scales_swapped(alpha, rank, rslora=False):
    return adapter_scale(alpha, rank, not rslora)


@mutant("adapter_scale", says="depend on the rank")
def alpha_alone(alpha, rank, rslora=False):
    return alpha


@mutant("adapter_scale", says="root is of the rank alone")
def root_of_all(alpha, rank, rslora=False):
    return math.sqrt(alpha / rank) if rslora else alpha / rank


# --- same_alpha


@exercise(
    "same_alpha",
    reference="labs_lib.methods.rslora:same_alpha",
    hints=["Solve x / rank = alpha / sqrt(rank) for x.", "rank / sqrt(rank) is sqrt(rank)."],
)
def check_same_alpha(candidate, ref):
    got = candidate(10, 16)
    expect(got is not None, "no alpha came back: return it")
    expect(got != 2.5, "that is the other way round: LoRA divides by more, so its alpha must be larger")
    expect(got != 160, "that is alpha * rank: LoRA divides by rank, rsLoRA by its root, so the root remains")
    expect(math.isclose(got, 40), f"x / 16 = 10 / 4 has the solution 40, not {got}")
    expect(
        math.isclose(candidate(7.5, 3), 7.5 * math.sqrt(3)),
        "for rank 3 the root is no whole number: do not round",
    )


@mutant("same_alpha", says="other way round")
def divides_alpha(alpha, rank):
    return alpha / math.sqrt(rank)


@mutant("same_alpha", says="the root remains")
def times_rank(alpha, rank):
    return alpha * rank


@mutant("same_alpha", says="do not round")
def rounds(alpha, rank):
    return round(same_alpha(alpha, rank))


# --- log_slope


@exercise(
    "log_slope",
    reference="labs_lib.methods.rslora:log_slope",
    hints=[
        "math.log of each, then subtract the mean of the logs.",
        "slope = sum(x * y) / sum(x * x), with x and y centred.",
    ],
)
def check_log_slope(candidate, ref):
    ranks = [2, 4, 16, 128]
    got = candidate(ranks, [5 * r**0.5 for r in ranks])
    expect(isinstance(got, float), f"return a number, not {type(got).__name__}")
    expect(abs(got - 2) > 1e-6, "that is the slope of log rank against log size: swap the two")
    line = [5 * r**0.5 for r in ranks]
    centred = [r - sum(ranks) / 4 for r in ranks]
    flat = sum(c * s for c, s in zip(centred, line, strict=True)) / sum(c * c for c in centred)
    expect(abs(got - flat) > 1e-6, "that is the slope of the numbers themselves: take logs first")
    expect(
        math.isclose(got, 0.5, abs_tol=1e-6),
        f"5 * sqrt(r) has the power 0.5, not {got:.4g}: are both logs centred?",
    )
    expect(abs(candidate(ranks, [7.0] * 4)) < 1e-9, "a size that does not depend on the rank has slope 0")
    sizes = [1.0, 3.0, 2.0, 9.0]
    right = ref(ranks, sizes)
    expect(
        math.isclose(candidate(ranks, sizes), right, abs_tol=1e-6),
        f"for points off a line the least-squares slope is {right:.3f}: use all points, not the two ends",
    )


@mutant("log_slope", says="swap the two")
def upside_down(ranks, sizes):
    return log_slope(sizes, ranks) if len(set(sizes)) > 1 else 0.0


@mutant("log_slope", says="take logs first")
def no_logs(ranks, sizes):
    return log_slope([math.exp(r - max(ranks)) for r in ranks], [math.exp(s - max(sizes)) for s in sizes])


@mutant("log_slope", says="two ends")
def two_ends(ranks, sizes):
    return math.log(sizes[-1] / sizes[0]) / math.log(ranks[-1] / ranks[0])


@mutant("log_slope", says="centred")
def not_centred(ranks, sizes):
    x, y = ([math.log(value) for value in values] for values in (ranks, sizes))
    return sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)


# --- best_between


@exercise(
    "best_between",
    reference="labs_lib.methods.rslora:best_between",
    hints=[
        "sorted(losses) gives the rates in order; min(range(len(rates)), key=...) the place of the lowest loss.",
        "One grid step of log rate is h = log(right / left) / 2.",
        "math.exp turns the log rate back into a rate.",
    ],
)
def check_best_between(candidate, ref):
    rates = [1e-3 * 2**k for k in range(5)]
    valley = {lr: math.log(lr / 5e-3) ** 2 for lr in reversed(rates)}
    got = candidate(valley)
    expect(got != 1e-3, "that is the rate of the highest loss: lower is better")
    expect(got != 4e-3, "that is the best grid point itself: now look between the points")
    if math.isclose(got, 4e-3 * (4e-3 / 5e-3), rel_tol=1e-6):
        raise Diagnosis(
            "the bottom lies on the other side of the middle: toward the neighbour with the lower loss"
        )
    expect(
        math.isclose(got, 5e-3, rel_tol=1e-6),
        f"the bottom of this parabola in log rate is 0.005, not {got:.4g}",
    )
    for edge, losses in ((1e-3, {lr: lr for lr in rates}), (1.6e-2, {lr: -lr for lr in rates})):
        try:
            found = candidate(losses)
        except (IndexError, KeyError) as error:
            raise Diagnosis(
                "at the edge of the grid there is no neighbour: return the edge itself"
            ) from error
        expect(found == edge, f"at the edge return the grid point {edge:g}, not {found:g}")
    try:
        candidate(dict.fromkeys(rates, 1.0) | {1e-3: 2.0, 2e-3: 1.0})
    except ZeroDivisionError as error:
        raise Diagnosis("three equal losses have no parabola: return the middle") from error


@mutant("best_between", says="between the points")
def grid_point(losses):
    return min(losses, key=losses.get)


@mutant("best_between", says="highest loss")
def highest(losses):
    return max(losses, key=losses.get)


@mutant("best_between", says="other side")
def wrong_side(losses):
    point = min(losses, key=losses.get)
    return point * point / best_between(losses)


@mutant("best_between", says="no neighbour")
def no_edge(losses):
    rates = sorted(losses)
    i = min(range(len(rates)), key=lambda k: losses[rates[k]])
    rates[i + 1], losses[rates[i - 1] if i else None]
    return best_between(losses)


# --- short answers


answer(
    "lab06.adam_power",
    reference=0.5,
    hints=["The step is like s * r.", "s is alpha over the root of r: r / sqrt(r) = ?"],
    mistakes={
        0: "that is Adam with alpha / r, or SGD with alpha / sqrt(r)",
        1: "that is r alone: s falls with the root of r",
        -0.5: "that is s alone: the sum over r numbers grows with r",
    },
)
answer("lab06.predict_shift", reference=0.25, within=(0.001, 1000))
