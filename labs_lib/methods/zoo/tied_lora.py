"""Tied-LoRA from scratch: LoRA whose A and B are shared by all blocks, with trained scales for each layer.

PEFT has no such method (its `ensure_weight_tying` is about tied embeddings), so this file follows the paper alone.

Source: Renduchintala, Konuk and Kuchaiev 2024, "Tied-LoRA: Enhancing parameter efficiency of LoRA with Weight Tying",
arXiv:2311.09578.
"""

import torch
from torch.nn import functional as F

from labs_lib.methods.zoo.layer import Held, ZooLinear, hold, uniform


class TiedLoRALinear(ZooLinear):
    """(alpha / rank) v * B (u * A x), added to base(x): A (rank, in) and B (out, rank) are the same in every block.

    Tied are layers of one name and size: all q_proj, all v_proj, ... u (rank,) and v (out,) are each layer's own.
    `train` says which of the four train, as the paper's variants do: "ABuv" all of them, "AB" ties LoRA and no more,
    "uv" leaves A and B frozen and random, which is VeRA but for its scales.
    Source: Renduchintala et al. 2024, section 3.

    Steps:
    1. plan: one A (uniform) and B for each kind of layer. B starts at zero if it trains; else it is uniform.
    2. __init__: u ones; v ones, or zeros where B does not start at zero: either way it begins as exactly nothing.
    3. update: through A, times u, through B, times v and alpha / rank. delta: the same as a matrix.
    """

    def __init__(self, base, shared, scale, train):
        super().__init__(base)
        self.shared, self.scale = shared, scale
        v = torch.full((base.out_features,), float("B" in train))
        hold(self, base.weight, train, {"u": torch.ones(len(shared.A)), "v": v})

    @classmethod
    def plan(cls, bases, rank=8, alpha=8, train="ABuv", generator=None):
        if not set("Bv") & set(train):
            raise ValueError(f"train={train!r} has neither B nor v: the update would stay zero for ever.")
        plans, kinds = {}, {}
        for name, base in bases.items():
            out, into = base.out_features, base.in_features
            if (kind := (name.rpartition(".")[2], out, into)) not in kinds:
                A = uniform(rank, into, generator)
                B = torch.zeros(out, rank) if "B" in train else uniform(out, rank, generator)
                kinds[kind] = Held(base.weight, train, A=A, B=B)
            plans[name] = {"shared": kinds[kind], "scale": alpha / rank, "train": train}
        return plans

    def delta(self):
        return (self.v[:, None] * self.shared.B) @ (self.u[:, None] * self.shared.A) * self.scale

    def update(self, x):
        return self.v * F.linear(self.u * F.linear(x, self.shared.A), self.shared.B) * self.scale
