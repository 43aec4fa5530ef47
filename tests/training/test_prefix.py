"""A prefix of a sweep: where it starts, and how far from real tokens it is told to lie."""

import pytest
import torch

from labs_lib.training.adapt import METHODS, prefix_distance
from labs_lib.training.sweeps import Arm


@pytest.fixture
def base():
    from labs_lib import load_base

    return load_base("tiny")


def test_distance_is_one_for_tokens_like_the_others():
    generator = torch.Generator().manual_seed(2)
    real, others, alike = (torch.randn(200, 3, generator=generator) for _ in range(3))
    assert prefix_distance(alike, real, others) == pytest.approx(1, rel=0.2)
    assert prefix_distance(real[:20], real, others) == 0
    assert prefix_distance(100 + alike, real, others) > 50


def test_a_prefix_starts_from_words_or_from_noise(base):
    from labs_lib.methods.prefix_tuning import text_prefix

    model, tokenizer = base
    text = "Guide: titlecase plain honest product home"
    expected = text_prefix(model, tokenizer(text)["input_ids"][:4]).weight
    adapted = METHODS["prefix"](model, Arm("words", "prefix", options={"tokens": 4, "text": text}), 1, 10)
    torch.testing.assert_close(adapted.model.prefix(), expected)
    assert [name for name, each in adapted.model.named_parameters() if each.requires_grad] == [
        "prefix.weight"
    ]
    measured = adapted.finish()
    assert measured["distance"] == measured["distance_at_start"]

    noise = METHODS["prefix"](adapted.model.base, Arm("noise", "prefix", options={"tokens": 4}), 1, 10)
    assert noise.finish()["distance"] > 2 * measured["distance"]
