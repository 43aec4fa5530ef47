"""`fit`: train whatever of a model is trainable on (prompt, completion) rows, with transformers' Trainer.

The Trainer brings the progress bar (notebook and terminal), schedules, resuming and, under `accelerate launch`, DDP and
FSDP. This file adds completion-only loss, a record of the run, and quiet defaults.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from labs_lib.errors import LabsError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback


@dataclass(frozen=True)
class Run:
    """What one training run did. `losses` is the training loss (nats per completion token) at every step."""

    steps: int
    lr: float
    batch_size: int
    seed: int
    seconds: float
    tokens_per_second: float
    trainable_parameters: int
    peak_bytes: int | None  # of the CUDA device; None on CPU, where `measure` counts tensors exactly
    losses: list[float] = field(repr=False)
    settings: dict = field(default_factory=dict, repr=False)

    @property
    def final_loss(self) -> float:
        """Mean loss of the last tenth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


def fit(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data,
    *,
    steps: int,
    lr: float,
    batch_size: int = 16,
    seed: int = 0,
    schedule: str = "linear",
    warmup: float = 0.06,
    weight_decay: float = 0.0,
    optimizer: "torch.optim.Optimizer | None" = None,
    callbacks: "list[TrainerCallback] | None" = None,
    checkpoints: str | Path | None = None,
    progress: bool = True,
    **arguments,
) -> Run:
    """Train the parameters of `model` that require gradients.

    Args:
        data: rows with `prompt` and `completion` (a Dataset split, or a dict of two lists).
        steps: optimiser steps; the rows are shuffled (by `seed`) and repeated as often as needed.
        lr: peak learning rate, after `warmup` (share of the steps), following `schedule` (transformers' names).
        optimizer: instead of AdamW(lr, weight_decay); it keeps its own learning rates.
        checkpoints: a folder to save into ten times, and to resume from if it holds a checkpoint. None: keep nothing.
        progress: show the progress bar.
        **arguments: anything else that transformers' TrainingArguments takes.

    Returns:
        Run, with the loss at every step. The model is trained in place and left in eval mode.

    Raises:
        LabsError: nothing to train, no rows, or a non-finite loss (with the step at which it broke).
    """
    import math
    import tempfile

    import torch
    from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils.notebook import NotebookProgressCallback

    from labs_lib.measure.quality import collate, encode_rows

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        raise LabsError(
            "Nothing to train: no parameter of the model requires a gradient. Inject an adapter first."
        )
    if not len(data["prompt"]):
        raise LabsError("Nothing to train on: the dataset has no rows.")
    if getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = True  # else the Trainer refuses adapters that are not PEFT's
    rows = encode_rows(tokenizer, data["prompt"], data["completion"])
    on_gpu = next(model.parameters()).is_cuda

    with tempfile.TemporaryDirectory(prefix="labs-fit-") as scratch:
        folder = Path(checkpoints) if checkpoints else Path(scratch)
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=lr,
            lr_scheduler_type=schedule,
            warmup_steps=math.ceil(warmup * steps),
            weight_decay=weight_decay,
            seed=seed,
            data_seed=seed,
            logging_steps=1,
            logging_strategy="steps",
            logging_nan_inf_filter=False,  # a loss that broke must be seen
            save_strategy="steps" if checkpoints else "no",
            save_steps=max(1, steps // 10),
            save_total_limit=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=not on_gpu,
            remove_unused_columns=False,
            dataloader_pin_memory=on_gpu,
            **arguments,
        )
        # Else the Trainer spreads every batch over all GPUs that it sees.
        settings._n_gpu = min(1, settings.n_gpu)
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=rows,
            data_collator=lambda part: collate(part, tokenizer.pad_token_id),
            optimizers=(optimizer, None),
            callbacks=[watch := _watch(steps, progress), *(callbacks or [])],
        )
        # One line with the loss replaces the Trainer's table, which grows by a row at every logged step.
        for standard in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
            trainer.remove_callback(standard)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
        seconds = time.perf_counter() - started
    model.eval()
    tokens = sum(len(row["input_ids"]) for row in rows) / len(rows) * batch_size * steps
    return Run(
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        trainable_parameters=trainable,
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        losses=watch.losses,
        settings={"schedule": schedule, "warmup": warmup, "weight_decay": weight_decay},
    )


def _watch(steps: int, progress: bool) -> "TrainerCallback":
    """A callback that keeps the loss of every step, shows one progress line, and stops at a loss that is not finite."""
    import math
    import sys

    from tqdm.std import tqdm  # not tqdm.auto: its widgets do not survive in a stored notebook
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.losses = [
                row["loss"] for row in state.log_history if "loss" in row
            ]  # of the run that is resumed
            self.bar = tqdm(
                total=steps,
                initial=state.global_step,
                disable=not progress,
                unit="step",
                ncols=80,
                mininterval=0.5,
                file=sys.stdout if "ipykernel" in sys.modules else sys.stderr,  # Jupyter paints stderr red
            )

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" not in (logs or {}):
                return
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                self.bar.close()
                raise LabsError(
                    f"The loss became {loss} at step {state.global_step}: "
                    f"lower the learning rate ({args.learning_rate:g})."
                )
            self.losses.append(loss)
            self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    return Watch()
