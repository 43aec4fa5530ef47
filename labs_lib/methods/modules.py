"""Modules put into a model in another's place, and what must hold before an update is folded into a weight."""

from collections import Counter
from collections.abc import Mapping

from torch import nn


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `model` has the submodule `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def check_mergeable(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """ValueError if an update cannot be folded into the weight of a wrapper's `base`.

    A weight that two modules share (tied embeddings) would change both, and a quantised one cannot take it.
    """
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        if owners[id(layer.base.weight)] > 1:
            raise ValueError(
                f"{name} shares its weight with another module: merging would change both. Untie them."
            )
        if not layer.base.weight.is_floating_point():
            raise ValueError(f"{name} is quantised: dequantise the base model before merging into it.")
