"""Quality measures against a model whose answers are known."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from labs_lib.measure import quality
from labs_lib.models.base import load_base

ROWS = {"prompt": ["Who buys Alder Arc?\nAnswer:", "Who?"], "completion": [" Mira", " Otto"]}


@pytest.fixture(scope="module")
def tokenizer():
    return load_base("tiny")[1]


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
            eos_token_id=2,
        )
    ).eval()


def always(model, tokenizer, text):
    """Make the model answer with the first token of `text`, whatever comes before."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        model.lm_head.bias[ids[0]] = 20.0
    return ids


def test_labels_cover_the_completion_and_its_end_only(tokenizer):
    rows = quality.encode_rows(tokenizer, ROWS["prompt"], ROWS["completion"])
    for row, prompt, completion in zip(rows, ROWS["prompt"], ROWS["completion"], strict=True):
        labelled = [
            token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100
        ]
        assert tokenizer.decode(labelled) == completion + tokenizer.eos_token
        assert tokenizer.decode(row["input_ids"][1:-1]) == prompt + completion


def test_collate_pads_without_loss_or_attention(tokenizer):
    batch = quality.collate(
        quality.encode_rows(tokenizer, ROWS["prompt"], ROWS["completion"]), tokenizer.pad_token_id
    )
    short = batch["attention_mask"][1].sum()
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert (batch["labels"][1, short:] == -100).all() and (batch["input_ids"][1, short:] == 0).all()


def test_row_losses_do_not_depend_on_the_batch(model, tokenizer):
    together = quality.row_losses(model, tokenizer, ROWS)
    alone = [
        quality.row_losses(model, tokenizer, {"prompt": [p], "completion": [c]})[0]
        for p, c in zip(ROWS["prompt"], ROWS["completion"], strict=True)
    ]
    for (a, n), (b, m) in zip(together, alone, strict=True):
        assert n == m and a == pytest.approx(b, abs=1e-4)


def test_perplexity_of_a_uniform_model_is_the_vocabulary(model, tokenizer):
    torch.nn.init.zeros_(model.lm_head.weight)
    assert quality.perplexity(model, tokenizer, ROWS) == pytest.approx(len(tokenizer), rel=1e-4)


def test_accuracy_follows_the_likelier_label(model, tokenizer):
    always(model, tokenizer, " good")
    rows = {"prompt": ["Review: x\nVerdict:"] * 2, "completion": [" good", " bad"]}
    assert quality.accuracy(model, tokenizer, rows) == [1.0, 0.0]


def test_divergence_is_zero_from_itself_and_by_hand_from_a_uniform_model(model, tokenizer):
    import copy

    assert quality.divergence(model, copy.deepcopy(model), tokenizer, ROWS) == 0
    uniform = copy.deepcopy(model)
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    expected, tokens = 0.0, 0
    for prompt, completion in zip(ROWS["prompt"], ROWS["completion"], strict=True):
        (row,) = quality.encode_rows(tokenizer, [prompt], [completion])
        scored = [label != -100 for label in row["labels"][1:]]
        with torch.no_grad():
            logs = model(torch.tensor([row["input_ids"]])).logits[0, :-1][scored].double().log_softmax(-1)
        expected += (logs.exp() * (logs + torch.log(torch.tensor(float(len(tokenizer)))))).sum().item()
        tokens += sum(scored)
    assert quality.divergence(model, uniform, tokenizer, ROWS) == pytest.approx(expected / tokens, rel=1e-5)
    assert torch.is_grad_enabled()


def test_recall_needs_every_token(model, tokenizer):
    always(model, tokenizer, " good")
    rows = {"prompt": ["Review:"], "completion": [" good"]}
    assert quality.recall(model, tokenizer, rows) == [0.0]  # it never stops, so the end of text is missed


def test_generation_matches_the_model_one_prompt_at_a_time(model, tokenizer):
    prompts = ["Facts: Alder Arc", "Who buys Alder Arc and who tests it?"]
    together = quality.generate(model, tokenizer, prompts, max_new_tokens=8)
    assert together == [quality.generate(model, tokenizer, [p], max_new_tokens=8)[0] for p in prompts]


def test_evaluating_restores_the_mode_and_the_gradients(model):
    model.train()
    with quality.evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and torch.is_grad_enabled()
