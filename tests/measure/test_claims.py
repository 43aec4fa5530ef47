"""The register is complete and sound, and every kind of measurement gets the verdict its rule says."""

import argparse
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labs_lib.errors import LabsError
from labs_lib.measure import Estimate, claim, context, observed, records
from labs_lib.measure.claims import add_arguments, main, parse_claim, register
from labs_lib.measure.rules import DEPENDS, FAILS, HOLDS, UNKNOWN, VERDICTS, combine, number, parse_rule
from labs_lib.measure.standings import mismatches, standings
from labs_lib.measure.stats import mean_ci, paired_tost

# ---- the register


def test_every_claim_is_there_once():
    assert list(register()) == list(range(1, 59))


def test_quotes_are_short_and_distinct():
    quotes = [each.quote for each in register().values()]
    assert len(set(quotes)) == len(quotes)
    assert all(quote.strip() == quote and 10 <= len(quote) <= 100 for quote in quotes)


@pytest.mark.parametrize("each", register().values(), ids=lambda each: f"claim{each.id}")
def test_a_claim_is_complete(each):
    assert each.says and each.test and each.where
    assert each.labs and all(re.fullmatch(r"0\d|1\d", lab) for lab in each.labs)
    assert list(each.labs) == sorted(each.labs)
    for part in each.parts.values():
        assert part.measures, f"part {part.name!r} does not say what is measured"
        assert part.rule.boolean == (part.rule.text == "true")
        assert part.evidence != "text" or part.reach == "anywhere"
        if part.evidence == "sampled":
            assert part.min_n >= 2
        if part.reach in ("elsewhere", "gpu"):
            assert each.would_tell or each.limits or part.evidence == "sampled"
    for report in each.reported:
        assert report["text"] and report["source"]["cite"] and report["source"]["url"].startswith("https://")


def test_no_verdict_is_typed_into_the_register():
    """No field can hold one; and no claim opens its proposition with a judgement."""
    allowed = {"id", "where", "quote", "says", "test", "labs", "parts", "measures", "unit", "rule", "reading"}
    allowed |= {"evidence", "min_n", "reach", "limits", "would_tell", "reported"}
    from labs_lib import paths

    raw = records.read_yaml(paths.data() / "claims.yaml")
    for entry in raw["claims"]:
        assert set(entry) <= allowed, entry["id"]
        assert not {"verdict", "known"} & {key for part in entry.get("parts", {}).values() for key in part}
    used = {report["source"] for entry in raw["claims"] for report in entry.get("reported", [])}
    assert used == set(raw["sources"]), "a source that no claim cites, or the reverse"


def test_every_lab_of_the_course_with_claims_exists():
    labs = {lab for each in register().values() for lab in each.labs}
    assert labs == {f"{n:02d}" for n in range(20)} - {"18"}


@pytest.mark.parametrize(
    "broken",
    [
        {"rule": {"between": [2, 1]}},
        {"rule": {"around": 3}},
        {"rule": {"equals": {"value": 3}}},
        {"rule": {"times": {"value": 3, "factor": 0.5}}},
        {"rule": "false"},
        {"reach": "moon"},
        {"evidence": "hearsay"},
        {"verdict": "fails"},
    ],
)
def test_a_malformed_claim_is_refused(broken):
    good = {
        "id": 1,
        "where": "1",
        "quote": "q",
        "says": "s",
        "test": "t",
        "labs": ["01"],
        "measures": "m",
        "unit": "",
        "evidence": "exact",
        "reach": "anywhere",
        "rule": {"at_least": 1},
    }
    assert parse_claim(good, {}).parts[""].rule.lo == 1
    with pytest.raises((KeyError, TypeError, ValueError)):
        parse_claim({**good, **broken}, {})


# ---- rules


@pytest.mark.parametrize(
    ("rule", "value", "ci", "verdict"),
    [
        ({"between": [0.1, 0.5]}, 0.5, None, HOLDS),
        ({"between": [0.1, 0.5]}, 0.593, None, FAILS),
        ({"between": [1, 3]}, 2, (1.2, 2.8), HOLDS),
        ({"between": [1, 3]}, 2, (0.8, 2.8), UNKNOWN),
        ({"between": [1, 3]}, 0.2, (-0.5, 0.9), FAILS),
        ({"between": [1, 3]}, 2, (-math.inf, math.inf), UNKNOWN),
        ({"at_least": 3}, 3, None, HOLDS),
        ({"at_least": 3}, 2, (1, 2.9), FAILS),
        ({"at_most": 3}, 2, (1, 3.1), UNKNOWN),
        ({"above": 0}, 0, None, FAILS),
        ({"above": 0}, 1, (0, 2), UNKNOWN),
        ({"above": 0}, 1, (0.01, 2), HOLDS),
        ({"above": 0}, -1, (-2, 0), FAILS),
        ({"below": 1}, 0.5, (0.4, 0.99), HOLDS),
        ({"equals": {"value": 614400, "abs": 0}}, 614400, None, HOLDS),
        ({"equals": {"value": 614400, "abs": 0}}, 614401, None, FAILS),
        ({"equals": {"value": 42, "rel": 0.1}}, 53.9, None, FAILS),
        ({"times": {"value": 10, "factor": 2}}, 5, None, HOLDS),
        ({"times": {"value": 10, "factor": 2}}, 20.1, None, FAILS),
        ({"equivalent": {"margin": 1}}, 0.1, (-0.5, 0.9), HOLDS),
        ({"equivalent": {"margin": 1}}, 0.1, (-0.5, 1.0), UNKNOWN),
        ({"equivalent": {"margin": 1}}, 2, (1.1, 3), FAILS),
        ("true", 1, None, HOLDS),
        ("true", 0, None, FAILS),
        ({"at_least": 3}, math.nan, None, UNKNOWN),
    ],
)
def test_rule_judges(rule, value, ci, verdict):
    assert parse_rule(rule).judge(value, ci) == verdict


finite = st.floats(-1e6, 1e6)


@given(finite, finite, finite, finite, finite)
def test_a_wider_interval_never_turns_one_verdict_into_the_opposite(a, b, lo, hi, more):
    """Less knowledge can only lead to "can't be told"."""
    rule = parse_rule({"between": sorted((a, b))}) if a != b else parse_rule({"at_least": a})
    lo, hi = sorted((lo, hi))
    narrow, wide = rule.judge(lo, (lo, hi)), rule.judge(lo, (lo - abs(more), hi + abs(more)))
    assert wide in (narrow, UNKNOWN)


@pytest.mark.parametrize(
    ("verdicts", "word"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([FAILS], FAILS),
        ([HOLDS, FAILS], DEPENDS),
        ([HOLDS, FAILS, UNKNOWN], DEPENDS),
        ([HOLDS, UNKNOWN], UNKNOWN),
        ([UNKNOWN], UNKNOWN),
        ([DEPENDS, HOLDS], DEPENDS),
        ([], UNKNOWN),
    ],
)
def test_combine(verdicts, word):
    assert combine(verdicts) == word


def test_equivalence_rule_agrees_with_two_one_sided_tests():
    for shift in (0.0, 0.6, 0.9, 1.5):
        a = [shift + x for x in (0.1, -0.3, 0.5, 0.2, -0.1, 0.4, -0.2, 0.3)]
        by_test = paired_tost(a, [0] * 8, margin=1)
        rule = parse_rule({"equivalent": {"margin": 1}})
        assert (rule.judge(0, mean_ci(a, level=rule.level).ci) == HOLDS) == by_test.equivalent


@pytest.mark.parametrize(
    ("x", "text"),
    [(614400, "614,400"), (0.5933, "0.593"), (1e-5, "1e-05"), (-2.0, "-2"), (39976960.4, "39,976,960")],
)
def test_number(x, text):
    assert number(x) == text


# ---- observing


def test_exact_number(capsys):
    verdict = claim(8).observe(0.593)
    assert verdict.word == FAILS
    line = capsys.readouterr().out
    assert (
        line == "Claim 8 (section 6, table): fails: measured 0.593 %; the chapter is right if 0.1 to 0.5 %\n"
    )


def test_conditions_that_disagree_make_it_depend():
    verdict = claim(11).observe(conditions={"training": 4.05, "saved": 0.117})
    assert verdict.word == DEPENDS
    assert [item.verdict for item in verdict.items] == [FAILS, HOLDS]
    assert "training: fails (4.05 %); saved: holds (0.117 %)" in str(verdict)


@pytest.mark.parametrize(
    ("given_", "word", "why"),
    [
        ([1.0, 2.0, 3.0, 2.5, 1.5], HOLDS, ""),
        ([1.0, 2.0, -3.0, 2.5, 1.5], UNKNOWN, "across the border"),
        ([-1.0, -2.0, -1.5, -1.2, -1.3], FAILS, ""),
        ([1.0, 2.0, 3.0], UNKNOWN, "n = 3"),
        ([2.0], UNKNOWN, "n = 1"),
        (2.0, UNKNOWN, "several seeds"),
        ({"value": 2.0, "ci": (1, 3), "n": 8}, HOLDS, ""),
        (Estimate(-2, -3, -1, 6), FAILS, ""),
        (math.nan, UNKNOWN, "not a number"),
    ],
)
def test_a_sampled_claim_needs_an_interval_from_enough_seeds(given_, word, why):
    verdict = claim(10).observe(given_)
    assert verdict.word == word
    assert why in verdict.items[0].why


def test_value_with_interval_and_further_conditions():
    verdict = claim(10).observe(2, ci=(1, 3), n=5, conditions={"equal parameters": Estimate(-2, -3, -1, 5)})
    assert verdict.word == DEPENDS
    assert "this run: holds" in str(verdict)


def test_numpy_and_torch_numbers_are_numbers():
    import numpy as np
    import torch

    assert claim(8).observe(np.float32(0.3)).word == HOLDS
    assert claim(8).observe(torch.tensor(0.3)).word == HOLDS
    assert claim(10).observe(np.array([1.0, 1.2, 0.9, 1.1, 1.0])).word == HOLDS


def test_an_equivalence_and_a_time_ratio_are_measurements():
    from labs_lib.measure.timing import TimeRatio

    tost = paired_tost([0.1, -0.1, 0.05, 0.0, 0.02], [0] * 5, margin=1)
    assert claim(27).observe(parts={"quality": tost}).word == HOLDS
    context.set(device="cuda")  # the claim is about a GPU; only the file name of its record would ask which
    ratio = TimeRatio(Estimate(1.26, 1.2, 1.3, 15), 1.0, 0.8)
    part = claim(5).parts["seconds"]
    from labs_lib.measure.claims import judge, measurement

    assert judge(part, "", measurement(ratio, 0.95), context.current()).verdict == FAILS


def test_parts():
    verdict = claim(35).observe(parts={"twenty_mb": {"q, v": 16.8, "all": 80.0}, "copies": 674})
    assert [item.verdict for item in verdict.items] == [HOLDS, FAILS, HOLDS]
    assert claim(29).observe(0.093, part="qlora_quality").word == FAILS


def test_parts_about_one_quantity_share_an_observation():
    verdict = claim(17).observe(614400)
    assert {item.part.name: item.verdict for item in verdict.items} == {
        "code_comment": FAILS,
        "exercise": HOLDS,
    }


def test_only_a_gpu_can_tell_some():
    verdict = claim(32).observe(0.95, ci=(0.93, 0.97), n=3)
    assert verdict.word == UNKNOWN
    assert "GPU" in str(verdict)


def test_some_cannot_be_told_at_all():
    verdict = claim(33).observe(parts={"dollars": 150_000})
    assert verdict.word == UNKNOWN
    assert "What would tell" in verdict._repr_html_()


def test_a_part_that_is_told_is_not_hidden_by_one_that_is_not():
    verdict = claim(51).observe(parts={"variants": 45, "users": 90})
    assert verdict.word == UNKNOWN
    assert "variants: holds (45 methods)" in str(verdict)


def test_a_verdict_on_a_base_says_which():
    context.set(model="small")
    assert "holds on the small base" in str(claim(10).observe(Estimate(2, 1, 3, 5)))
    context.set(model="HuggingFaceTB/SmolLM2-135M")
    assert "on HuggingFaceTB/SmolLM2-135M:" in str(claim(10).observe(Estimate(2, 1, 3, 5)))
    assert " on " not in str(claim(8).observe(0.3)).split(":")[1]


def test_booleans_are_said_in_words():
    assert "the printed call returns an optimizer: no" in str(claim(41).observe(False))


def test_smoke_gives_no_verdict_and_no_record():
    context.set(profile="smoke", lab="01")
    verdict = claim(8).observe(0.593)
    assert verdict.word is None
    assert "smoke run, no verdict" in str(verdict)
    assert "no verdict" in verdict._repr_html_()
    assert records.load_records("claims_lab01") == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: claim(59), "1 to 58"),
        (lambda: claim("eight"), "1 to 58"),
        (lambda: claim(8).observe(), "nothing was observed"),
        (lambda: claim(8).observe("a lot"), "A measurement is"),
        (lambda: claim(8).observe([]), "empty"),
        (lambda: claim(8).observe(1, ci=(2, 1)), "upside down"),
        (lambda: claim(35).observe(20), "twenty_mb"),
        (lambda: claim(35).observe(20, part="size"), "no part 'size'"),
        (lambda: claim(35).observe(20, parts={"copies": 700}), "not both"),
    ],
)
def test_wrong_use_is_one_clear_sentence(wrong, says):
    with pytest.raises(LabsError, match=re.escape(says)) as error:
        wrong()
    assert "\n" not in str(error.value)


def test_a_repr_is_short_enough_to_be_stored_beside_the_table():
    assert repr(claim(37)) == "<claim 37 (section 9): Two float32 copies of a 7B model are 42 GB.>"
    assert repr(claim(37).observe(53.9)) == "<claim 37: fails>"
    context.set(profile="smoke")
    assert repr(claim(37).observe(53.9)) == "<claim 37: no verdict (smoke run)>"


def test_many_measurements_are_counted_in_one_line():
    sizes = {"a": 16.8, "b": 33.6, "c": 80, "d": 160}
    verdict = claim(35).observe(parts={"twenty_mb": sizes, "ten_to_fifty_mb": sizes, "copies": 674})
    assert str(verdict).endswith(
        ": depends: twenty mb: depends (1 of 4 hold); ten to fifty mb: depends (2 of 4 hold); copies: holds (674 GB)"
    )
    assert verdict._repr_html_().count("<tr>") == 1 + 9
    context.set(profile="smoke")
    assert "no verdict (9 measurements)" in str(
        claim(35).observe(parts=dict.fromkeys(["twenty_mb", "ratio"], sizes) | {"copies": 1})
    )


def test_html_is_escaped_and_shows_what_others_report():
    html = claim(19).observe(614400)._repr_html_()
    assert "&lt;1K params" in html and "<1K" not in html
    assert "As reported" in claim(37).observe(53.9)._repr_html_()


def test_observed_keeps_the_order():
    claim(8).observe(0.3)
    claim(9).observe(8.4e6)
    assert [verdict.claim.id for verdict in observed()] == [8, 9]


# ---- records of claims, and where they stand


def test_record_goes_to_the_cache_unless_told_otherwise(monkeypatch):
    context.set(lab="01", profile="cpu", seed=3)
    claim(8).observe(0.593, note="chapter's configuration", seeds=[0, 1])
    assert not (records.folder(recorded=True)).exists()
    (record,) = records.load_records("claims_lab01")
    assert record.rows == [
        {
            "claim": 8,
            "part": "",
            "condition": "",
            "value": 0.593,
            "ci": None,
            "n": None,
            "unit": "%",
            "verdict": FAILS,
        }
    ]
    origin = record.provenance
    assert (origin["lab"], origin["profile"], origin["seed"], origin["seeds"]) == ("01", "cpu", 3, [0, 1])
    assert {"python", "torch", "peft"} <= set(origin["versions"])
    assert not standings() and standings(mine=True)[8][0].verdict == FAILS

    monkeypatch.setenv("LABS_RECORD", "1")
    claim(8).observe(0.593)
    assert (records.folder(recorded=True) / "cpu.claims_lab01.json").exists()


def test_standing_takes_the_newest_run_of_each_lab(monkeypatch):
    monkeypatch.setenv("LABS_RECORD", "1")

    def run(name, lab, date, rows):
        full = [{"ci": None, "n": None, "unit": "points", "part": "", "condition": "", **row} for row in rows]
        records.save_record(
            records.Record(f"claims_lab{lab}", full, provenance={"run": name, "date": date, "device": "cpu"})
        )

    old = {"claim": 10, "value": -1.0, "verdict": FAILS}
    new = {"claim": 10, "value": 1.0, "verdict": HOLDS}
    run("a", "02", "2026-01-01", [{**old, "condition": "renamed since"}])
    run("b", "02", "2026-01-02", [{**new, "condition": "r8"}])
    run("b", "02", "2026-01-02", [{**new, "condition": "r64"}])
    run("a", "02", "2026-01-01", [{**old, "condition": "late to arrive"}])
    (standing,) = standings()[10]
    assert {row["condition"] for row in standing.rows} == {"r8", "r64"}
    assert standing.verdict == HOLDS
    run("c", "14", "2026-01-03", [old])
    assert standings()[10][0].verdict == DEPENDS, "two labs that disagree"


def test_a_recorded_verdict_that_its_rule_would_not_give_is_found(monkeypatch):
    monkeypatch.setenv("LABS_RECORD", "1")
    context.set(lab="01")
    claim(8).observe(0.593)
    claim(10).observe([1.0])  # an interval without ends survives JSON
    assert mismatches() == []
    path = records.folder(recorded=True) / "cpu.claims_lab01.json"
    path.write_text(path.read_text().replace('"fails"', '"holds"'))
    (found,) = mismatches()
    assert "claim 8" in found and "'holds'" in found and "'fails'" in found


def test_the_course_s_own_records_agree_with_the_rules(monkeypatch):
    monkeypatch.delenv("LABS_HOME")
    assert mismatches() == []


def call(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return main(parser.parse_args(words))


def test_command_lists_and_filters(capsys, monkeypatch):
    monkeypatch.setenv("LABS_RECORD", "1")
    context.set(lab="01")
    claim(8).observe(0.593)
    assert call() == 0
    out = capsys.readouterr().out
    assert "58 claims, 1 measured: 1 fails" in out
    assert call("--lab", "1") == 0
    lab = capsys.readouterr().out
    assert "cpu: fails" in lab and " 8 " in lab and "GaLore" not in lab.split("\n")[0]
    assert call("--open") == 0
    assert "57 claims" in capsys.readouterr().out
    assert call("8", "33") == 0
    full = capsys.readouterr().out
    assert "0.593 %, fails" in full and "not measured yet" in full
    assert call("--check") == 0
    with pytest.raises(LabsError):
        call("77")


def test_a_full_disk_does_not_stop_a_learner(monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "_replace", full)
    assert claim(8).observe(0.593).word == FAILS
    assert "not kept" in capsys.readouterr().out
    monkeypatch.setenv("LABS_RECORD", "1")
    with pytest.raises(LabsError, match="No space left"):
        claim(8).observe(0.593)


def test_rows_are_plain_json():
    context.set(lab="01")
    import numpy as np

    claim(10).observe(np.array([1.0, 1.2, 0.9, 1.1, 1.0]))
    (path,) = records.folder(recorded=False).glob("*.json")
    row = json.loads(path.read_text())[-1]["rows"][0]
    assert row["n"] == 5 and set(row["verdict"].split()) and row["verdict"] in VERDICTS
