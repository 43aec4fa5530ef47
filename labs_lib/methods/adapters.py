"""Bottleneck adapters from scratch: small networks between the frozen sub-layers of a block, and how to combine them.

An adapter squeezes a hidden state through a few units and adds the result to it. It is not linear, so it cannot be
merged into a weight: it stays a step of its own, in every layer. In exchange, trained adapters can be put one behind
the other (a stack) or be given to an attention that mixes them token by token (AdapterFusion).

PEFT has no bottleneck adapters. AdapterHub's `adapters` has, but pins an older transformers; on a block that norms
before its sub-layers it lets a Pfeiffer adapter read the residual sum, here one reads what the sub-layer made.

Sources: Houlsby et al. 2019, arXiv:1902.00751 (after attention and after the FFN); Pfeiffer et al. 2021,
AdapterFusion, arXiv:2005.00247 (after the FFN only); He et al. 2022, arXiv:2110.04366 (parallel, scaled).
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from labs_lib.methods.modules import replace

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
# where in a block, and what an adapter there reads: the sub-layer's output, or (parallel) the sub-layer's input
PLACEMENTS = {
    "houlsby": (("attention", "ffn"), False),
    "pfeiffer": (("ffn",), False),
    "parallel": (("ffn",), True),
}


def init_adapter(
    width: int,
    bottleneck: int,
    std: float = 0.01,
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[nn.Linear, nn.Linear]:
    """Fresh layers of an adapter that starts as (nearly) nothing: down (width -> bottleneck), up (back to width).

    Source: near nothing as in Houlsby et al. 2019, section 2.1; exactly nothing as in He et al. 2022 and in LoRA:
    better in parallel, where an adapter reads a normed and so larger state.

    Steps:
    1. Two nn.Linear, `down` and `up`, with biases of zero.
    2. Near nothing: both weights normal with standard deviation `std`, cut off at two of them (nn.init.trunc_normal_
       with a, b and generator). What an adapter adds is then of the order of std squared.
    3. `exact`: up's weight is zero, and down's is uniform between -bound and bound, where bound = 1 / sqrt(width).
    """
    if bottleneck < 1:
        raise ValueError(f"bottleneck is the number of units in the middle, so at least 1: got {bottleneck}.")
    down, up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
    for bias in (down.bias, up.bias):
        nn.init.zeros_(bias)
    if exact:
        nn.init.uniform_(down.weight, -(width**-0.5), width**-0.5, generator=generator)
        nn.init.zeros_(up.weight)
    else:
        for weight in (down.weight, up.weight):
            nn.init.trunc_normal_(weight, 0, std, -2 * std, 2 * std, generator=generator)
    return down, up


class BottleneckAdapter(nn.Module):
    """What an adapter adds to a hidden state: scale * up(activation(down(x))), x (..., width) to (..., width).

    The addition itself, the adapter's skip connection, is AdaptedSublayer's. All of it trains, biases too.
    Source: Houlsby et al. 2019, section 2.1, figure 2; `scale` is s of He et al. 2022, section 4.5.

    Steps:
    1. forward: x in the dtype of the weights (a half-precision model may have float32 adapters), then down, the
       activation, up, times the scale. The skip is not added here.
    """

    def __init__(  # keep
        self,
        width,
        bottleneck,
        activation="relu",
        scale=1.0,
        parallel=False,
        std=0.01,
        exact=False,
        generator=None,
    ) -> None:
        super().__init__()
        self.down, self.up = init_adapter(width, bottleneck, std, exact, generator)
        self.activation, self.scale, self.parallel = ACTIVATIONS[activation], scale, parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.up(self.activation(self.down(x.to(self.up.weight.dtype))))


class AdaptedSublayer(nn.Module):
    """A frozen sub-layer, attention or FFN, to whose output h its adapters add, before the block's own residual sum.

    `adapters` holds them by name, `active` says which of them act and in which order; with none it is `base`.
    Source: Houlsby et al. 2019, figure 2; in parallel He et al. 2022, table 1; stacks Pfeiffer et al. 2020,
    arXiv:2005.00052; fused AdapterFusion, section 3.2.

    Steps:
    1. Run `base`. Attention returns a tuple, whose first element is h; hand the others on as they are.
    2. A stack: for each active adapter in turn h = h + adapter(h), so that the next one reads what this one wrote.
       An adapter with `parallel` reads x, the input of the sub-layer, instead.
    3. `fused`: all of them read the same h (or x); h = h + fusion(h, their additions, stacked on dim -2).
    4. h keeps the dtype that it had.
    """

    def __init__(self, base: nn.Module) -> None:  # keep
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapters, self.active = nn.ModuleDict(), []
        self.fusion, self.fused = None, False

    def forward(self, *args, **kwargs):
        output = self.base(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        h = first = output[0] if isinstance(output, tuple) else output
        acting = [self.adapters[name] for name in self.active]
        if self.fused and acting:
            changes = torch.stack([adapter(x if adapter.parallel else h) for adapter in acting], dim=-2)
            h = h + self.fusion(h, changes)
        else:
            for adapter in acting:
                h = h + adapter(x if adapter.parallel else h)
        h = h.to(first.dtype)
        return (h, *output[1:]) if isinstance(output, tuple) else h


class AdapterFusion(nn.Module):
    """Attention over adapters: for every token, a mixture of what the adapters would add.

    h (..., width) asks; changes (..., adapters, width) answer; returns the mixture (..., width). Any number of
    adapters fits the same three matrices.
    Source: Pfeiffer et al. 2021, section 3.2; what is mixed are the adapters' additions, as in `adapters`.

    Steps:
    1. __init__: query, key and value are nn.Linear(width, width, bias=False): query and key normal with standard
       deviation 0.02, value the identity. It starts as about the mean of the adapters.
    2. weights: softmax over the adapters of query(h) . key(change).
    3. forward: the weighted sum of value(change).
    """

    def __init__(self, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        nn.init.normal_(self.query.weight, std=0.02, generator=generator)
        nn.init.normal_(self.key.weight, std=0.02, generator=generator)
        nn.init.eye_(self.value.weight)

    def weights(self, h: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
        question = self.query(h.to(changes.dtype))[..., None, :]
        return (question * self.key(changes)).sum(dim=-1).softmax(dim=-1)

    def forward(self, h: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
        return (self.weights(h, changes)[..., None] * self.value(changes)).sum(dim=-2)


def count_adapters(width: int, bottleneck: int, layers: int, placement: str = "pfeiffer") -> int:
    """How many numbers the adapters of a model train; 2 m d + m + d for each adapter.

    Steps:
    1. One adapter: the weights of down and up, and a bias for each.
    2. Times the places per block, len(PLACEMENTS[placement][0]), times the layers.
    """
    one = 2 * width * bottleneck + bottleneck + width
    return one * len(PLACEMENTS[placement][0]) * layers


def sublayer_names(model: nn.Module, places: Sequence[str], attention: str, ffn: str) -> list[str]:
    """Full names of the blocks' attention and FFN, as far as `places` has them, in the model's own order.

    A block is whatever has both; `attention` and `ffn` are what the model's code calls them.
    """
    blocks = [
        name for name, module in model.named_modules() if hasattr(module, attention) and hasattr(module, ffn)
    ]
    if not blocks:
        raise ValueError(
            f"No block of this model has both {attention!r} and {ffn!r}: say what it calls its attention and its FFN."
        )
    called = {"attention": attention, "ffn": ffn}
    return [f"{block}.{called[place]}".lstrip(".") for block in blocks for place in places]


def inject_adapters(
    model: nn.Module,
    bottleneck: int,
    placement: str = "pfeiffer",
    name: str = "default",
    generator: torch.Generator | None = None,
    kind: type[nn.Module] = BottleneckAdapter,
    sublayer: type[nn.Module] = AdaptedSublayer,
    attention: str = "self_attn",
    ffn: str = "mlp",
    **options,
) -> nn.Module:
    """Freeze `model`, adapters of other names included, and add a new adapter to each place; returns the model.

    `options` go to BottleneckAdapter (or to your own `kind`; `sublayer` is your own AdaptedSublayer): activation,
    scale, std, exact. The new adapter alone trains and acts, until use_adapters says otherwise. Bad arguments leave
    the model as it was.

    Steps:
    1. The places: sublayer_names for PLACEMENTS[placement]. Make a `kind` for each.
    2. Freeze every parameter of the model.
    3. Where a place has no AdaptedSublayer yet, put one there. Add the new adapter to its `adapters`.
    4. use_adapters(model, [name]).
    """
    _check(model, placement, name, options)
    places, parallel = PLACEMENTS[placement]
    names = sublayer_names(model, places, attention, ffn)
    width = model.config.hidden_size
    made = {
        each: kind(width, bottleneck, parallel=parallel, generator=generator, **options) for each in names
    }
    model.requires_grad_(False)
    for each, adapter in made.items():
        if each not in adapted_sublayers(model):
            replace(model, each, sublayer(model.get_submodule(each)))
        site = model.get_submodule(each)
        weight = next(site.base.parameters())
        site.adapters[name] = adapter.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    return use_adapters(model, [name])


def adapted_sublayers(model: nn.Module) -> dict[str, nn.Module]:
    """The wrapped sub-layers by name, told by what they carry, not class: a learner's own AdaptedSublayer counts."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "adapters", None), nn.ModuleDict)
    }


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that the model carries, active or not, in the order in which they were added."""
    return list(dict.fromkeys(name for site in adapted_sublayers(model).values() for name in site.adapters))


def use_adapters(model: nn.Module, names: Sequence[str], fused: bool = False) -> nn.Module:
    """Say which adapters act, and in which order; [] is the base model. What trains does not change.

    `fused` mixes them by the fusion that fuse_adapters has put there; otherwise they are stacked, first name first.
    """
    known = adapter_names(model)
    if isinstance(names, str) or len(set(names)) < len(names):
        raise ValueError(f"names is a list of different adapters, such as {known}: got {names!r}.")
    if strange := [name for name in names if name not in known]:
        raise ValueError(
            f"No adapter is called {strange[0]!r}; this model has: {', '.join(known) or 'none'}."
        )
    sites = adapted_sublayers(model).values()
    active = [[name for name in names if name in site.adapters] for site in sites]
    if fused and any(site.fusion is None for site, acting in zip(sites, active, strict=True) if acting):
        raise ValueError("There is no fusion for these adapters yet: call fuse_adapters first.")
    for site, acting in zip(sites, active, strict=True):
        site.active, site.fused = acting, fused
    return model


def fuse_adapters(
    model: nn.Module,
    names: Sequence[str],
    generator: torch.Generator | None = None,
    kind: type[nn.Module] = AdapterFusion,
) -> nn.Module:
    """Freeze everything and put a fresh AdapterFusion (or your own `kind`) over `names`; returns the model.

    Only the fusion trains, 3 * width * width numbers for each place: it learns which adapter to ask for which token.

    Steps:
    1. use_adapters(model, names) refuses unknown names; fewer than two are a ValueError.
    2. Freeze every parameter of the model.
    3. Give each wrapped sub-layer that has any of them a `kind`(width, generator), on its adapters' device and dtype.
    4. use_adapters(model, names, fused=True).
    """
    if len(names) < 2:
        raise ValueError(f"A fusion mixes at least two adapters: got {list(names)}.")
    use_adapters(model, names)
    model.requires_grad_(False)
    for site in adapted_sublayers(model).values():
        if site.active:
            up = site.adapters[site.active[0]].up
            site.fusion = kind(up.out_features, generator).to(up.weight.device, up.weight.dtype)
    return use_adapters(model, names, fused=True)


def train_adapter(model: nn.Module, name: str) -> nn.Module:
    """Make one adapter the only thing that trains, for instance to go on with one that lies in a stack."""
    if name not in adapter_names(model):
        raise ValueError(f"No adapter is called {name!r}; this model has: {', '.join(adapter_names(model))}.")
    model.requires_grad_(False)
    for site in adapted_sublayers(model).values():
        if name in site.adapters:
            site.adapters[name].requires_grad_(True)
    return model


def remove_adapters(model: nn.Module) -> nn.Module:
    """Take the wrappers and all adapters away, in place: the (still frozen) base model, returned. Exact.

    There is no merging: between down and up lies an activation, and no weight of the model can stand for that.
    """
    for name, site in adapted_sublayers(model).items():
        replace(model, name, site.base)
    return model


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """One adapter's tensors: <sub-layer>.down.weight, .down.bias, .up.weight, .up.bias."""
    return {
        f"{where}.{tensor}": value.detach()
        for where, site in adapted_sublayers(model).items()
        if name in site.adapters
        for tensor, value in site.adapters[name].named_parameters()
    }


def _check(model: nn.Module, placement: str, name: str, options: dict) -> None:
    if placement not in PLACEMENTS:
        raise ValueError(f"placement={placement!r} is not known: one of {', '.join(PLACEMENTS)}.")
    if options.get("activation", "relu") not in ACTIVATIONS:
        raise ValueError(
            f"activation={options['activation']!r} is not known: one of {', '.join(ACTIVATIONS)}."
        )
    if name in adapter_names(model):
        raise ValueError(
            f"This model already carries an adapter called {name!r}: give the new one another name."
        )
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"An adapter cannot be called {name!r}: take letters, digits and _, and no method of a dict."
        )
