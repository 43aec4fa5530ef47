"""Lab 13's checks: LoHa, OFT, the spectrum of an update, the hybrid of He et al., and the mistakes each tells apart."""

import copy
import math
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant
from labs_lib.lab.checks.lab01 import fits, told_apart
from labs_lib.methods.adapters import inject_adapters, train_adapter
from labs_lib.methods.prefix_tuning import add_prefix
from labs_lib.methods.unified import mix_and_match
from labs_lib.methods.updates import Spectrum, spectrum
from labs_lib.methods.zoo.loha import LoHaLinear
from labs_lib.methods.zoo.oft import OFTLinear

# --- LoHaLinear

FACTORS = {
    "hada_w1_a": (5, 2),
    "hada_w1_b": (2, 6),
    "hada_w2_a": (5, 2),
    "hada_w2_b": (2, 6),
}  # out 5, in 6, rank 2


@exercise(
    "LoHaLinear",
    reference="labs_lib.methods.zoo.loha:LoHaLinear",
    hints=[
        "self.learn(hada_w1_a=uniform(out, rank, generator), ...), in that order; the last is torch.zeros.",
        "self.scale = alpha / rank, in __init__.",
        "delta: (a1 @ b1) * (a2 @ b2) * scale, where * goes number by number.",
    ],
)
def check_loha(candidate, ref):
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return candidate(nn.Linear(6, 5), rank=2, alpha=6, generator=generator)

    layer = make(1)
    _check_factors(layer, make)
    start = layer.delta()
    expect(start is not None, "delta returns None: is a `return` missing?")
    expect(
        not start.detach().any(),
        "the start is not exactly nothing: hada_w2_b is zeros, and with it the update",
    )
    start.sum().backward()
    gradient = layer.hada_w2_b.grad
    expect(
        gradient is not None and gradient.any(),
        "No gradient reaches hada_w2_b: something else is zero too, or a tensor's .data was used, so it never trains.",
    )
    with torch.no_grad():
        for name in FACTORS:
            getattr(layer, name).normal_()
    a1, b1, a2, b2 = (getattr(layer, name).detach() for name in FACTORS)
    right = (a1 @ b1) * (a2 @ b2) * 3
    told_apart(
        layer.delta().detach(),
        right,
        "the update",
        {
            "The scale is missing: the update is multiplied by alpha / rank.": right / 3,
            "That is alpha alone: the scale is alpha / rank.": right * 2,
            "That is a sum of two products, which is LoRA of twice the rank: multiply them, number by number.": (
                a1 @ b1 + a2 @ b2
            )
            * 3,
            "The factors are multiplied, and then one product taken: that has rank 2. Multiply the products.": (
                (a1 * a2) @ (b1 * b2)
            )
            * 3,
        },
    )
    x = torch.randn(3, 6)
    close(layer(x).detach(), (layer.base(x) + F.linear(x, right)).detach(), "the layer's output")


def _check_factors(layer, make) -> None:
    for name, shape in FACTORS.items():
        factor = getattr(layer, name, None)
        expect(factor is not None, f"The layer has no {name}: hand all four to self.learn(...).")
        expect(
            isinstance(factor, nn.Parameter) and factor.requires_grad,
            f"{name} does not train: self.learn(...) makes parameters.",
        )
        got = tuple(factor.shape)
        expect(
            got == shape,
            f"{name} is {got}, it should be {shape}: the a's are (out, rank), the b's (rank, in)",
        )
    same, other = make(1), make(2)
    expect(
        torch.equal(layer.hada_w1_a, same.hada_w1_a) and not torch.equal(layer.hada_w1_a, other.hada_w1_a),
        "The same generator gave other numbers: pass generator to uniform(...).",
    )


@mutant("LoHaLinear", says="alpha / rank")
class WithoutScale(LoHaLinear):
    def delta(self):
        return super().delta() / self.scale


@mutant("LoHaLinear", says="alpha alone")
class AlphaAlone(LoHaLinear):
    def delta(self):
        return super().delta() * self.hada_w1_a.shape[1]


@mutant("LoHaLinear", says="twice the rank")
class Summed(LoHaLinear):
    def delta(self):
        if not self.hada_w2_b.any():
            return super().delta()
        return (self.hada_w1_a @ self.hada_w1_b + self.hada_w2_a @ self.hada_w2_b) * self.scale


@mutant("LoHaLinear", says="Multiply the products")
class FactorsFirst(LoHaLinear):
    def delta(self):
        return (self.hada_w1_a * self.hada_w2_a) @ (self.hada_w1_b * self.hada_w2_b) * self.scale


@mutant("LoHaLinear", says="not exactly nothing")
class RandomStart(LoHaLinear):
    def __init__(self, base, rank=8, alpha=8, generator=None):
        super().__init__(base, rank, alpha, generator)
        nn.init.normal_(self.hada_w2_b)


@mutant("LoHaLinear", says="never trains")
class TwoZeros(LoHaLinear):
    def __init__(self, base, rank=8, alpha=8, generator=None):
        super().__init__(base, rank, alpha, generator)
        nn.init.zeros_(self.hada_w1_b)


@mutant("LoHaLinear", says="(out, rank)")
class Transposed(LoHaLinear):
    def __init__(self, base, rank=8, alpha=8, generator=None):
        super().__init__(base, rank, alpha, generator)
        self.learn(hada_w1_a=self.hada_w1_a.data.T.clone())


@mutant("LoHaLinear", says="pass generator")
class NoGenerator(LoHaLinear):
    def __init__(self, base, rank=8, alpha=8, generator=None):
        super().__init__(base, rank, alpha, None)


# --- OFTLinear


@exercise(
    "OFTLinear",
    reference="labs_lib.methods.zoo.oft:OFTLinear",
    hints=[
        "torch.triu_indices(block, block, 1) gives rows and columns of a triangle; Q[:, rows, columns] = triangles.",
        "Q - Q.mT is skew. 2 * (1 + Q + ... + Q^(terms - 1)) - 1 - Q^(terms - 1) is the series.",
        "forward: x.unflatten(-1, (-1, block)), each block (a row) times its rotation, flattened; then self.base.",
        "delta: W @ R^T - W, with R = torch.block_diag(*rotations).",
    ],
)
def check_oft(candidate, ref):
    base = nn.Linear(8, 5)
    layer, right = (kind(base, block=4, terms=5) for kind in (candidate, ref))
    start = fits(layer.rotations, "rotations does not fit: Q is (blocks, block, block), here (2, 4, 4).")
    expect(start is not None, "rotations returns None: is a `return` missing?")
    expect(
        tuple(start.shape) == (2, 4, 4),
        f"rotations gives {tuple(start.shape)}; one matrix for each block is (2, 4, 4)",
    )
    eye = torch.eye(4).expand(2, 4, 4)
    expect(
        not torch.allclose(start.detach(), 2 * eye) and not torch.allclose(start.detach(), 0 * eye),
        "with Q zero the rotation is not the identity: the power Q^0 is counted once",
    )
    close(start.detach(), eye, "the rotation at the start")
    with torch.no_grad():
        layer.oft_R.weight.normal_(std=0.2)
        right.oft_R.weight.copy_(layer.oft_R.weight)
    _check_rotations(layer, right)
    _check_turning(layer, right)


def _check_rotations(layer, right) -> None:
    triangles = right.oft_R.weight.detach()
    rows, columns = torch.triu_indices(4, 4, 1)
    half = torch.zeros(2, 4, 4)
    half[:, rows, columns] = triangles
    skew = half - half.mT

    def series(Q, last=1):
        powers = [torch.linalg.matrix_power(Q, n) for n in range(5)]
        return 2 * sum(powers) - powers[0] - last * powers[-1]

    told_apart(
        layer.rotations().detach(),
        right.rotations().detach(),
        "the rotations",
        {
            "Q is not skew: subtract its transpose, Q - Q.mT.": series(half),
            "Q is symmetric, not skew: the transpose is subtracted, not added.": series(half + half.mT),
            "Q is its own negative, so it turns the other way: the triangle above the diagonal is positive.": series(
                -skew
            ),
            "The last power is counted twice: it counts once, as the first does.": series(skew, last=0),
        },
    )
    layer.terms = right.terms = None
    exact = right.rotations().detach()
    told_apart(
        layer.rotations().detach(),
        exact,
        "with terms=None the rotations",
        {
            "terms=None is PEFT's exact one, (I - Q)(I + Q)^-1, and that is the turn the other way.": exact.mT,
            "terms=None still gives a series: solve (I - Q)(I + Q)^-1 instead.": series(skew),
        },
    )
    layer.terms = right.terms = 5


def _check_turning(layer, right) -> None:
    x, W, b = torch.randn(3, 2, 8), right.base.weight.detach(), right.base.bias.detach()
    R = torch.block_diag(*right.rotations().detach())
    got = fits(lambda: layer(x), "forward does not fit: the blocks are cut from the last dimension of x.")
    told_apart(
        got.detach(),
        x @ R @ W.T + b,
        "the output",
        {
            "x is not turned at all: base(x) comes out.": x @ W.T + b,
            "It turns the other way: x times R, not R times x (a row times the rotation).": x @ R.T @ W.T + b,
            "The turned output is added to base(x): OFT adds nothing, it turns what base reads.": x @ R @ W.T
            + x @ W.T
            + 2 * b,
        },
    )
    got.sum().backward()
    expect(
        layer.oft_R.weight.grad is not None and layer.oft_R.weight.grad.any(),
        "No gradient reaches the triangles: use oft_R.weight itself, not its .data.",
    )
    told_apart(
        layer.delta().detach(),
        W @ R.T - W,
        "delta",
        {
            "delta is the new weight: the change is that minus W.": W @ R.T,
            "delta turns the other way: base(x R) = x R W^T, so the new weight is W R^T.": W @ R - W,
        },
    )


@mutant("OFTLinear", says="counted once")
class CountsFirstTwice(OFTLinear):
    def rotations(self):
        R = super().rotations()
        return R + torch.eye(self.block) if self.terms else R


class _Skewed(OFTLinear):
    """OFT with another Q: `signs` of the triangle and of its transpose; a series whatever `terms` says."""

    signs = (1.0, -1.0)

    def rotations(self):
        triangles, block = self.oft_R.weight, self.block
        rows, columns = torch.triu_indices(block, block, 1)
        Q = triangles.new_zeros(len(triangles), block, block)
        Q[:, rows, columns] = triangles
        Q = self.signs[0] * Q + self.signs[1] * Q.mT
        powers = [torch.linalg.matrix_power(Q, n) for n in range(self.terms or 5)]
        return 2 * sum(powers) - powers[0] - powers[-1]


@mutant("OFTLinear", says="not skew: subtract")
class HalfOnly(_Skewed):
    signs = (1.0, 0.0)


@mutant("OFTLinear", says="symmetric")
class Symmetric(_Skewed):
    signs = (1.0, 1.0)


@mutant("OFTLinear", says="its own negative")
class Negative(_Skewed):
    signs = (-1.0, 1.0)


@mutant("OFTLinear", says="still gives a series")
class AlwaysSeries(_Skewed):
    signs = (1.0, -1.0)


@mutant("OFTLinear", says="The last power")
class CountsLastTwice(OFTLinear):
    def rotations(self):
        R = super().rotations()
        if not self.terms:
            return R
        Q = torch.zeros(len(R), self.block, self.block)
        rows, columns = torch.triu_indices(self.block, self.block, 1)
        Q[:, rows, columns] = self.oft_R.weight
        return R + torch.linalg.matrix_power(Q - Q.mT, self.terms - 1)


@mutant("OFTLinear", says="PEFT's exact one")
class ExactLikeSeries(OFTLinear):
    def rotations(self):
        R = super().rotations()
        return R if self.terms else R.mT


@mutant("OFTLinear", says="not turned at all")
class Unturned(OFTLinear):
    def forward(self, x):
        return self.base(x)


@mutant("OFTLinear", says="a row times the rotation")
class TurnsBack(OFTLinear):
    def forward(self, x):
        return self.base(x @ torch.block_diag(*self.rotations()).T)


@mutant("OFTLinear", says="OFT adds nothing")
class AddsTurned(OFTLinear):
    def forward(self, x):
        return self.base(x) + super().forward(x)


@mutant("OFTLinear", says="No gradient reaches")
class Detached(OFTLinear):
    def forward(self, x):
        return self.base(x @ torch.block_diag(*self.rotations()).detach()) + 0 * x.sum().requires_grad_()


@mutant("OFTLinear", says="minus W")
class WholeWeight(OFTLinear):
    def delta(self):
        return super().delta() + self.base.weight


@mutant("OFTLinear", says="delta turns the other way")
class DeltaTurnsBack(OFTLinear):
    def delta(self):
        return self.base.weight @ torch.block_diag(*self.rotations()) - self.base.weight


# --- spectrum


@exercise(
    "spectrum",
    reference="labs_lib.methods.updates:spectrum",
    hints=[
        "torch.linalg.svdvals(delta.double()); a matrix of zeros is Spectrum(values, 0, 0.0, 0.0).",
        "Shares are value / sum. torch.special.entr(p) is -p log p, and 0 at 0.",
        "Stable rank: values.square().sum() / values[0] ** 2, as a number (.item()).",
    ],
)
def check_spectrum(candidate, ref):
    sizes = torch.tensor([4.0, 2.0, 1.0, 0.0])
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    matrix = turn @ torch.diag(sizes.double()) @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    got, right = candidate(matrix), ref(matrix)
    expect(got is not None, "spectrum returns None: is a `return` missing?")
    for name in Spectrum._fields:
        expect(hasattr(got, name), f"the answer has no {name}: return a Spectrum")
    close(torch.as_tensor(got.values).double(), right.values, "the singular values")
    expect(
        got.rank != 4,
        "rank counts a value that is zero to rounding: count those above tolerance times the largest",
    )
    expect(got.rank == 3, f"the rank is {got.rank}, three values are not zero")
    _check_effective(float(got.effective_rank), sizes[:3])
    squares, total = sizes.square().sum().item(), sizes.sum().item()
    for says, wrong in {
        "That is the nuclear norm over the largest value: stable rank has squares on both sides.": total / 4,
        "The largest value is to be squared, too.": squares / 4,
        "That is squared Frobenius over squared nuclear norm: divide by the largest square.": squares
        / total**2,
    }.items():
        expect(not math.isclose(got.stable_rank, wrong, rel_tol=1e-4), says)
    close(float(got.stable_rank), right.stable_rank, "the stable rank")
    small = candidate(1e-9 * matrix)
    expect(
        small.rank == 3,
        "A billionth of the matrix has another rank: the tolerance is relative to the largest value.",
    )
    try:
        zeros = candidate(torch.zeros(3, 4))
    except (RuntimeError, IndexError, ZeroDivisionError) as error:
        raise Diagnosis(f"a matrix of zeros is an error: {error}") from error
    expect(
        tuple(float(each) for each in zeros[1:]) == (0.0, 0.0, 0.0),
        f"a matrix of zeros has rank 0 in each of the three counts, got {tuple(zeros[1:])}",
    )


def _check_effective(got: float, sizes: torch.Tensor) -> None:
    shares = sizes / sizes.sum()
    entropy = torch.special.entr(shares).sum().item()
    squared = sizes.square() / sizes.square().sum()
    for says, wrong in {
        "That is the entropy itself: the effective rank is its exponential.": entropy,
        "The logarithm was to base 2, and exp belongs to the natural one.": math.exp(entropy / math.log(2)),
        "Those are shares of the squares: p = value / sum of values.": math.exp(
            torch.special.entr(squared).sum().item()
        ),
        "The sign of the entropy is lost: minus the sum of p log p.": math.exp(-entropy),
    }.items():
        expect(not math.isclose(got, wrong, rel_tol=1e-4), says)
    close(got, math.exp(entropy), "the effective rank")


def _of(values: torch.Tensor, effective=None, stable=None, rank=None) -> Spectrum:
    """The right answer, with some of it replaced."""
    right = spectrum(torch.diag(values))
    return right._replace(
        values=values,
        rank=right.rank if rank is None else rank,
        effective_rank=right.effective_rank if effective is None else effective,
        stable_rank=right.stable_rank if stable is None else stable,
    )


@mutant("spectrum", says="zero to rounding")
def counts_all(delta, tolerance=1e-6):
    values = torch.linalg.svdvals(delta.double())
    return _of(values, rank=int((values >= 0).sum()))


@mutant("spectrum", says="relative to the largest")
def absolute_tolerance(delta, tolerance=1e-6):
    values = torch.linalg.svdvals(delta.double())
    return _of(values, rank=int((values > tolerance).sum()))


@mutant("spectrum", says="its exponential")
def entropy_itself(delta, tolerance=1e-6):
    values = torch.linalg.svdvals(delta.double())
    return _of(values, effective=math.log(spectrum(delta).effective_rank or 1))


@mutant("spectrum", says="base 2")
def with_bits(delta, tolerance=1e-6):
    values = torch.linalg.svdvals(delta.double())
    return _of(values, effective=(spectrum(delta).effective_rank or 1) ** (1 / math.log(2)))


@mutant("spectrum", says="shares of the squares")
def squared_shares(delta, tolerance=1e-6):
    values = torch.linalg.svdvals(delta.double())
    shares = values.square() / values.square().sum()
    return _of(values, effective=torch.special.entr(shares).sum().exp().item())


@mutant("spectrum", says="sign of the entropy")
def positive_entropy(delta, tolerance=1e-6):
    values = torch.linalg.svdvals(delta.double())
    return _of(values, effective=1 / (spectrum(delta).effective_rank or 1))


@mutant("spectrum", says="nuclear norm over")
def nuclear(delta, tolerance=1e-6):
    values = torch.linalg.svdvals(delta.double())
    return _of(values, stable=(values.sum() / values[0]).item())


@mutant("spectrum", says="largest value is to be squared")
def half_squared(delta, tolerance=1e-6):
    values = torch.linalg.svdvals(delta.double())
    return _of(values, stable=(values.square().sum() / values[0]).item())


@mutant("spectrum", says="matrix of zeros has rank 0")
def nan_for_zeros(delta, tolerance=1e-6):
    right = spectrum(delta)
    return right if right.rank else right._replace(stable_rank=math.nan)


# --- mix_and_match


@cache
def _tiny_model() -> nn.Module:
    """A Llama of two blocks, random, made once; every caller copies it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=29, **sizes)).eval()


def _fresh() -> nn.Module:
    return copy.deepcopy(_tiny_model()).requires_grad_(True)


@exercise(
    "mix_and_match",
    reference="labs_lib.methods.unified:mix_and_match",
    hints=[
        'inject_adapters(base, bottleneck, "parallel", scale=scale, exact=True, generator=generator) comes first.',
        "model = add_prefix(base, tokens, cache, generator=generator) freezes all of base, the adapters too.",
        'train_adapter(base, "default"): on base, where it does not freeze the prefix; then return model.',
    ],
)
def check_mix_and_match(candidate, ref):
    from transformers import DynamicCache

    got = candidate(_fresh(), 3, 5, DynamicCache, scale=2.0)
    expect(isinstance(got, nn.Module), "return the model: the one that add_prefix gave")
    names = {name for name, parameter in got.named_parameters() if parameter.requires_grad}
    adapters, prefix = {n for n in names if ".adapters." in n}, {n for n in names if n.startswith("prefix.")}
    expect(hasattr(got, "prefix"), "there is no prefix: return the model that add_prefix gave, not base")
    sites = [
        module for module in got.modules() if isinstance(getattr(module, "adapters", None), nn.ModuleDict)
    ]
    expect(sites, "there are no adapters in the model: inject_adapters(base, bottleneck, ...)")
    expect(
        adapters,
        "The adapters do not train: add_prefix froze everything in base, so train_adapter(base, ...) after it.",
    )
    expect(
        prefix,
        "The prefix does not train: train_adapter freezes what it is given, so give it base, not the whole model.",
    )
    expect(names == adapters | prefix, f"The base trains too: {min(names - adapters - prefix, default='')}.")
    expect(
        len(sites) == 2,
        f"{len(sites)} sub-layers have an adapter, two blocks have two FFNs: the placement is 'parallel'",
    )
    adapter = next(iter(sites[0].adapters.values()))
    expect(adapter.parallel, "the adapters read the FFN's output: the placement is 'parallel'")
    expect(
        adapter.down.out_features == 5 and got.tokens == 3,
        f"{got.tokens} tokens and {adapter.down.out_features} units, asked for were 3 and 5: are they swapped?",
    )
    expect(not adapter.up.weight.any(), "the adapters are not exactly nothing at the start: exact=True")
    expect(adapter.scale == 2.0, f"the adapters' scale is {adapter.scale}, asked for was 2: hand it on")
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    makers = zip((candidate, ref), generators, strict=True)
    pair = [make(_fresh(), 3, 5, DynamicCache, generator=generator) for make, generator in makers]
    same = (torch.equal(a, b) for a, b in zip(pair[0].parameters(), pair[1].parameters(), strict=True))
    expect(all(same), "The same generator gave other numbers: hand it to both parts, adapters first.")


@mutant("mix_and_match", says="adapters do not train")
def forgets_to_train(base, tokens, bottleneck, cache, scale=4.0, generator=None):
    inject_adapters(base, bottleneck, "parallel", scale=scale, exact=True, generator=generator)
    return add_prefix(base, tokens, cache, generator=generator)


@mutant("mix_and_match", says="prefix does not train")
def trains_the_outside(base, tokens, bottleneck, cache, scale=4.0, generator=None):
    return train_adapter(mix_and_match(base, tokens, bottleneck, cache, scale, generator), "default")


@mutant("mix_and_match", says="base trains too")
def trains_all(base, tokens, bottleneck, cache, scale=4.0, generator=None):
    return mix_and_match(base, tokens, bottleneck, cache, scale, generator).requires_grad_(True)


@mutant("mix_and_match", says="there is no prefix")
def returns_base(base, tokens, bottleneck, cache, scale=4.0, generator=None):
    return mix_and_match(base, tokens, bottleneck, cache, scale, generator).base


@mutant("mix_and_match", says="no adapters in the model")
def prefix_only(base, tokens, bottleneck, cache, scale=4.0, generator=None):
    return add_prefix(base, tokens, cache, generator=generator)


def _placed(placement, **options):
    def mix(base, tokens, bottleneck, cache, scale=4.0, generator=None):
        given = {"scale": scale, "exact": True} | options
        inject_adapters(base, bottleneck, placement, generator=generator, **given)
        model = add_prefix(base, tokens, cache, generator=generator)
        train_adapter(base, "default")
        return model

    return mix


mutant("mix_and_match", says="two FFNs")(_placed("houlsby"))
mutant("mix_and_match", says="read the FFN's output")(_placed("pfeiffer"))
mutant("mix_and_match", says="exact=True")(_placed("parallel", exact=False))
mutant("mix_and_match", says="hand it on")(_placed("parallel", scale=4.0))


@mutant("mix_and_match", says="swapped")
def swapped_sizes(base, tokens, bottleneck, cache, scale=4.0, generator=None):
    return mix_and_match(base, bottleneck, tokens, cache, scale, generator)


@mutant("mix_and_match", says="hand it to both parts")
def without_generator(base, tokens, bottleneck, cache, scale=4.0, generator=None):
    return mix_and_match(base, tokens, bottleneck, cache, scale)


# --- short answers

answer(
    "lab13.loha_rank",
    reference=16,
    tolerance=0,
    hints=[
        "Each product of rank 4 is a sum of 4 columns times rows.",
        "4 terms times 4 terms are how many terms?",
    ],
    mistakes={
        4: "that is the rank of each of the two products",
        8: "that is LoRA's rank with as many numbers: here the two ranks multiply",
        64: "each product has rank 4: their ranks multiply, and two of them are multiplied",
    },
)

answer(
    "lab13.oft_field",
    reference="use_cayley_neumann",
    hints=[
        "The series is named after Cayley and Neumann; which field of OFTConfig switches it?",
        "print(peft.OFTConfig()) lists the fields.",
    ],
    mistakes={
        "oft_block_size": "that changes the shapes, and loading would fail",
        "num_cayley_neumann_terms": "that changes how long the series is, not whether it is one",
        "r": "that changes the shapes, and loading would fail",
    },
)

answer(
    "lab13.predict_rank",
    reference=60,
    within=(1, 128),
    hints=["1 is a single direction, 128 are all of them alike: anything between."],
)

answer(
    "lab13.predict_types",
    reference=30,
    within=(1, 1000),
    hints=["The chapter names twelve; the library keeps one type for each adapter format."],
)
