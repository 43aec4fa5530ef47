"""VeRA from scratch: one random pair of matrices for all layers, frozen, and two trained vectors for each.

Source: Kopiczko, Blankevoort and Asano 2024, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454.
"""

import torch
from torch.nn import functional as F

from labs_lib.methods.zoo.layer import Held, ZooLinear, uniform


class VeRALinear(ZooLinear):
    """b * B (d * A x), added to base(x): A (rank, in) and B (out, rank) are shared and frozen, d and b train.

    vera_lambda_d (rank,) starts at `start`, vera_lambda_b (out,) at zero: exactly nothing. The shared pair has the
    largest sizes that any layer needs, each layer takes its corner; they are Kaiming uniform from `seed`, as in PEFT,
    so that a file of vectors is enough. Source: Kopiczko et al. 2024, equation 2 and section 3.3.

    Steps:
    1. plan: one pair for all layers. A, then B, from the same generator, bounds sqrt(6 / in) and sqrt(6 / rank).
    2. __init__: keep the pair, learn the two vectors.
    3. update: through A, times d, through B, times b. delta: the same as a matrix, (b B) (d A).
    """

    def __init__(self, base, shared, start):
        super().__init__(base)
        self.shared = shared
        d = torch.full((len(shared.A),), float(start))
        self.learn(vera_lambda_d=d, vera_lambda_b=torch.zeros(base.out_features))

    @classmethod
    def plan(cls, bases, rank=256, start=0.1, seed=0, generator=None):
        width = max(base.in_features for base in bases.values())
        height = max(base.out_features for base in bases.values())
        generator = torch.Generator().manual_seed(seed)  # whatever the run's: the pair is told by its seed
        A = uniform(rank, width, generator, (6 / width) ** 0.5)
        B = uniform(height, rank, generator, (6 / rank) ** 0.5)
        shared = Held(next(iter(bases.values())).weight, A=A, B=B)
        return {name: {"shared": shared, "start": start} for name in bases}

    def pair(self):
        return self.shared.A[:, : self.base.in_features], self.shared.B[: self.base.out_features]

    def delta(self):
        A, B = self.pair()
        return (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)

    def update(self, x):
        A, B = self.pair()
        return self.vera_lambda_b * F.linear(self.vera_lambda_d * F.linear(x, A), B)
