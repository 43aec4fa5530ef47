"""LoKr from scratch: the Kronecker product of two small matrices, one of them a low-rank product if it is large.

Source: Yeh et al. 2024, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
arXiv:2309.14859; Edalati et al. 2022, "KronA", arXiv:2212.10650.
"""

from math import isqrt

import torch

from labs_lib.methods.zoo.layer import ZooLinear, uniform


def two_factors(size: int, factor: int = -1) -> tuple[int, int]:
    """A size as a product of two: as square as it can be, or with `factor`, if it divides, as the first.

    A `factor` that does not divide is an upper limit for the smaller of the two.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = isqrt(size) if factor < 0 else min(factor, isqrt(size))
    first = max(each for each in range(1, most + 1) if size % each == 0)
    return first, size // first


class LoKrLinear(ZooLinear):
    """The update (alpha / rank) w1 (x) w2: w1 is (out1, in1), w2 (out2, in2), out = out1 out2 and in = in1 in2.

    Its rank is rank(w1) rank(w2): high with few numbers. w2 is lokr_w2_a @ lokr_w2_b of that `rank` where this is
    smaller; with `decompose_both` so is w1. w1 (or its first factor) starts at zero, and with it the update.
    Source: Yeh et al. 2024, equations 4 and 5; starting values as in PEFT.

    Steps:
    1. __init__: split both sizes by two_factors; learn w1, then w2, each whole or in two factors.
    2. delta: torch.kron(w1, w2), times alpha / rank.
    3. update: without that matrix: x as (in1, in2); w1 x w2^T, flattened, is (w1 (x) w2) x.
    """

    def __init__(self, base, rank=8, alpha=8, factor=-1, decompose_both=False, generator=None):
        super().__init__(base)
        self.scale, self.split = alpha / rank, two_factors(base.in_features, factor)
        (in1, in2), (out1, out2) = self.split, two_factors(base.out_features, factor)
        if decompose_both and rank < max(out1, in1) / 2:
            self.learn(lokr_w1_a=torch.zeros(out1, rank), lokr_w1_b=uniform(rank, in1, generator))
        else:
            self.learn(lokr_w1=torch.zeros(out1, in1))
        if rank < max(out2, in2) / 2:
            self.learn(lokr_w2_a=uniform(out2, rank, generator), lokr_w2_b=uniform(rank, in2, generator))
        else:
            self.learn(lokr_w2=uniform(out2, in2, generator))

    def pair(self):
        w1 = self.lokr_w1 if hasattr(self, "lokr_w1") else self.lokr_w1_a @ self.lokr_w1_b
        w2 = self.lokr_w2 if hasattr(self, "lokr_w2") else self.lokr_w2_a @ self.lokr_w2_b
        return w1, w2

    def delta(self):
        return torch.kron(*self.pair()) * self.scale

    def update(self, x):
        w1, w2 = self.pair()
        return (w1 @ x.unflatten(-1, self.split) @ w2.mT).flatten(-2) * self.scale
