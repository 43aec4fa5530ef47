"""Side by side: a column for every device and model that a record is of, the published figures, and what is missing."""

import pytest

from labs_lib.measure import claim, context
from labs_lib.measure.records import NoRecord, Record, load_records, save_record
from labs_lib.measure.sides import (
    interval,
    newest,
    peft_benchmark,
    ratio_of,
    side_by_side,
    step_cost,
    token_cost,
)
from labs_lib.measure.standings import mismatches, standings

COMMAND = "labs bench training"


def row(arm: str, ratio: float, model: str = "small", **more) -> dict:
    return {"arm": arm, "model": model, "rows": 1, "length": 64, "ratio": ratio} | more


def keep(device: str, date: str, *rows: dict, recorded: bool = True) -> None:
    record = Record(
        "bench_training", list(rows), provenance={"device": device, "date": date, "machine": device}
    )
    save_record(record, device="cpu", recorded=recorded)


def shown(**where):
    return side_by_side(
        "bench_training", ["DoRA", "IA3", "LoHa"], lambda row: f"{row['ratio']:.1f}", COMMAND, **where
    )


def test_without_a_record_only_the_command_is_told():
    found = shown()
    assert found.rows == []
    assert str(found).count(COMMAND) == 2 and "No CPU record" in found.note and "No GPU record" in found.note
    assert "{" not in found.note


def test_a_column_per_device_and_model_the_cpus_first():
    keep("h100", "2026-12-01", row("DoRA", 1.2, "llama-2-7b"), row("IA3", 0.9, "llama-2-7b"))
    keep("cpu", "2026-11-01", row("DoRA", 9.9))
    keep("cpu", "2026-11-27", row("DoRA", 1.4), row("IA3", 0.8))
    keep("cpu", "2026-11-26", row("DoRA", 1.3, "random:512x4"))
    keep("cpu", "2026-11-30", row("DoRA", 7.7), recorded=False)  # a learner's own does not hide the course's
    found = shown()
    assert found.rows == [
        {
            "": "DoRA",
            "cpu, random:512x4, 1 x 64 tokens": "1.3",
            "cpu, small, 1 x 64 tokens": "1.4",
            "h100, llama-2-7b, 1 x 64 tokens": "1.2",
        },
        {
            "": "IA3",
            "cpu, random:512x4, 1 x 64 tokens": "",
            "cpu, small, 1 x 64 tokens": "0.8",
            "h100, llama-2-7b, 1 x 64 tokens": "0.9",
        },
    ]
    assert "No " not in found.note and "cpu: 2026-11-27" in found.note and "h100: 2026-12-01" in found.note
    assert [list(each) for each in shown(model="small").rows] == [["", "cpu, small, 1 x 64 tokens"]] * 2


def test_what_was_not_measured_is_told():
    keep(
        "cpu",
        "2026-11-27",
        row("DoRA", 0, out_of_memory=True),
        row("IA3", 0, missing="bitsandbytes"),
        row("LoHa", 0, refused="no"),
    )
    assert [list(each.values())[1] for each in shown().rows] == ["does not fit", "needs bitsandbytes", "-"]
    assert "No GPU record yet" in shown().note


def test_published_figures_have_a_column_of_their_own():
    keep("cpu", "2026-11-27", row("DoRA", 1.4))
    found = side_by_side(
        "bench_training",
        ["DoRA", "LoHa"],
        lambda row: "x",
        COMMAND,
        published={"PEFT's benchmark": {"LoHa": "1.5"}},
    )
    assert [each["PEFT's benchmark"] for each in found.rows] == ["", "1.5"]


def test_intervals():
    assert interval({"ratio": 1.236, "ratio_lo": 1.2, "ratio_hi": 1.3}, "ratio") == "1.24 [1.20, 1.30]"
    assert interval({"ratio": 1.236}, "ratio", 1) == "1.2" and interval({}, "ratio") == "-"


def test_texts_of_a_step_and_of_a_token():
    ends = {"ratio": 1.236, "ratio_lo": 1.2, "ratio_hi": 1.3}
    assert step_cost(ends | {"peak_bytes": 20.23e9}) == "20.2 GB, 1.24 [1.20, 1.30] x"
    assert token_cost(ends | {"ms": 1.2345}) == "1.23 ms, 1.24 [1.20, 1.30] x"
    assert ratio_of(ends | {"rounds": 9}) == {"value": 1.236, "ci": (1.2, 1.3), "n": 9}


def test_the_benchmarks_figures_are_the_published_ones():
    ((title, figures),) = peft_benchmark({"DoRA r16": "DoRA r32", "LoRA r16": "LoRA r32"}).items()
    assert "PEFT" in title
    assert figures == {
        "DoRA r16": "22.8 GiB, 1.26 x (DoRA r32)",
        "LoRA r16": "20.8 GiB, 1.00 x (LoRA r32)",
    }


def test_the_newest_record_with_such_rows():
    keep("h100", "2026-12-01", row("DoRA", 1.2, "llama-2-7b"), row("DoRA", 1.3, "llama-3.2-1b"))
    keep("cpu", "2026-12-02", row("DoRA", 1.4))
    found = newest("bench_training", "gpu", model="llama-2-7b")
    assert [each["ratio"] for each in found.rows] == [1.2] and found.device == "h100"
    assert newest("bench_training").device == "cpu"
    assert isinstance(newest("bench_training", "gpu", model="small"), NoRecord)


@pytest.mark.parametrize("seconds, word", [(1.02, "holds"), (1.3, "fails")])
def test_a_gpus_record_is_judged_on_a_cpu_as_that_gpus(seconds, word):
    """Claim 5's seconds can only be told by a GPU: its record tells, and the verdict is kept among the GPU's."""
    context.set(lab="04", profile="cpu", device="cpu", model="small")
    measured = {"value": seconds, "ci": (seconds - 0.01, seconds + 0.01), "n": 9}
    assert claim(5).observe(parts={"seconds": measured}).word == "can't be told here"
    keep("h100", "2026-12-01", row("DoRA", seconds, "llama-2-7b"))
    record = newest("bench_training", "gpu")
    verdict = claim(5).observe(parts={"seconds": measured}, on=record)
    assert verdict.word == word
    kept = load_records("claims_lab04")
    assert [each.device for each in kept] == ["cpu", "h100"] or [each.device for each in kept] == [
        "h100",
        "cpu",
    ]
    (h100,) = [each for each in kept if each.device == "h100"]
    assert h100.provenance["machine"] == "h100" and h100.provenance["from"].startswith(
        "bench_training, 2026-12"
    )
    assert h100.provenance["model"] == "llama-2-7b"
    stand = standings(mine=True)[5]
    assert [(each.device, each.verdict) for each in stand] == [("cpu", "can't be told here"), ("h100", word)]
    assert mismatches() == []


def test_a_verdict_of_a_record_names_its_model():
    context.set(lab="11", profile="cpu", device="cpu", model="small")
    keep("h100", "2026-12-01", row("IA3", 0.9, "llama-2-7b"))
    verdict = claim(20).observe(parts={"training_memory": 0.9}, on=newest("bench_training", "gpu"))
    assert verdict.scope == " on the llama-2-7b base"
