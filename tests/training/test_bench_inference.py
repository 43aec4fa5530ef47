"""`labs bench inference`: every arm decodes what its model generates, and what cannot is a row."""

import json

import pytest
import torch

from labs_lib import cli
from labs_lib.measure.records import stored
from labs_lib.training import bench, bench_arms, bench_inference
from labs_lib.training.bench_inference import BASE, Arms, Plan, methods

TWIN = "random:64x2"
NAMES = tuple(methods(bench.config_of(TWIN), half=False))


def plan(**changes) -> Plan:
    small = {"model": TWIN, "batches": (2,), "prompt": 6, "tokens": 3, "seconds": 0.0, "least": 2}
    return Plan(**(small | changes))


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_decodes_what_its_model_generates(name):
    arms = Arms(plan(arms=(name,)))
    decoder, ids = arms.ready()[name], bench_inference.prompt(plan(), arms, 2)
    with torch.no_grad():
        token, cache = decoder.prefill(ids)
        last = decoder.decode(token, cache, 4)
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        whole = decoder.whole.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(whole[:, -1:], last) and torch.equal(whole[:, -5:-4], token)


def test_the_same_step_again_and_again():
    """After a turn the cache is back where it was: ten turns do not decode a longer and longer text."""
    arms = Arms(plan(arms=("LoRA", "prefix 30")))
    with torch.no_grad():
        steps = bench_inference.decoding(plan(), arms, 2)
        for name, (step, flops) in steps.items():
            cache = step.__defaults__[2]
            before = cache.get_seq_length()
            step()
            step()
            assert cache.get_seq_length() == before == (36 if name == "prefix 30" else 6)
            assert flops > 0


def test_flops_of_a_token():
    found = {
        row["arm"]: row["flops"]
        for row in bench_inference.measure(
            plan(), Arms(plan(arms=("LoRA", "LoRA, merged", "IA3"))), "decode", 2
        )
    }
    assert found["LoRA, merged"] == found["IA3"] == found[BASE] < found["LoRA"]


def test_what_does_not_fit_is_a_row(monkeypatch, tmp_path):
    def full(name, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr("labs_lib.models.twins.random_packed", full)
    rows, complete = bench_inference.run(plan(arms=("LoRA", "QLoRA")), tmp_path / "log.jsonl")
    assert complete and {row["arm"] for row in rows if row["what"] == "decode"} == {BASE, "LoRA"}
    (missing,) = [row for row in rows if row["what"] == "none"]
    assert missing["arm"] == "QLoRA" and missing["needed_bytes"] == 2 * 2**20
    assert "QLoRA: out of memory" in bench_inference.table(rows)


def test_without_a_base_there_is_no_ratio(monkeypatch):
    def fail(model):
        raise ValueError("broken")

    monkeypatch.setattr(bench_arms, "share", fail)
    with pytest.raises(bench.LabsError, match=r"base itself is not there: ValueError: broken"):
        Arms(plan()).ready()


def test_it_stops_in_time_and_resumes(tmp_path, monkeypatch):
    log, wanted = tmp_path / "log.jsonl", plan(arms=("IA3",), batches=(1, 2))
    assert bench_inference.run(wanted, log, minutes=0) == ([], False)
    rows, complete = bench_inference.run(wanted, log)
    assert complete and len(log.read_text().splitlines()) == 4
    assert [(row["what"], row["batch"]) for row in rows if row["arm"] == "IA3"] == [
        ("decode", 1),
        ("decode", 2),
        ("prefill", 1),
        ("prefill", 2),
    ]
    monkeypatch.setattr(bench_inference, "measure", None)  # nothing is left to measure
    assert bench_inference.run(wanted, log) == (rows, True)


def test_the_command_records_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    monkeypatch.delenv("LABS_RECORD", raising=False)
    words = [
        "bench",
        "inference",
        "--model",
        TWIN,
        "--device",
        "cpu",
        "--quick",
        "--prompt",
        "4",
        "--tokens",
        "2",
    ]
    assert cli.main([*words, "--batch", "1", "--arms", "DoRA; DoRA, norms kept"]) == 0
    record = stored("bench_inference", recorded=False)[-1]
    assert {row["arm"] for row in record.rows} == {BASE, "DoRA", "DoRA, norms kept"}
    assert all(row["ratio_lo"] <= row["ratio"] <= row["ratio_hi"] for row in record.rows)
    assert "ms per token, batch 1" in capsys.readouterr().out
    json.dumps(record.rows, allow_nan=False)


@pytest.mark.parametrize("words, told", [(["--batch", "one"], "1,8"), (["--tokens", "0"], "above 0")])
def test_wrong_words_are_told(words, told, capsys):
    assert cli.main(["bench", "inference", "--device", "cpu", *words]) == 2
    assert told in capsys.readouterr().err
