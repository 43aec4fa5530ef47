"""The linear layer that adds each row's own adapter, and how a model gets such layers and loses them again."""

from dataclasses import dataclass

import torch
from torch import nn

from labs_lib.errors import LabsError
from labs_lib.serving.batch import Index, StaticIndex
from labs_lib.serving.graphs import Beside
from labs_lib.serving.layout import Layout, LinearSpec
from labs_lib.serving.ops import OPS, choose


@dataclass
class Step:
    """What the layers of one model share: the pages, and which row of the current forward pass uses which slot."""

    pages: torch.Tensor  # the adapter arena (pages, width)
    layout: Layout
    op: str = "auto"
    index: Index | StaticIndex | None = None  # None: no row has an adapter, the base model runs alone
    gain_page: torch.Tensor | None = (
        None  # (rows,) page with DoRA's gains for each row, None if no row has any
    )
    beside: Beside | None = None  # set while a step is recorded: where A x is computed while W x is


class MultiLoRALinear(nn.Module):
    """A linear layer plus, row by row, the update of the adapter that the row's request named.

    LoRA: y = base(x) + B A x, the scale inside B.
    DoRA: y = (base(x) - bias) gain + bias + B A x, scale and gain inside B.
    """

    def __init__(self, base: nn.Linear, spec: LinearSpec, step: Step) -> None:
        super().__init__()
        self.base, self.spec, self.step = base, spec, step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step, spec, index = self.step, self.spec, self.step.index
        if index is None:
            return self.base(x)
        rows = x.reshape(-1, spec.in_features)
        a, b = step.layout.a(step.pages, spec), step.layout.b(step.pages, spec)
        name = step.op
        if name == "auto":
            name = choose(index, rows, spec.in_features, spec.out_features)
        halves = step.beside is not None and name == "sgmv"
        if halves:
            from labs_lib.serving import sgmv as kernels  # where there is Triton

            with step.beside:
                h = kernels.shrink(rows, a, index)
        y = self.base(x)
        out = y.view(-1, spec.out_features)
        if halves:
            step.beside.join()
        if step.gain_page is not None:
            gain = b[step.gain_page]  # gain - 1, so that page 0 leaves a row as it is
            out += gain * (out if self.base.bias is None else out - self.base.bias)
        if halves:
            kernels.expand(h, b, index, out)
        else:
            OPS[name](rows, a, b, index, out=out)
        return y


def install(model: nn.Module, step: Step) -> nn.Module:
    """Put a MultiLoRALinear around each linear layer of the layout, in place; returns the model."""
    if any(isinstance(layer, MultiLoRALinear) for layer in model.modules()):
        raise LabsError("This model already serves: close the other engine first, or load a second copy.")
    for spec in step.layout.linears:
        parent, _, child = spec.name.rpartition(".")
        layer = MultiLoRALinear(model.get_submodule(spec.name), spec, step)
        setattr(model.get_submodule(parent), child, layer)
    return model


def uninstall(model: nn.Module) -> nn.Module:
    """Take the wrappers away; the model is what it was."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, MultiLoRALinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base)
    return model
