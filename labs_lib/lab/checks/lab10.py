"""Lab 10's checks: what a wrong adapter looks like from outside. Beside each stand the mistakes it must tell apart."""

import torch
from torch import nn
from torch.nn import functional as F

from labs_lib.lab.check import answer, exercise, expect, mutant
from labs_lib.lab.checks.lab01 import fits, told_apart
from labs_lib.methods.adapters import (
    AdaptedSublayer,
    AdapterFusion,
    BottleneckAdapter,
    count_adapters,
    init_adapter,
)
from labs_lib.methods.llama_adapter import zero_gated_attention

# --- init_adapter


@exercise(
    "init_adapter",
    reference="labs_lib.methods.adapters:init_adapter",
    hints=[
        "down = nn.Linear(width, bottleneck), up = nn.Linear(bottleneck, width); nn.init.zeros_ for both biases.",
        "nn.init.trunc_normal_(weight, 0, std, -2 * std, 2 * std, generator=generator), for both weights.",
        "exact: nn.init.uniform_(down.weight, -bound, bound, generator=generator) and nn.init.zeros_(up.weight).",
        "return down, up",
    ],
)
def check_init_adapter(candidate, ref):
    width, bottleneck, std = 300, 40, 0.05

    def make(**options):
        return candidate(width, bottleneck, generator=torch.Generator().manual_seed(1), **options)

    down, up = _layers(make(std=std), width, bottleneck)
    for name, layer in (("down", down), ("up", up)):
        expect(
            not layer.bias.any(),
            f"{name}'s bias is not zero: nn.Linear starts it at random, so set it (nn.init.zeros_).",
        )
    expect(
        up.weight.any(),
        "up's weight is zero: that is the exact start; near nothing draws both weights from a normal.",
    )
    for name, layer in (("down", down), ("up", up)):
        size, largest = layer.weight.std().item(), layer.weight.abs().max().item()
        expect(
            0.6 * std < size < 1.1 * std,
            f"{name}'s weights have a standard deviation of {size:.3g} where std={std:g}: draw them with that.",
        )
        expect(
            largest <= 2 * std,
            f"{name} has a weight of {largest:.3g}: the normal is cut off at two deviations, 2 * std = {2 * std:g}.",
        )
    again, _ = make(std=std)
    expect(
        torch.equal(again.weight, down.weight),
        "The same generator gives other weights: hand `generator` on, and draw from nothing else.",
    )
    down, up = _layers(make(std=std, exact=True), width, bottleneck)
    expect(not up.weight.any(), "exact: up's weight must be zero, so that the adapter adds exactly nothing.")
    expect(
        down.weight.any(),
        "exact: both weights are zero. Then neither ever gets a gradient: only up starts at zero.",
    )
    bound, largest = width**-0.5, down.weight.abs().max().item()
    expect(
        0.98 * bound < largest <= bound,
        f"exact: down reaches {largest:.3g}; uniform between -bound and bound, bound = 1/sqrt(width) = {bound:.3g}.",
    )
    expect(not down.bias.any() and not up.bias.any(), "exact: the biases are zero here as well.")


def _layers(made, width: int, bottleneck: int) -> tuple[nn.Linear, nn.Linear]:
    expect(made is not None, "init_adapter returns None: is a `return down, up` missing?")
    expect(
        isinstance(made, tuple) and len(made) == 2 and all(isinstance(each, nn.Linear) for each in made),
        "return two nn.Linear: down, up",
    )
    shapes = [(each.in_features, each.out_features) for each in made]
    expect(
        shapes != [(bottleneck, width), (width, bottleneck)],
        "down and up are swapped: down comes first, and goes from width to bottleneck.",
    )
    expect(
        shapes == [(width, bottleneck), (bottleneck, width)],
        f"the layers go {shapes}, they should go ({width}, {bottleneck}) and ({bottleneck}, {width})",
    )
    return made


@mutant("init_adapter", says="bias is not zero")
def biases_left(width, bottleneck, std=0.01, exact=False, generator=None):
    down, up = init_adapter(width, bottleneck, std, exact, generator)
    nn.init.uniform_(up.bias, -0.1, 0.1)
    return down, up


@mutant("init_adapter", says="cut off at two deviations")
def not_cut_off(width, bottleneck, std=0.01, exact=False, generator=None):
    down, up = init_adapter(width, bottleneck, std, exact, generator)
    if not exact:
        for layer in (down, up):
            nn.init.normal_(layer.weight, 0, std, generator=generator)
    return down, up


@mutant("init_adapter", says="standard deviation of")
def default_weights(width, bottleneck, std=0.01, exact=False, generator=None):
    down, up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
    for layer in (down, up):
        nn.init.zeros_(layer.bias)
    return down, up


@mutant("init_adapter", says="the exact start")
def always_exact(width, bottleneck, std=0.01, exact=False, generator=None):
    return init_adapter(width, bottleneck, std, True, generator)


@mutant("init_adapter", says="neither ever gets a gradient")
def both_zero(width, bottleneck, std=0.01, exact=False, generator=None):
    down, up = init_adapter(width, bottleneck, std, exact, generator)
    if exact:
        nn.init.zeros_(down.weight)
    return down, up


@mutant("init_adapter", says="uniform between")
def bound_without_root(width, bottleneck, std=0.01, exact=False, generator=None):
    down, up = init_adapter(width, bottleneck, std, exact, generator)
    if exact:
        nn.init.uniform_(down.weight, -1 / width, 1 / width, generator=generator)
    return down, up


@mutant("init_adapter", says="hand `generator` on")
def own_randomness(width, bottleneck, std=0.01, exact=False, generator=None):
    return init_adapter(width, bottleneck, std, exact)


@mutant("init_adapter", says="swapped")
def layers_swapped(width, bottleneck, std=0.01, exact=False, generator=None):
    return init_adapter(width, bottleneck, std, exact, generator)[::-1]


# --- BottleneckAdapter


@exercise(
    "BottleneckAdapter",
    reference="labs_lib.methods.adapters:BottleneckAdapter",
    hints=[
        "Inside out: self.down, then self.activation, then self.up; self.scale in front.",
        "x.to(self.up.weight.dtype) first, so that a bfloat16 model can have float32 adapters.",
        "return self.scale * self.up(self.activation(self.down(x)))",
    ],
)
def check_bottleneck_adapter(candidate, ref):
    adapter = candidate(6, 3, scale=4.0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    x = torch.randn(2, 5, 6)
    got = fits(lambda: adapter(x), "The layers do not fit in that order: down first, then up.")
    expect(got is not None, "forward returns None: is a `return` missing?")
    with torch.no_grad():
        inner = adapter.down(x)
        right = 4 * adapter.up(inner.relu())
        mistakes = {
            "x itself is in the result: the skip connection is AdaptedSublayer's, here is only what is added.": x
            + right,
            "The scale is missing: self.scale times the rest.": right / 4,
            "There is no activation between down and up: then the two are one matrix of low rank, like LoRA.": 4
            * adapter.up(inner),
            "The activation comes last: it belongs between down and up.": 4 * adapter.up(inner).relu(),
            "The scale acts before up, so up's bias is not scaled.": adapter.up(4 * inner.relu()),
        }
    told_apart(got.detach(), right, "what the adapter adds", mistakes)
    half = fits(
        lambda: adapter(x.to(torch.bfloat16)),
        "A bfloat16 x does not fit float32 weights: x.to(self.up.weight.dtype) first.",
    )
    expect(
        half.dtype == torch.float32, "A bfloat16 x should be computed in the dtype of the weights, float32."
    )


@mutant("BottleneckAdapter", says="skip connection")
class WithSkip(BottleneckAdapter):
    def forward(self, x):
        return x + super().forward(x)


@mutant("BottleneckAdapter", says="scale is missing")
class WithoutScale(BottleneckAdapter):
    def forward(self, x):
        return super().forward(x) / self.scale


@mutant("BottleneckAdapter", says="no activation")
class Linear(BottleneckAdapter):
    def forward(self, x):
        return self.scale * self.up(self.down(x.to(self.up.weight.dtype)))


@mutant("BottleneckAdapter", says="comes last")
class ActivatedLast(BottleneckAdapter):
    def forward(self, x):
        return self.scale * self.activation(self.up(self.down(x.to(self.up.weight.dtype))))


@mutant("BottleneckAdapter", says="up's bias is not scaled")
class ScaledInside(BottleneckAdapter):
    def forward(self, x):
        return self.up(self.scale * self.activation(self.down(x.to(self.up.weight.dtype))))


@mutant("BottleneckAdapter", says="does not fit float32")
class WithoutCast(BottleneckAdapter):
    def forward(self, x):
        return self.scale * self.up(self.activation(self.down(x)))


# --- AdaptedSublayer


class _Attention(nn.Linear):
    """Like a transformer's attention: called by keyword, answers with a tuple."""

    def forward(self, hidden_states, mask=None):
        return super().forward(hidden_states), "weights"


class _Times(nn.Module):
    """An adapter that adds `factor` times what it reads."""

    def __init__(self, factor: float, parallel: bool = False):
        super().__init__()
        self.factor, self.parallel = factor, parallel

    def forward(self, x):
        return self.factor * x.float()


@exercise(
    "AdaptedSublayer",
    reference="labs_lib.methods.adapters:AdaptedSublayer",
    hints=[
        "output = self.base(*args, **kwargs); h is output[0] if it is a tuple, else output.",
        "x = args[0] if args else kwargs['hidden_states']: what the sub-layer itself reads.",
        "Stack: for name in self.active: h = h + adapter(x if adapter.parallel else h).",
        "Fused: changes = torch.stack([...], dim=-2), then h = h + self.fusion(h, changes), once.",
        "Last: h = h.to(first.dtype), and (h, *output[1:]) if the output was a tuple.",
    ],
)
def check_adapted_sublayer(candidate, ref):
    x, says = torch.randn(2, 3, 6), "The shapes do not fit: the adapters read h, or, with `parallel`, x."
    sublayers = (
        (nn.Linear(6, 6), lambda m: m(x), False),
        (_Attention(6, 6), lambda m: m(hidden_states=x), True),
    )
    for base, call, tail in sublayers:
        site = candidate(base)
        for name, adapter in (("a", _Times(2)), ("b", _Times(3)), ("p", _Times(5, parallel=True))):
            site.adapters[name] = adapter
        h = F.linear(x, base.weight, base.bias).detach()

        def run(active, site=site, call=call, tail=tail):
            site.active = active
            got = fits(lambda: call(site), says)
            expect(got is not None, "forward returns None: is a `return` missing?")
            if tail:
                expect(
                    isinstance(got, tuple) and got[1:] == ("weights",),
                    "Attention returns a tuple, and so must its wrapper: (h, *output[1:]).",
                )
                return got[0].detach()
            expect(
                isinstance(got, torch.Tensor), f"the FFN returns a tensor, the wrapper {type(got).__name__}"
            )
            return got.detach()

        _check_stack(run, x, h)
        site.fused, site.fusion = (
            True,
            lambda h, changes: changes[..., 0, :] + 10 * changes[..., 1, :] + 100 * h,
        )
        told_apart(
            run(["a", "p"]),
            h + 2 * h + 50 * x + 100 * h,
            "the fused output",
            {
                "Fused, the mixture takes h's place: it is added to it.": 2 * h + 50 * x + 100 * h,
                "`fused` is ignored: it asks for h + self.fusion(h, changes).": h + 2 * h + 5 * x,
                "Fused, `parallel` is forgotten: such an adapter reads x.": h + 2 * h + 50 * h + 100 * h,
            },
        )
        told_apart(
            run(["a", "b"]),
            h + 2 * h + 30 * h + 100 * h,
            "the fused output",
            {
                "Fused, the second adapter reads what the first one wrote: all of them read the same h.": h
                + 2 * h
                + 30 * 3 * h
                + 100 * h
            },
        )
    half = candidate(nn.Linear(6, 6).to(torch.bfloat16))
    half.adapters["a"], half.active = _Times(2), ["a"]
    expect(
        half(x.to(torch.bfloat16)).dtype == torch.bfloat16,
        "h came out as float32 though the sub-layer's was bfloat16: h.to(first.dtype) at the end.",
    )


def _check_stack(run, x, h) -> None:
    told_apart(
        run([]), h, "with no adapter active the output", {"With none active, adapters still act.": h + 2 * h}
    )
    told_apart(
        run(["a"]),
        3 * h,
        "the output with one adapter",
        {
            "The adapter's change takes h's place: it is added, that is the skip connection.": 2 * h,
            "The adapter reads x, the sub-layer's input; only one with `parallel` does that.": h + 2 * x,
            "Nothing is added: the active adapters must act.": h,
            "All adapters act: only those in `active` should, in its order.": 12 * h + 5 * x,
        },
    )
    told_apart(
        run(["p"]),
        h + 5 * x,
        "the output with a parallel adapter",
        {"An adapter with `parallel` reads x, the sub-layer's input; here it read h.": 6 * h},
    )
    told_apart(
        run(["a", "b"]),
        12 * h,
        "the output of a stack",
        {
            "The second adapter reads the old h: in a stack it reads what the first one wrote.": 6 * h,
            "Only the last adapter acts: each adds to what is there.": 4 * h,
        },
    )


class _Own(AdaptedSublayer):
    """A forward whose parts a mutant can get wrong."""

    def reads(self, adapter, h, x):
        return x if adapter.parallel else h

    def stack(self, h, x, acting):
        for adapter in acting:
            h = h + adapter(self.reads(adapter, h, x))
        return h

    def fuse(self, h, x, acting):
        changes = torch.stack([adapter(self.reads(adapter, h, x)) for adapter in acting], dim=-2)
        return h + self.fusion(h, changes)

    def chosen(self):
        return [self.adapters[name] for name in self.active]

    def cast(self, h, first):
        return h.to(first.dtype)

    def forward(self, *args, **kwargs):
        output = self.base(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        first = output[0] if isinstance(output, tuple) else output
        acting = self.chosen()
        h = self.fuse(first, x, acting) if self.fused and acting else self.stack(first, x, acting)
        h = self.cast(h, first)
        return (h, *output[1:]) if isinstance(output, tuple) else h


@mutant("AdaptedSublayer", says="reads x, the sub-layer's input; only one")
class ReadsTheInput(_Own):
    def reads(self, adapter, h, x):
        return x


@mutant("AdaptedSublayer", says="here it read h")
class NeverParallel(_Own):
    def reads(self, adapter, h, x):
        return h


@mutant("AdaptedSublayer", says="takes h's place: it is added, that is")
class Replaces(_Own):
    def stack(self, h, x, acting):
        for adapter in acting:
            h = adapter(self.reads(adapter, h, x))
        return h


@mutant("AdaptedSublayer", says="reads the old h")
class ReadsOldState(_Own):
    def stack(self, h, x, acting):
        return h + sum(adapter(self.reads(adapter, h, x)) for adapter in acting)


@mutant("AdaptedSublayer", says="All adapters act")
class AllAct(_Own):
    def chosen(self):
        return list(self.adapters.values()) if self.active else []


@mutant("AdaptedSublayer", says="the second adapter reads what the first one wrote")
class FusesAChain(_Own):
    def fuse(self, h, x, acting):
        now, changes = h, []
        for adapter in acting:
            changes.append(adapter(self.reads(adapter, now, x)))
            now = now + changes[-1]
        return h + self.fusion(h, torch.stack(changes, dim=-2))


@mutant("AdaptedSublayer", says="the mixture takes h's place")
class FusionReplaces(_Own):
    def fuse(self, h, x, acting):
        return super().fuse(h, x, acting) - h


@mutant("AdaptedSublayer", says="`fused` is ignored")
class NeverFused(_Own):
    def fuse(self, h, x, acting):
        return self.stack(h, x, acting)


@mutant("AdaptedSublayer", says="Attention returns a tuple")
class DropsTheTuple(_Own):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@mutant("AdaptedSublayer", says="came out as float32")
class Promotes(_Own):
    def cast(self, h, first):
        return h


# --- zero_gated_attention


@exercise(
    "zero_gated_attention",
    reference="labs_lib.methods.llama_adapter:zero_gated_attention",
    hints=[
        "keys.repeat(len(queries), 1, 1, 1) for every sequence; repeat_interleave(shared, dim=1) for every head.",
        "scores = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5",
        "weights = gate * scores.softmax(dim=-1, dtype=torch.float32).to(queries.dtype)",
        "(weights @ values) is (batch, heads, length, head): .transpose(1, 2).flatten(2) puts heads side by side.",
    ],
)
def check_zero_gated_attention(candidate, ref):
    queries, keys, values = torch.randn(2, 4, 5, 6), torch.randn(1, 2, 3, 6), torch.randn(1, 2, 3, 6)
    gate = torch.tensor([0.7])
    got = fits(
        lambda: candidate(queries, keys, values, gate),
        "The shapes do not fit: keys and values need every sequence (repeat) and every head (repeat_interleave).",
    )
    expect(got is not None, "zero_gated_attention returns None: is a `return` missing?")

    def attend(weights, v):
        return (weights @ v).transpose(1, 2).flatten(2)

    k, v = (each.expand(2, -1, -1, -1).repeat_interleave(2, dim=1) for each in (keys, values))
    crossed = [each.expand(2, -1, -1, -1).repeat(1, 2, 1, 1) for each in (keys, values)]
    scores = queries @ k.transpose(2, 3) / 6**0.5
    right = attend(0.7 * scores.softmax(-1), v)
    expect(
        got.shape == right.shape,
        f"the result has shape {tuple(got.shape)}, expected {tuple(right.shape)}: heads side by side, the tokens first",
    )
    mistakes = {
        "The gate is missing: it multiplies the weights.": attend(scores.softmax(-1), v),
        "The gate is inside the softmax, where zero does not mean nothing: it multiplies the weights after it.": attend(
            (0.7 * scores).softmax(-1), v
        ),
        "The scores are not divided by the root of the head's size.": attend(
            0.7 * (scores * 6**0.5).softmax(-1), v
        ),
        "The scores are divided by the head's size, not by its root.": attend(
            0.7 * (scores / 6**0.5).softmax(-1), v
        ),
        "The softmax goes over the tokens of the text: it goes over the prompts, the last dim.": attend(
            0.7 * scores.softmax(-2), v
        ),
        "There is no softmax: weights over the prompts add up to the gate.": attend(0.7 * scores, v),
        "Heads 0 and 1 share the first key head, 2 and 3 the second: repeat_interleave on dim 1, not repeat.": attend(
            0.7 * (queries @ crossed[0].transpose(2, 3) / 6**0.5).softmax(-1), crossed[1]
        ),
        "The heads are flattened before the tokens came first: transpose(1, 2), then flatten.": (
            (0.7 * scores.softmax(-1)) @ v
        ).reshape(2, 5, 24),
    }
    told_apart(got, right, "what the prompts add", mistakes)


def _scores(queries, keys, values):
    shared = queries.shape[1] // keys.shape[1]
    k, v = (each.repeat(len(queries), 1, 1, 1).repeat_interleave(shared, dim=1) for each in (keys, values))
    return queries @ k.transpose(2, 3) / queries.shape[-1] ** 0.5, v


@mutant("zero_gated_attention", says="gate is missing")
def without_gate(queries, keys, values, gate):
    return zero_gated_attention(queries, keys, values, torch.ones(1))


@mutant("zero_gated_attention", says="inside the softmax")
def gate_inside(queries, keys, values, gate):
    scores, v = _scores(queries, keys, values)
    return ((gate * scores).softmax(-1) @ v).transpose(1, 2).flatten(2)


@mutant("zero_gated_attention", says="not divided by the root")
def unscaled(queries, keys, values, gate):
    return zero_gated_attention(queries * queries.shape[-1] ** 0.5, keys, values, gate)


@mutant("zero_gated_attention", says="softmax goes over the tokens")
def softmax_over_text(queries, keys, values, gate):
    scores, v = _scores(queries, keys, values)
    return (gate * scores.softmax(-2) @ v).transpose(1, 2).flatten(2)


@mutant("zero_gated_attention", says="share the first key head")
def heads_crossed(queries, keys, values, gate):
    shared = queries.shape[1] // keys.shape[1]
    return zero_gated_attention(queries, *(each.repeat(1, shared, 1, 1) for each in (keys, values)), gate)


@mutant("zero_gated_attention", says="before the tokens came first")
def flattened_first(queries, keys, values, gate):
    scores, v = _scores(queries, keys, values)
    out = gate * scores.softmax(-1) @ v
    return out.reshape(out.shape[0], out.shape[2], -1)


@mutant("zero_gated_attention", says="need every sequence")
def without_heads(queries, keys, values, gate):
    scores = queries @ keys.transpose(2, 3)
    return (gate * scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


# --- AdapterFusion


@exercise(
    "AdapterFusion",
    reference="labs_lib.methods.adapters:AdapterFusion",
    hints=[
        "__init__: three nn.Linear(width, width, bias=False); normal_(std=0.02, generator=...) twice, eye_ for value.",
        "weights: self.query(h)[..., None, :] has room for the adapters; times self.key(changes), summed over dim -1.",
        "Then softmax over the adapters, the last dim that is left.",
        "forward: (weights[..., None] * self.value(changes)).sum(dim=-2)",
    ],
)
def check_adapter_fusion(candidate, ref):
    width = 64
    fusion = candidate(width, torch.Generator().manual_seed(0))
    for name in ("query", "key", "value"):
        layer = getattr(fusion, name, None)
        expect(isinstance(layer, nn.Linear), f"self.{name} should be an nn.Linear(width, width, bias=False)")
        expect(layer.bias is None, f"{name} has a bias: bias=False.")
    expect(
        torch.equal(fusion.value.weight, torch.eye(width)),
        "value should start as the identity (nn.init.eye_): a fresh fusion hands on what the adapters say.",
    )
    for name in ("query", "key"):
        size = getattr(fusion, name).weight.std().item()
        expect(
            0.018 < size < 0.022, f"{name} has standard deviation {size:.3g}: normal, 0.02 (nn.init.normal_)."
        )
    again = candidate(width, torch.Generator().manual_seed(0))
    expect(
        torch.equal(again.query.weight, fusion.query.weight),
        "The same generator gives another query: hand `generator` on.",
    )
    _check_mixture(candidate(6))


@torch.no_grad()
def _check_mixture(fusion: nn.Module) -> None:
    for parameter in fusion.parameters():
        parameter.normal_()
    h, changes = torch.randn(2, 5, 6), torch.randn(2, 5, 3, 6)
    query, key, value = (getattr(fusion, name).weight for name in ("query", "key", "value"))
    scores = torch.einsum("bti,btai->bta", h @ query.T, changes @ key.T)
    weights = fits(
        lambda: fusion.weights(h, changes),
        "The shapes do not fit: the query needs a dim for the adapters, self.query(h)[..., None, :].",
    )
    expect(weights is not None, "weights returns None: is a `return` missing?")
    swapped = torch.einsum("bti,btai->bta", h @ key.T, changes @ query.T)
    told_apart(
        weights,
        scores.softmax(-1),
        "the weights",
        {
            "There is no softmax: the weights of a token should add up to one.": scores,
            "The softmax goes over the tokens: it goes over the adapters, the last dim.": scores.softmax(1),
            "Query and key are swapped: h asks (query), the changes answer (key).": swapped.softmax(-1),
            "The scores are divided by the root of the width: AdapterFusion does not.": (
                scores / 6**0.5
            ).softmax(-1),
        },
    )
    mixed = torch.einsum("bta,btai->bti", scores.softmax(-1), changes)
    right = torch.einsum("bta,btai->bti", scores.softmax(-1), changes @ value.T)
    got = fits(
        lambda: fusion(h, changes), "The shapes do not fit: weights[..., None] times self.value(changes)."
    )
    told_apart(
        got,
        right,
        "the mixture",
        {
            "The value matrix is not used: mix value(change).": mixed,
            "h is in the result: the sum with h is AdaptedSublayer's.": h + right,
            "That is the plain mean: use the weights.": (changes @ value.T).mean(-2),
            "That is the plain sum: use the weights.": (changes @ value.T).sum(-2),
        },
    )


@mutant("AdapterFusion", says="start as the identity")
class RandomValue(AdapterFusion):
    def __init__(self, width, generator=None):
        super().__init__(width, generator)
        nn.init.normal_(self.value.weight, std=0.02)


@mutant("AdapterFusion", says="has a bias")
class WithBias(AdapterFusion):
    def __init__(self, width, generator=None):
        super().__init__(width, generator)
        self.key = nn.Linear(width, width)


@mutant("AdapterFusion", says="no softmax")
class Unnormalised(AdapterFusion):
    def weights(self, h, changes):
        return (self.query(h)[..., None, :] * self.key(changes)).sum(-1)


@mutant("AdapterFusion", says="goes over the tokens")
class OverTokens(AdapterFusion):
    def weights(self, h, changes):
        return (self.query(h)[..., None, :] * self.key(changes)).sum(-1).softmax(1)


@mutant("AdapterFusion", says="are swapped")
class Swapped(AdapterFusion):
    def weights(self, h, changes):
        return (self.key(h)[..., None, :] * self.query(changes)).sum(-1).softmax(-1)


@mutant("AdapterFusion", says="value matrix is not used")
class WithoutValue(AdapterFusion):
    def forward(self, h, changes):
        return (self.weights(h, changes)[..., None] * changes).sum(-2)


@mutant("AdapterFusion", says="h is in the result")
class AddsState(AdapterFusion):
    def forward(self, h, changes):
        return h + super().forward(h, changes)


@mutant("AdapterFusion", says="plain mean")
class PlainMean(AdapterFusion):
    def forward(self, h, changes):
        return self.value(changes).mean(-2)


# --- short answers

answer(
    "lab10.waits",
    reference="prompts",
    hints=[
        "What the prompts add is gate * (something of the prompts). Derive it by each of the two, at gate = 0.",
        "By the gate: something. By the prompts: gate times something.",
    ],
    mistakes={
        "gate": "its derivative is what the prompts would add, and that is not zero: the gate moves at once",
        "both": "the gate's derivative is what the prompts would add, and that is not zero",
        "none": "the prompts' derivative carries a factor of the gate, which is zero",
    },
)

answer(
    "lab10.houlsby_7b",
    reference=lambda: count_adapters(4096, 64, 32, "houlsby"),
    tolerance=0,
    hints=[
        "One adapter: 4096 x 64 down, 64 x 4096 up, and two biases, of 64 and of 4096.",
        "Two adapters per block, 32 blocks.",
    ],
    mistakes={
        count_adapters(4096, 64, 32, "pfeiffer"): "that is one adapter per block: Houlsby has two",
        2 * 32 * 2 * 4096 * 64: "the biases train as well, 64 and 4,096 of them",
        2 * (2 * 4096 * 64 + 64 + 4096): "that is one of the 32 blocks",
        2 * 32 * (4096 * 64 + 64 + 4096): "down and up are two matrices of that size",
    },
)

answer(
    "lab10.predict_latency",
    reference=20.0,
    within=(-50, 500),
    unit="%",
    hints=[
        "How many percent longer a token takes. Count the steps one after another, not the multiplications."
    ],
)

answer(
    "lab10.predict_stack",
    reference=50.0,
    within=(0, 100),
    unit="%",
    hints=["A share between 0 and 100. Neither adapter has ever met the other."],
)
