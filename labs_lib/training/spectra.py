"""`labs spectra`: are gradients low-rank, and how long does a basis stay right?

Three models of the small base's shape, three seeds each: random weights and pretrained ones, both trained on waybills
by Adam, and the pretrained one on the text it was pretrained on, untrained. At some steps, for several batch sizes: the
share of every layer's gradient that its first singular directions hold. At more steps: the share that the basis of an
earlier step's batch keeps of another batch's gradient now, which is what GaLore lives on between two SVDs.

Stops and goes on like a sweep, and records itself when it is complete.
"""

import argparse
import random
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from labs_lib.paths import cache

if TYPE_CHECKING:
    import torch
    from torch import nn

SIZE, SEEDS, LR, BATCH = "small", (1, 2, 3), 1e-3, 16
STARTS = {  # start -> the steps at which bases are compared; the gradients' energy is measured at those in SPECTRA
    "random weights, waybills": (0, 1, 5, 20, 50),
    "pretrained, waybills": (0, 1, 5, 20, 50),
    "pretrained, its own text": (0,),
}
SPECTRA = (0, 5, 50)
BATCHES = (8, 64, 256)  # rows of a batch
RANKS = (1, 2, 4, 8, 16, 32, 64)
BASES = (4, 32)  # ranks of the bases: 1/32 and 1/4 of the width


def gradients(model: "nn.Module", rows: list[dict], pad: int, part: int = 64) -> "dict[str, torch.Tensor]":
    """The gradient of the mean loss over all completion tokens of `rows`, of every linear layer but the head."""
    from labs_lib.measure.quality import collate
    from labs_lib.methods.lora import target_names

    tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
    for start in range(0, len(rows), part):
        some = rows[start : start + part]
        share = sum(label != -100 for row in some for label in row["labels"][1:]) / tokens
        (share * model(**collate(some, pad)).loss).backward()
    found = {
        name: model.get_submodule(name).weight.grad.clone() for name in target_names(model, "all-linear")
    }
    model.zero_grad(set_to_none=True)
    return found


def watch(model: "nn.Module", rows: list[dict], pad: int, seed: int, steps: tuple[int, ...]):
    """A callback for the Trainer; what it measured after these steps stands in `spectra` and `kept`.

    `spectra`: for step and batch size, the layers' energy within the first RANKS directions, a list per rank.
    `kept`: for step, step of the basis and rank: what the basis keeps, what the gradient's own would; mean over layers.
    """
    from statistics import fmean

    from transformers import TrainerCallback

    from labs_lib.methods.galore import Projector, energy_curve, energy_kept

    rng = random.Random(seed)  # not torch's: training must draw the same batches as without a watcher

    class Watch(TrainerCallback):
        def __init__(self):
            self.spectra, self.kept, self.bases = [], [], {}

        def measure(self, step: int) -> None:
            for batch in BATCHES if step in SPECTRA else ():
                curves = [
                    energy_curve(each) for each in gradients(model, rng.sample(rows, batch), pad).values()
                ]
                energy = {rank: [round(curve[rank - 1].item(), 4) for curve in curves] for rank in RANKS}
                self.spectra.append({"step": step, "batch": batch, "energy": energy})
            basis, now = (gradients(model, rng.sample(rows, BATCH), pad) for _ in range(2))
            for rank in BASES:
                self.bases[step, rank] = {name: Projector(rank) for name in basis}
                for name, projector in self.bases[step, rank].items():
                    projector.refresh(basis[name])
            for (then, rank), projectors in self.bases.items():
                kept = fmean(energy_kept(now[name], each) for name, each in projectors.items())
                best = fmean(energy_curve(each)[rank - 1].item() for each in now.values())
                self.kept.append({"step": step, "basis": then, "rank": rank, "kept": kept, "best": best})

        def on_train_begin(self, args, state, control, **kwargs):
            self.measure(0)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in steps:
                self.measure(state.global_step)

    return Watch()


def run_point(start: str, seed: int, size: str = SIZE) -> dict:
    from labs_lib.measure.quality import encode_rows
    from labs_lib.models.base import fresh_base, load_base
    from labs_lib.models.corpus import documents
    from labs_lib.training.fit import fit
    from labs_lib.world.tasks import load_task

    began = time.perf_counter()
    model, tokenizer = load_base(size)
    if start.startswith("random"):
        model = fresh_base(size, seed)
    if start.endswith("own text"):
        pairs = islice(documents(9000 + seed), 2048)
        texts = dict(zip(("prompt", "completion"), map(list, zip(*pairs, strict=True)), strict=True))
    else:
        texts = load_task("domain")["train"][:]
    rows = encode_rows(tokenizer, texts["prompt"], texts["completion"])
    steps = STARTS[start]
    watcher = watch(model, rows, tokenizer.pad_token_id, seed, steps)
    if max(steps):
        settings = {"steps": max(steps), "lr": LR, "batch_size": BATCH, "seed": seed, "progress": False}
        fit(model, tokenizer, texts, callbacks=[watcher], **settings)
    else:
        watcher.measure(0)
    measured = {"spectra": watcher.spectra, "kept": watcher.kept}
    return {"start": start, "seed": seed} | measured | {"seconds": round(time.perf_counter() - began, 1)}


def run(limit: int | None = None) -> Path | None:
    """Run what is missing; returns the record's path once it is complete, None if `limit` came first."""
    from labs_lib.measure.records import Record, save_record
    from labs_lib.training.resume import run_points

    plan = [{"start": start, "seed": seed} for start in STARTS for seed in SEEDS]
    log = cache() / "sweeps" / "galore_spectra.jsonl"
    rows = run_points(log, lambda rows: plan, lambda point: run_point(**point), "spectra", limit)
    if rows is None:
        return None
    note = (
        "Energy of gradients in their first singular directions, and what older bases keep of it; small base."
    )
    return save_record(Record("galore_spectra", rows, note=note))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit", type=int, default=None, help="stop after so many runs; the next call goes on"
    )


def main(args: argparse.Namespace) -> int:
    path = run(args.limit)
    print(f"recorded in {path}" if path else "stopped early; run the same command to go on")
    return 0
