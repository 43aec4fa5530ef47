"""The checks of lab 05, LoRA+."""

import torch
from torch import nn

from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant
from labs_lib.methods.lora_plus import feature_change, lora_plus_groups

# --- feature_change


def _factors() -> tuple[torch.Tensor, ...]:
    """A, B, dA, dB, x of five different sizes, so that nothing fits by accident."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=generator) for shape in ((3, 7), (4, 3), (3, 7), (4, 3), (5, 7))
    )


@exercise(
    "feature_change",
    reference="labs_lib.methods.lora_plus:feature_change",
    hints=[
        "Multiply (B + dB)(A + dA) out: four terms, one of which was there before.",
        "x is (batch, in), so A x for every row is x @ A.T, of shape (batch, rank).",
    ],
)
def check_feature_change(candidate, ref):
    A, B, dA, dB, x = _factors()
    got, right = candidate(A, B, dA, dB, x), ref(A, B, dA, dB, x)
    expect(
        isinstance(got, dict) and set(got) == set(right), 'return a dict with the keys "B", "A" and "both"'
    )
    for key, tensor in got.items():
        expect(
            tuple(tensor.shape) == (5, 4),
            f'"{key}" has shape {tuple(tensor.shape)}, should be (batch, out) = (5, 4): x has a row per sample',
        )
    if torch.allclose(got["A"], right["B"]) and torch.allclose(got["B"], right["A"]):
        raise Diagnosis('"A" and "B" are swapped: "B" is what the step of B does, dB A x')
    whole = x @ ((B + dB) @ (A + dA) - B @ A).T
    if torch.allclose(got["B"], right["B"] + right["both"]):
        raise Diagnosis('"B" uses A after its step: use A as it was; what both do together is "both"')
    close(got["B"], right["B"], "what the step of B does")
    close(got["A"], right["A"], "what the step of A does")
    close(got["both"], right["both"], "what the two steps do together")
    close(sum(got.values()), whole, "the sum of the three parts, against the whole change,")


@mutant("feature_change", says="swapped")
def swapped(A, B, dA, dB, x):
    parts = feature_change(A, B, dA, dB, x)
    return {"B": parts["A"], "A": parts["B"], "both": parts["both"]}


@mutant("feature_change", says="A as it was")
def after_the_step(A, B, dA, dB, x):
    return feature_change(A, B, dA, dB, x) | {"B": x @ (A + dA).T @ dB.T}


@mutant("feature_change", says="a row per sample")
def transposed(A, B, dA, dB, x):
    return {key: part.T for key, part in feature_change(A, B, dA, dB, x).items()}


@mutant("feature_change", says='keys "B", "A" and "both"')
def forgets_both(A, B, dA, dB, x):
    parts = feature_change(A, B, dA, dB, x)
    return {key: parts[key] for key in ("A", "B")}


# --- lora_plus_groups


class Adapted(nn.Module):
    """What a LoRA model holds: frozen base, A, B, a vector and a bias that train."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 4).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(2, 6)), nn.Parameter(torch.zeros(4, 2))
        self.magnitude, self.lora_bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))


@exercise(
    "lora_plus_groups",
    reference="labs_lib.methods.lora_plus:lora_plus_groups",
    hints=[
        "model.named_parameters() gives names and parameters; parameter.requires_grad says whether it trains.",
        "parameter.ndim is 1 for a vector and 2 for a matrix.",
        'A group is {"params": [...], "lr": ..., "weight_decay": ...}.',
    ],
)
def check_lora_plus_groups(candidate, ref):
    model = Adapted()
    groups = candidate(model, 0.5, 8, weight_decay=0.1)
    expect(
        isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups),
        "return a list of dicts, each with params, lr and weight_decay",
    )
    held = {id(parameter): group for group in groups for parameter in group["params"]}
    expect(
        not any(id(parameter) in held for parameter in model.base.parameters()),
        "the frozen base is in a group: leave out what does not require a gradient",
    )
    named = {
        "lora_A": model.lora_A,
        "lora_B": model.lora_B,
        "the vector": model.magnitude,
        "the bias": model.lora_bias,
    }
    for name, parameter in named.items():
        expect(id(parameter) in held, f"{name} trains, but is in no group")
    a, b, vector, bias = (held[id(parameter)] for parameter in named.values())
    for name, group in zip(named, (a, b, vector, bias), strict=True):
        expect(
            "lr" in group and "weight_decay" in group,
            f"the group of {name} needs an lr and a weight_decay of its own",
        )
    if (a["lr"], b["lr"]) == (4.0, 0.5):
        raise Diagnosis("A got B's rate: lr * ratio belongs to lora_B")
    expect(b["lr"] != 0.5 / 8, "B is slower than A: multiply its rate by the ratio, do not divide")
    expect(
        (a["lr"], b["lr"]) == (0.5, 4.0),
        f"A learns at {a['lr']}, B at {b['lr']}; expected lr = 0.5 and lr * ratio = 4",
    )
    expect(vector["lr"] == 4.0, "a vector such as DoRA's magnitude learns at B's rate")
    expect(
        b["weight_decay"] == a["weight_decay"] == 0.1,
        "the weight_decay that was asked for does not reach the groups",
    )
    expect(bias["lr"] == 4.0 and bias["weight_decay"] == 0, "a bias learns at B's rate, without decay")
    expect(sum(len(group["params"]) for group in groups) == 4, "a parameter is in two groups")
    only = nn.Module()
    only.lora_A, only.lora_B = model.lora_A, model.lora_B
    expect(len(candidate(only, 0.5, 8)) == 2, "leave out empty groups: a plain LoRA has two")
    for ratio in (0, -1):
        try:
            candidate(model, 0.5, ratio)
        except ValueError:
            continue
        raise Diagnosis(f"a ratio of {ratio} should raise ValueError: B would not learn, or unlearn")


@mutant("lora_plus_groups", says="A got B's rate")
def ratio_on_a(model, lr, ratio, weight_decay=0.0):
    if ratio <= 0:
        raise ValueError
    groups = lora_plus_groups(model, lr, ratio, weight_decay)
    groups[0]["lr"], groups[1]["lr"] = groups[1]["lr"], groups[0]["lr"]
    return groups


@mutant("lora_plus_groups", says="do not divide")
def divides(model, lr, ratio, weight_decay=0.0):
    return lora_plus_groups(model, lr, 1 / ratio if ratio > 0 else ratio, weight_decay)


@mutant("lora_plus_groups", says="frozen base")
def everything(model, lr, ratio, weight_decay=0.0):
    groups = lora_plus_groups(model, lr, ratio, weight_decay)
    groups[0]["params"] += [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return groups


@mutant("lora_plus_groups", says="learns at B's rate")
def vectors_with_a(model, lr, ratio, weight_decay=0.0):
    groups = lora_plus_groups(model, lr, ratio, weight_decay)
    vectors = [parameter for parameter in groups[1]["params"] if parameter.ndim == 1]
    groups[0]["params"] += vectors
    groups[1]["params"] = [parameter for parameter in groups[1]["params"] if parameter.ndim > 1]
    return groups


@mutant("lora_plus_groups", says="does not reach the groups")
def loses_the_decay(model, lr, ratio, weight_decay=0.0):
    return lora_plus_groups(model, lr, ratio)


@mutant("lora_plus_groups", says="without decay")
def decays_biases(model, lr, ratio, weight_decay=0.0):
    return [group | {"weight_decay": weight_decay} for group in lora_plus_groups(model, lr, ratio)]


@mutant("lora_plus_groups", says="empty groups")
def keeps_empty_groups(model, lr, ratio, weight_decay=0.0):
    groups = lora_plus_groups(model, lr, ratio, weight_decay)
    return groups + [{"params": [], "lr": lr, "weight_decay": 0.0}] * (3 - len(groups))


@mutant("lora_plus_groups", says="raise ValueError")
def any_ratio(model, lr, ratio, weight_decay=0.0):
    return lora_plus_groups(model, lr, ratio if ratio > 0 else 1, weight_decay)


# --- short answers


answer(
    "lab05.read_moves",
    reference=lambda: 4096 * 2e-4,
    hints=[
        "Each of the 4096 entries of A moves by the learning rate.",
        "The inputs are 1, so the moves add up.",
    ],
    mistakes={
        2e-4: "that is the move of one entry: the input has 4096",
        4096**0.5 * 2e-4: "the root is for moves in random directions: here all go the same way",
    },
)
answer("lab05.predict_speedup", reference=1.5, within=(0.1, 100))
