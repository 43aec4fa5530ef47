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
from importlib.util import find_spec

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

    Steps:
        1. A batch without adapters (index.rank is 0) has nothing to add: `_nothing(x, b, out)`.
        2. Fetch each row's pages, index.row_pages (T, R), from a (P, in) and b (P, out): A (T, R, in), B (T, R, out).
        3. One batched product takes x (T, in) into the rank, a second out of it: (T, out).
        4. Without `out` return that; with it, add it to `out` in place and return `out`.
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
    """Rows sorted by slot, then two matrix products per slot: for few adapters with many rows each, as in prefill.

    Steps:
        1. A batch without adapters (index.rank is 0) has nothing to add: `_nothing(x, b, out)`.
        2. Bring the rows of a slot together, x[index.order], unless they are so already (index.grouped).
        3. For each (slot, start, stop, pages) of index.segments: rows start..stop times a[pages] transposed, times
           b[pages]. The base's segment has pages None: zeros.
        4. Put the parts together, and the rows back where they came from, y[index.back], if they were moved.
        5. Without `out` return that; with it, add it to `out` in place and return `out`.
    """
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
STATIC = (
    "gather",
    "sgmv",
)  # those that a recorded step can use: shapes do not depend on who shares the batch
OPS: dict[str, Op] = {op.__name__: op for op in (loop, gather, tiles, blocks, segments, grouped, sgmv)}


def fits_grouped(x: Tensor, outputs: int) -> bool:
    """grouped_mm refuses rows that are not a multiple of 16 bytes, and double precision."""
    size = x.element_size()
    return size <= 4 and x.shape[1] * size % 16 == outputs * size % 16 == 0


def fits_sgmv(x: Tensor) -> bool:
    """The kernels run on CUDA, in single precision or less."""
    return x.is_cuda and has_triton() and x.dtype != torch.float64


def choose(index: Index, x: Tensor, inputs: int, outputs: int) -> str:
    """The name of the op that should be fastest for the batch x (T, in) on a layer of inputs -> outputs."""
    key = inputs, outputs, x.dtype, x.device.type
    if key not in index.choices:
        if index.static and not fits_sgmv(x):
            index.choices[key] = "gather"
        elif x.device.type == "cpu":
            cost = cpu_costs(index, inputs, outputs)
            index.choices[key] = min(cost, key=cost.get)
        elif fits_sgmv(x):
            index.choices[key] = "sgmv"  # two launches whatever the batch, and no copies
        else:  # launches are what costs: segments has two per adapter
            index.choices[key] = "segments" if index.adapters <= 2 else "tiles"
    return index.choices[key]


def cpu_costs(index: Index, inputs: int, outputs: int) -> dict[str, float]:
    """Microseconds that each op should take on one CPU core, from what it has to do.

    Fitted to the CPU times of 600 shapes (1 to 512 rows, 1 to 32 adapters of rank 4 to 32, layers 64 -> 160 to
    1024 -> 1024) on an AMD EPYC with AVX-512, where the op chosen takes 2 % longer than the best on average, at
    worst 60 %. Elsewhere the constants move, but mostly together; `opbench` measures whether the choices still hold.

    What decides: gather copies an adapter for each row, tiles for each tile; blocks copies none, but pays with empty
    cells when some adapter has many rows; segments costs 7 for every adapter, which is nothing beside a long prompt.
    grouped_mm is left out: on a CPU it is a loop over adapters too, and wherever it beats segments, tiles beat it.
    """
    T, R, layer = len(index), index.rank, (inputs + outputs) / 1000
    if not R:
        return {"gather": 0.0}
    copy, read, move, multiply = 0.3, 0.19, 0.35, 0.03  # a thousand numbers

    def tiled(cut: Tiles, fetch: float) -> float:
        row = multiply * R + (0 if cut.aligned else move)
        return cut.count * layer * (fetch * R + cut.rows * row)

    adapters = index.adapters
    cost = {
        "gather": 11 + copy * T * R * layer,
        "tiles": 11 + tiled(index.tiles(index.tile_rows), copy),
        "segments": 1 + 7 * adapters + layer * (read * adapters * R + multiply * T * R),
    }
    if not index.grouped:
        cost["segments"] += 2 * move * T * layer
    if index.contiguous:
        cost["blocks"] = 11 + tiled(index.blocks, read)
    return cost


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


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
