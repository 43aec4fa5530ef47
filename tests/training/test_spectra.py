"""Gradients' spectra: the gradient is the whole batch's, watching changes no training, a run stops and goes on."""

import json

import pytest
import torch

from labs_lib.measure.quality import encode_rows
from labs_lib.measure.records import stored
from labs_lib.models.base import load_base
from labs_lib.training import spectra
from labs_lib.training.fit import fit
from labs_lib.world.tasks import load_task


@pytest.fixture
def brief(monkeypatch, tmp_path):
    """Two steps of the tiny base and batches of a few rows; a cache of its own."""
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    monkeypatch.delenv("LABS_RECORD", raising=False)
    steps = {start: (0, 2) if len(steps) > 1 else steps for start, steps in spectra.STARTS.items()}
    for name, value in {
        "STARTS": steps,
        "SPECTRA": (0, 2),
        "BATCHES": (2, 6),
        "BATCH": 4,
        "SIZE": "tiny",
    }.items():
        monkeypatch.setattr(spectra, name, value)


def waybills():
    model, tokenizer = load_base("tiny")
    texts = load_task("domain")["train"][:32]
    return model, tokenizer, texts, encode_rows(tokenizer, texts["prompt"], texts["completion"])


def test_a_gradient_in_parts_is_the_whole_batchs():
    model, tokenizer, _, rows = waybills()
    pad = tokenizer.pad_token_id
    whole, parts = spectra.gradients(model, rows[:6], pad), spectra.gradients(model, rows[:6], pad, part=2)
    assert len(whole) == 28 and all(parameter.grad is None for parameter in model.parameters())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5)


def test_watching_changes_no_step_and_measures_what_it_says(brief):
    losses = []
    for watched in (False, True):
        model, tokenizer, texts, rows = waybills()
        watcher = spectra.watch(model, rows, tokenizer.pad_token_id, 1, (0, 2))
        callbacks = [watcher] if watched else []
        settings = {"steps": 3, "lr": 1e-3, "batch_size": 4, "seed": 1, "progress": False}
        losses.append(fit(model, tokenizer, texts, callbacks=callbacks, **settings).losses)
    assert losses[0] == losses[1]
    assert [(each["step"], each["batch"]) for each in watcher.spectra] == [(0, 2), (0, 6), (2, 2), (2, 6)]
    for each in watcher.spectra:
        by_rank = torch.tensor([each["energy"][rank] for rank in spectra.RANKS])
        assert by_rank.shape == (len(spectra.RANKS), 28)
        assert (by_rank.diff(dim=0) >= -1e-4).all() and torch.allclose(by_rank[-1], torch.ones(28))
    found = {(k["step"], k["basis"], k["rank"]) for k in watcher.kept}
    assert found == {(0, 0, r) for r in (4, 32)} | {(2, basis, r) for basis in (0, 2) for r in (4, 32)}
    assert all(0 < each["kept"] < each["best"] <= 1 for each in watcher.kept)


def test_stops_goes_on_and_records_once_complete(brief, monkeypatch, tmp_path):
    monkeypatch.setattr(
        spectra, "run_point", lambda start, seed: {"start": start, "seed": seed, "at": len(done())}
    )

    def done():
        log = tmp_path / "sweeps" / "galore_spectra.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []

    assert spectra.run(limit=4) is None and len(done()) == 4
    before = done()
    assert spectra.run() and done()[:4] == before and len(done()) == 9
    (record,) = stored("galore_spectra", recorded=False)
    assert [(row["start"], row["seed"]) for row in record.rows] == [
        (start, seed) for start in spectra.STARTS for seed in spectra.SEEDS
    ]


def test_text_that_the_base_knows_is_measured_untrained(brief):
    row = spectra.run_point("pretrained, its own text", 1, "tiny")
    assert [each["step"] for each in row["spectra"]] == [0, 0] and {each["step"] for each in row["kept"]} == {
        0
    }
