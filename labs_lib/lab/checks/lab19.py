"""The checks of lab 19, choosing a method."""

from statistics import fmean

from labs_lib.lab.check import Diagnosis, answer, exercise, expect, mutant
from labs_lib.measure.advice import Constraints, Method, objection, regret, tied_with_best


def _method(**changes) -> Method:
    given = {
        "name": "x",
        "scores": {"a": [90.0, 92.0], "b": [50.0, 52.0]},
        "kept": {"a": [80.0, 80.0], "b": [40.0, 40.0]},
        "trained": 5_000,
        "base": 1_000_000,
        "peak": 60,
        "full_peak": 100,
        "overhead": 0.05,
        "unmerged_overhead": 0.05,
        "merges": False,
        "engines": {"vLLM": "accepted", "LoRAX": "refused"},
    }
    return Method(**{**given, **changes})


# --- objection


@exercise(
    "objection",
    reference="labs_lib.measure.advice:objection",
    hints=[
        "One if per constraint: it is asked (not None) and it is broken. Return a sentence.",
        "per_seed(method.kept, asked.task) gives one number per seed: take their mean.",
    ],
)
def check_objection(candidate, ref):
    method = _method()
    nothing = candidate(method, Constraints())
    expect(nothing is None, f"nothing was asked, so nothing is broken: None, not {nothing!r}")
    for asked, what in (
        ({"trained": 4_999}, "trained"),
        ({"memory": 0.59}, "memory, a share of full fine-tuning's peak"),
        ({"overhead": 0.04}, "overhead"),
        ({"mixed_batch": "LoRAX"}, "mixed_batch: LoRAX refuses it"),
        ({"kept": 61.0}, "kept: the mean over tasks is 60"),
    ):
        expect(
            candidate(method, Constraints(**asked)), f"{asked} is broken, and you had no objection: {what}"
        )
    for asked, what in (
        ({"trained": 5_000}, "exactly as many as allowed is allowed"),
        ({"memory": 0.6}, "exactly the share allowed is allowed"),
        ({"overhead": 0.05}, "exactly the overhead allowed is allowed"),
        ({"mixed_batch": "vLLM"}, "vLLM accepts it"),
        ({"kept": 60.0}, "the mean over tasks is 60, which is enough"),
        ({"kept": 70.0, "task": "a"}, "on task a 80 % are kept: look at the task that was asked for"),
    ):
        expect(candidate(method, Constraints(**asked)) is None, f"{asked} is met, and you object: {what}")
    said = candidate(method, Constraints(trained=10))
    expect(isinstance(said, str), f"the reason is a sentence, not {said!r}")


@mutant("objection", says="exactly as many")
def strict_limits(method, asked):
    if asked.trained is not None and method.trained >= asked.trained:
        return "too many"
    return objection(method, asked)


@mutant("objection", says="no objection")
def only_the_budget(method, asked):
    return "too many" if asked.trained is not None and method.trained > asked.trained else None


@mutant("objection", says="the task that was asked for")
def forgets_the_task(method, asked):
    return objection(method, Constraints(**{**vars(asked), "task": None}))


# --- tied_with_best


@exercise(
    "tied_with_best",
    reference="labs_lib.measure.advice:tied_with_best",
    hints=[
        "paired_difference(scores[best], scores[name]).lo is the lower end.",
        "With one seed it is not finite.",
    ],
)
def check_tied_with_best(candidate, ref):
    scores = {"a": [50, 60, 70, 80], "b": [49, 61, 69, 81], "c": [48, 58, 68, 78], "d": [10, 10, 10, 11]}
    got = candidate(scores)
    expect(isinstance(got, dict) and set(got) == set(scores), "return a dict: every name to True or False")
    expect(got["a"], "the best is tied with itself")
    expect(not got["d"], "d is 50 points behind with every seed: not tied")
    if got["c"]:
        raise Diagnosis(
            "c is behind by 2 with every seed: pair the seeds, and the spread between them does not matter"
        )
    expect(got["b"], "b is ahead with two seeds and behind with two: tied")
    one = candidate({"a": [50], "b": [40]})
    expect(all(one.values()), "with one seed there is no interval: nobody can be told apart")


@mutant("tied_with_best", says="pair the seeds")
def overlapping(scores):
    best = max(scores, key=lambda name: fmean(scores[name]))
    return {name: max(each) >= min(scores[best]) for name, each in scores.items()}


@mutant("tied_with_best", says="ahead with two")
def only_the_best(scores):
    best = max(scores, key=lambda name: fmean(scores[name]))
    return {name: name == best or len(each) == 1 for name, each in scores.items()}


@mutant("tied_with_best", says="no interval")
def sure_of_one_seed(scores):
    tied = tied_with_best(scores)
    best = max(scores, key=lambda name: fmean(scores[name]))
    return {name: tied[name] and (len(each) > 1 or name == best) for name, each in scores.items()}


# --- regret


@exercise(
    "regret",
    reference="labs_lib.measure.advice:regret",
    hints=[
        "[*each[:i], *each[i + 1 :]] leaves seed i out.",
        "The best on seed i is the max over methods, with hindsight.",
    ],
)
def check_regret(candidate, ref):
    scores = {"a": [90.0, 90.0, 10.0], "b": [80.0, 80.0, 80.0]}
    got = candidate(scores)
    expect(got is not None, "nothing came back: return a list")
    got = [float(each) for each in got]
    if got == [10.0, 10.0, 0.0]:
        raise Diagnosis("the choice has seen the seed that it is judged on: leave it out first")
    expect(min(got) >= 0, f"a regret below zero, {min(got)}: it is the best score minus the chosen one's")
    expect(got == [10.0, 10.0, 70.0], f"for {scores} the regrets are 10, 10 and 70, not {got}")


@mutant("regret", says="seen the seed")
def with_hindsight(scores):
    chosen = max(scores, key=lambda name: fmean(scores[name]))
    return [max(each[i] for each in scores.values()) - scores[chosen][i] for i in range(len(scores[chosen]))]


@mutant("regret", says="below zero")
def the_other_way(scores):
    return [-each for each in regret(scores)]


# --- short answers

answer("lab19.predict_rows", reference=2, within=(0, 8))
