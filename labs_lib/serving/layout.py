"""Where an adapter's numbers lie in memory: which linear layers there are, and what one page holds.

A **page** is one rank of an adapter across all adapted layers: for each layer one row of A (its input side) and the
matching column of B (its output side, with the scale folded in). An adapter of rank r is r pages, wherever they are;
nothing has to be contiguous, so mixed ranks leave no holes. Key/value cells of about the same size lie in pages of
their own, which is what lets one pool hold both (Sheng et al. 2023, "S-LoRA", arXiv:2311.03285, section 5.1).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn


@dataclass(frozen=True)
class LinearSpec:
    """One adapted layer and its two places in a page."""

    name: str
    in_features: int
    out_features: int
    a_at: int
    b_at: int


@dataclass(frozen=True)
class Layout:
    """The adapted layers of a model, in the model's order; `width` numbers make a page.

    `cell` numbers hold the keys and values of one token in all layers: (layers, 2, key/value heads, head size).
    """

    linears: tuple[LinearSpec, ...]
    width: int
    cell: int

    @classmethod
    def of(cls, model: nn.Module) -> "Layout":
        """The layout for every nn.Linear of a decoder but its output head; a page is a whole number of KV cells."""
        head, linears, at = model.get_output_embeddings(), [], 0
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and layer is not head:
                inputs, outputs = layer.in_features, layer.out_features
                linears.append(LinearSpec(name, inputs, outputs, at, at + inputs))
                at += inputs + outputs
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cell = config.num_hidden_layers * 2 * heads * size
        return cls(tuple(linears), -(-at // cell) * cell, cell)

    @cached_property
    def by_name(self) -> dict[str, LinearSpec]:
        return {spec.name: spec for spec in self.linears}

    @property
    def tokens_per_page(self) -> int:
        """KV cells that fit into a page of adapter width."""
        return self.width // self.cell

    def a(self, pages: torch.Tensor, spec: LinearSpec) -> torch.Tensor:
        """The A rows of a layer in `pages` (n, width): a view (n, in)."""
        return pages[:, spec.a_at : spec.a_at + spec.in_features]

    def b(self, pages: torch.Tensor, spec: LinearSpec) -> torch.Tensor:
        """The B columns of a layer in `pages` (n, width): a view (n, out)."""
        return pages[:, spec.b_at : spec.b_at + spec.out_features]
