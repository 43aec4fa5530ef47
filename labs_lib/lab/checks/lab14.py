"""The checks of lab 14, the bake-off: a front, a paired bootstrap, a rank correlation."""

import math

import numpy as np

from labs_lib.lab.check import Diagnosis, answer, exercise, expect, mutant
from labs_lib.measure.fronts import pareto_front, rank_correlation, resampled_means

# --- pareto_front


@exercise(
    "pareto_front",
    reference="labs_lib.measure.fronts:pareto_front",
    hints=[
        "any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points.values())",
        "sorted(names, key=lambda name: points[name]) sorts by cost, then quality.",
    ],
)
def check_pareto_front(candidate, ref):
    points = {"dear": (9.0, 10.0), "cheap": (1.0, 2.0), "beaten": (5.0, 1.0), "middle": (4.0, 6.0)}
    got = candidate(dict(points))
    expect(got is not None, "nothing came back: return the names")
    got = list(got)
    if "beaten" in got and "cheap" not in got:
        raise Diagnosis("the directions are mixed up: less cost is better, more quality is better")
    expect(
        got != ["dear"],
        "only the best is left: a cheaper one that is worse is not beaten, since nobody is both cheaper and better",
    )
    expect("beaten" not in got, "'beaten' (cost 5) stays, though 'middle' (cost 4) is better and cheaper")
    expect(set(got) == {"dear", "cheap", "middle"}, f"on the front are dear, middle and cheap, not {got}")
    expect(got == ["cheap", "middle", "dear"], f"sort them by cost, cheapest first: {got}")
    twins = {"a": (1.0, 2.0), "b": (1.0, 2.0), "worse": (1.0, 1.0), "dearer": (2.0, 2.0)}
    got = sorted(candidate(twins))
    expect(got != [], "two equal points beat each other away: neither is better in anything, so both stay")
    expect(
        "worse" not in got and "dearer" not in got,
        "a tie in one of the two is enough to be beaten, if the other is worse: use <= and >=",
    )
    expect(got == ["a", "b"], f"of two equal points both stay: {got}")


@mutant("pareto_front", says="directions are mixed up")
def front_of_costs(points):
    return pareto_front({name: (-cost, -quality) for name, (cost, quality) in points.items()})


@mutant("pareto_front", says="only the best is left")
def single_best(points):
    return [max(points, key=lambda name: points[name][1])]


@mutant("pareto_front", says="cheapest first")
def unsorted_front(points):
    return pareto_front(points)[::-1]


@mutant("pareto_front", says="beat each other away")
def beats_itself(points):
    return [
        name
        for name in pareto_front(points)
        if not any(points[other] == points[name] for other in points if other != name)
    ]


@mutant("pareto_front", says="a tie in one of the two")
def strictly_beaten(points):
    def beaten(name):
        cost, quality = points[name]
        return any(c < cost and q > quality for c, q in points.values())

    return sorted((name for name in points if not beaten(name)), key=points.get)


# --- resampled_means


@exercise(
    "resampled_means",
    reference="labs_lib.measure.fronts:resampled_means",
    hints=[
        "columns = np.random.default_rng(seed).integers(seeds, size=(draws, seeds))",
        "scores[:, columns] has shape (methods, draws, seeds).",
        ".mean(axis=2).T",
    ],
)
def check_resampled_means(candidate, ref):
    scores = np.array([[10.0, 20.0, 60.0, 70.0], [15.0, 25.0, 65.0, 75.0], [50.0, 40.0, 30.0, 20.0]])
    got = candidate(scores, 400, 1)
    expect(got is not None, "nothing came back: return the array of means")
    got = np.asarray(got)
    expect(got.shape != (3, 400), "methods by draws: transpose, so that a row is one repetition")
    expect(got.shape == (400, 3), f"400 repetitions of 3 methods have shape (400, 3), not {got.shape}")
    expect(
        got.std() > 0 and len(np.unique(got[:, 0])) > 1,
        "all repetitions are equal: draw the seeds with replacement, else each is the old sample in another order",
    )
    apart = got[:, 1] - got[:, 0]
    expect(
        np.allclose(apart, 5),
        "method 2 is always 5 above method 1, but not in the repetitions: draw the same seeds for all methods",
    )
    few = np.isin(got[:, 0], scores[0]).all()
    expect(not few, "a repetition has as many seeds as the experiment: the mean of four draws, not one draw")
    expect(
        np.allclose(got, ref(scores, 400, 1)),
        "use np.random.default_rng(seed).integers(seeds, size=(draws, seeds))",
    )


@mutant("resampled_means", says="transpose")
def not_transposed(scores, draws=2000, seed=0):
    return resampled_means(scores, draws, seed).T


@mutant("resampled_means", says="same seeds for all")
def each_its_own_seeds(scores, draws=2000, seed=0):
    return np.concatenate([resampled_means([row], draws, seed + i) for i, row in enumerate(scores)], axis=1)


@mutant("resampled_means", says="with replacement")
def shuffled(scores, draws=2000, seed=0):
    return np.tile(np.mean(scores, axis=1), (draws, 1))


@mutant("resampled_means", says="not one draw")
def one_seed_each(scores, draws=2000, seed=0):
    columns = np.random.default_rng(seed).integers(np.shape(scores)[1], size=draws)
    return np.asarray(scores)[:, columns].T


# --- rank_correlation


@exercise(
    "rank_correlation",
    reference="labs_lib.measure.fronts:rank_correlation",
    hints=[
        "below = (values[None, :] < values[:, None]).sum(axis=1); the equal ones likewise with ==.",
        "ranks = below + equal / 2, then minus their mean.",
        "a @ b / np.sqrt((a @ a) * (b @ b))",
    ],
)
def check_rank_correlation(candidate, ref):
    x, y = [1.0, 2.0, 3.0, 10.0], [2.0, 1.0, 40.0, 30.0]
    got = candidate(x, y)
    expect(got is not None, "no number came back: return it")
    a, b = (np.array(each) - np.mean(each) for each in (x, y))
    plain = a @ b / math.sqrt((a @ a) * (b @ b))
    expect(
        abs(got - plain) > 1e-9, f"{got:.2f} is the correlation of the numbers themselves: take ranks first"
    )
    expect(got > 0, "the sign is turned: the same order gives +1")
    expect(
        math.isclose(got, 0.6, abs_tol=1e-9), f"ranks 1 2 3 4 and 2 1 4 3 correlate with 0.6, not {got:.3f}"
    )
    ties = candidate([1.0, 2.0, 2.0, 3.0, 2.0], [5.0, 1.0, 4.0, 6.0, 2.0])
    right = ref([1.0, 2.0, 2.0, 3.0, 2.0], [5.0, 1.0, 4.0, 6.0, 2.0])
    expect(
        math.isclose(ties, right, abs_tol=1e-9),
        f"with ties it is {right:.3f}, not {ties:.3f}: equal numbers share the mean of their places",
    )


@mutant("rank_correlation", says="take ranks first")
def of_numbers(x, y):
    return float(np.corrcoef(x, y)[0, 1])


@mutant("rank_correlation", says="sign is turned")
def one_list_reversed(x, y):
    return rank_correlation(x, [-each for each in y])


@mutant("rank_correlation", says="share the mean")
def ties_in_order(x, y):
    ranks = [np.argsort(np.argsort(each, kind="stable"), kind="stable") for each in (x, y)]
    return rank_correlation(*ranks)


# --- short answers

answer(
    "lab14.planned_runs",
    reference=880,
    hints=["Each arm meets each task.", "Three runs choose the rate, five measure."],
    mistakes={
        550: "those are the five fresh seeds alone: choosing the rate costs three runs more",
        330: "those are the runs that choose the rate alone: five fresh seeds follow",
        1650: "the seeds do not multiply the rates: five seeds run at the best rate only",
        176: "that is one task: there are five",
    },
)
answer("lab14.predict_front", reference=5, within=(1, 22))
answer("lab14.predict_agreement", reference=0.5, within=(-1, 1))
