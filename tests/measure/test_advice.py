"""Advice ranks by records alone, says who is out and why, who is tied, and where the evidence ends."""

from statistics import fmean

import pytest

from labs_lib.errors import LabsError
from labs_lib.measure.advice import (
    Constraints,
    advise,
    objection,
    per_seed,
    read_methods,
    regret,
    tied_with_best,
)
from labs_lib.measure.records import Record

SEEDS = range(1, 6)


def scores_and_costs():
    """Four methods on two tasks: "even" and "small" are as good as each other, "weak" is worse, "full" is large."""
    level = {"full": (96, 90), "even": (96, 92), "small": (95, 92), "weak": (60, 20)}
    rows = [
        {
            "arm": {"name": name},
            "label": label,
            "stage": stage,
            "seed": seed,
            "kept": 0.9 - 0.1 * (name == "full"),
        }
        | {"score": (level[name][i] + (seed * 7 + 3 * len(name)) % 5) / 100}
        for name in level
        for i, label in enumerate(("style", "facts"))
        for stage, seeds in (("sweep", [0]), ("final", SEEDS))
        for seed in seeds
    ]
    costs = [{"arm": None, "model": "small", "scores": {}}]
    for name, params, peak, flops in (
        ("full", 1_000_000, 40, 100),
        ("even", 70_000, 20, 110),
        ("small", 2_000, 22, 101),
        ("weak", 500, 25, 130),
    ):
        row = {"arm": {"name": name, "method": "full" if name == "full" else "x"}, "model": "small"}
        row |= {"params": params, "peak_bytes": peak, "request_flops": flops, "base_request_flops": 100}
        row |= {
            "mergeable": name != "weak",
            "engines": {"this engine": "accepted" if name == "even" else "refused"},
        }
        costs.append(row | ({} if name == "weak" else {"merged_request_flops": 100}))
    return Record("sweep_bakeoff", rows), Record("bakeoff_costs", costs)


@pytest.fixture
def methods():
    return read_methods(*scores_and_costs())


def names(advice):
    return [option.method.name for option in advice.options]


def test_reading_takes_the_fresh_seeds_only(methods):
    assert list(methods) == ["full", "even", "small", "weak"]
    assert all(len(values) == 5 for each in methods.values() for values in each.scores.values())
    assert methods["weak"].overhead == pytest.approx(0.3) and methods["even"].overhead == 0
    assert per_seed(methods["even"].scores, "style") != per_seed(methods["even"].scores, None)
    with pytest.raises(LabsError, match="its tasks are style, facts"):
        per_seed(methods["even"].scores, "chess")


def test_without_constraints_the_best_comes_first_and_ties_are_told(methods):
    advice = advise(Constraints(), methods)
    assert set(names(advice)) == set(methods) and names(advice)[-1] == "weak"
    assert not advice.excluded
    tied = {option.method.name for option in advice.options if option.tied}
    assert {"even", "small"} <= tied and "weak" not in tied
    assert any("might be the best" in caveat for caveat in advice.caveats)
    assert advice.options[0].behind is None and advice.options[-1].behind.lo > 0


@pytest.mark.parametrize(
    ("asked", "left", "word"),
    [
        ({"trained": 2_000}, {"small", "weak"}, "trains 1,000,000 numbers"),
        ({"memory": 0.5}, {"even"}, "of full fine-tuning's peak"),
        ({"overhead": 0.0}, {"full", "even", "small"}, "more FLOPs a request"),
        ({"mixed_batch": "this engine"}, {"even"}, "refused"),
        ({"kept": 85}, {"even", "small", "weak"}, "of the old facts"),
    ],
)
def test_each_constraint_puts_out_who_breaks_it_and_says_why(methods, asked, left, word):
    advice = advise(Constraints(**asked), methods)
    assert set(names(advice)) == left and set(advice.excluded) == set(methods) - left
    assert all(word in why for why in advice.excluded.values()) or word in " ".join(advice.excluded.values())
    assert all(objection(methods[name], Constraints(**asked)) is None for name in left)


def test_where_the_evidence_ends(methods):
    assert any("sweep your best two" in each for each in advise(Constraints(parameters=7e9), methods).caveats)
    assert not any("sweep" in each for each in advise(Constraints(parameters=2e6), methods).caveats)
    nothing = advise(Constraints(trained=10), methods)
    assert nothing.options == [] and "give one constraint up" in nothing.caveats[-1]
    assert len(nothing.excluded) == 4


def test_tied_is_paired_not_overlap():
    """Seeds differ more than methods do: pairing sees what two separate intervals would not."""
    scores = {"a": [50, 60, 70, 80, 90], "b": [48, 58, 68, 78, 88], "c": [49, 61, 69, 81, 89]}
    assert tied_with_best(scores) == {"a": True, "b": False, "c": True}
    assert tied_with_best({"a": [50], "b": [40]}) == {"a": True, "b": True}, "one seed tells nothing"


def test_regret_is_what_the_choice_without_a_seed_costs_on_it():
    scores = {"a": [90.0, 90.0, 10.0], "b": [80.0, 80.0, 80.0]}
    # without seed 0 or 1, b is chosen and loses 10; without seed 2, a is chosen and loses 70
    assert regret(scores) == [10.0, 10.0, 70.0]
    assert regret({"a": [1.0, 2.0]}) == [0.0, 0.0]


def test_it_shows_itself(methods):
    advice = advise(Constraints(task="style", trained=100_000), methods)
    assert "= even" in str(advice) and "- full: out" in str(advice)
    assert "<table>" in advice._repr_html_() and "1 methods are out" in advice._repr_html_()


def test_the_course_s_own_records_advise(monkeypatch):
    monkeypatch.delenv("LABS_HOME")
    methods = read_methods()
    assert len(methods) > 15
    advice = advise(Constraints(), methods)
    best = advice.options[0]
    assert best.score.value == pytest.approx(max(fmean(per_seed(m.scores, None)) for m in methods.values()))


def test_no_record_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("LABS_HOME", str(tmp_path))
    monkeypatch.setenv("LABS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(LabsError, match="labs bakeoff"):
        read_methods()
