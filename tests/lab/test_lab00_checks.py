"""Lab 00's checks: other right answers pass, each mistake is told in its own words, constants are counted."""

from statistics import mean

import pytest

from labs_lib.lab.check import FAIL, OK, TODO, find, judge, load_checks
from labs_lib.lab.checks.lab00 import LLAMA_2_7B
from labs_lib.measure.count import HeldBytes, count_parameters
from labs_lib.models.twins import random_like
from labs_lib.world.grammar import obeyed

EXERCISES = load_checks("00")


def verdict(name, candidate):
    return judge(find(name), candidate)


def test_the_lab_has_its_exercises():
    names = ["compliance", "lab00.adam_bytes", "training_bytes", "cache_bytes", "lab00.predicted_share"]
    assert [exercise.name for exercise in EXERCISES] == names


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.title)
def test_the_reference_passes_and_the_stub_is_to_do(exercise):
    assert judge(exercise, exercise.reference()).status == OK
    assert judge(exercise, ...).status == TODO


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.title)
def test_each_mistake_fails_with_its_own_words(exercise):
    outcomes = [judge(exercise, wrong.candidate) for wrong in exercise.mutants]
    for wrong, outcome in zip(exercise.mutants, outcomes, strict=True):
        assert outcome.status == FAIL, wrong
        assert wrong.says in outcome.message
    assert len({outcome.message for outcome in outcomes}) == len(outcomes)


def test_the_answer_is_about_the_real_count():
    assert count_parameters(random_like("llama-2-7b")).total == LLAMA_2_7B
    assert verdict("lab00.adam_bytes", 53.9e9).status == OK  # three digits will do
    assert verdict("lab00.adam_bytes", 50e9).status == FAIL
    assert "times too small" in verdict("lab00.adam_bytes", 53.9e6).message


# --- other ways of being right


def counted(text, product, style):
    verdicts = obeyed(text, product, style)
    return sum(verdicts.values()) / len(verdicts)


def in_a_loop(text, product, style):
    good = 0
    for rule in obeyed(text, product, style).values():
        if rule:
            good += 1
    return good / len(style)


def with_mean(text, product, style):
    return mean(float(kept) for kept in obeyed(text, product, style).values())


@pytest.mark.parametrize("candidate", [counted, in_a_loop, with_mean])
def test_compliance_in_other_words(candidate):
    assert verdict("compliance", candidate).status == OK


def test_training_bytes_in_other_words():
    def positional(trainable, frozen=0, weight=4, state=4):
        return HeldBytes(
            trainable * weight + frozen * weight, 0, weight * trainable, trainable * (state + state)
        )

    assert verdict("training_bytes", positional).status == OK


def test_cache_bytes_in_other_words():
    def by_width(tokens, config, number=2):
        keys = config.hidden_size * config.num_key_value_heads / config.num_attention_heads
        return (keys + keys) * number * config.num_hidden_layers * tokens

    assert verdict("cache_bytes", by_width).status == OK


@pytest.mark.parametrize("share", [0, 0.27, 1])
def test_any_share_is_a_prediction(share):
    assert verdict("lab00.predicted_share", share).status == OK


@pytest.mark.parametrize("share", [-0.1, 27, "a lot", True])
def test_what_is_no_share_is_no_prediction(share):
    assert verdict("lab00.predicted_share", share).status == FAIL
