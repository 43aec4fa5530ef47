"""Lab 01's checks: what a wrong LoRA looks like from outside, and the mistakes each check must tell apart.

A check runs the learner's code on tiny random tensors, in milliseconds. Beside each stand its mutants:
mistakes that learners make, which must fail with words of their own.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, nn
from torch.nn import functional as F

from labs_lib.lab.check import Diagnosis, answer, close, exercise, expect, mutant
from labs_lib.methods.lora import LoRALinear, init_lora, inject_lora, lora_delta, lora_layers, target_names


def told_apart(got: Any, expected: torch.Tensor, what: str, mistakes: dict[str, torch.Tensor]) -> None:
    """Like `close`, but a result that equals a known mistake gets that mistake's own words."""
    if isinstance(got, torch.Tensor):
        for says, wrong in mistakes.items():
            if got.shape == wrong.shape and torch.allclose(got.float(), wrong, rtol=1e-5, atol=1e-5):
                raise Diagnosis(says)
    close(got, expected, what)


def fits(call: Callable[[], Any], says: str) -> Any:
    """The call's result; a mismatch of shapes, which torch reports as a RuntimeError, is told as `says`."""
    try:
        return call()
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise Diagnosis(f"{says} (torch: {str(error).splitlines()[0]})") from error


# --- lora_delta


@exercise(
    "lora_delta",
    reference="labs_lib.methods.lora:lora_delta",
    hints=[
        "B is (out, rank) and A is (rank, in): in which order do they multiply to (out, in)?",
        "The product is scaled by one number, alpha / rank.",
        "return (B @ A) * (alpha / rank)",
    ],
)
def check_lora_delta(candidate, ref):
    A, B, alpha, rank = torch.randn(3, 6), torch.randn(5, 3), 6.0, 3
    product = B @ A
    got = fits(
        lambda: candidate(A, B, alpha, rank),
        "The product does not fit: B (out, rank) times A (rank, in) does, A times B does not.",
    )
    told_apart(
        got,
        ref(A, B, alpha, rank),
        "the update",
        {
            "The scale is missing: multiply by alpha / rank.": product,
            "The scale is alpha; where is the 1/r? It is alpha / rank.": product * alpha,
            "The scale is 1 / rank; alpha is missing.": product / rank,
            "The scale is upside down: alpha / rank, not rank / alpha.": product * rank / alpha,
            "That is alpha / sqrt(rank), rsLoRA's scale; plain LoRA has alpha / rank.": product
            * alpha
            / math.sqrt(rank),
            "Did you forget a transpose? This is (in, out); a linear layer's weight is (out, in).": (
                product.T * alpha / rank
            ),
        },
    )


@mutant("lora_delta", says="scale is missing")
def no_scale(A, B, alpha, rank):
    return B @ A


@mutant("lora_delta", says="1/r")
def alpha_without_rank(A, B, alpha, rank):
    return alpha * (B @ A)


@mutant("lora_delta", says="alpha is missing")
def rank_without_alpha(A, B, alpha, rank):
    return (B @ A) / rank


@mutant("lora_delta", says="upside down")
def inverted_scale(A, B, alpha, rank):
    return (B @ A) * (rank / alpha)


@mutant("lora_delta", says="rsLoRA")
def square_root_scale(A, B, alpha, rank):
    return (B @ A) * (alpha / rank**0.5)


@mutant("lora_delta", says="A times B does not")
def swapped_factors(A, B, alpha, rank):
    return (A @ B) * (alpha / rank)


@mutant("lora_delta", says="forget a transpose")
def transposed_update(A, B, alpha, rank):
    return (A.T @ B.T) * (alpha / rank)


@mutant("lora_delta", says="return")
def forgot_to_return(A, B, alpha, rank):
    (B @ A) * (alpha / rank)


# --- init_lora


@exercise(
    "init_lora",
    reference="labs_lib.methods.lora:init_lora",
    hints=[
        "One factor must be zero, so that the update starts at zero; if both were, neither would ever get a gradient.",
        "torch.empty(rank, in_features).uniform_(low, high, generator=generator) draws in place.",
        "bound = in_features**-0.5; A is uniform between -bound and bound; B = torch.zeros(out_features, rank).",
    ],
)
def check_init_lora(candidate, ref):
    in_features, out_features, rank = 100, 7, 25
    got = candidate(in_features, out_features, rank, Generator().manual_seed(1))
    expect(isinstance(got, tuple | list) and len(got) == 2, "Return two tensors, A and B.")
    A, B = got
    shapes = tuple(A.shape), tuple(B.shape)
    right = (rank, in_features), (out_features, rank)
    expect(shapes != right[::-1], "A and B are swapped: return A (rank, in) first, then B (out, rank).")
    expect(
        shapes == right,
        f"A is {shapes[0]} and B is {shapes[1]}; they should be (rank, in) = {right[0]} and (out, rank) = {right[1]}.",
    )
    expect(
        A.any(), "A is zero, and B too: then each one's gradient is zero as well, and nothing ever trains."
    )
    expect(not B.any(), "B starts at zero: is yours random? The update must be nothing at first.")
    again, _ = candidate(in_features, out_features, rank, Generator().manual_seed(1))
    expect(torch.equal(A, again), "The same generator gave another A: pass generator=generator to the draw.")
    bound, largest = in_features**-0.5, A.abs().max().item()
    expect(
        A.min() < 0, "A is never negative: draw between -bound and bound (torch.rand draws between 0 and 1)."
    )
    for name, wrong in {"rank": rank**-0.5, "out_features": out_features**-0.5}.items():
        expect(
            not 0.97 * wrong < largest < 1.001 * wrong,
            f"A's bound looks like 1/sqrt({name}); it is 1/sqrt(in_features).",
        )
    shape = A.std().item() / largest  # a uniform: 1/sqrt(3) = 0.577; a Gaussian of 2,500 draws: about 0.28
    expect(shape > 0.5, "A looks Gaussian, as in the paper; PEFT's is uniform between -bound and bound.")
    expect(
        0.97 * bound < largest < 1.001 * bound,
        f"A reaches {largest:.3f}; its bound should be 1/sqrt(in_features) = {bound:.3f}.",
    )


@mutant("init_lora", says="swapped")
def returns_b_first(in_features, out_features, rank, generator=None):
    return init_lora(in_features, out_features, rank, generator)[::-1]


@mutant("init_lora", says="should be (rank, in)")
def input_first(in_features, out_features, rank, generator=None):
    return torch.rand(in_features, rank), torch.zeros(rank, out_features)


@mutant("init_lora", says="is yours random?")
def b_is_random(in_features, out_features, rank, generator=None):
    A, B = init_lora(in_features, out_features, rank, generator)
    return A, torch.randn_like(B)


@mutant("init_lora", says="nothing ever trains")
def both_zero(in_features, out_features, rank, generator=None):
    return torch.zeros(rank, in_features), torch.zeros(out_features, rank)


@mutant("init_lora", says="same generator")
def ignores_the_generator(in_features, out_features, rank, generator=None):
    return init_lora(in_features, out_features, rank)


@mutant("init_lora", says="never negative")
def only_positive(in_features, out_features, rank, generator=None):
    A, B = init_lora(in_features, out_features, rank, generator)
    return A.abs(), B


@mutant("init_lora", says="1/sqrt(rank)")
def bound_from_rank(in_features, out_features, rank, generator=None):
    A, B = init_lora(in_features, out_features, rank, generator)
    return A * math.sqrt(in_features / rank), B


@mutant("init_lora", says="1/sqrt(out_features)")
def bound_from_out(in_features, out_features, rank, generator=None):
    A, B = init_lora(in_features, out_features, rank, generator)
    return A * math.sqrt(in_features / out_features), B


@mutant("init_lora", says="Gaussian")
def gaussian(in_features, out_features, rank, generator=None):
    return torch.randn(rank, in_features, generator=generator) / rank, torch.zeros(out_features, rank)


@mutant("init_lora", says="its bound should be")
def bound_without_root(in_features, out_features, rank, generator=None):
    A, B = init_lora(in_features, out_features, rank, generator)
    return A / math.sqrt(in_features), B


# --- LoRALinear


@exercise(
    "LoRALinear",
    reference="labs_lib.methods.lora:LoRALinear",
    hints=[
        "__init__ ends with self.base, self.lora_A, self.lora_B (nn.Parameter), self.rank, self.alpha, self.merged.",
        "forward: F.linear(x, self.lora_A) takes x to the rank, F.linear(..., self.lora_B) from there to out.",
        "merge, under torch.no_grad(): self.base.weight += lora_delta(...), then self.merged = True.",
    ],
)
def check_lora_linear(candidate, ref):
    base, x, rank, alpha = nn.Linear(6, 4), torch.randn(2, 5, 6), 3, 6.0
    weight, expected = base.weight.detach().clone(), base(x).detach()
    layer = candidate(base, rank, alpha)
    _check_parameters(layer, rank)
    got = fits(
        lambda: layer(x),
        "forward does not fit: x goes through lora_A (rank, in) first, then lora_B (out, rank).",
    )
    expect(got is not None, "forward returns None: is a `return` missing?")
    told_apart(
        got,
        expected,
        "B is zero at first, so the output should be base(x), but it",
        {"The update comes out alone: add it to base(x).": torch.zeros_like(expected)},
    )

    with torch.no_grad():
        layer.lora_B.normal_()
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    update = F.linear(F.linear(x, A), B)
    got = layer(x)
    told_apart(
        got.detach(),
        expected + update * alpha / rank,
        "the output",
        {
            "The scale is missing: the update is multiplied by alpha / rank.": expected + update,
            "The scale is alpha; where is the 1/r? It is alpha / rank.": expected + update * alpha,
            "The update never arrives: the output is still base(x) when B is not zero.": expected,
        },
    )
    got.sum().backward()
    expect(
        layer.lora_A.grad is not None and layer.lora_B.grad is not None,
        "No gradient reaches lora_A and lora_B: use them themselves, not their .data, and no torch.no_grad in forward.",
    )
    _check_dropout(candidate, x)
    _check_merging(layer, x, weight, B @ A, alpha / rank)


def _check_parameters(layer: nn.Module, rank: int) -> None:
    for name, shape, meaning in (("lora_A", (rank, 6), "(rank, in)"), ("lora_B", (4, rank), "(out, rank)")):
        factor = getattr(layer, name, None)
        expect(factor is not None, f"The layer has no {name}: set self.{name} in __init__.")
        expect(
            isinstance(factor, nn.Parameter),
            f"{name} is no nn.Parameter, so no optimiser would ever see it: wrap it in nn.Parameter.",
        )
        expect(
            tuple(factor.shape) == shape,
            f"{name} is {tuple(factor.shape)}; it should be {meaning} = {shape}.",
        )
        expect(
            factor.requires_grad,
            f"{name} is frozen: only the base should be. Freeze the base, not the layer.",
        )
    expect(isinstance(getattr(layer, "base", None), nn.Linear), "Keep the wrapped layer as self.base.")
    for name in ("rank", "alpha", "merged"):
        expect(hasattr(layer, name), f"Keep self.{name}: merging and saving need it.")
    still = [name for name, parameter in layer.base.named_parameters() if parameter.requires_grad]
    expect(
        not still,
        f"The base is not frozen: its {' and '.join(still)} would train too. Use base.requires_grad_(False).",
    )


def _check_dropout(candidate: type[nn.Module], x: torch.Tensor) -> None:
    """In training, dropout falls on the update's input and nowhere else."""
    base = nn.Linear(6, 4)
    layer = candidate(base, 3, 6.0, dropout=0.5).train()
    close(layer(x), base(x), "dropout belongs on the update's input only, but with B zero the output", 1e-6)
    with torch.no_grad():
        layer.lora_B.normal_()
    expect(
        not torch.equal(layer(x), layer(x)),
        "dropout=0.5 drops nothing in training: put self.dropout on the update's input.",
    )
    layer.eval()
    expect(
        torch.equal(layer(x), layer(x)),
        "dropout still drops after eval(): use nn.Dropout, which knows the mode.",
    )


def _check_merging(
    layer: nn.Module, x: torch.Tensor, weight: torch.Tensor, product: torch.Tensor, scale: float
) -> None:
    before, merged = layer(x).detach(), weight + product * scale
    fits(layer.merge, "merge does not fit: the update must have the weight's own shape, (out, in).")
    told_apart(
        layer.base.weight.detach(),
        merged,
        "the merged weight",
        {
            "merge left the base weight as it was.": weight,
            "merge forgot the scale: add lora_delta, which has it.": weight + product,
            "The scale is applied twice on merging: lora_delta already has it.": weight + product * scale**2,
            "merge replaced the weight by the update: add it.": product * scale,
        },
    )
    told_apart(
        layer(x).detach(),
        before,
        "the output after merging",
        {
            "The update counts twice after merging: while merged, forward is base(x).": F.linear(
                x, merged + product * scale, layer.base.bias
            ).detach()
        },
    )
    layer.merge()
    close(layer.base.weight, merged, "merging twice should add the update once: keep self.merged. The weight")
    layer.unmerge()
    close(layer.base.weight, weight, "unmerge should give the base weight back, but it")
    close(layer(x), before, "the output after unmerging")


def _merge_adding(update: Callable[[LoRALinear], torch.Tensor]) -> Callable[[LoRALinear], None]:
    @torch.no_grad()
    def merge(self):
        if not self.merged:
            self.base.weight += update(self)
            self.merged = True

    return merge


def _update(self: LoRALinear) -> torch.Tensor:
    return lora_delta(self.lora_A, self.lora_B, self.alpha, self.rank)


@mutant("LoRALinear", says="not frozen")
class BaseNotFrozen(LoRALinear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.base.requires_grad_(True)


@mutant("LoRALinear", says="bias would train")
class BiasNotFrozen(LoRALinear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.base.bias.requires_grad_(True)


@mutant("LoRALinear", says="Freeze the base, not the layer")
class AllFrozen(LoRALinear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.requires_grad_(False)


@mutant("LoRALinear", says="no nn.Parameter")
class PlainTensors(LoRALinear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        A, B = self.lora_A.detach(), self.lora_B.detach()
        del self.lora_A, self.lora_B
        self.lora_A, self.lora_B = A, B


@mutant("LoRALinear", says="it should be (rank, in)")
class TransposedFactors(LoRALinear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_A, self.lora_B = nn.Parameter(self.lora_A.T.clone()), nn.Parameter(self.lora_B.T.clone())


@mutant("LoRALinear", says="B is zero at first")
class RandomB(LoRALinear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.normal_(self.lora_B)


@mutant("LoRALinear", says="scale is missing")
class NoScale(LoRALinear):
    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)


@mutant("LoRALinear", says="1/r")
class AlphaWithoutRank(LoRALinear):
    def forward(self, x):
        return self.base(x) + self.alpha * F.linear(F.linear(x, self.lora_A), self.lora_B)


@mutant("LoRALinear", says="through lora_A (rank, in) first")
class BBeforeA(LoRALinear):
    def forward(self, x):
        return self.base(x) + (x @ self.lora_B @ self.lora_A) * (self.alpha / self.rank)


@mutant("LoRALinear", says="never arrives")
class BaseOnly(LoRALinear):
    def forward(self, x):
        return self.base(x)


@mutant("LoRALinear", says="comes out alone")
class UpdateOnly(LoRALinear):
    def forward(self, x):
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * (self.alpha / self.rank)


@mutant("LoRALinear", says="No gradient reaches")
class UsesData(LoRALinear):
    def forward(self, x):
        if self.merged:
            return self.base(x)
        update = F.linear(F.linear(x, self.lora_A.data), self.lora_B.data) * (self.alpha / self.rank)
        return (self.base(x) + update).requires_grad_()


@mutant("LoRALinear", says="update's input only")
class DropoutOnEverything(LoRALinear):
    def forward(self, x):
        return super().forward(self.dropout(x))


@mutant("LoRALinear", says="drops nothing")
class NoDropout(LoRALinear):
    def __init__(self, base, rank, alpha, dropout=0.0, generator=None):
        super().__init__(base, rank, alpha, 0.0, generator)


@mutant("LoRALinear", says="after eval()")
class DropoutAlways(LoRALinear):
    def forward(self, x):
        self.dropout.train()
        return super().forward(x)


@mutant("LoRALinear", says="left the base weight")
class MergeOnCopy(LoRALinear):
    merge = _merge_adding(lambda self: 0 * _update(self))


@mutant("LoRALinear", says="forgot the scale")
class MergeWithoutScale(LoRALinear):
    merge = _merge_adding(lambda self: self.lora_B @ self.lora_A)


@mutant("LoRALinear", says="applied twice")
class MergeScaleTwice(LoRALinear):
    merge = _merge_adding(lambda self: _update(self) * (self.alpha / self.rank))


@mutant("LoRALinear", says="the weight's own shape")
class MergeForgotTranspose(LoRALinear):
    merge = _merge_adding(lambda self: _update(self).T)


@mutant("LoRALinear", says="replaced the weight")
class MergeReplaces(LoRALinear):
    merge = _merge_adding(lambda self: _update(self) - self.base.weight)


@mutant("LoRALinear", says="counts twice")
class ForwardIgnoresMerged(LoRALinear):
    def forward(self, x):
        update = F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)
        return self.base(x) + update * (self.alpha / self.rank)


@mutant("LoRALinear", says="merging twice")
class MergesAgain(LoRALinear):
    def merge(self):
        self.merged = False
        super().merge()


@mutant("LoRALinear", says="unmerge should give")
class UnmergeOnlyFlips(LoRALinear):
    def unmerge(self):
        self.merged = False


# --- inject_lora


class Toy(nn.Module):
    """Two blocks and a head, with the names of a Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
            for _ in range(2)
        )
        self.lm_head = nn.Linear(4, 11)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = h + layer["v_proj"](h) * torch.sigmoid(layer["q_proj"](h) * layer["k_proj"](h))
        return self.lm_head(h)


@exercise(
    "inject_lora",
    reference="labs_lib.methods.lora:inject_lora",
    hints=[
        "target_names(model, targets) knows which layers are meant, and leaves the head out of 'all-linear'.",
        "Freeze the model while A and B are not in it yet; freezing at the end would freeze them too.",
        'parent, _, child = name.rpartition("."); setattr(model.get_submodule(parent), child, wrapper).',
    ],
)
def check_inject_lora(candidate, ref):
    _check_targets(candidate, ["q_proj", "v_proj"])
    _check_targets(candidate, "all-linear")


def _check_targets(candidate: Callable[..., nn.Module], targets: str | list[str]) -> None:
    model, ids = Toy(), torch.arange(11)
    expected, wanted = model(ids).detach(), set(target_names(model, targets))
    got = candidate(model, targets, 2, 4.0)
    expect(got is not None, "inject_lora returns None: return the model.")
    found = set(lora_layers(got))
    expect(
        "lm_head" not in found,
        f"The output head lm_head is wrapped too: targets={targets!r} leaves it alone.",
    )
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    expect(not missing, f"Not wrapped for targets={targets!r}: {', '.join(missing)}.")
    expect(not extra, f"Wrapped without being targets ({targets!r}): {', '.join(extra)}.")
    close(got(ids), expected, "a fresh LoRA changes nothing, but the model's output")
    factors = [parameter for layer in lora_layers(got).values() for parameter in (layer.lora_A, layer.lora_B)]
    expect(
        all(p.requires_grad for p in factors),
        "A and B are frozen too: freeze the model before they are in it.",
    )
    trains = [name for name, parameter in got.named_parameters() if parameter.requires_grad]
    others = [name for name in trains if not name.endswith(("lora_A", "lora_B"))]
    expect(
        not others, f"The base is not frozen: {', '.join(others[:3])} would train. Freeze the whole model."
    )
    for layer in lora_layers(got).values():
        expect(
            (layer.rank, layer.alpha) == (2, 4.0),
            f"rank and alpha are {layer.rank} and {layer.alpha}, not those passed in.",
        )


@mutant("inject_lora", says="return the model")
def returns_nothing(model, targets, rank, alpha, dropout=0.0, generator=None):
    inject_lora(model, targets, rank, alpha, dropout, generator)


@mutant("inject_lora", says="lm_head is wrapped")
def wraps_the_head(model, targets, rank, alpha, dropout=0.0, generator=None):
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return inject_lora(model, names if targets == "all-linear" else targets, rank, alpha, dropout, generator)


@mutant("inject_lora", says="Not wrapped")
def only_the_first_block(model, targets, rank, alpha, dropout=0.0, generator=None):
    names = [name for name in target_names(model, targets) if ".0." in name]
    return inject_lora(model, names, rank, alpha, dropout, generator)


@mutant("inject_lora", says="without being targets")
def ignores_targets(model, targets, rank, alpha, dropout=0.0, generator=None):
    return inject_lora(model, "all-linear", rank, alpha, dropout, generator)


@mutant("inject_lora", says="Freeze the whole model")
def freezes_only_what_it_wraps(model, targets, rank, alpha, dropout=0.0, generator=None):
    model = inject_lora(model, targets, rank, alpha, dropout, generator)
    model.embed.requires_grad_(True)
    return model


@mutant("inject_lora", says="before they are in it")
def freezes_last(model, targets, rank, alpha, dropout=0.0, generator=None):
    return inject_lora(model, targets, rank, alpha, dropout, generator).requires_grad_(False)


@mutant("inject_lora", says="changes nothing")
def wraps_new_layers(model, targets, rank, alpha, dropout=0.0, generator=None):
    for name in target_names(model, targets):
        model.get_submodule(name).reset_parameters()
    return inject_lora(model, targets, rank, alpha, dropout, generator)


@mutant("inject_lora", says="not those passed in")
def own_alpha(model, targets, rank, alpha, dropout=0.0, generator=None):
    return inject_lora(model, targets, rank, 2 * rank * alpha, dropout, generator)


# --- predictions: any sensible number is right, it is the surprise that teaches


answer("lab01.predict_exact", reference=50, within=(0, 100), unit="%")
answer("lab01.predict_recall", reference=50, within=(0, 100), unit="%")


# --- short answers: Llama-2-7B has 32 blocks of width 4,096, and q_proj and v_proj are 4,096 x 4,096


answer(
    "lab01.llama_2_7b_qv",
    reference=32 * 2 * 16 * (4096 + 4096),
    unit="parameters",
    tolerance=0,
    mistakes={
        2 * 16 * (4096 + 4096): "that is one block: there are 32",
        32
        * 2
        * 16
        * 4096: "that is half: q_proj and v_proj each carry an update, and each update has A and B",
        32
        * 2
        * 4096
        * 4096: "that is what the weights themselves have: the update has rank * (in + out) per layer",
        10_000_000: "that is the chapter's round figure: count it",
    },
    hints=[
        "A is (16, 4096) and B is (4096, 16): how many numbers is that per layer?",
        "32 blocks, two layers in each.",
    ],
)
answer(
    "lab01.llama_2_7b_qv_megabytes",
    reference=32 * 2 * 16 * (4096 + 4096) * 2 / 1e6,
    unit="MB",
    mistakes={
        33.55: "that is float32, as PEFT saves it: half precision takes 2 bytes per parameter",
        16.0: "that is MiB (2**20 bytes); a megabyte is 10**6 bytes",
        8.39: "that is one byte per parameter: half precision takes 2",
    },
    hints=["Parameters times 2 bytes, divided by 10**6."],
)
