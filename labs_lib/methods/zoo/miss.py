"""MiSS from scratch: one small matrix for each output, repeated along the inputs until it is as wide as the weight.

Source: Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
arXiv:2409.15371 (first called Bone). This is the standard one; PEFT's "bat" and "mini" are variants of it.
"""

import torch
from torch.nn import functional as F

from labs_lib.methods.zoo.layer import ZooLinear


class MiSSLinear(ZooLinear):
    """The update [D D D ...]: D^T is miss_block (rank, out), zeros at the start, and columns that do not fit are cut.

    The same as summing the inputs in groups, every rank-th to one, and one matrix on the sums: half of LoRA's numbers,
    and no product of two trained matrices. There is no alpha.
    Source: Kang and Yin 2024, table 1, the efficient form: W x + D (sum of the groups of x).

    Steps:
    1. __init__: learn miss_block; the rank is at most the number of inputs.
    2. delta: miss_block^T side by side, cut to the width of the weight.
    3. update: zeros behind x until rank divides; as (..., groups, rank), summed over the groups; times miss_block.
    """

    def __init__(self, base, rank=64, generator=None):
        super().__init__(base)
        if not 1 <= rank <= base.in_features:
            raise ValueError(f"rank is from 1 to the {base.in_features} inputs of the layer: got {rank}.")
        self.learn(miss_block=torch.zeros(rank, base.out_features))

    def delta(self):
        rank, width = len(self.miss_block), self.base.in_features
        return self.miss_block.T.repeat(1, -(-width // rank))[:, :width]

    def update(self, x):
        rank = len(self.miss_block)
        groups = F.pad(x, (0, -x.shape[-1] % rank)).unflatten(-1, (-1, rank))
        return groups.sum(-2) @ self.miss_block
