"""SGMV as two Triton kernels that follow the page table: rows shrink to their adapter's ranks, and expand again.

The batch comes cut into tiles of rows that share an adapter (`batch.Tiles`). `_shrink` computes h = A x for one tile,
`_expand` adds B h to its rows; both read an adapter's pages where they lie, one per rank, so nothing is gathered,
sorted or padded in memory. Sums are float32 whatever the inputs are.

Few rows make few tiles, and a GPU with idle processors: then the shrink, whose sums are long, is split along `in`,
each part writes its own h, and the expand adds the parts up in a fixed order, so the answer is the same every time.

Source: Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving", arXiv:2310.18547, section 4; the page table is that of
Sheng et al. 2023, "S-LoRA", arXiv:2311.03285, section 5.1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from labs_lib.serving.batch import Index

RANKS_TIMES_BLOCK = (
    2048  # numbers of A or B that a program holds: what a small GPU (T4) has shared memory for
)
PROGRAMS = 128  # about as many as a large GPU has processors: below this, split the shrink


@triton.jit
def _shrink(
    x, a, h, cells, pages,
    R, K, span, x_step, a_step, split_step,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h[split, row, :] = A[:, part] x[row, part] for the rows of one tile; `span` is the length of a part."""
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tl.load(cells + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # -1: an empty cell
    rank = tl.arange(0, RANKS)
    page = tl.load(pages + tile * R + rank, mask=rank < R, other=0).to(tl.int64)  # 0: no such rank
    k = split * span + tl.arange(0, BLOCK)
    end = tl.minimum((split + 1) * span, K)
    total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for _ in range(0, span, BLOCK):
        mask = (row[:, None] >= 0) & (k[None, :] < end)
        left = tl.load(x + row[:, None] * x_step + k[None, :], mask=mask, other=0.0)
        mask = (page[None, :] > 0) & (k[:, None] < end)
        right = tl.load(a + page[None, :] * a_step + k[:, None], mask=mask, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        k += BLOCK
    to = h + split * split_step + row[:, None] * RANKS + rank[None, :]
    tl.store(to, total, mask=row[:, None] >= 0)


@triton.jit
def _expand(
    h, b, out, cells, pages,
    R, N, splits, b_step, out_step, split_step,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row, part] += B[part, :] h[row, :] for the rows of one tile and one part of the columns."""
    tile = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(cells + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    rank = tl.arange(0, RANKS)
    page = tl.load(pages + tile * R + rank, mask=rank < R, other=0).to(tl.int64)
    left = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for split in range(splits):
        at = h + split * split_step + row[:, None] * RANKS + rank[None, :]
        left += tl.load(at, mask=row[:, None] >= 0, other=0.0)
    mask = (page[:, None] > 0) & (n[None, :] < N)
    right = tl.load(b + page[:, None] * b_step + n[None, :], mask=mask, other=0.0)
    delta = tl.dot(left, right.to(tl.float32), input_precision="ieee")
    to = out + row[:, None] * out_step + n[None, :]
    mask = (row[:, None] >= 0) & (n[None, :] < N)
    delta += tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, delta.to(out.dtype.element_ty), mask=mask)


def sgmv(x: Tensor, a: Tensor, b: Tensor, index: Index, out: Tensor | None = None) -> Tensor:
    """See `ops`: x (T, in), a (P, in), b (P, out) -> (T, out), or added to `out`. float32, float16 or bfloat16."""
    if out is None:
        out = x.new_zeros(len(x), b.shape[1])
    # Tensor cores multiply at least 16 x 16. Larger tiles read an adapter fewer times; 16 keep single rows cheap.
    ranks = max(16, triton.next_power_of_2(index.rank))
    cut = index.tiles(64 if index.largest > 32 and ranks <= 64 else 16)
    K, N = x.shape[1], b.shape[1]
    block = max(32, RANKS_TIMES_BLOCK // ranks)  # numbers of a row at a time
    splits = max(1, min(PROGRAMS // cut.count, triton.cdiv(K, 2 * block)))
    span = triton.cdiv(triton.cdiv(K, splits), block) * block
    splits = triton.cdiv(K, span)
    h = torch.empty(splits, len(x), ranks, dtype=torch.float32, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    _shrink[cut.count, splits](
        x, a, h, cut.cells_on_device, cut.pages,
        index.rank, K, span, x.stride(0), a.stride(0), h.stride(0),
        ROWS=cut.rows, RANKS=ranks, BLOCK=block,
    )  # fmt: skip
    _expand[cut.count, triton.cdiv(N, block)](
        h, b, out, cut.cells_on_device, cut.pages,
        index.rank, N, splits, b.stride(0), out.stride(0), h.stride(0),
        ROWS=cut.rows, RANKS=ranks, BLOCK=block,
    )  # fmt: skip
    return out
