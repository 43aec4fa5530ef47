"""The unified view: every method as a change of a hidden state, described by measurement and not by hand.

He et al. lay adapters, prefix tuning and LoRA out along four questions. Which hidden state h changes? Does the change
read what the frozen module reads, x (parallel), or what it made, h (sequential)? What function is it? How is it put
together with h, and with which scale? Here the answers are read off an adapted model: it is pushed at one place and
one looks what moves. At the end the paper's own hybrid, mix-and-match, out of the parts of this course.

Source: He, Zhou, Ma, Berg-Kirkpatrick and Neubig 2022, "Towards a Unified View of Parameter-Efficient Transfer
Learning", arXiv:2110.04366, sections 3 and 4, table 1.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from labs_lib.methods.adapters import inject_adapters, sublayer_names, train_adapter
from labs_lib.methods.prefix_tuning import add_prefix

NONLINEAR = {"relu", "gelu", "silu", "tanh", "sigmoid", "softmax"}


@dataclass(frozen=True)
class Design:
    """One row of the table: what one change does to a hidden state, all of it measured.

    Attributes:
        where: the modules whose output changes, by sub-layer.
        insertion: "parallel" reads x, "sequential" reads h, "sequential, on x" changes x before the module reads it.
        form: of the change D: "linear", "affine", "softmax" (a weighted mean, bounded) or "nonlinear (which)".
        composition: how D meets h: "h + D", "l h" (a factor for each number), "g h + D", "(1 - p) h + p D", "x + D".
        scale: "fixed: ..." is set by hand, "learned: ..." is trained: doubling it doubles D (or h, or x).
        width: the rank of D over many tokens: how wide the bottleneck is. With a bias, one more; for virtual tokens,
            whose weights add up to one in each head, heads x (tokens - 1) + 1.
        kept: the least and the largest share of h that is left in the output.
        blocks: in how many of the model's blocks.
    """

    where: str
    insertion: str
    form: str
    composition: str
    scale: str
    width: int
    kept: tuple[float, float]
    blocks: int = 0


def describe(
    model: nn.Module,
    input_ids: torch.Tensor,
    noise: float = 0.1,
    seed: int = 0,
    attention: str = "self_attn",
    ffn: str = "mlp",
) -> list[Design]:
    """What the methods on `model` do to its hidden states: one Design for each kind of change.

    The model is copied and stays as it is. In the copy, in float64 on the CPU, every trained number gets some `noise`,
    because a fresh adapter does nothing. `input_ids` (rows, length) is any text; to see the width of virtual tokens it
    needs more tokens than that. Known are wrappers around a module (`base`), be it a linear layer or a whole sub-layer,
    and wrappers around the model that add virtual tokens.

    Steps:
    1. Virtual tokens, if the model itself is wrapped: `_virtual`.
    2. The wrapped modules, one of each kind (the last block's): what they read, from one run of the model; `_measure`.
    3. Kinds with equal answers make one row.
    """
    model = copy.deepcopy(model).to("cpu", torch.float64).eval()  # the noise is drawn there
    input_ids = input_ids.cpu()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                some = noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                vector = parameter.squeeze().ndim <= 1 and parameter.any()
                parameter += parameter * some if vector else some  # a factor stays near what it was
        core = model.base if isinstance(getattr(model, "base", None), nn.Module) else model
        rows = [] if core is model else [_virtual(model, core, input_ids, attention, ffn)]
        kinds: dict[tuple[str, str], list[str]] = {}
        for name, module in core.named_modules():
            if isinstance(getattr(module, "base", None), nn.Module):
                kinds.setdefault(_place(name, attention, ffn), []).append(name)
        found = [
            (place, leaf, replace(_measure(core, names[-1], input_ids, generator), blocks=len(names)))
            for (place, leaf), names in kinds.items()
        ]
    if not rows and not kinds:
        raise ValueError("Nothing on this model is wrapped: adapt it with one of the course's methods first.")
    alike: dict[tuple, list] = {}
    for place, leaf, design in found:
        answers = (design.insertion, design.form, design.composition, design.scale, design.blocks)
        alike.setdefault(answers, []).append((place, leaf, design))
    return rows + [_together(group) for group in alike.values()]


def _together(group: list[tuple[str, str, Design]]) -> Design:
    """One row for changes with equal answers: all their places, the widest width, the whole range of what is kept."""
    places: dict[str, list[str]] = {}
    for place, leaf, _ in group:
        places.setdefault(place, []).append(leaf)
    texts = [f"{place} ({', '.join(leaves)})" if any(leaves) else place for place, leaves in places.items()]
    designs = [design for _, _, design in group]
    kept = (min(design.kept[0] for design in designs), max(design.kept[1] for design in designs))
    width = max(design.width for design in designs)
    return replace(designs[0], where=", ".join(texts), kept=kept, width=width)


def _place(name: str, attention: str, ffn: str) -> tuple[str, str]:
    """A module's sub-layer, and its name within it: "model.layers.0.self_attn.q_proj" is ("attention", "q_proj")."""
    parts = name.split(".")
    for called, place in ((attention, "attention"), (ffn, "ffn")):
        if called in parts:
            inside = parts[parts.index(called) + 1 :]
            return place, ".".join(part for part in inside if part != "base")
    return "elsewhere", parts[-1]


# --- one wrapped module


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() <= tolerance * (a.norm() + b.norm()))


def _first(output):
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _hooks(*handles) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Spy(TorchFunctionMode):
    """Keeps the names of the functions that are called while `on`."""

    def __init__(self):
        super().__init__()
        self.seen, self.on = set(), True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.on:
            self.seen.add(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


@dataclass
class _Site:
    """A wrapped module, with the arguments of a call of it that the model made."""

    module: nn.Module
    args: tuple
    kwargs: dict

    @property
    def x(self) -> torch.Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def __call__(self, x, push=0, h=None, spy=None):
        """Its output for x, what its base read, and what its base made; `push` is added to that, or `h` replaces it."""
        seen = {}

        def before(base, args, kwargs):
            seen["read"] = args[0] if args else kwargs["hidden_states"]
            if spy is not None:
                spy.on = False

        def after(base, args, output):
            if spy is not None:
                spy.on = True
            seen["h"] = (_first(output) if h is None else h) + push
            return (seen["h"], *output[1:]) if isinstance(output, tuple) else seen["h"]

        base = self.module.base
        handles = (
            base.register_forward_pre_hook(before, with_kwargs=True),
            base.register_forward_hook(after),
        )
        with _hooks(*handles):
            if self.args:
                output = self.module(x, *self.args[1:], **self.kwargs)
            else:
                output = self.module(**(self.kwargs | {"hidden_states": x}))
        return _first(output), seen["read"], seen["h"]


def _called(core: nn.Module, name: str, input_ids: torch.Tensor) -> _Site:
    """The module `name` with the arguments that it gets when the model reads the text."""
    found = {}

    def keep(module, args, kwargs):
        found.setdefault("call", (args, kwargs))

    module = core.get_submodule(name)
    with _hooks(module.register_forward_pre_hook(keep, with_kwargs=True)):
        core(input_ids=input_ids, use_cache=False)
    return _Site(module, *found["call"])


def _measure(core: nn.Module, name: str, input_ids: torch.Tensor, generator: torch.Generator) -> Design:
    """Push at a wrapped module from all sides.

    Steps:
    1. What the base reads is not what the wrapper was given: the change is on x.
    2. Push what the base makes, h, twice. Where each number of the output answers by a fixed factor, that share is
       kept, and the rest of the output is D. If D is nothing, h is rescaled; otherwise D reads x: parallel.
    3. It answers in another way: D reads h: sequential.
    4. D on sums, zero and large inputs: which form. D's rank over all of these.
    5. What doubles D, or h, when it is doubled: the scale.
    """
    site = _called(core, name, input_ids)

    def draw(like):
        size = like.std().clamp(min=1.0)  # large enough to cross an activation's kink
        return size * torch.randn(like.shape, generator=generator, dtype=like.dtype)

    out, read, h = site(site.x)
    pushes = [draw(h), draw(h)]
    answers = [site(site.x, push=push)[0] - out for push in pushes]
    kept = answers[0] / pushes[0]
    fixed_share = _close(answers[1], kept * pushes[1])
    on_x = not _close(read, site.x)
    if on_x:
        insertion, source = "sequential, on x", site.x

        def change(x):
            return site(x)[1] - x

        factor = read / site.x
        other = draw(site.x)
        composition = "l x" if _close(site(other)[1], factor * other) else "x + D"
    elif torch.equal(out, h):
        raise ValueError(f"{name} changes nothing yet: describe it with some noise.")
    elif fixed_share and not _close(out, kept * h, 1e-10):
        insertion, source = "parallel", site.x

        def change(x):
            out, _, h = site(x)
            return out - kept * h

        composition = "h + D" if _close(kept, torch.ones_like(kept)) else "g h + D"
    else:
        insertion, source = "sequential", h

        def change(h):
            return site(site.x, h=h)[0] - h

        composition = "l h" if fixed_share else "h + D"
    form, width = _form(change, source, draw, site)
    share = (kept.min().item(), kept.max().item()) if fixed_share else (1.0, 1.0)
    sample, x = draw(source), draw(site.x)

    def look():
        out, read, _ = site(x)
        return change(sample), {"x": read, "h": out} if on_x else {"h": out}

    scale = _scale(site, look)
    return Design("", insertion, form, composition, scale, width, tuple(round(each, 3) for each in share))


def _form(change: Callable, source: torch.Tensor, draw: Callable, site: _Site) -> tuple[str, int]:
    """Which function the change is of its source, and the rank of its values."""
    u, v = draw(source), draw(source)
    at = {"0": change(torch.zeros_like(u)), "u": change(u), "v": change(v), "u + v": change(u + v)}
    rows = source[..., 0].numel()
    more = [
        change(draw(source)) for _ in range(2 * source.shape[-1] // rows)
    ]  # enough to show every direction
    values = torch.cat([each.flatten(0, -2) for each in (*at.values(), *more)])
    singular = torch.linalg.svdvals(values)
    width = int((singular > 1e-6 * singular[0]).sum())
    if _close(at["u + v"] + at["0"], at["u"] + at["v"]):
        return ("linear" if at["0"].norm() <= 1e-6 * at["u"].norm() else "affine"), width
    with _Spy() as spy:
        site(site.x, spy=spy)
    functions = ", ".join(sorted(spy.seen & NONLINEAR))
    grows = change(1e4 * u).norm() / change(1e3 * u).norm()
    return ("softmax" if functions == "softmax" and grows < 2 else f"nonlinear ({functions})"), width


def _scale(site: _Site, look: Callable) -> str:
    """Vectors and settings that, doubled, double the change, or all of the state that it changes."""
    change, states = look()
    own = [module for name, module in site.module.named_modules() if not f"{name}.".startswith("base.")]
    fixed, learned = [], []
    for module in own:
        for name, value in list(vars(module).items()):
            if type(value) in (int, float):
                setattr(module, name, 2 * value)
                try:
                    doubled = _close(look()[0], 2 * change)
                except (RuntimeError, ValueError):  # a size is no scale
                    doubled = False
                setattr(module, name, value)
                fixed += [name] if doubled and value else []
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.squeeze().ndim <= 1 and parameter.requires_grad:
                parameter.mul_(2)
                after = look()
                parameter.div_(2)
                if _close(after[0], 2 * change):
                    learned.append(name)
                else:
                    moved = [state for state in states if _close(after[1][state], 2 * states[state])]
                    learned += [f"{name}, on {state}" for state in moved[:1]]
    texts = [
        f"{kind}: {', '.join(names)}" for kind, names in (("fixed", fixed), ("learned", learned)) if names
    ]
    return "; ".join(texts) or "none"


# --- virtual tokens


def _virtual(model: nn.Module, core: nn.Module, input_ids: torch.Tensor, attention: str, ffn: str) -> Design:
    """What virtual tokens do to the text's attention heads, before the output projection.

    Steps:
    1. In each layer, compare what the heads make with what they make of the same hidden states without virtual tokens.
    2. Add 1 to every value of the text. Without virtual tokens every head's output would grow by 1, since attention's
       weights add up to one; with them it grows by 1 - p: p is the share that the virtual tokens drew.
    3. What is left of the output without (1 - p) h is p D. Add 2 instead of 1: p and D stay, so D does not read h.
    """
    length = input_ids.shape[1]
    names = sublayer_names(core, ["attention"], attention, ffn)
    kept, mixtures, same, more = [], [], [], 0
    for name in names:
        plain = _called(core, name, input_ids)
        runs = [_heads(model, core, name, length, add, input_ids=input_ids) for add in (0.0, 1.0, 2.0)]
        (states, heads), pushed, twice = runs[0], runs[1][1], runs[2][1]
        more = states.shape[1] - length
        alone = _Site(plain.module, (), plain.kwargs | {"hidden_states": states[:, -length:]})
        h = _heads(alone, core, name, length, 0.0, x=alone.x)[1]
        share = pushed - heads
        kept.append(share)
        mixtures.append((heads - share * h) / (1 - share))
        same.append(_close(twice - heads, 2 * share))
    kept = torch.stack(kept)
    gated = all(same) and bool((kept > 0).all() and (kept < 1).all()) and kept.std() > 1e-6
    singular = torch.linalg.svdvals(mixtures[-1].flatten(0, -2))
    return Design(
        where="attention (heads), through " + ("the input" if more else "each layer's keys and values"),
        insertion="parallel" if all(same) else "sequential",
        form="softmax" if gated else "nonlinear",
        composition="(1 - p) h + p D" if gated else "h + D",
        scale="none",
        width=int((singular > 1e-6 * singular[0]).sum()),
        kept=(round(kept.min().item(), 3), round(kept.max().item(), 3)),
        blocks=len(names),
    )


def _heads(model, core: nn.Module, name: str, length: int, add: float, **call):
    """What one attention layer read, and its heads' outputs for the text, with `add` on all values of the text."""
    found = {}

    def read(module, args, kwargs):
        found.setdefault("x", args[0] if args else kwargs["hidden_states"])

    def values(module, args, output):
        output = output.clone()
        output[:, -length:] += add
        return output

    def made(module, args):
        found.setdefault("heads", args[0][:, -length:])

    layer = core.get_submodule(name)
    handles = (
        layer.register_forward_pre_hook(read, with_kwargs=True),
        layer.v_proj.register_forward_hook(values),
        layer.o_proj.register_forward_pre_hook(made),
    )
    with _hooks(*handles):
        if isinstance(model, _Site):
            model.module(**(model.kwargs | {"hidden_states": call["x"]}))
        else:
            model(**call)
    return found["x"], found["heads"]


# --- the paper's hybrid


def mix_and_match(
    base: nn.Module,
    tokens: int,
    bottleneck: int,
    cache: Callable,
    scale: float = 4.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """MAM: a prefix with few tokens for the attention, and a scaled parallel adapter for the FFN; returns the model.

    The paper's finding in one model: attention is well served by a small change, the FFN uses a large one better. The
    paper takes 30 tokens, a bottleneck of 512 and a scale of 4. `cache` is transformers.DynamicCache. The adapters
    start as exactly nothing; the prefix does not. On disk they are two: save_prefix(model), save_adapter(model.base).
    Source: He et al. 2022, section 4.6.

    Steps:
    1. inject_adapters into `base`: placement "parallel", exact=True, the scale.
    2. add_prefix around it. That freezes everything in `base`, the adapters too.
    3. So train_adapter again.
    """
    inject_adapters(base, bottleneck, "parallel", scale=scale, exact=True, generator=generator)
    model = add_prefix(base, tokens, cache, generator=generator)
    train_adapter(base, "default")
    return model
