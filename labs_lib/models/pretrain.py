"""`labs pretrain SIZE`: pretrain one member of the base family on transformers' Trainer, resumable after a kill.

Checkpoints go to the cache; the finished model, its loss curve and its card's log go to `data/base/SIZE/`.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from labs_lib.errors import LabsError
from labs_lib.models.base import SIZES, base_config, base_folder
from labs_lib.models.corpus import FACTS, WRITING, documents
from labs_lib.paths import cache

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Stage:
    """A run of the Trainer: `steps` of a cosine schedule that would reach zero at `schedule`, from peak times `lr`."""

    name: str
    mixture: dict[str, float]
    steps: int
    schedule: int
    lr: float
    warmup: int


#: The recipe of the shipped family: AdamW, `batch` rows of ROW tokens a step.
STAGES = (
    Stage("writing", WRITING, steps=2700, schedule=4500, lr=1.0, warmup=200),
    Stage("facts", FACTS, steps=1500, schedule=1500, lr=0.8, warmup=50),
)
RECIPE = {"batch": 48, "weight_decay": 0.01, "beta2": 0.98, "seed": 7}
PEAK_LR = {"tiny": 4e-3, "small": 2.5e-3, "medium": 1.5e-3, "large": 8e-4, "xlarge": 4e-4}
#: What is stored; a bfloat16 member is also trained under bfloat16 autocast (a fifth faster, even on CPU).
STORED_DTYPE = {
    "tiny": "float32",
    "small": "float32",
    "medium": "bfloat16",
    "large": "bfloat16",
    "xlarge": "bfloat16",
}
ROW = 120  # tokens; the few longer documents are left out


def packed_rows(
    tokenizer: "PreTrainedTokenizerBase", seed: int, mixture: dict[str, float] = WRITING
) -> Iterator[tuple[list[int], list[int]]]:
    """Endless (tokens, labels) rows of exactly ROW tokens: one long document, the rest filled with short ones.

    Documents keep their `<bos>`, by which the model learns that what stands before does not count. Labels are -100 on
    prompts (their content is random, so nothing can be learned from predicting it) and on padding.
    """
    waiting: list[tuple[list[int], list[int]]] = []
    source = documents(seed, mixture)
    while True:
        batch = list(islice(source, 512))
        starts = tokenizer([prompt for prompt, _ in batch])["input_ids"]
        ends = tokenizer([c + tokenizer.eos_token for _, c in batch], add_special_tokens=False)["input_ids"]
        waiting += [(start + end, [-100] * len(start) + end) for start, end in zip(starts, ends, strict=True)]
        waiting = [document for document in waiting if len(document[0]) <= ROW]
        while len(waiting) > 256:
            tokens, labels = [], []
            for i in _fitting(waiting, ROW):
                tokens += waiting[i][0]
                labels += waiting[i][1]
                waiting[i] = None
            waiting = [document for document in waiting if document]
            padding = ROW - len(tokens)
            yield tokens + [tokenizer.pad_token_id] * padding, labels + [-100] * padding


def _fitting(waiting: list, room: int) -> list[int]:
    """Indices of waiting documents, oldest first, that together fit into `room` tokens."""
    chosen = []
    for i, (tokens, _) in enumerate(waiting):
        if len(tokens) <= room:
            chosen.append(i)
            room -= len(tokens)
            if room < 10:
                break
    return chosen


def completion_loss(model, input_ids: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
    """Mean cross-entropy over labelled positions; the projection to the vocabulary is not computed elsewhere."""
    from torch.nn.functional import cross_entropy

    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    wanted = targets != -100
    return cross_entropy(model.lm_head(hidden[wanted]).float(), targets[wanted])


def train_stage(
    model, tokenizer, stage: Stage, number: int, batch: int, lr: float, bf16: bool, work: Path
) -> list[tuple[int, float]]:
    """Run one stage in place, going on from the last checkpoint in `work`; returns its (step, loss) curve."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class PackedDocuments(torch.utils.data.IterableDataset):
        def __iter__(self):
            for tokens, labels in packed_rows(tokenizer, 1000 * number + RECIPE["seed"], stage.mixture):
                yield {"input_ids": tokens, "labels": labels}

    class CompletionTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return completion_loss(model, inputs["input_ids"], inputs["labels"])

    class StopEarly(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step >= stage.steps:
                control.should_save = control.should_training_stop = True

    arguments = TrainingArguments(
        output_dir=work,
        max_steps=stage.schedule,
        per_device_train_batch_size=batch,
        learning_rate=lr * stage.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(stage.warmup, stage.schedule // 10),
        weight_decay=RECIPE["weight_decay"],
        adam_beta2=RECIPE["beta2"],
        optim="adamw_torch_fused",
        bf16=bf16,
        use_cpu=bf16 and not torch.cuda.is_available(),  # else the Trainer refuses bfloat16
        logging_steps=max(1, stage.schedule // 150),
        save_steps=max(1, stage.schedule // 15),
        save_total_limit=1,
        seed=RECIPE["seed"],
        report_to=[],
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # else the Trainer spreads each batch over all GPUs
    trainer = CompletionTrainer(
        model=model, args=arguments, train_dataset=PackedDocuments(), callbacks=[StopEarly()]
    )
    last = get_last_checkpoint(str(work)) if work.is_dir() else None
    if last and int(last.rpartition("-")[2]) >= stage.steps:  # a finished stage of an interrupted run
        model.load_state_dict(type(model).from_pretrained(last).state_dict())
        trainer.state = TrainerState.load_from_json(str(Path(last) / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=last)
    return [(row["step"], round(float(row["loss"]), 4)) for row in trainer.state.log_history if "loss" in row]


def pretrain(size: str, scale: float = 1.0, batch: int = RECIPE["batch"], lr: float | None = None) -> Path:
    """Pretrain and store one family member; returns its folder. Continues from the last checkpoint if there is one.

    `scale` multiplies the steps of both stages; the shipped recipe is 1.
    """
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from labs_lib.models.tokenizer import train_tokenizer

    if size not in SIZES:
        raise LabsError(f"No size {size!r}: one of {', '.join(SIZES)}.")
    folder, lr = base_folder(size), lr or PEAK_LR[size]
    work = cache() / "pretrain" / f"{size}-{scale:g}x{batch}-{lr:g}"
    if not (folder / "tokenizer.json").is_file():
        train_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(RECIPE["seed"])
    model = LlamaForCausalLM(base_config(size))
    bf16 = STORED_DTYPE[size] == "bfloat16"
    stages, started = [], time.time()
    for number, stage in enumerate(STAGES, 1):
        stage = replace(stage, steps=round(stage.steps * scale), schedule=round(stage.schedule * scale))
        losses = train_stage(model, tokenizer, stage, number, batch, lr, bf16, work / stage.name)
        stages.append(asdict(stage) | {"loss": losses})
    log = {
        "size": size,
        "parameters": model.num_parameters(),
        "batch": batch,
        "row_tokens": ROW,
        "peak_lr": lr,
        "seed": RECIPE["seed"],
        "minutes_of_last_run": round((time.time() - started) / 60, 1),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "stored_dtype": STORED_DTYPE[size],
        "stages": stages,
    }
    model.to(getattr(torch, STORED_DTYPE[size])).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it private
    (folder / "training_log.json").write_text(json.dumps(log) + "\n", encoding="utf-8")
    return folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("size", choices=SIZES, help="which member of the family")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on the steps of the recipe (default: 1, as shipped)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=RECIPE["batch"],
        help=f"rows of {ROW} tokens a step (default: %(default)s)",
    )
    parser.add_argument("--lr", type=float, default=None, help="peak learning rate (default: the size's own)")


def main(args: argparse.Namespace) -> int:
    from labs_lib.world.build import write_checksums

    folder = pretrain(args.size, args.scale, args.batch, args.lr)
    write_checksums()
    print(f"stored in {folder}; measure it with `labs competence {args.size} --write`")
    return 0
