"""`advise(Constraints(...))`: methods ranked by this course's own records, with the evidence, and where that ends.

What a method scores comes from the bake-off (`sweep_bakeoff`), what it costs from `bakeoff_costs`. Nothing else is
asked: no rule of thumb, no reputation. A method is *tied* with the best if their paired difference might be zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from labs_lib.errors import LabsError
from labs_lib.measure.records import Record, load_record
from labs_lib.measure.stats import Estimate, mean_ci, paired_difference

SCORES, COSTS = "sweep_bakeoff", "bakeoff_costs"
ACCEPTED = "accepted"  # the interop matrix's word for "served right"
LARGEST = 10  # times the largest base measured: beyond it, advice says that it is a guess


@dataclass(frozen=True)
class Method:
    """What the records know of one method of the bake-off.

    Attributes:
        scores, kept: per task, in percent, one number per seed: the score, and what was left of the old facts.
        trained: numbers that train on the base; `base`: numbers that the base has.
        peak: bytes that the largest moment of a training step holds; `full_peak`: the same for full fine-tuning.
        overhead: FLOPs of a request beyond the base's, as a share; folded into the weights where that can be done.
        merges: whether it can be folded in.
        engines: what each serving engine does with a batch of mixed tenants, in the interop matrix's words.
    """

    name: str
    scores: Mapping[str, Sequence[float]]
    kept: Mapping[str, Sequence[float]]
    trained: int
    base: int
    peak: int
    full_peak: int
    overhead: float
    unmerged_overhead: float
    merges: bool
    engines: Mapping[str, str]


@dataclass(frozen=True)
class Constraints:
    """What is asked of a method; what is None is not asked.

    Attributes:
        task: one of the bake-off's tasks; None takes the mean over all.
        trained: at most so many trained numbers, on the base that was measured.
        memory: the peak of a training step, at most this share of full fine-tuning's.
        overhead: FLOPs of a request beyond the base's, at most this share, after merging where that is possible.
        mixed_batch: an engine that must serve many tenants of it in one batch: "this engine", "vLLM", ...
        kept: at least so many percent of the old facts must be left.
        parameters: of the model that you have in mind.
    """

    task: str | None = None
    trained: int | None = None
    memory: float | None = None
    overhead: float | None = None
    mixed_batch: str | None = None
    kept: float | None = None
    parameters: float | None = None


@dataclass(frozen=True)
class Option:
    """A method that meets the constraints: its score, how far it is behind the best, and what speaks for it."""

    method: Method
    score: Estimate
    behind: Estimate | None
    tied: bool
    evidence: Sequence[str]


@dataclass(frozen=True)
class Advice:
    """Options, best first; who is out, and why; and where the evidence ends. Shows itself as a table."""

    options: Sequence[Option]
    excluded: Mapping[str, str]
    caveats: Sequence[str]
    source: str = ""
    asked: str = field(default="")

    def __str__(self) -> str:
        lines = [f"{self.asked} ({self.source})"] if self.asked else []
        for option in self.options:
            mark = "=" if option.tied else " "
            lines.append(f"{mark} {option.method.name:18} {option.score} %   {'; '.join(option.evidence)}")
        lines += [f"- {name}: out, {why}" for name, why in self.excluded.items()]
        return "\n".join([*lines, *(f"! {caveat}" for caveat in self.caveats)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import html

        cell = '<td style="text-align:left;vertical-align:top">{}</td>'.format
        head = "".join(
            f'<th style="text-align:left">{title}</th>'
            for title in ("", "method", "score (%)", "behind the best (points)", "evidence")
        )
        rows = []
        for option in self.options:
            behind = "" if option.behind is None else str(option.behind)
            texts = ("tied" if option.tied else "", option.method.name, str(option.score), behind)
            rows.append(
                "".join(cell(html.escape(t)) for t in texts)
                + cell("<br>".join(map(html.escape, option.evidence)))
            )
        out = "".join(
            f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in self.excluded.items()
        )
        notes = "".join(f"<p><b>Mind:</b> {html.escape(caveat)}</p>" for caveat in self.caveats)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return (
            f"<p>{html.escape(self.asked)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            + (
                f"<details><summary>{len(self.excluded)} methods are out</summary><ul>{out}</ul></details>"
                if out
                else ""
            )
            + notes
        )


def read_methods(scores: Record | None = None, costs: Record | None = None) -> dict[str, Method]:
    """Every method of the bake-off by name.

    Raises:
        LabsError: a record is missing; says how to make it.
    """
    scores = scores or load_record(SCORES, device="cpu")
    costs = costs or load_record(COSTS, device="cpu")
    if not scores or not costs:
        raise LabsError(
            "There is no record of the bake-off: `labs bakeoff` and `labs bakeoff --costs` make it."
        )
    cost = {row["arm"]["name"]: row for row in costs.rows if row["arm"] and row["model"] == "small"}
    full = next(row for row in cost.values() if row["arm"]["method"] == "full")
    found: dict[str, Method] = {}
    for name, row in cost.items():
        rows = [each for each in scores.rows if each["stage"] == "final" and each["arm"]["name"] == name]
        if not rows:
            continue
        labels = dict.fromkeys(each["label"] for each in rows)
        base, unmerged = row["base_request_flops"], row["request_flops"]
        merged = row.get("merged_request_flops", unmerged)
        found[name] = Method(
            name=name,
            scores={label: _by_seed(rows, label, "score") for label in labels},
            kept={label: _by_seed(rows, label, "kept") for label in labels},
            trained=row["params"],
            base=full["params"],
            peak=row["peak_bytes"],
            full_peak=full["peak_bytes"],
            overhead=merged / base - 1,
            unmerged_overhead=unmerged / base - 1,
            merges=row["mergeable"],
            engines=row["engines"],
        )
    return found


def _by_seed(rows: Sequence[dict], label: str, key: str) -> list[float]:
    chosen = sorted((row for row in rows if row["label"] == label), key=lambda row: row["seed"])
    return [100 * row[key] for row in chosen]


def per_seed(values: Mapping[str, Sequence[float]], task: str | None) -> list[float]:
    """One number per seed: of one task, or the mean over all tasks, for the seeds that all tasks have."""
    if task is not None:
        if task not in values:
            raise LabsError(f"The bake-off has no task {task!r}: its tasks are {', '.join(values)}.")
        return list(values[task])
    return [fmean(column) for column in zip(*values.values(), strict=False)]  # seeds 1, 2, ... in every task


def objection(method: Method, asked: Constraints) -> str | None:
    """Why a method does not meet the constraints, in words; None if it does.

    Steps:
    1. trained: more numbers than allowed. memory: peak / full_peak above the share allowed.
    2. overhead: more FLOPs than allowed. mixed_batch: engines says something else than ACCEPTED for that engine.
    3. kept: the mean of per_seed(method.kept, task) is below what is asked.
    4. Return the first that fails, with both numbers; None at the end. What is None in `asked` is not asked.
    """
    if asked.trained is not None and method.trained > asked.trained:
        return f"trains {method.trained:,} numbers, more than {asked.trained:,}"
    share = method.peak / method.full_peak
    if asked.memory is not None and share > asked.memory:
        return f"holds {100 * share:.0f} % of full fine-tuning's peak, more than {100 * asked.memory:.0f} %"
    if asked.overhead is not None and method.overhead > asked.overhead + 1e-9:
        return f"costs {100 * method.overhead:.1f} % more FLOPs a request, more than {100 * asked.overhead:.1f} %"
    if asked.mixed_batch is not None and method.engines.get(asked.mixed_batch) != ACCEPTED:
        return f"in a mixed batch of {asked.mixed_batch}: {method.engines.get(asked.mixed_batch, 'unknown')}"
    left = fmean(per_seed(method.kept, asked.task))
    if asked.kept is not None and left < asked.kept:
        return f"leaves {left:.0f} % of the old facts, less than {asked.kept:.0f} %"
    return None


def tied_with_best(scores: Mapping[str, Sequence[float]]) -> dict[str, bool]:
    """Which methods might be as good as the best: the 95 % interval of their paired difference to it reaches 0.

    `scores` has one number per seed and method, the seeds in the same order. The best by its mean is tied with itself.
    One seed tells nothing: then everybody is tied.

    Steps:
    1. best: the name with the largest mean.
    2. For every name: paired_difference(scores[best], scores[name]) has `lo`, the interval's lower end; tied if <= 0.
    """
    best = max(scores, key=lambda name: fmean(scores[name]))
    return {name: name == best or not paired_difference(scores[best], scores[name]).lo > 0 for name in scores}


def regret(scores: Mapping[str, Sequence[float]]) -> list[float]:
    """What following the record would have cost on a run that it had not seen, in points, for each seed in turn.

    `scores` has one number per seed and method, the seeds in the same order.

    Steps:
    1. Leave seed i out: chosen is the method with the largest mean over the other seeds.
    2. The regret is the largest score that any method has on seed i, minus the chosen one's.
    3. Return one number per seed; it is never below zero.
    """
    costs = []
    for i in range(len(next(iter(scores.values())))):
        chosen = max(scores, key=lambda name: fmean([*scores[name][:i], *scores[name][i + 1 :]]))
        costs.append(max(each[i] for each in scores.values()) - scores[chosen][i])
    return costs


def advise(asked: Constraints, methods: Mapping[str, Method] | None = None) -> Advice:
    """Rank the methods that meet the constraints by what they scored, with the evidence for each."""
    methods = read_methods() if methods is None else methods
    excluded = {name: why for name, each in methods.items() if (why := objection(each, asked))}
    allowed = {name: each for name, each in methods.items() if name not in excluded}
    scores = {name: per_seed(each.scores, asked.task) for name, each in allowed.items()}
    caveats = _caveats(asked, methods, allowed)
    told = f"Best on {asked.task or 'the mean over all tasks'}"
    source = f"{SCORES} and {COSTS}, a base of {next(iter(methods.values())).base:,} numbers"
    if not allowed:
        return Advice(
            [], excluded, [*caveats, "No method meets all of this: give one constraint up."], source, told
        )
    tied = tied_with_best(scores)
    order = sorted(allowed, key=lambda name: (-fmean(scores[name]), allowed[name].trained))
    best = order[0]
    options = [
        Option(
            allowed[name],
            mean_ci(scores[name]),
            None if name == best else paired_difference(scores[best], scores[name]),
            tied[name],
            _evidence(allowed[name], asked),
        )
        for name in order
    ]
    return Advice(options, excluded, caveats, source, told)


def _evidence(method: Method, asked: Constraints) -> list[str]:
    left = mean_ci(per_seed(method.kept, asked.task))
    seeds = len(per_seed(method.scores, asked.task))
    return [
        f"{seeds} seeds at its own best learning rate",
        f"{method.trained:,} trained numbers ({100 * method.trained / method.base:.2f} % of the base)",
        f"old facts kept {left} %",
        f"training holds {100 * method.peak / method.full_peak:.0f} % of full fine-tuning's peak",
        f"a request costs {100 * method.overhead:.1f} % more" + (", merged" if method.merges else ""),
    ]


def _caveats(asked: Constraints, methods: Mapping[str, Method], allowed: Mapping[str, Method]) -> list[str]:
    """Where the evidence ends."""
    base = next(iter(methods.values())).base
    notes = []
    if asked.parameters and asked.parameters > LARGEST * base:
        notes.append(
            f"Measured on {base:,} parameters; you ask about {asked.parameters:,.0f}. Counts and what can be merged or "
            "served carry over; the order of scores need not: sweep your best two on your own model."
        )
    scores = {name: per_seed(each.scores, asked.task) for name, each in allowed.items()}
    if scores and all(fmean(each) > 99 for each in scores.values()):
        notes.append("Every method left is near 100 % here: this task does not tell them apart.")
    ties = tied_with_best(scores) if scores else {}
    if sum(ties.values()) > 1:
        cheapest = min((name for name in ties if ties[name]), key=lambda name: allowed[name].trained)
        notes.append(
            f"{sum(ties.values())} methods might be the best: take the one that suits you; {cheapest} trains least."
        )
    return notes
