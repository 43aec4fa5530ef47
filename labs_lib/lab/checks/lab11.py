"""Lab 11's checks: what a wrong (IA)3 looks like from outside. Beside each stand the mistakes it must tell apart."""

import torch
from torch import nn

from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant
from labs_lib.lab.checks.lab01 import fits, told_apart
from labs_lib.methods.ia3 import IA3Linear, scaled_tensors
from labs_lib.methods.lora import target_names

# --- IA3Linear


@exercise(
    "IA3Linear",
    reference="labs_lib.methods.ia3:IA3Linear",
    hints=[
        "ia3_l = nn.Parameter(torch.ones(shape)): (1, in_features) if feedforward, else (out_features, 1).",
        "forward: self.base(x * self.ia3_l.flatten()) if self.feedforward, else self.base(x) * self.ia3_l.flatten().",
        "merge: for tensor, factor in scaled_tensors(self): tensor.mul_(factor), and then self.merged = True.",
        "unmerge: tensor.div_(factor + EPSILON), and then self.merged = False.",
    ],
)
def check_ia3_linear(candidate, ref):
    for feedforward in (False, True):
        base, x = nn.Linear(6, 4), torch.randn(2, 5, 6)
        weight, bias, expected = base.weight.detach().clone(), base.bias.detach().clone(), base(x).detach()
        layer = candidate(base, feedforward)
        _check_start(layer, base, feedforward)
        got = fits(
            lambda layer=layer, x=x: layer(x),
            "The vector does not fit: flatten it to a row, and mind which side it scales.",
        )
        expect(got is not None, "forward returns None: is a `return` missing?")
        close(got, expected, "with all factors one the output should be base(x), but it")
        with torch.no_grad():
            layer.ia3_l.uniform_(0.5, 2.0)
        l = layer.ia3_l.detach().flatten()  # noqa: E741 (the paper's letter)
        _check_output(layer, x, l, weight, bias, feedforward)
        _check_gradient(layer, x)
        _check_merging(layer, x, weight, bias)


def _check_start(layer: nn.Module, base: nn.Linear, feedforward: bool) -> None:
    expect(
        isinstance(getattr(layer, "ia3_l", None), nn.Parameter),
        "ia3_l should be an nn.Parameter: without that no optimizer finds it.",
    )
    shapes = {True: (1, base.in_features), False: (base.out_features, 1)}
    shape, side = tuple(layer.ia3_l.shape), "inputs" if feedforward else "outputs"
    expect(
        shape != shapes[not feedforward],
        f"with feedforward={feedforward} it is the {side} that are scaled: ia3_l has the other side's shape, {shape}",
    )
    expect(
        shape == shapes[feedforward],
        f"ia3_l is {shape}, it should be {shapes[feedforward]}: one per {side[:-1]}",
    )
    expect(
        layer.ia3_l.any(),
        "ia3_l starts at zero, which silences the layer: the factor that changes nothing is 1.",
    )
    expect(
        not any(p.requires_grad for p in base.parameters()),
        "The base still trains: freeze it, with its bias (base.requires_grad_(False)).",
    )


def _check_output(layer, x, l, weight, bias, feedforward) -> None:  # noqa: E741
    rows, columns = weight * l[:, None] if not feedforward else None, weight * l if feedforward else None
    y = x @ weight.T
    if feedforward:
        right = x @ columns.T + bias
        mistakes = {"The factors are ignored: multiply the inputs by them.": y + bias}
    else:
        right = (y + bias) * l
        mistakes = {
            "The factors are ignored: multiply the outputs by them.": y + bias,
            "The bias is not scaled: it is the output that is multiplied, and base(x) contains the bias.": x
            @ rows.T
            + bias,
            "The scaled output is added to the old one, as in LoRA: here it takes its place.": (y + bias)
            * (1 + l),
        }
    got = fits(
        lambda: layer(x), "The vector does not fit: flatten it to a row, and mind which side it scales."
    )
    told_apart(got.detach(), right, "the output", mistakes)


def _check_gradient(layer: nn.Module, x: torch.Tensor) -> None:
    layer(x).square().sum().backward()
    expect(
        layer.ia3_l.grad is not None,
        "No gradient reaches ia3_l: use it itself, not its .data, with no torch.no_grad around forward.",
    )


def _check_merging(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    before, factor = layer(x).detach(), layer.ia3_l.detach()
    layer.merge()
    after = layer.base.weight.detach().clone()
    told_apart(
        after,
        weight * factor,
        "the merged weight",
        {
            "merge changes nothing: multiply the weight in place (mul_).": weight,
            "merge adds the factors: they multiply.": weight + factor,
        },
    )
    expect(
        layer.feedforward or not torch.equal(layer.base.bias.detach(), bias),
        "merge forgot the bias, which is part of the output: scaled_tensors(self) lists it.",
    )
    told_apart(
        layer(x).detach(),
        before,
        "the output after merging",
        {
            "Merged, the factors act twice: while self.merged, forward is base(x) alone.": (
                layer.base(x * factor.flatten()) if layer.feedforward else layer.base(x) * factor.flatten()
            ).detach()
        },
    )
    layer.merge()
    expect(
        torch.equal(layer.base.weight, after),
        "A second merge multiplies again: merge only if not self.merged, and set it.",
    )
    layer.unmerge()
    told_apart(
        layer.base.weight.detach(),
        weight,
        "the weight after unmerge",
        {
            "unmerge changes nothing: divide by factor + EPSILON (div_).": after,
            "unmerge multiplies once more: it should divide.": weight * factor * factor,
            "unmerge subtracts: what was multiplied is divided.": after - factor,
        },
    )
    close(layer.base.bias.detach(), bias, "the bias after unmerge")
    close(layer(x).detach(), before, "the output after unmerge, where the factors act again,")
    with torch.no_grad():  # a factor of zero: EPSILON is what keeps the weight a number
        layer.ia3_l.zero_()
    layer.merge()
    layer.unmerge()
    expect(
        not layer.base.weight.isnan().any(),
        "A factor of zero gives nan on unmerge: divide by factor + EPSILON.",
    )


@mutant("IA3Linear", says="other side's shape")
class SidesSwapped(IA3Linear):
    def __init__(self, base, feedforward=False):
        super().__init__(base, not feedforward)


@mutant("IA3Linear", says="silences the layer")
class StartsAtZero(IA3Linear):
    def __init__(self, base, feedforward=False):
        super().__init__(base, feedforward)
        nn.init.zeros_(self.ia3_l)


@mutant("IA3Linear", says="base still trains")
class NotFrozen(IA3Linear):
    def __init__(self, base, feedforward=False):
        super().__init__(base, feedforward)
        base.requires_grad_(True)


@mutant("IA3Linear", says="should be an nn.Parameter")
class PlainTensor(IA3Linear):
    def __init__(self, base, feedforward=False):
        super().__init__(base, feedforward)
        ones = self.ia3_l.data
        del self.ia3_l
        self.ia3_l = ones


@mutant("IA3Linear", says="factors are ignored")
class Ignored(IA3Linear):
    def forward(self, x):
        return self.base(x) + 0 * self.ia3_l.sum()


@mutant("IA3Linear", says="bias is not scaled")
class BiasLeftOut(IA3Linear):
    def forward(self, x):
        if self.merged or self.feedforward:
            return super().forward(x)
        return (self.base(x) - self.base.bias) * self.ia3_l.flatten() + self.base.bias


@mutant("IA3Linear", says="should be base(x)")
class Added(IA3Linear):
    def forward(self, x):
        return self.base(x) + super().forward(x)


@mutant("IA3Linear", says="does not fit")
class NotFlattened(IA3Linear):
    def forward(self, x):
        return self.base(x * self.ia3_l) if self.feedforward else self.base(x) * self.ia3_l


@mutant("IA3Linear", says="No gradient reaches ia3_l")
class WithoutGradient(IA3Linear):
    def forward(self, x):
        factors = self.ia3_l.data.flatten()
        y = self.base(x * factors) if self.feedforward else self.base(x) * factors
        return y + 0 * x.sum().requires_grad_()


@mutant("IA3Linear", says="merge changes nothing")
class NotInPlace(IA3Linear):
    @torch.no_grad()
    def merge(self):
        for tensor, factor in scaled_tensors(self):
            tensor = tensor * factor
        self.merged = True


@mutant("IA3Linear", says="merge forgot the bias")
class MergesWeightOnly(IA3Linear):
    @torch.no_grad()
    def merge(self):
        if not self.merged:
            self.base.weight *= self.ia3_l
            self.merged = True


@mutant("IA3Linear", says="act twice")
class ScalesWhenMerged(IA3Linear):
    def forward(self, x):
        merged, self.merged = self.merged, False
        y = super().forward(x)
        self.merged = merged
        return y


@mutant("IA3Linear", says="second merge")
class MergesAgain(IA3Linear):
    @torch.no_grad()
    def merge(self):
        for tensor, factor in scaled_tensors(self):
            tensor.mul_(factor)
        self.merged = True


@mutant("IA3Linear", says="unmerge multiplies")
class UnmergeMultiplies(IA3Linear):
    @torch.no_grad()
    def unmerge(self):
        for tensor, factor in scaled_tensors(self):
            tensor.mul_(factor)
        self.merged = False


@mutant("IA3Linear", says="unmerge subtracts")
class UnmergeSubtracts(IA3Linear):
    @torch.no_grad()
    def unmerge(self):
        for tensor, factor in scaled_tensors(self):
            tensor.sub_(factor)
        self.merged = False


@mutant("IA3Linear", says="gives nan")
class WithoutEpsilon(IA3Linear):
    @torch.no_grad()
    def unmerge(self):
        for tensor, factor in scaled_tensors(self):
            tensor.div_(factor)
        self.merged = False


# --- ia3_targets


class _Toy(nn.Module):
    """Two blocks with the names of a Llama's layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"k_proj": nn.Linear(6, 4), "o_proj": nn.Linear(4, 6), "down_proj": nn.Linear(9, 6)}
            )
            for _ in range(2)
        )


@exercise(
    "ia3_targets",
    reference="labs_lib.methods.ia3:ia3_targets",
    hints=[
        "names = target_names(model, targets); the same call with feedforward says which of them scale their inputs.",
        "target_names refuses an empty list: ask it only `if feedforward`.",
        "return {name: name in inputs for name in names}, after the ValueError for what is in inputs but not in names.",
    ],
)
def check_ia3_targets(candidate, ref):
    toy, usual = _Toy(), (["k_proj", "down_proj"], ["down_proj"])
    got = candidate(toy, *usual)
    expect(got is not None, "ia3_targets returns None: is a `return` missing?")
    expect(isinstance(got, dict), f"return a dict, name -> True or False, not {type(got).__name__}")
    right = ref(toy, *usual)
    if got == dict.fromkeys(right, False):
        raise Diagnosis(
            "Every layer is scaled on its outputs: full names end in the short ones, compare full names."
        )
    if got == {name: not inputs for name, inputs in right.items()}:
        raise Diagnosis("The sides are the wrong way round: True is for what feedforward names.")
    expect(
        set(got) == set(right),
        f"{sorted(got)} are listed, expected {sorted(right)}: all that targets means, no more",
    )
    expect(got == right, f"which side is scaled: got {got}, expected {right}")
    try:
        none = candidate(toy, ["k_proj"], [])
    except ValueError as error:
        raise Diagnosis(f"feedforward=[] means no layer, not an error: {error}") from error
    expect(none == ref(toy, ["k_proj"], []), f"with feedforward=[] got {none}")
    one = candidate(toy, ["down_proj"], ["layers.1.down_proj"])
    expect(
        one == ref(toy, ["down_proj"], ["layers.1.down_proj"]),
        "A full name stands for that layer alone: use target_names for feedforward as well.",
    )
    for feedforward, what in ((["down_proj"], "not among the targets"), (["dwn_proj"], "misspelt")):
        try:
            candidate(toy, ["k_proj"], feedforward)
        except ValueError:
            continue
        raise Diagnosis(
            f"feedforward names a layer that is {what}, and nobody is told: PEFT's silent mistake. Raise ValueError."
        )


@mutant("ia3_targets", says="compare full names")
def short_names_only(model, targets, feedforward):
    return {name: name in feedforward for name in target_names(model, targets)}


@mutant("ia3_targets", says="wrong way round")
def inverted(model, targets, feedforward):
    inputs = target_names(model, feedforward) if feedforward else []
    return {name: name not in inputs for name in target_names(model, targets)}


@mutant("ia3_targets", says="all that targets means")
def feedforward_only(model, targets, feedforward):
    return dict.fromkeys(target_names(model, feedforward), True)


@mutant("ia3_targets", says="not an error")
def empty_is_an_error(model, targets, feedforward):
    inputs = target_names(model, feedforward)
    return {name: name in inputs for name in target_names(model, targets)}


@mutant("ia3_targets", says="stands for that layer alone")
def last_part_only(model, targets, feedforward):
    kinds = {name.rpartition(".")[2] for name in feedforward}
    names = target_names(model, targets)
    if feedforward and not kinds & {name.rpartition(".")[2] for name in names}:
        raise ValueError("not among the targets")
    return {name: name.rpartition(".")[2] in kinds for name in names}


@mutant("ia3_targets", says="nobody is told")
def silent(model, targets, feedforward):
    names = target_names(model, targets)
    return {name: any(f".{name}".endswith(f".{each}") for each in feedforward) for name in names}


@mutant("ia3_targets", says="return a dict")
def list_of_names(model, targets, feedforward):
    return target_names(model, targets)


# --- count_ia3


@exercise(
    "count_ia3",
    reference="labs_lib.methods.ia3:count_ia3",
    hints=[
        "for name, inputs in ia3_targets(model, targets, feedforward).items(): layer = model.get_submodule(name)",
        "layer.in_features if inputs else layer.out_features",
    ],
)
def check_count_ia3(candidate, ref):
    toy, usual = _Toy(), (["k_proj", "down_proj"], ["down_proj"])
    got, right = candidate(toy, *usual), ref(toy, *usual)
    expect(got is not None, "count_ia3 returns None: is a `return` missing?")
    wrong = {
        2
        * (
            4 + 6
        ): "That is one number per output everywhere: a layer that scales its inputs has in_features.",
        2 * (6 + 9): "That is one number per input everywhere: keys and values are scaled on their outputs.",
        2 * (6 + 6): "The sides are swapped: in_features where inputs are scaled, else out_features.",
        2
        * (6 * 4 + 9 * 6): "That is the size of the weights: a vector has one number per output (or input).",
        right // 2: "That is one block: go through all the layers that ia3_targets lists.",
    }
    if got in wrong:
        raise Diagnosis(f"{got}: {wrong[got]}")
    expect(got == right, f"{got} numbers, expected {right}")
    meta = _Toy().to("meta")
    expect(candidate(meta, *usual) == right, "On the meta device the count differs: use shapes only.")


@mutant("count_ia3", says="per output everywhere")
def outputs_only(model, targets, feedforward):
    return sum(model.get_submodule(name).out_features for name in target_names(model, targets))


@mutant("count_ia3", says="per input everywhere")
def inputs_only(model, targets, feedforward):
    return sum(model.get_submodule(name).in_features for name in target_names(model, targets))


@mutant("count_ia3", says="size of the weights")
def weights(model, targets, feedforward):
    return sum(model.get_submodule(name).weight.numel() for name in target_names(model, targets))


@mutant("count_ia3", says="one block")
def one_block(model, targets, feedforward):
    return 4 + 9


# --- rescaling_share


@exercise(
    "rescaling_share",
    reference="labs_lib.methods.ia3:rescaling_share",
    hints=[
        "A projection: the best gain of a row is (change * before).sum / (before * before).sum over that row.",
        "dim = 0 if feedforward else 1, and keepdim=True so that gain * before fits.",
        "((gain * before).square().sum() / change.square().sum()).item()",
    ],
)
def check_rescaling_share(candidate, ref):
    before = torch.randn(5, 7)
    change = torch.randn(5, 7) + 0.4 * before
    for feedforward in (False, True):
        dim = 0 if feedforward else 1
        got = fits(
            lambda feedforward=feedforward: candidate(before, before + change, feedforward),
            "The gains do not fit the weight: keepdim=True keeps them a column (or a row).",
        )
        expect(got is not None, "rescaling_share returns None: is a `return` missing?")
        gain = (change * before).sum(dim, keepdim=True) / before.square().sum(dim, keepdim=True)
        after = before + change
        ratio = (after * before).sum(dim, keepdim=True) / before.square().sum(dim, keepdim=True)
        reached = gain * before

        def share(part, whole):
            return part.square().sum() / whole.square().sum()

        wrong = {
            "That is the other side: rows are dim=1, columns, with feedforward, dim=0.": ref(
                before, after, not feedforward
            ),
            "That is the root of the share: compare squares, which add up to the whole.": share(
                reached, change
            ).sqrt(),
            "You projected the new weight, not the change: take change = after - before.": share(
                ratio * before, after
            ),
            "That is what rescaling does not reach: one minus the share.": share(change - reached, change),
            "One gain for the whole matrix: every row (or column) has its own.": share(
                (change * before).sum() / before.square().sum() * before, change
            ),
        }
        for says, value in wrong.items():
            if abs(float(got) - float(value)) < 1e-5:
                raise Diagnosis(says)
        close(torch.tensor(float(got)), torch.tensor(ref(before, after, feedforward)), "the share")


@mutant("rescaling_share", says="other side")
def sides_swapped(before, after, feedforward=False):
    change, dim = after - before, 1 if feedforward else 0
    gain = (change * before).sum(dim, keepdim=True) / before.square().sum(dim, keepdim=True)
    return ((gain * before).square().sum() / change.square().sum()).item()


@mutant("rescaling_share", says="root of the share")
def rooted(before, after, feedforward=False):
    change, dim = after - before, 0 if feedforward else 1
    gain = (change * before).sum(dim, keepdim=True) / before.square().sum(dim, keepdim=True)
    return ((gain * before).norm() / change.norm()).item()


@mutant("rescaling_share", says="not the change")
def of_the_weight(before, after, feedforward=False):
    dim = 0 if feedforward else 1
    ratio = (after * before).sum(dim, keepdim=True) / before.square().sum(dim, keepdim=True)
    return ((ratio * before).square().sum() / after.square().sum()).item()


@mutant("rescaling_share", says="keepdim=True")
def dropped_dim(before, after, feedforward=False):
    change, dim = after - before, 0 if feedforward else 1
    gain = (change * before).sum(dim) / before.square().sum(dim)
    return ((gain * before).square().sum() / change.square().sum()).item()


@mutant("rescaling_share", says="whole matrix")
def one_gain(before, after, feedforward=False):
    change = after - before
    gain = (change * before).sum() / before.square().sum()
    return ((gain * before).square().sum() / change.square().sum()).item()


# --- short answers

answer(
    "lab11.bug_field",
    reference="feedforward_modules",
    hints=[
        "The count is 4,096 per vector: which vector should have 11,008 numbers, and what tells PEFT so?",
        "PEFT reads a list as names, and a bare string as a regular expression that must match the full name.",
    ],
    mistakes={
        "target_modules": "the three layers are all there, in a list: the vectors exist, one sits on the wrong side",
        "task_type": "that decides the wrapper, not where the vectors sit",
        "down_proj": "that is the layer it happens to; which field of the configuration is at fault?",
    },
)

answer(
    "lab11.llama_count",
    reference=lambda: 32 * (4096 + 4096 + 11008),
    tolerance=0,
    hints=[
        "Keys and values have 4096 outputs each. How wide is what the third vector scales?",
        "The inner activations of the FFN are 11,008 wide: 4096 + 4096 + 11008 per layer, times 32.",
    ],
    mistakes={
        32 * 3 * 4096: "the third vector scales the FFN's inner activations, 11,008 of them, not 4,096",
        4096 + 4096 + 11008: "that is one of the 32 layers",
        32 * (4096 + 11008): "three vectors: keys, values and the FFN",
        32 * 4096 * (4096 + 4096 + 11008): "those are the weights that are scaled; the vectors are smaller",
    },
)

answer(
    "lab11.predict_few",
    reference=30.0,
    within=(0, 100),
    unit="%",
    hints=["A share of texts between 0 and 100, exact to the letter."],
)

answer(
    "lab11.predict_facts",
    reference=40.0,
    within=(0, 100),
    unit="%",
    hints=["LoRA of rank 8 has 33 times as many numbers and recalls most of the 512 facts."],
)
