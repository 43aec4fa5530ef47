"""Adding many adapters to one batch: ways to compute, for each row, B A x with that row's own A and B.

All have one signature, `op(x, a, b, index, out=None)`, and one answer; which is fastest depends on shape and device.

    x      (T, in)   rows of the batch
    a, b   (P, in), (P, out): one layer's columns of the arena. Page p is one rank of an adapter: a[p] is a row of its
           A, b[p] the matching column of its B, scale folded in. Both are strided views; nothing here needs a copy.
    index  who uses which pages (`batch.Index`)
    out    (T, out): if given, the update is added to it in place and `out` is returned; else the update is returned.

Rows of the base model get exact zeros. No row's arithmetic ever meets another adapter's weights, so that a tenant
who uploads infinities spoils nobody's answer.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from labs_lib.errors import LabsError
from labs_lib.serving.batch import Index, Tiles


def loop(x: Tensor, a: Tensor, b: Tensor, index: Index, out: Tensor | None = None) -> Tensor:
    """The reference: adapter by adapter, as one would write it down."""
    delta = x.new_zeros(len(x), b.shape[1])
    for slot in sorted(set(index.slots.tolist()) - {0}):
        rows, pages = index.slot == slot, index.pages[slot].to(x.device)
        delta[rows] = x[rows] @ a[pages].T @ b[pages]
    return delta if out is None else out.add_(delta)


def gather(x: Tensor, a: Tensor, b: Tensor, index: Index, out: Tensor | None = None) -> Tensor:
    """A copy of its adapter for every row, then two batched products (1, in) (in, R) and (1, R) (R, out).

    Any pages, any mix of ranks; base rows get copies of page 0, zeros. The copies are the cost: T R (in + out)
    numbers, so this is for few rows. Source: the gather-BMM that Chen et al. 2023, "Punica", arXiv:2310.18547, compare.
    """
    if not index.rank:
        return _nothing(x, b, out)
    A, B = F.embedding(index.row_pages, a), F.embedding(index.row_pages, b)  # (T, R, in), (T, R, out)
    h = torch.bmm(x.unsqueeze(1), A.mT)  # (T, 1, R)
    if out is None:
        return torch.bmm(h, B).squeeze(1)
    out.unsqueeze(1).baddbmm_(h, B)
    return out


def tiles(x: Tensor, a: Tensor, b: Tensor, index: Index, out: Tensor | None = None) -> Tensor:
    """Like `gather`, with one copy for every tile of rows that share an adapter. The tiles are those of SGMV."""
    if not index.rank:
        return _nothing(x, b, out)
    cut = index.tiles(index.tile_rows)
    return _by_tile(x, F.embedding(cut.pages, a), F.embedding(cut.pages, b), cut, out)


def blocks(x: Tensor, a: Tensor, b: Tensor, index: Index, out: Tensor | None = None) -> Tensor:
    """One tile per slot, so that the arena itself is the batch of adapters: no weight is copied.

    Needs a contiguous index. Every tile is as large as the largest, so this is for slots with about as many rows
    each; if the batch fills them in slot order, not even rows are copied.
    """
    if not index.rank:
        return _nothing(x, b, out)
    if not index.contiguous:
        raise LabsError(
            "blocks reads slots in place, which needs the policy 'separate': use gather with this pool."
        )
    return _by_tile(x, _in_place(a, index), _in_place(b, index), index.blocks, out)


def segments(x: Tensor, a: Tensor, b: Tensor, index: Index, out: Tensor | None = None) -> Tensor:
    """Rows sorted by slot, then two matrix products per slot: for few adapters with many rows each, as in prefill."""
    if not index.rank:
        return _nothing(x, b, out)
    x = x if index.grouped else x.index_select(0, index.order)
    if out is not None and index.grouped:
        for _, start, stop, pages in index.segments:
            if pages is not None:
                out[start:stop].addmm_(x[start:stop] @ a[pages].T, b[pages])
        return out
    y = torch.cat(
        [
            x.new_zeros(stop - start, b.shape[1]) if pages is None else x[start:stop] @ a[pages].T @ b[pages]
            for _, start, stop, pages in index.segments
        ]
    )
    y = y if index.grouped else y.index_select(0, index.back)
    return y if out is None else out.add_(y)


def grouped(x: Tensor, a: Tensor, b: Tensor, index: Index, out: Tensor | None = None) -> Tensor:
    """`segments` in two calls: torch's grouped matrix product, whose groups are ragged. Base rows are a group of zeros.

    It wants rows of a multiple of 16 bytes: the ranks are padded with page 0, and `in` and `out` must fit.
    """
    if not index.rank:
        return _nothing(x, b, out)
    if not hasattr(F, "grouped_mm"):
        raise LabsError("This torch has no grouped_mm: update to torch 2.10 or later, or use segments.")
    if not fits_grouped(x, b.shape[1]):
        raise LabsError(
            f"grouped_mm needs rows of a multiple of 16 bytes in at most single precision, not {x.shape[1]} and "
            f"{b.shape[1]} numbers in {x.dtype}: use segments."
        )
    x = x.contiguous() if index.grouped else x.index_select(0, index.order)
    A, B = F.embedding(index.table, a), F.embedding(index.table, b)  # (segments, R, in), (segments, R, out)
    y = F.grouped_mm(F.grouped_mm(x, A.mT, offs=index.ends), B, offs=index.ends)
    y = y if index.grouped else y.index_select(0, index.back)
    return y if out is None else out.add_(y)


def sgmv(x: Tensor, a: Tensor, b: Tensor, index: Index, out: Tensor | None = None) -> Tensor:
    """Segmented gather matrix-vector product: two Triton kernels that follow the page table themselves (CUDA)."""
    if not index.rank:
        return _nothing(x, b, out)
    from labs_lib.serving import sgmv as kernels

    return kernels.sgmv(x, a, b, index, out)


Op = Callable[..., Tensor]
OPS: dict[str, Op] = {op.__name__: op for op in (loop, gather, tiles, blocks, segments, grouped, sgmv)}



def fits_grouped(x: Tensor, outputs: int) -> bool:
    """grouped_mm refuses rows that are not a multiple of 16 bytes, and double precision."""
    size = x.element_size()
    return size <= 4 and x.shape[1] * size % 16 == outputs * size % 16 == 0


def choose(index: Index, x: Tensor, inputs: int, outputs: int) -> str:
    """The name of the op that should be fastest for this batch on a layer of inputs -> outputs."""
    key = inputs, outputs, x.dtype
    if key not in index.choices:
        index.choices[key] = _choose(index, x, inputs, outputs)
    return index.choices[key]


def _choose(index: Index, x: Tensor, inputs: int, outputs: int) -> str:
    cost = cpu_costs(index, inputs, outputs)
    return min(cost, key=cost.get)


def cpu_costs(index: Index, inputs: int, outputs: int) -> dict[str, float]:
    return dict(segments=1.0)


def _nothing(x: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """The update of a batch without adapters."""
    return x.new_zeros(len(x), b.shape[1]) if out is None else out


def _in_place(pages: Tensor, index: Index) -> Tensor:
    """(P, n) -> (slots in use, R, n): the arena as a batch of adapters. as_strided because five calls are one here."""
    step, width = pages.stride(0), index.pages.shape[1]
    size = (index.blocks.count, index.rank, pages.shape[1])
    at = pages.storage_offset() + index.low * width * step
    return pages.as_strided(size, (width * step, step, pages.stride(1)), at)


def _by_tile(x: Tensor, A: Tensor, B: Tensor, cut: Tiles, out: Tensor | None) -> Tensor:
    """x (T, in) into tiles, times A (tiles, R, in) and B (tiles, R, out), and back to rows.

    An empty cell holds a copy of row 0, whose product nobody reads.
    """
    x = x if cut.place is None else x.index_select(0, cut.place)
    h = torch.bmm(x.view(cut.count, cut.rows, -1), A.mT)  # (tiles, rows, R)
    if cut.back is None and out is not None:
        out.view(cut.count, cut.rows, -1).baddbmm_(h, B)
        return out
    y = torch.bmm(h, B).flatten(0, 1)
    if cut.back is not None:
        y = y.index_select(0, cut.back)
    if cut.base is not None:
        y = y.masked_fill_(cut.base, 0)
    return y if out is None else out.add_(y)
