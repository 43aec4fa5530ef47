"""Quality of a model on the world's tasks: generated copy, closed-book recall, classification, perplexity.

Every function takes (model, tokenizer, rows), `rows` a dict of columns or a Dataset with `prompt` and
`completion`, and gives per-row values, from which a caller takes a mean and a confidence interval.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from labs_lib.world.scorers import StyleScore
    from labs_lib.world.tenants import Tenant


@contextmanager
def evaluating(model: "PreTrainedModel") -> "Iterator[torch.device]":
    """Eval mode without gradients, restored afterwards; gives the model's device."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_new_tokens: int = 80,
    batch_size: int = 128,
) -> list[str]:
    """Greedy continuations of `prompts`, without the prompt and without special tokens."""
    texts = []
    with evaluating(model) as device:
        for part in _batches(list(prompts), batch_size):
            inputs = tokenizer(list(part), return_tensors="pt", padding=True).to(device)
            inputs.pop("token_type_ids", None)
            out = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            texts += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def encode_rows(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], completions: Sequence[str]
) -> list[dict]:
    """Token ids of prompt + completion + end-of-text, and labels that take the loss on the completion only.

    Prompt and completion are tokenised apart, so that the boundary is the same in training and in generation.
    """
    starts = tokenizer(list(prompts))["input_ids"]
    ends = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
    return [
        {
            "input_ids": start + end + [tokenizer.eos_token_id],
            "labels": [-100] * len(start) + end + [tokenizer.eos_token_id],
        }
        for start, end in zip(starts, ends, strict=True)
    ]


def collate(rows: list[dict], pad: int) -> "dict[str, torch.Tensor]":
    """Right-pad encoded rows to one batch: `input_ids`, `attention_mask`, `labels`, each int64 (batch, length)."""
    import torch

    length = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> "torch.Tensor":
        return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])

    mask = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    )
    return {"input_ids": padded("input_ids", pad), "attention_mask": mask, "labels": padded("labels", -100)}


def _completion_logits(model, tokenizer, rows, batch_size: int):
    """For each batch: (logits that predict the completion, labels), shifted; a soft prompt's positions are cut."""
    encoded = encode_rows(tokenizer, rows["prompt"], rows["completion"])
    with evaluating(model) as device:
        for part in _batches(encoded, batch_size):
            batch = {key: value.to(device) for key, value in collate(part, tokenizer.pad_token_id).items()}
            labels = batch.pop("labels")
            logits = model(**batch).logits[:, -labels.shape[1] :]
            yield logits[:, :-1].float(), labels[:, 1:]


def recall(model, tokenizer, rows, batch_size: int = 256) -> list[float]:
    """1.0 for each row whose completion is the model's greedy answer, token by token; 0.0 otherwise."""
    hits: list[float] = []
    for logits, labels in _completion_logits(model, tokenizer, rows, batch_size):
        right = (logits.argmax(-1) == labels) | (labels == -100)
        hits += right.all(-1).float().tolist()
    return hits


def row_losses(model, tokenizer, rows, batch_size: int = 64) -> list[tuple[float, int]]:
    """(summed cross-entropy in nats, number of tokens) of each row's completion."""
    from torch.nn.functional import cross_entropy

    losses: list[tuple[float, int]] = []
    for logits, labels in _completion_logits(model, tokenizer, rows, batch_size):
        nats = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100).sum(-1)
        losses += zip(nats.tolist(), (labels != -100).sum(-1).tolist(), strict=True)
    return losses


def perplexity(model, tokenizer, rows, batch_size: int = 64) -> float:
    """exp(mean cross-entropy per completion token)."""
    from math import exp

    losses = row_losses(model, tokenizer, rows, batch_size)
    return exp(sum(nats for nats, _ in losses) / sum(tokens for _, tokens in losses))


def divergence(model, other, tokenizer, rows, batch_size: int = 64) -> float:
    """Mean KL divergence of `other` from `model`, in nats per completion token: how differently they predict."""
    from torch.nn.functional import kl_div

    nats, tokens = 0.0, 0
    pairs = [list(_completion_logits(each, tokenizer, rows, batch_size)) for each in (model, other)]
    for (logits, labels), (others, _) in zip(*pairs, strict=True):
        scored = labels != -100
        logs = [each[scored].double().log_softmax(-1) for each in (logits, others)]
        nats += kl_div(logs[1], logs[0], reduction="sum", log_target=True).item()
        tokens += scored.sum().item()
    return nats / tokens


def accuracy(
    model, tokenizer, rows, labels: Sequence[str] = (" good", " bad"), batch_size: int = 256
) -> list[float]:
    """1.0 for each row whose completion is the likeliest of `labels` after the prompt, 0.0 otherwise."""
    scores = []
    for label in labels:
        filled = {"prompt": rows["prompt"], "completion": [label] * len(rows["prompt"])}
        scores.append([-nats for nats, _ in row_losses(model, tokenizer, filled, batch_size)])
    chosen = [labels[max(range(len(labels)), key=lambda i: score[i])] for score in zip(*scores, strict=True)]
    return [float(choice == truth) for choice, truth in zip(chosen, rows["completion"], strict=True)]


def style_quality(
    model, tokenizer, rows, tenant: "Tenant", guided: bool = False, max_new_tokens: int = 80
) -> "StyleScore":
    """Generate copy for `rows` and score it by the tenant's rules; `guided` puts the guide into the prompt."""
    from labs_lib.world.catalogue import Product
    from labs_lib.world.scorers import score_style
    from labs_lib.world.tasks import copy_prompt

    prompts = rows["prompt"]
    if guided:
        prompts = [copy_prompt(Product.from_dict(product), tenant.style) for product in rows["product"]]
    return score_style(generate(model, tokenizer, prompts, max_new_tokens), rows["product"], tenant)
