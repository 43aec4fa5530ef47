"""LoHa from scratch: two low-rank products, multiplied number by number.

Source: Hyeon-Woo, Ye-Bin and Oh 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
Learning", arXiv:2108.06098; as an adapter LyCORIS, arXiv:2309.14859.
"""

import torch

from labs_lib.methods.zoo.layer import ZooLinear, uniform


class LoHaLinear(ZooLinear):
    """The update (alpha / rank) (A1 B1) * (A2 B2), where * goes number by number: its rank is up to rank squared.

    hada_w1_a and hada_w2_a are (out, rank), hada_w1_b and hada_w2_b (rank, in). The last starts at zero, so that the
    second product does, and with it the update. Twice the numbers of LoRA of that rank; the matrix is formed every
    time. Source: Hyeon-Woo et al. 2022, proposition 1; starting values as in PEFT (LyCORIS draws normal ones).

    Steps:
    1. __init__: learn the four factors, three of them uniform, drawn in the order of their names.
    2. delta: both products, times each other, times alpha / rank.
    """

    def __init__(self, base, rank=8, alpha=8, generator=None):
        super().__init__(base)
        out, into = base.out_features, base.in_features
        self.scale = alpha / rank
        self.learn(
            hada_w1_a=uniform(out, rank, generator),
            hada_w1_b=uniform(rank, into, generator),
            hada_w2_a=uniform(out, rank, generator),
            hada_w2_b=torch.zeros(rank, into),
        )

    def delta(self):
        return (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b) * self.scale
