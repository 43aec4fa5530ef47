"""OFT from scratch: the input is cut into blocks, and each block is turned by a trained rotation.

Nothing is added. What a rotation keeps is the length of every row of the weight, and the angles between rows.

Source: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv:2306.07280; the
truncated series Qiu et al. 2025, "Orthogonal Finetuning Made Scalable" (OFTv2), arXiv:2506.19847.
"""

import torch

from labs_lib.methods.zoo.layer import Held, ZooLinear, wide


class OFTLinear(ZooLinear):
    """base(x R): R turns each block of `block` inputs. oft_R.weight (blocks, block (block - 1) / 2) starts at zero.

    Its numbers are the upper triangles of skew matrices Q, Q^T = -Q; at zero nothing turns, exactly. Cayley:
    (I + Q) (I - Q)^-1 is a rotation, and equals (I + Q) (I + Q + Q^2 + ...). The series is cut so that `terms` powers
    of Q are left, the last counted once, those between twice: a rotation only as long as Q is small. terms=None
    solves (I - Q) (I + Q)^-1 without an error; as in PEFT, that is the turn the other way.
    Source: Qiu et al. 2023, Cayley and blocks; Qiu et al. 2025, equation 2 (turn x, not W) and section 3.3 (series).

    Steps:
    1. rotations: Q from the triangles, (blocks, block, block); then the series, or the solution.
    2. forward: x as (..., blocks, block), each block a row times its rotation; then base.
    3. delta: R is block diagonal, and base(x R) = x R W^T, so the new weight is W R^T.
    """

    def __init__(self, base, block=32, terms=5, generator=None):  # keep
        super().__init__(base)
        if base.in_features % block:
            raise ValueError(f"A block of {block} does not divide {base.in_features} inputs: take a divisor.")
        self.block, self.terms = block, terms
        triangles = torch.zeros(base.in_features // block, block * (block - 1) // 2)
        self.oft_R = Held(base.weight, ["weight"], weight=triangles)  # a module, as in PEFT

    def rotations(self):
        triangles, block = self.oft_R.weight, self.block
        rows, columns = torch.triu_indices(block, block, 1)
        Q = triangles.new_zeros(len(triangles), block, block)
        Q[:, rows, columns] = triangles
        Q = Q - Q.mT
        if self.terms is None:
            eye = torch.eye(block).to(Q)
            return torch.linalg.solve(eye + Q, eye - Q, left=False)
        powers = [torch.linalg.matrix_power(Q, n) for n in range(self.terms)]
        return 2 * sum(powers) - powers[0] - powers[-1]

    def forward(self, x):
        blocks = wide(x).unflatten(-1, (-1, self.block))
        return self.base(torch.einsum("...nk,nkc->...nc", blocks, self.rotations()).flatten(-2).to(x.dtype))

    def delta(self):
        W = wide(self.base.weight)
        return W @ torch.block_diag(*self.rotations()).T - W
