"""Lab 04's checks: what a wrong DoRA looks like from outside. Beside each stand the mistakes it must tell apart."""

import torch
from torch import nn
from torch.nn import functional as F

from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant
from labs_lib.lab.checks.lab01 import fits, told_apart
from labs_lib.methods.dora import DoRALinear
from labs_lib.methods.lora import lora_delta

# --- decompose


@exercise(
    "decompose",
    reference="labs_lib.methods.dora:decompose",
    hints=[
        "A row is weight[i, :]: which dim does the norm sum over?",
        "torch.linalg.norm(weight, dim=1) has one number per row.",
        "magnitude[:, None] stands beside each row when you divide.",
    ],
)
def check_decompose(candidate, ref):
    weight = torch.randn(4, 6)
    got = fits(
        lambda: candidate(weight),
        "The division does not fit: magnitude (out,) becomes (out, 1) as magnitude[:, None].",
    )
    expect(
        isinstance(got, tuple) and len(got) == 2,
        f"return the pair (magnitude, direction), not {type(got).__name__}",
    )
    magnitude, direction = got
    expect(
        magnitude.shape != (6,),
        "these are the lengths of the 6 columns: sum along each row, dim=1, one number per output",
    )
    expect(magnitude.numel() != 1, "that is one length for the whole matrix: every row has its own, dim=1")
    expect(
        magnitude.shape == (4,),
        f"magnitude has shape {tuple(magnitude.shape)}, it should be (4,): one number per row (no keepdim)",
    )
    told_apart(
        magnitude,
        ref(weight)[0],
        "the magnitude",
        {
            "That is the square of the length: take the root.": weight.square().sum(dim=1),
            "That sums absolute values: a length is the root of the sum of squares.": weight.abs().sum(dim=1),
        },
    )
    told_apart(
        direction,
        ref(weight)[1],
        "the direction",
        {
            "The direction was multiplied by the magnitude: divide.": weight * magnitude[:, None],
            "The direction is still the weight: divide each row by its length.": weight,
        },
    )


@mutant("decompose", says="6 columns")
def per_column(weight):
    magnitude = weight.norm(dim=0)
    return magnitude, weight / magnitude


@mutant("decompose", says="whole matrix")
def whole_matrix(weight):
    return weight.norm(), weight / weight.norm()


@mutant("decompose", says="take the root")
def squared(weight):
    magnitude = weight.square().sum(dim=1)
    return magnitude, weight / magnitude[:, None]


@mutant("decompose", says="divide")
def multiplied(weight):
    magnitude = weight.norm(dim=1)
    return magnitude, weight * magnitude[:, None]


@mutant("decompose", says="magnitude[:, None]")
def no_new_axis(weight):
    magnitude = weight.norm(dim=1)
    return magnitude, weight / magnitude


@mutant("decompose", says="the pair")
def magnitude_only(weight):
    return weight.norm(dim=1)


# --- dora_weight


@exercise(
    "dora_weight",
    reference="labs_lib.methods.dora:dora_weight",
    hints=[
        "First turn: V = weight + lora_delta(A, B, alpha, rank).",
        "Whose length counts: that of the old weight's rows, or of V's?",
        "(magnitude / torch.linalg.norm(V, dim=1))[:, None] * V",
    ],
)
def check_dora_weight(candidate, ref):
    W, A, B, m = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2), torch.rand(4) + 0.5
    got = fits(
        lambda: candidate(W, A, B, m, 3.0, 2),
        "The scaling does not fit: one factor per row is (magnitude / length)[:, None].",
    )
    V, plain = W + lora_delta(A, B, 3.0, 2), W + B @ A
    told_apart(
        got,
        ref(W, A, B, m, 3.0, 2),
        "the weight",
        {
            "That is LoRA's weight: its rows have whatever length came out. Set them to magnitude.": V,
            "The rows are multiplied by magnitude, but V was not brought to length one first.": m[:, None]
            * V,
            "You divided by the length of W's rows: V's have another length by now.": (m / W.norm(dim=1))[
                :, None
            ]
            * V,
            "The scale alpha / rank is missing: use lora_delta.": (m / plain.norm(dim=1))[:, None] * plain,
            "Only the update got the magnitudes: the old weight turns with it, both are V.": W
            + (m / V.norm(dim=1))[:, None] * (V - W),
        },
    )


@mutant("dora_weight", says="LoRA's weight")
def lora_weight(weight, A, B, magnitude, alpha, rank):
    return weight + lora_delta(A, B, alpha, rank)


@mutant("dora_weight", says="length one first")
def not_normalised(weight, A, B, magnitude, alpha, rank):
    return magnitude[:, None] * (weight + lora_delta(A, B, alpha, rank))


@mutant("dora_weight", says="length of W's rows")
def old_length(weight, A, B, magnitude, alpha, rank):
    return (magnitude / weight.norm(dim=1))[:, None] * (weight + lora_delta(A, B, alpha, rank))


@mutant("dora_weight", says="alpha / rank")
def unscaled(weight, A, B, magnitude, alpha, rank):
    V = weight + B @ A
    return (magnitude / V.norm(dim=1))[:, None] * V


@mutant("dora_weight", says="Only the update")
def update_only(weight, A, B, magnitude, alpha, rank):
    update = lora_delta(A, B, alpha, rank)
    return weight + (magnitude / (weight + update).norm(dim=1))[:, None] * update


@mutant("dora_weight", says="[:, None]")
def columns_scaled(weight, A, B, magnitude, alpha, rank):
    V = weight + lora_delta(A, B, alpha, rank)
    return (magnitude / V.norm(dim=1)) * V


# --- DoRALinear


@exercise(
    "DoRALinear",
    reference="labs_lib.methods.dora:DoRALinear",
    hints=[
        "gain: self.lora_magnitude_vector / length of the rows of V, where length.detach() stands in if self.detach.",
        "forward: plain is base(x) without its bias; while dropout acts, W of the dropped x, F.linear(x, W).",
        "return y + (gain - 1) * plain + gain * update, with update as in LoRA; while merged, y alone.",
        "gain = self.gain() if self.kept_gain is None else self.kept_gain",
    ],
)
def check_dora_linear(candidate, ref):
    base, x, rank, alpha = nn.Linear(6, 4), torch.randn(2, 5, 6), 3, 6.0
    bias, expected = base.bias.detach(), base(x).detach()
    layer = candidate(base, rank, alpha)
    got = layer(x)
    expect(got is not None, "forward returns None: is a `return` missing?")
    close(
        got.detach(),
        expected,
        "at the start the gain is 1 and B is zero, so the output should be base(x), but it",
    )

    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude_vector.uniform_(0.5, 2.0)
    W, m = base.weight.detach(), layer.lora_magnitude_vector.detach()
    update = lora_delta(layer.lora_A, layer.lora_B, alpha, rank).detach()
    gain, old = m / (W + update).norm(dim=1), m / W.norm(dim=1)
    told_apart(
        layer.gain().detach(),
        gain,
        "the gain",
        {
            "The gain divides by the length of W's rows: V = W + (alpha / rank) B A is longer.": old,
            "The gain is the magnitude itself: divide by the length of V's rows.": m,
            "The gain is upside down: magnitude / length.": 1 / gain,
        },
    )
    plain, added = expected - bias, F.linear(x, update)
    told_apart(
        layer(x).detach(),
        bias + gain * (plain + added),
        "the output",
        {
            "The output is LoRA's: the gain is missing.": expected + added,
            "The gain multiplies the update only: W x has it too, so add (gain - 1) * plain.": expected
            + gain * added,
            "The bias was scaled with the rest: plain is W x without the bias.": gain * (expected + added),
            "base(x) is counted twice: add (gain - 1) * plain, not gain * plain.": expected
            + gain * (plain + added),
        },
    )
    _check_gradients(candidate, x)
    _check_dropout(candidate, x)
    _check_merging(layer, x)


def _check_gradients(candidate: type[nn.Module], x: torch.Tensor) -> None:
    """The gradient of B as the reference has it, with the length in the graph and without."""
    start = DoRALinear(nn.Linear(6, 4), 3, 6.0)
    nn.init.normal_(start.lora_B)
    g, gradients = torch.randn(2, 5, 4), {}
    for mine, kind in ((True, candidate), (False, DoRALinear)):
        for detach in (True, False):
            layer = kind(nn.Linear(6, 4), 3, 6.0, detach=detach)
            layer.load_state_dict(start.state_dict())
            (layer(x) * g).sum().backward()
            for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
                gradient = getattr(layer, name).grad
                expect(
                    gradient is not None,
                    f"No gradient reaches {name}: use it itself, not its .data, with no torch.no_grad around it.",
                )
                gradients[mine, detach, name] = gradient
    same = torch.allclose(gradients[True, True, "lora_B"], gradients[True, False, "lora_B"], atol=1e-6)
    detached = torch.allclose(gradients[True, True, "lora_B"], gradients[False, True, "lora_B"], atol=1e-5)
    expect(
        not (same and not detached),
        "detach=True changes nothing: the gradient still runs through the length.",
    )
    expect(not (same and detached), "detach=False changes nothing: detach the length only if self.detach.")
    if not detached and torch.allclose(
        gradients[True, True, "lora_B"], gradients[False, False, "lora_B"], atol=1e-5
    ):
        raise Diagnosis(
            "detach is the wrong way round: with detach=True no gradient runs through the length."
        )
    for (mine, detach, name), gradient in gradients.items():
        if mine:
            close(gradient, gradients[False, detach, name], f"with detach={detach} the gradient of {name}")


def _check_dropout(candidate: type[nn.Module], x: torch.Tensor) -> None:
    base = nn.Linear(6, 4)
    layer = candidate(base, 3, 6.0, dropout=0.5).train()
    close(layer(x), base(x), "dropout must spare base(x): on a fresh layer the output", 1e-5)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude_vector.uniform_(0.5, 2.0)
    expect(not torch.equal(layer(x), layer(x)), "dropout=0.5 drops nothing in training: use self.dropout.")
    torch.manual_seed(0)
    got = layer(x).detach()
    torch.manual_seed(0)
    dropped, y = F.dropout(x, 0.5), base(x).detach()
    gain, plain = layer.gain().detach(), F.linear(x, base.weight.detach())
    update = gain * F.linear(dropped, lora_delta(layer.lora_A, layer.lora_B, 6.0, 3).detach())
    told_apart(
        got,
        y + (gain - 1) * F.linear(dropped, base.weight.detach()) + update,
        "the output with dropout",
        {
            "Dropout falls on the update only: in DoRA (gain - 1) * plain sees the dropped x too.": y
            + (gain - 1) * plain
            + update
        },
    )
    layer.eval()
    expect(torch.equal(layer(x), layer(x)), "dropout still drops after eval().")


def _check_merging(layer: nn.Module, x: torch.Tensor) -> None:
    before = layer(x).detach()
    layer.merge()
    close(layer(x).detach(), before, "while merged, forward is base(x) alone: the output after merging")
    layer.unmerge()
    layer.kept_gain = 2 * layer.gain().detach()
    expect(
        not torch.allclose(layer(x), before, atol=1e-5),
        "kept_gain is ignored: where it is not None, use it and compute no gain.",
    )
    layer.kept_gain = None


def _rows(self: DoRALinear) -> torch.Tensor:
    return self.base.weight + lora_delta(self.lora_A, self.lora_B, self.alpha, self.rank)


@mutant("DoRALinear", says="length of W's rows")
class OldLength(DoRALinear):
    def gain(self):
        return self.lora_magnitude_vector / self.base.weight.norm(dim=1)


@mutant("DoRALinear", says="upside down")
class UpsideDown(DoRALinear):
    def gain(self):
        return _rows(self).norm(dim=1) / self.lora_magnitude_vector


@mutant("DoRALinear", says="should be base(x)")
class MagnitudeAlone(DoRALinear):
    def gain(self):
        return self.lora_magnitude_vector


@mutant("DoRALinear", says="still runs through the length")
class NeverDetached(DoRALinear):
    def gain(self):
        return self.lora_magnitude_vector / _rows(self).norm(dim=1)


@mutant("DoRALinear", says="only if self.detach")
class AlwaysDetached(DoRALinear):
    def gain(self):
        return self.lora_magnitude_vector / _rows(self).norm(dim=1).detach()


@mutant("DoRALinear", says="wrong way round")
class DetachedUpsideDown(DoRALinear):
    def gain(self):
        length = _rows(self).norm(dim=1)
        return self.lora_magnitude_vector / (length if self.detach else length.detach())


@mutant("DoRALinear", says="No gradient reaches lora_magnitude_vector")
class GainWithoutGradient(DoRALinear):
    @torch.no_grad()
    def gain(self):
        return super().gain()


def _forward(combine):
    """A forward that puts base output, plain, gain and update together its own way, without dropout's extra pass."""

    def forward(self, x):
        y = self.base(x)
        if self.merged:
            return y
        x = self.dropout(x)
        update = F.linear(F.linear(x, self.lora_A), self.lora_B) * (self.alpha / self.rank)
        return combine(y, y - self.base.bias, self.gain(), update)

    return forward


@mutant("DoRALinear", says="multiplies the update only")
class UpdateOnly(DoRALinear):
    forward = _forward(lambda y, plain, gain, update: y + gain * update)


@mutant("DoRALinear", says="the gain is missing")
class StillLoRA(DoRALinear):
    forward = _forward(lambda y, plain, gain, update: y + update)


@mutant("DoRALinear", says="bias was scaled")
class ScaledBias(DoRALinear):
    forward = _forward(lambda y, plain, gain, update: gain * (y + update))


@mutant("DoRALinear", says="should be base(x)")
class CountedTwice(DoRALinear):
    forward = _forward(lambda y, plain, gain, update: y + gain * (plain + update))


@mutant("DoRALinear", says="falls on the update only")
class DropoutOnUpdateOnly(DoRALinear):
    forward = _forward(lambda y, plain, gain, update: y + (gain - 1) * plain + gain * update)


@mutant("DoRALinear", says="while merged")
class AddsWhenMerged(DoRALinear):
    def forward(self, x):
        merged, self.merged = self.merged, False
        y = super().forward(x)
        self.merged = merged
        return y


@mutant("DoRALinear", says="kept_gain is ignored")
class IgnoresKeptGain(DoRALinear):
    def forward(self, x):
        kept, self.kept_gain = self.kept_gain, None
        y = super().forward(x)
        self.kept_gain = kept
        return y


# --- weight_change


@exercise(
    "weight_change",
    reference="labs_lib.methods.dora:weight_change",
    hints=[
        "decompose(before) and decompose(after) give two magnitudes and two directions.",
        "The cosine of two rows of length one is the sum of their products, dim=1.",
        "Both results are means over rows, as plain numbers: .mean().item().",
    ],
)
def check_weight_change(candidate, ref):
    before = torch.randn(4, 6)
    after = before + torch.randn(4, 6)
    got = candidate(before, after)
    expect(
        isinstance(got, tuple) and len(got) == 2,
        f"return the pair (magnitude, direction), not {type(got).__name__}",
    )
    magnitude, direction = ref(before, after)
    longer = after.norm(dim=1) - before.norm(dim=1)
    cosine = F.cosine_similarity(before, after, dim=1)

    def near(value, wrong):
        return abs(float(value) - float(wrong)) < 1e-5

    if near(got[0], longer.mean()) and not near(got[0], longer.abs().mean()):
        raise Diagnosis(
            "Rows that grew and rows that shrank cancel: take the absolute difference before the mean."
        )
    if near(got[0], (after - before).norm(dim=1).mean()):
        raise Diagnosis("That is the length of the difference: subtract the two lengths instead.")
    if near(got[0], longer.abs().sum()):
        raise Diagnosis("That is the sum over rows: take the mean, so that layers of any width compare.")
    close(torch.tensor(float(got[0])), torch.tensor(magnitude), "the change in magnitude")
    if near(got[1], cosine.mean()):
        raise Diagnosis("That is the cosine, which is 1 for no change: return one minus it.")
    if near(got[1], (1 - (before * after).sum(dim=1)).mean()):
        raise Diagnosis(
            "The cosine is taken of the directions, whose rows have length one, not of the weights."
        )
    close(torch.tensor(float(got[1])), torch.tensor(direction), "the change in direction")


@mutant("weight_change", says="cancel")
def signed(before, after):
    return (after.norm(dim=1) - before.norm(dim=1)).mean().item(), 0.0


@mutant("weight_change", says="length of the difference")
def length_of_difference(before, after):
    return (after - before).norm(dim=1).mean().item(), 0.0


@mutant("weight_change", says="take the mean")
def summed(before, after):
    return (after.norm(dim=1) - before.norm(dim=1)).abs().sum().item(), 0.0


@mutant("weight_change", says="one minus it")
def the_cosine(before, after):
    moved = (after.norm(dim=1) - before.norm(dim=1)).abs().mean().item()
    return moved, F.cosine_similarity(before, after, dim=1).mean().item()


@mutant("weight_change", says="not of the weights")
def of_the_weights(before, after):
    moved = (after.norm(dim=1) - before.norm(dim=1)).abs().mean().item()
    return moved, (1 - (before * after).sum(dim=1)).mean().item()


# --- short answers

answer(
    "lab04.predict_points",
    reference=2.0,
    within=(-30, 30),
    unit="points",
    hints=["The chapter says 1 to 3. A negative number means that LoRA wins."],
)

answer(
    "lab04.llama_magnitudes",
    reference=lambda: 32 * (5 * 4096 + 2 * 11008),
    hints=[
        "One magnitude per output of each layer: q, k, v, o and down have 4096 outputs, gate and up 11008.",
        "Five times 4096 and twice 11008, times 32 layers.",
    ],
    mistakes={
        32 * (6 * 4096 + 11008): "these are the inputs: a magnitude belongs to a row, which makes one output",
        5 * 4096 + 2 * 11008: "that is one of the 32 layers",
        32 * 7 * 4096: "gate and up have 11008 outputs, not 4096",
    },
)
