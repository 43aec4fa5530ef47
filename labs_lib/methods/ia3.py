"""(IA)3 from scratch: three learned vectors per block, which turn up or down what the block computes anyway.

Nothing is added to a weight: keys, values and the inner activations of the FFN are multiplied, number by number. A
vector on outputs is (out, 1), one on inputs (1, in), so that either times the (out, in) weight is the merged weight.
Names on disk and the order of operations are PEFT's.

Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638, section 3.3.
"""

from collections.abc import Sequence

import torch
from torch import nn

from labs_lib.methods.lora import target_names
from labs_lib.methods.modules import check_mergeable, replace

TARGETS = ("k_proj", "v_proj", "down_proj")  # keys, values, and the last layer of the FFN
FEEDFORWARD = ("down_proj",)  # its input is what the paper scales
EPSILON = 1e-8  # PEFT divides by ia3_l + 1e-8 when it unmerges
SMALLEST = 1e-4  # below this the division comes back with an error of more than EPSILON / 1e-4 = 0.01 percent


class IA3Linear(nn.Module):
    """A frozen linear layer with a trained factor on each of its outputs, or, for the FFN, on each of its inputs.

    Takes x (..., in) to (..., out). Only `ia3_l` trains; all ones change nothing. Source: Liu et al. 2022, section 3.3.

    Steps:
    1. __init__: freeze `base`; ia3_l is a parameter of ones, (1, in) if `feedforward`, else (out, 1).
    2. forward: base(x * l) if `feedforward`, else base(x) * l, with l = ia3_l.flatten(); while merged, base(x) alone.
    3. merge: multiply the tensors that scaled_tensors(self) lists by their factors, in place and only once.
    4. unmerge: divide by factor + EPSILON, which comes near the old weight and no nearer.
    """

    def __init__(self, base: nn.Linear, feedforward: bool = False) -> None:
        super().__init__()
        shape = (1, base.in_features) if feedforward else (base.out_features, 1)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)  # never train in half precision
        self.ia3_l = nn.Parameter(torch.ones(shape, device=base.weight.device, dtype=dtype))
        self.base, self.feedforward, self.merged = base.requires_grad_(False), feedforward, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return self.base(x)
        if self.feedforward:
            return self.base((x * self.ia3_l.flatten()).to(x.dtype))
        y = self.base(x)
        return (y * self.ia3_l.flatten()).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        if not self.merged:
            for tensor, factor in scaled_tensors(self):
                tensor.mul_(factor)
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged:
            for tensor, factor in scaled_tensors(self):
                tensor.div_(factor + EPSILON)
            self.merged = False


def scaled_tensors(layer: IA3Linear) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What merging multiplies, with the factors in its shape: the weight and, where outputs are scaled, the bias."""
    pairs = [(layer.base.weight, layer.ia3_l)]
    if layer.base.bias is not None and not layer.feedforward:
        pairs.append((layer.base.bias, layer.ia3_l.flatten()))
    return pairs


def ia3_targets(
    model: nn.Module, targets: str | Sequence[str] = TARGETS, feedforward: Sequence[str] = FEEDFORWARD
) -> dict[str, bool]:
    """Full names of the layers to scale, in the model's order; True: on the inputs, False: on the outputs.

    `targets` and `feedforward` as in lora.target_names. What `feedforward` names and `targets` does not is an error:
    PEFT leaves a name that it does not find, or a misspelt one, on the outputs without a word.

    Steps:
    1. The names that `targets` means and, unless it is empty, those that `feedforward` means: target_names.
    2. A name among the latter that is not among the former is a ValueError.
    3. Say for each target whether it is among the latter.
    """
    names = target_names(model, targets)
    inputs = target_names(model, feedforward) if feedforward else []
    if stray := [name for name in inputs if name not in names]:
        raise ValueError(
            f"feedforward names {stray[0]}, which is not among the targets: add it there, or pass feedforward=()."
        )
    return {name: name in inputs for name in names}


def count_ia3(
    model: nn.Module, targets: str | Sequence[str] = TARGETS, feedforward: Sequence[str] = FEEDFORWARD
) -> int:
    """How many numbers (IA)3 would train in this model, from the shapes alone: a model on "meta" will do.

    Steps:
    1. Go through ia3_targets(model, targets, feedforward); model.get_submodule(name) gives the layer.
    2. A layer scaled on its inputs has in_features numbers, the others have out_features. Add them up.
    """
    total = 0
    for name, inputs in ia3_targets(model, targets, feedforward).items():
        layer = model.get_submodule(name)
        total += layer.in_features if inputs else layer.out_features
    return total


def rescaling_share(before: torch.Tensor, after: torch.Tensor, feedforward: bool = False) -> float:
    """How much of a weight's change (IA)3 could have made: a share between 0 and 1.

    `before` and `after` are (out, in). (IA)3 turns a row w into l * w (with `feedforward` a column), so of the row's
    change d it reaches only the part along w. The share is that part's squared length over the change's, all rows
    together. A change in a random direction of n numbers has 1/n of it along w: that is the yardstick.

    Steps:
    1. change = after - before; dim is 1 for rows, 0 for columns.
    2. The best l - 1 of each row is change . before / before . before, a sum over dim each (keepdim=True).
    3. Return the sum of squares of that times before, over the sum of squares of change, as a float.
    """
    change, dim = after - before, 0 if feedforward else 1
    gain = (change * before).sum(dim, keepdim=True) / before.square().sum(dim, keepdim=True)
    return ((gain * before).square().sum() / change.square().sum()).item()


def inject_ia3(
    model: nn.Module,
    targets: str | Sequence[str] = TARGETS,
    feedforward: Sequence[str] = FEEDFORWARD,
    kind: type[nn.Module] = IA3Linear,
) -> nn.Module:
    """Freeze `model` and put an IA3Linear (or your own `kind`) in place of each target; returns the model.

    `targets` and `feedforward` as in ia3_targets. Bad ones are an error that leaves the model as it was.

    Steps:
    1. Make a `kind`(layer, feedforward) for each layer that ia3_targets lists.
    2. Freeze every parameter of the model.
    3. Put each wrapper in its layer's place: setattr on the parent, model.get_submodule(name of the parent).
    """
    if ia3_layers(model):
        raise ValueError("This model already carries (IA)3 layers: call merge_ia3 or remove_ia3 first.")
    scaled = ia3_targets(model, targets, feedforward)
    layers = {name: kind(model.get_submodule(name), inputs) for name, inputs in scaled.items()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        layer.ia3_l.requires_grad_(True)
        replace(model, name, layer)
    return model


def ia3_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The wrapped layers by name, told by what they carry, not class: a learner's own IA3Linear counts."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "ia3_l", None), nn.Parameter)
    }


def merge_ia3(model: nn.Module) -> nn.Module:
    """Fold every vector into its base weight and take the wrappers away, in place; returns the plain model.

    Refuses a weight that two modules share (tied embeddings: merging would change both) and a quantised one.
    """
    layers = ia3_layers(model)
    check_mergeable(model, layers)
    for name, layer in layers.items():
        layer.merge()
        replace(model, name, layer.base)
    return model


def remove_ia3(model: nn.Module) -> nn.Module:
    """Take the wrappers away without their vectors, in place: the (still frozen) base model, returned.

    Exact as long as nothing was merged. From a merged layer the base comes back by division, so nearly; where a
    factor is next to nothing it does not come back, and that is an error which leaves the model as it was.
    """
    layers = ia3_layers(model)
    for name, layer in layers.items():
        if getattr(layer, "merged", False) and (layer.ia3_l.detach().abs() < SMALLEST).any():
            raise ValueError(
                f"{name} is merged, and a factor next to zero has erased weights: load the base again."
            )
    for name, layer in layers.items():
        if getattr(layer, "merged", False):
            layer.unmerge()
        replace(model, name, layer.base)
    return model


def ia3_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's names on disk: base_model.model.<layer>.ia3_l, (out, 1) or (1, in)."""
    return {
        f"base_model.model.{name}.ia3_l": layer.ia3_l.detach() for name, layer in ia3_layers(model).items()
    }
