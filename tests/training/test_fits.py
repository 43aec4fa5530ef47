"""Bytes of a training step, counted without weights: the same as of a real one; and what they say about cards."""

import pytest
import torch

from labs_lib.measure.memory import fused_attention, peak_memory
from labs_lib.measure.records import load_record
from labs_lib.models.twins import random_like, twin_config
from labs_lib.training import fits
from labs_lib.training.bench_arms import arms_for, random_bases, trainee

TWIN = "random:64x2"


def peak(name: str, device: str) -> int:
    twin = random_like(TWIN, device, torch.float32).requires_grad_(False)
    arm = next(arm for arm in arms_for(twin.config, half=False) if arm.name == name)
    ids = torch.zeros((2, 40), dtype=torch.long, device=device)
    with random_bases(), fused_attention():
        one = trainee(arm, twin, {"input_ids": ids, "labels": ids})
        one.step()
        return peak_memory(one.step, one.model, one.optimizers, one.batch, device="cpu").peak


@pytest.mark.parametrize(
    "name",
    ["LoRA r16", "DoRA r16", "full fine-tuning", "GaLore", "GaLore, layer by layer", "prompt 10"],
)
def test_without_weights_the_count_is_that_of_a_real_step(name):
    """Without `fused_attention` the meta device spells attention out, and scores are counted that no device holds."""
    assert peak(name, "meta") == peak(name, "cpu")


def test_real_attention_is_left_alone():
    q, k, v = (torch.randn(1, heads, 5, 8) for heads in (4, 2, 2))
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(q, k, v, is_causal=True, enable_gqa=True)
    with fused_attention():
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(found, expected) and torch.nn.functional.scaled_dot_product_attention is attention


def test_every_method_has_an_arm_and_every_point_is_named_once():
    config = twin_config("llama-2-7b")
    for method in fits.METHODS:
        arm, eight_bit = fits.arm_of(method, config)
        assert eight_bit == ("8-bit" in method) and arm.arm.name.startswith(
            method.split(",")[0].split(" ")[0]
        )
    assert fits.arm_of("GaLore, 8-bit, layer by layer", config)[0].update == "backward"
    points = fits.points()
    assert (
        len({str(point) for point in points}) == len(points) == len(fits.MODELS) * (2 * len(fits.METHODS) - 1)
    )
    with pytest.raises(KeyError):
        fits.arm_of("magic", config)


def test_counting_orders_the_methods(monkeypatch):
    shared = {"model": TWIN, "rows": 1, "length": 64}
    found = {
        (method, ways): fits.count(shared | {"method": method, "checkpointing": ways})
        for method in ("full fine-tuning", "GaLore", "GaLore, 8-bit", "LoRA r16", "QLoRA r16")
        for ways in (False, True)
    }
    peaks = {key: row["peak_bytes"] for key, row in found.items()}
    assert all(peaks[method, True] <= peaks[method, False] for method, _ in peaks)
    assert peaks["QLoRA r16", False] < peaks["LoRA r16", False] < peaks["full fine-tuning", False]
    states = {method: found[method, False]["state_bytes"] for method, _ in found}
    assert states["GaLore, 8-bit"] < states["GaLore"] < states["full fine-tuning"]


ROWS = [
    {"method": method, "model": model, "checkpointing": ways, "peak_bytes": gb * 1e9}
    for model, gigabytes in (("1b", ((5, 4), (3,))), ("7b", ((20, 14), (30,))))
    for method, each in zip(("LoRA", "prefix"), gigabytes, strict=True)
    for ways, gb in zip((False, True), each, strict=False)
]


def test_what_fits_on_a_card():
    assert fits.fits(14.4e9, 16) and not fits.fits(14.41e9, 16)
    assert fits.fitting(ROWS, 16) == {"LoRA": "7b, checkpointing", "prefix": "1b"}
    assert fits.fitting(ROWS, 24) == {"LoRA": "7b", "prefix": "1b"}
    assert fits.fitting(ROWS, 2) == {"LoRA": "", "prefix": ""}
    assert fits.table(ROWS, (16, 24)) == [
        {"peak GB: card": "LoRA", "1b": "5.0 (4.0): 16 GB", "7b": "20.0 (14.0): 16 GB"},
        {"peak GB: card": "prefix", "1b": "3.0: 16 GB", "7b": "30.0: none"},
    ]


def test_the_recorded_counts_are_todays():
    record = load_record(fits.RECORD, device="cpu")
    assert {(row["model"], row["method"], row["checkpointing"]) for row in record.rows} == {
        (point["model"], point["method"], point["checkpointing"]) for point in fits.points()
    }
    wanted = {"model": "smollm2-135m", "method": "LoRA r16", "checkpointing": False}
    row = next(row for row in record.rows if wanted.items() <= row.items())
    if record.provenance["versions"]["transformers"] == __import__("transformers").__version__:
        assert (
            fits.count({key: row[key] for key in ("model", "method", "checkpointing", "rows", "length")})
            == row
        )


def test_counting_resumes_and_records(tmp_path, monkeypatch):
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    monkeypatch.delenv("LABS_RECORD", raising=False)
    monkeypatch.setattr(fits, "MODELS", (TWIN,))
    monkeypatch.setattr(fits, "METHODS", ("LoRA r16", "prefix 30"))
    assert fits.record_counts(limit=1) is None
    path = fits.record_counts()
    assert path.name == "cpu.training_room.json" and not list((tmp_path / "bench").iterdir())
