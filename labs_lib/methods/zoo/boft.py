"""BOFT from scratch: several rounds of small rotations, with a butterfly's shuffling between, and a scale per output.

One round turns inputs only within their block; after m rounds each output mixes 2^(m-1) blocks.

Source: Liu et al. 2024, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", arXiv:2311.06243.
"""

import torch

from labs_lib.methods.zoo.layer import ZooLinear, wide


class BOFTLinear(ZooLinear):
    """s * base(x R), where R is a product of `factors` block rotations. boft_R (factors, blocks, block, block), zeros.

    boft_s (out, 1) starts at ones; the bias is not scaled. Each rotation is Cayley's of a skew matrix, exactly.
    Source: Liu et al. 2024, section 4, equation 2; the scale is that of the authors' code and of PEFT.

    Steps:
    1. __init__: in round i, groups of half a block are sorted, even ones first, within 2^i blocks: `orders`.
    2. rotate: Q = (boft_R - its transpose) / 2; solve (I - Q) (I + Q)^-1.
    3. For each round, last first: into its order, each block times its rotation, back out of the order.
    4. forward: base of that, times s; the bias stays out of it. delta: s W R^T - W, with R = rotate(identity).
    """

    def __init__(self, base, block=4, factors=1, generator=None):
        super().__init__(base)
        size = base.in_features
        if size % (block * 2 ** (factors - 1)) or (factors > 1 and block % 2):
            raise ValueError(f"{factors} rounds of blocks of {block} do not fit {size} inputs.")
        groups = [(-1, 2**i, 2, block // 2) if i else (-1, 1, 1, block) for i in range(factors)]
        orders = torch.stack([torch.arange(size).view(each).transpose(1, 2).flatten() for each in groups])
        self.register_buffer("orders", orders.to(base.weight.device), persistent=False)
        R = torch.zeros(factors, size // block, block, block)
        self.learn(boft_R=R, boft_s=torch.ones(base.out_features, 1))

    def rotate(self, x):
        eye, Q = torch.eye(self.boft_R.shape[-1]).to(self.boft_R), (self.boft_R - self.boft_R.mT) / 2
        rounds = torch.linalg.solve(eye + Q, eye - Q, left=False)
        for order, turn in zip(self.orders.flip(0), rounds.flip(0), strict=True):
            blocks = x[..., order.argsort()].unflatten(-1, turn.shape[:2])
            x = torch.einsum("...nk,nkc->...nc", blocks, turn).flatten(-2)[..., order]
        return x

    def forward(self, x):
        y, bias = self.base(self.rotate(wide(x)).to(x.dtype)), self.base.bias
        bias = 0 if bias is None else bias
        return ((y - bias) * self.boft_s.flatten() + bias).to(y.dtype)

    def delta(self):
        W = wide(self.base.weight)
        return self.boft_s * (W @ self.rotate(torch.eye(W.shape[1]).to(W)).T) - W
