"""What fits on a card: the bytes of a training step by method and model size, counted tensor by tensor without weights.

`labs bench training --count` runs a real step of each method on the meta device, where tensors have shapes but no
numbers, and records the peak: weights, gradients, optimizer states and activations together. `table` and `fitting` read
that. Left out is what a GPU adds: its context, scratch space in kernels, rounding; `RESERVE` stands for that.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labs_lib.training.bench_arms import BenchArm

RECORD = "training_room"
MODELS = ("smollm2-135m", "llama-3.2-1b", "llama-3.2-3b", "llama-2-7b")
ROWS, LENGTH = 1, 512
RESERVE = 0.1  # of a card, for what is not a tensor
CARDS = (16, 24, 80)  # GB, as they are sold
#: those a learner chooses from; the second name is with activations computed twice instead of kept
METHODS = (
    "full fine-tuning",
    "GaLore",
    "GaLore, 8-bit",
    "GaLore, layer by layer",
    "GaLore, 8-bit, layer by layer",
    "DoRA r16",
    "LoRA r16",
    "prefix 30",
    "IA3",
    "prompt 10",
    "QLoRA r16",
)


def points() -> list[dict]:
    """Every model by every method, with checkpointing and without; a prefix lives in the cache, which that drops."""
    return [
        {"model": model, "method": method, "checkpointing": ways, "rows": ROWS, "length": LENGTH}
        for model in MODELS
        for method in METHODS
        for ways in (False, True)
        if not (ways and method.startswith("prefix"))
    ]


def count(point: dict) -> dict:
    """The bytes of one point: `weight_bytes`, `state_bytes` and `peak_bytes` of a step, all of them exact but two.

    States of 8 bits are arithmetic (methods.galore.galore_bytes), and a 4-bit base is dequantised by the course's own
    layer, to float32 for one layer at a time.
    """
    import torch

    from labs_lib.measure.count import optimizer_state_bytes, tensor_bytes
    from labs_lib.measure.memory import fused_attention, peak_memory
    from labs_lib.methods.galore import galore_bytes
    from labs_lib.models.twins import random_like
    from labs_lib.training.bench_arms import random_bases, trainee

    twin = random_like(point["model"]).requires_grad_(False)
    arm, eight_bit = arm_of(point["method"], twin.config)
    ids = torch.zeros((point["rows"], point["length"]), dtype=torch.long, device="meta")
    with random_bases(), fused_attention(), _one_sequence():
        one = trainee(arm, twin, {"input_ids": ids, "labels": ids}, point["checkpointing"])
        one.step()  # the optimiser's states
        peak = peak_memory(one.step, one.model, one.optimizers, one.batch, device="cpu").peak
        one.close()
    states = sum(map(optimizer_state_bytes, one.optimizers))
    if eight_bit:
        whole = random_like(point["model"])
        small, large = (galore_bytes(whole, arm.arm.rank, state=size).optimizer for size in (1, 2))
        states, peak = states + small - large, peak + small - large
    return point | {"weight_bytes": tensor_bytes(one.model), "state_bytes": states, "peak_bytes": peak}


@contextmanager
def _one_sequence() -> Iterator[None]:
    """While it lasts, transformers takes a batch for whole sequences: to find that out, it would read numbers."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    kept = getattr(masking_utils, name, None)
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, kept)


def arm_of(method: str, config) -> "tuple[BenchArm, bool]":
    """The bench's arm that a method is counted by, and whether its states are to be taken in 8 bits."""
    from labs_lib.training.bench_arms import arms_for

    eight_bit = "8-bit" in method
    wanted = method.replace(", 8-bit", "")
    for arm in arms_for(config, half=False):
        if arm.name == wanted:
            return (replace(arm, packed=False, by="by hand") if arm.packed else arm), eight_bit
    raise KeyError(method)


def record_counts(limit: int | None = None) -> Path | None:
    """Count all points and record them; None if stopped before the last. Resumes."""
    from labs_lib.measure.records import Record, save_record, versions
    from labs_lib.paths import cache
    from labs_lib.training.resume import run_points

    log = cache() / "bench" / f"{RECORD}-{versions()['transformers']}-{versions()['torch']}.jsonl"
    rows = run_points(log, lambda rows: points(), count, "counting", limit)
    if rows is None:
        return None
    note = "One step on the meta device in bfloat16 (float16 takes the same bytes): tensors counted, nothing timed."
    path = save_record(Record(RECORD, rows, note), device="cpu")
    log.unlink()
    return path


def fits(peak: float, card_gb: float) -> bool:
    """Whether a step of `peak` bytes runs on a card of so many GB."""
    return peak <= (1 - RESERVE) * card_gb * 1e9


def fitting(rows: Sequence[dict], card_gb: float) -> dict[str, str]:
    """By method the largest model that a card can train, and whether that takes checkpointing; "" if none."""
    found = dict.fromkeys((row["method"] for row in rows), "")
    for row in rows:  # smallest model first, each without checkpointing first
        name = found[row["method"]]
        if fits(row["peak_bytes"], card_gb) and name.removesuffix(", checkpointing") != row["model"]:
            found[row["method"]] = row["model"] + (", checkpointing" if row["checkpointing"] else "")
    return found


def table(rows: Sequence[dict], cards: Sequence[int] = CARDS) -> list[dict[str, str]]:
    """By method and model: GB at the peak, in brackets with checkpointing; and the smallest of `cards` that does."""
    models, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "method"))
    peaks: dict[tuple[str, str], list[float]] = {}
    for row in sorted(rows, key=lambda row: row["checkpointing"]):
        peaks.setdefault((row["method"], row["model"]), []).append(row["peak_bytes"])

    def cell(found: list[float]) -> str:
        words = " ".join(f"({peak / 1e9:.1f})" if i else f"{peak / 1e9:.1f}" for i, peak in enumerate(found))
        card = next((f"{card} GB" for card in cards if fits(min(found), card)), "none")
        return f"{words}: {card}"

    return [
        {"peak GB: card": method} | {model: cell(peaks[method, model]) for model in models}
        for method in methods
    ]
