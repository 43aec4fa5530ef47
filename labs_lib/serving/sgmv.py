"""SGMV as two Triton kernels that follow the page table: rows shrink to their adapter's ranks, and expand again.

The batch comes cut into tiles of rows that share an adapter (`batch.Tiles`). `_shrink` computes h = A x for one tile,
`_expand` adds B h to its rows; both read an adapter's pages where they lie, one per rank, so nothing is gathered,
sorted or padded in memory. Sums are float32 whatever the inputs are. A tile without rows is left at once: a recorded
step has as many tiles as its largest batch needs.

Few rows make few tiles, and a GPU with idle processors: then the shrink, whose sums are long, is split along `in`,
each part writes its own h, and the expand adds the parts up in a fixed order, so the answer is the same every time.

How large the pieces are changes nothing but the time: `tuning`.

Source: Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving", arXiv:2310.18547, section 4; the page table is that of
Sheng et al. 2023, "S-LoRA", arXiv:2311.03285, section 5.1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from labs_lib.serving.batch import TILE, Index, StaticIndex, Tiles
from labs_lib.serving.tuning import Expand, Shape, Shrink, pieces

LARGE_TILE = 64  # rows of a tile where an adapter has many: its pages are read fewer times


@triton.jit(do_not_specialize=["R"])
def _shrink(
    x, a, h, cells, pages,
    R, K, x_step, a_step, split_step,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """h[split, row, :] = A[:, part] x[row, part] for the rows of one tile; a part is STEPS blocks of K."""
    tile, split = tl.program_id(0), tl.program_id(1)
    if tl.load(cells + tile * ROWS) < 0:  # no rows: tiles fill up from their first cell
        return
    row = tl.load(cells + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # -1: an empty cell
    rank = tl.arange(0, RANKS)
    page = tl.load(pages + tile * R + rank, mask=rank < R, other=0).to(tl.int64)  # 0: no such rank
    k = split * (STEPS * BLOCK) + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for _ in range(STEPS):
        mask = (row[:, None] >= 0) & (k[None, :] < K)
        left = tl.load(x + row[:, None] * x_step + k[None, :], mask=mask, other=0.0)
        mask = (page[None, :] > 0) & (k[:, None] < K)
        right = tl.load(a + page[None, :] * a_step + k[:, None], mask=mask, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        k += BLOCK
    to = h + split.to(tl.int64) * split_step + row[:, None] * RANKS + rank[None, :]
    tl.store(to, total, mask=row[:, None] >= 0)


@triton.jit(do_not_specialize=["R"])
def _expand(
    h, b, out, cells, pages,
    R, N, b_step, out_step, split_step,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[row, part] += B[part, :] h[row, :] for the rows of one tile and one part of the columns."""
    tile = tl.program_id(0)
    if tl.load(cells + tile * ROWS) < 0:
        return
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(cells + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    rank = tl.arange(0, RANKS)
    page = tl.load(pages + tile * R + rank, mask=rank < R, other=0).to(tl.int64)
    mask = (page[:, None] > 0) & (n[None, :] < N)  # B does not wait for h
    right = tl.load(b + page[:, None] * b_step + n[None, :], mask=mask, other=0.0).to(tl.float32)
    left = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    at = h + row[:, None] * RANKS + rank[None, :]
    for _ in tl.static_range(SPLITS):  # unrolled: all loads are under way at once
        left += tl.load(at, mask=row[:, None] >= 0, other=0.0)
        at += split_step
    delta = tl.dot(left, right, input_precision=PRECISION)
    to = out + row[:, None] * out_step + n[None, :]
    mask = (row[:, None] >= 0) & (n[None, :] < N)
    delta += tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, delta.to(out.dtype.element_ty), mask=mask)


def sgmv(x: Tensor, a: Tensor, b: Tensor, index: Index, out: Tensor | None = None) -> Tensor:
    """See `ops`: x (T, in), a (P, in), b (P, out) -> (T, out), or added to `out`. float32, float16 or bfloat16."""
    if out is None:
        out = x.new_zeros(len(x), b.shape[1])
    return expand(shrink(x, a, index), b, index, out)


def shrink(x: Tensor, a: Tensor, index: Index | StaticIndex, how: Shrink | None = None) -> Tensor:
    """The first half: h (parts, T, ranks) float32, whose sum over the parts is A x; garbage for the base's rows."""
    cut, ranks = _cut(index)
    K = x.shape[1]
    how = how or pieces(Shape("shrink", cut.rows, ranks, a.element_size(), cut.count, K), str(x.device))
    splits = max(1, min(how.programs // cut.count, triton.cdiv(K, how.block)))
    splits = 1 << splits.bit_length() - 1  # few numbers of parts: each is a kernel to compile
    steps = triton.cdiv(triton.cdiv(K, splits), how.block)
    splits = triton.cdiv(K, steps * how.block)
    h = torch.empty(splits, len(x), ranks, dtype=torch.float32, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    _shrink[cut.count, splits](
        x, a, h, cut.cells_on_device, cut.pages,
        index.rank, K, x.stride(0), a.stride(0), h.stride(0),
        ROWS=cut.rows, RANKS=ranks, BLOCK=how.block, STEPS=steps,
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return h


def expand(
    h: Tensor, b: Tensor, index: Index | StaticIndex, out: Tensor, how: Expand | None = None
) -> Tensor:
    """The second half: B h added to `out` (T, out) in place."""
    cut, ranks = _cut(index)
    N = b.shape[1]
    how = how or pieces(Shape("expand", cut.rows, ranks, b.element_size(), cut.count, N), str(out.device))
    # tf32 holds float16 and bfloat16 exactly, and h to 11 bits; the result is rounded to 11 or 8 bits anyway.
    precision = "ieee" if b.dtype == torch.float32 else "tf32"
    _expand[cut.count, triton.cdiv(N, how.block)](
        h, b, out, cut.cells_on_device, cut.pages,
        index.rank, N, b.stride(0), out.stride(0), h.stride(0),
        ROWS=cut.rows, RANKS=ranks, BLOCK=how.block, SPLITS=len(h), PRECISION=precision, num_warps=how.warps,
    )  # fmt: skip
    return out


def _cut(index: Index | StaticIndex) -> tuple[Tiles | StaticIndex, int]:
    """The batch in tiles, and the ranks of a tile: matrix units multiply 16 x 16 at least."""
    ranks = max(TILE, triton.next_power_of_2(index.rank))
    return index.tiles(LARGE_TILE if index.largest > 32 and ranks <= 64 else TILE), ranks
