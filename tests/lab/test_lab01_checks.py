"""Lab 01's checks: right answers in other words pass, and each mistake is told in words of its own."""

import pytest
import torch
from torch import nn

from labs_lib.lab.check import FAIL, OK, TODO, find, judge, load_checks
from labs_lib.methods.lora import LoRALinear, init_lora, target_names

EXERCISES = load_checks("01")


def verdict(name, candidate):
    return judge(find(name), candidate)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.title)
def test_the_reference_passes(exercise):
    assert judge(exercise, exercise.reference()).status == OK


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.title)
def test_each_mistake_fails_with_its_own_words(exercise):
    outcomes = [judge(exercise, wrong.candidate) for wrong in exercise.mutants]
    for wrong, outcome in zip(exercise.mutants, outcomes, strict=True):
        assert outcome.status == FAIL, wrong
        assert wrong.says in outcome.message
    assert len({outcome.message for outcome in outcomes}) == len(outcomes)


# --- other ways of being right


def kaiming_init(in_features, out_features, rank, generator=None):
    A = torch.empty(rank, in_features)
    nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)
    return [A, torch.zeros(out_features, rank)]


def rand_init(in_features, out_features, rank, generator=None):
    A = (2 * torch.rand(rank, in_features, generator=generator) - 1) / in_features**0.5
    return A, torch.zeros((out_features, rank))


class Explicit(nn.Module):
    """Written as a learner would, from the docstring alone, with matrices instead of F.linear."""

    def __init__(self, base, rank, alpha, dropout=0.0, generator=None):
        super().__init__()
        for parameter in base.parameters():
            parameter.requires_grad = False
        A, B = init_lora(base.in_features, base.out_features, rank, generator)
        self.base, self.rank, self.alpha = base, rank, alpha
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.dropout = nn.Dropout(dropout)
        self.merged = False

    def forward(self, x):
        if self.merged:
            return self.base(x)
        return self.base(x) + self.alpha / self.rank * (self.dropout(x) @ self.lora_A.T @ self.lora_B.T)

    def delta(self):
        return self.alpha / self.rank * self.lora_B.data @ self.lora_A.data

    def merge(self):
        if not self.merged:
            self.base.weight.data = self.base.weight.data + self.delta()
        self.merged = True

    def unmerge(self):
        if self.merged:
            self.base.weight.data = self.base.weight.data - self.delta()
        self.merged = False


def inject_by_walking(model, targets, rank, alpha, dropout=0.0, generator=None):
    wanted = target_names(model, targets)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            if f"{parent_name}.{child_name}".lstrip(".") in wanted:
                setattr(parent, child_name, Explicit(child, rank, alpha, dropout, generator))
    return model


@pytest.mark.parametrize(
    "name, candidate",
    [
        ("lora_delta", lambda A, B, alpha, rank: alpha / rank * torch.einsum("or,ri->oi", B, A)),
        ("init_lora", kaiming_init),
        ("init_lora", rand_init),
        ("LoRALinear", Explicit),
        ("inject_lora", inject_by_walking),
        ("lab01.llama_2_7b_qv_megabytes", 16.8),
    ],
)
def test_right_in_other_words(name, candidate):
    outcome = verdict(name, candidate)
    assert outcome.status == OK, outcome.message


def test_a_half_written_class_is_still_to_do():
    class Half(LoRALinear):
        def merge(self):
            raise NotImplementedError("TODO: LoRALinear.merge")

    outcome = verdict("LoRALinear", Half)
    assert outcome.status == TODO
    assert "LoRALinear.merge" in outcome.message


def test_a_layer_without_its_attributes_is_told_which():
    class Forgetful(Explicit):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            del self.alpha

    assert "self.alpha" in verdict("LoRALinear", Forgetful).message
