"""What every method of the zoo shares: a layer to build on, and the ways into a model, out of it and onto paper.

A method is a class of its own file: what it trains (`learn`), the change of the weight as a matrix (`delta`) and, where
there is a cheaper way than that matrix, what it adds to the output (`update`). Matrices are (out, in), as in PyTorch.
"""

from collections.abc import Mapping, Sequence
from inspect import signature

import torch
from torch import nn
from torch.nn import functional as F

from labs_lib.methods.lora import target_names
from labs_lib.methods.modules import check_mergeable, replace


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 at least: nothing is trained in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def uniform(
    rows: int, columns: int, generator: torch.Generator | None = None, bound: float | None = None
) -> torch.Tensor:
    """Random numbers between -bound and bound; without one, 1 / sqrt(columns), as nn.Linear and LoRA's A have."""
    bound = columns**-0.5 if bound is None else bound
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


def hold(module: nn.Module, like: torch.Tensor, trained: Sequence[str], tensors: Mapping) -> None:
    """Give a module tensors on the device of `like`: parameters those in `trained`, the others buffers on no disk."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    for name, tensor in tensors.items():
        tensor = tensor.to(like.device, dtype)
        if name in trained:
            setattr(module, name, nn.Parameter(tensor))
        else:
            module.register_buffer(name, tensor, persistent=False)


class Held(nn.Module):
    """A module that only holds tensors, so that many layers can share them; those in `trained` train."""

    def __init__(self, like: torch.Tensor, trained: Sequence[str] = (), **tensors: torch.Tensor) -> None:
        super().__init__()
        hold(self, like, trained, tensors)


class ZooLinear(nn.Module):
    """A frozen linear layer with a trained change: base(x) + delta x. Takes x (..., in) to (..., out).

    A method overrides `delta`, and `update` if it need not form that matrix; one that turns the input, `forward`.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @classmethod
    def plan(cls, bases: Mapping[str, nn.Linear], **options) -> dict[str, dict]:
        """What `__init__` gets for each layer, by name; a method whose layers share tensors makes them here."""
        return dict.fromkeys(bases, options)

    def learn(self, **tensors: torch.Tensor) -> None:
        """Make these tensors the layer's trained parameters."""
        hold(self, self.base.weight, list(tensors), tensors)

    def delta(self) -> torch.Tensor:
        """The change of the weight, (out, in): what merging adds."""
        raise NotImplementedError

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the output for x (..., in)."""
        return F.linear(x, self.delta())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return (y + self.update(wide(x))).to(y.dtype)


def options_of(kind: type[ZooLinear]) -> list[str]:
    """The names of the options that a method takes, for instance rank and alpha."""
    asked = kind.plan if "plan" in vars(kind) else kind.__init__
    return [
        name for name in signature(asked).parameters if name not in ("self", "base", "bases", "generator")
    ]


def make_layers(model: nn.Module, kind: type[ZooLinear], targets="all-linear", **options) -> dict:
    """The layers that inject_zoo would put in, by name; the model stays as it is."""
    if zoo_layers(model):
        raise ValueError("This model already carries layers of the zoo: call merge_zoo or remove_zoo first.")
    bases = {name: model.get_submodule(name) for name in target_names(model, targets)}
    return {name: kind(bases[name], **each) for name, each in kind.plan(bases, **options).items()}


def inject_zoo(
    model: nn.Module,
    kind: type[ZooLinear],
    targets: str | Sequence[str] = "all-linear",
    generator: torch.Generator | None = None,
    **options,
) -> nn.Module:
    """Freeze `model` and put a `kind` in place of each target layer; returns the model.

    `kind` is a class of the zoo (ZOO["vera"]) or your own subclass of ZooLinear; `options` are what it takes. Bad
    arguments leave the model as it was.
    """
    layers = make_layers(model, kind, targets, generator=generator, **options)
    model.requires_grad_(False)
    for name, layer in layers.items():
        replace(model, name, layer)
    return model


def count_zoo(
    model: nn.Module, kind: type[ZooLinear], targets: str | Sequence[str] = "all-linear", **options
) -> int:
    """How many numbers the method would train in this model, shared ones once; a model on "meta" will do."""
    layers = nn.ModuleList(make_layers(model, kind, targets, **options).values())
    frozen = {id(parameter) for parameter in model.parameters()}
    return sum(parameter.numel() for parameter in layers.parameters() if id(parameter) not in frozen)


def zoo_layers(model: nn.Module) -> dict[str, ZooLinear]:
    """The zoo's layers by name, a learner's own subclass included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ZooLinear)}


@torch.no_grad()
def merge_zoo(model: nn.Module) -> nn.Module:
    """Fold every change into its weight and take the layers away, in place; returns the plain model.

    Refuses a weight that two modules share (tied embeddings: merging would change both) and a quantised one.
    """
    layers = zoo_layers(model)
    check_mergeable(model, layers)
    for name, layer in layers.items():
        layer.base.weight += layer.delta()
        replace(model, name, layer.base)
    return model


def remove_zoo(model: nn.Module) -> nn.Module:
    """Take the layers away without their changes, in place: the (still frozen) base model, returned. Exact."""
    for name, layer in zoo_layers(model).items():
        replace(model, name, layer.base)
    return model


def zoo_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained tensors under PEFT's names on disk: base_model.model.<layer>.<tensor>.

    What layers share stands under the first of them. VeRA's frozen projections are not among them: the seed gives
    them back (PEFT: save_projection=False).
    """
    state, seen = {}, set()
    for name, layer in zoo_layers(model).items():
        frozen = {id(parameter) for parameter in layer.base.parameters()}
        for tensor, value in layer.named_parameters():
            if id(value) not in seen | frozen:
                seen.add(id(value))
                state[f"base_model.model.{name}.{tensor}"] = value.detach()
    return state


@torch.no_grad()
def load_zoo_state_dict(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors, named as in zoo_state_dict, into the layers; names and shapes must match."""
    own = zoo_state_dict(model)
    if odd := sorted(own.keys() ^ tensors.keys()):
        raise ValueError(f"The adapter and the model differ in {len(odd)} tensors, the first being {odd[0]}.")
    for key, tensor in tensors.items():
        if own[key].shape != tensor.shape:
            raise ValueError(
                f"{key} is {tuple(tensor.shape)} in the adapter, {tuple(own[key].shape)} in the model."
            )
    for key, tensor in tensors.items():
        own[key].copy_(tensor)
