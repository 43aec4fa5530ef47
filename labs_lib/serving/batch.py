"""Which adapter each row of a batch uses, in the forms that the ops want: made once per step, shared by all layers.

The bookkeeping is numpy on the host (a few microseconds a call, where a torch call costs as much as the work);
what an op needs on the device goes there the first time that an op asks.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from labs_lib.serving.types import IsolationError

TILE = 16  # rows: what a GPU's matrix units multiply at least


class Segment(NamedTuple):
    """Rows start..stop of the batch in `Index.order`: all of one slot. `pages` indexes the arena; None: no adapter."""

    slot: int
    start: int
    stop: int
    pages: slice | torch.Tensor | None


class Tiles:
    """The rows that have an adapter, cut into `count` tiles of up to `rows` rows; all rows of a tile have one slot.

    Cell k of tile i is number i * rows + k. `cell_of_row` (T,) says in which cell each row lies, -1 for rows without an
    adapter; `table` (count, R) has each tile's pages.
    """

    def __init__(self, count: int, rows: int, cell_of_row: np.ndarray, table: np.ndarray, device) -> None:
        self.count, self.rows, self.cell_of_row, self.table = count, rows, cell_of_row, table
        self.device = device

    @cached_property
    def cells(self) -> np.ndarray:
        """(count * rows,) the row of the batch in each cell, -1 if none."""
        cells, has = np.full(self.count * self.rows, -1), np.flatnonzero(self.cell_of_row >= 0)
        cells[self.cell_of_row[has]] = has
        return cells

    @cached_property
    def aligned(self) -> bool:
        """The tiles are the batch itself: nothing has to be moved."""
        T = len(self.cell_of_row)
        return self.count * self.rows == T and bool((self.cell_of_row == np.arange(T)).all())

    @cached_property
    def place(self) -> torch.Tensor | None:
        """(count * rows,) the row to copy into each cell; None if aligned. Empty cells get row 0: nobody reads them."""
        return None if self.aligned else torch.from_numpy(np.maximum(self.cells, 0)).to(self.device)

    @cached_property
    def back(self) -> torch.Tensor | None:
        """(T,) the cell to read each row's result from; None if aligned."""
        return None if self.aligned else torch.from_numpy(np.maximum(self.cell_of_row, 0)).to(self.device)

    @cached_property
    def base(self) -> torch.Tensor | None:
        """(T, 1) True for rows without an adapter, whose result is zero whatever `back` read; None if none."""
        mask = self.cell_of_row < 0
        return torch.from_numpy(mask[:, None]).to(self.device) if mask.any() else None

    @cached_property
    def cells_on_device(self) -> torch.Tensor:
        """`cells` for a kernel that moves rows by itself."""
        return torch.from_numpy(self.cells).to(self.device)

    @cached_property
    def pages(self) -> torch.Tensor:
        """(count, R) page numbers of each tile's adapter, padded by 0."""
        return torch.from_numpy(self.table).to(self.device)


class Index:
    """The batch of one step as the ops see it.

    `static` False: made for one batch, of shapes that follow from it (see `StaticIndex`).

    Args:
        slot: slot of each row (T,), a sequence of ints or a tensor. 0 is the base model.
        pages: page table (S, R) in host memory: row s has the pages of slot s, padded by 0, the page of zeros.
        contiguous: page r of slot s is number s * R + r wherever there is one, and the rest of these R pages are zeros,
            so that an arena (P, width) seen as (S, R, width) has one adapter per row.
        device: where the ops run.

    Raises IsolationError for a slot that is not in the table: -1 would quietly read the last tenant's pages.
    """

    static = False

    def __init__(
        self,
        slot: Sequence[int] | torch.Tensor,
        pages: torch.Tensor,
        contiguous: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.pages, self.contiguous, self.device = pages.cpu(), contiguous, device
        slot = slot.cpu().numpy() if isinstance(slot, torch.Tensor) else slot
        self.slots = slots = np.array(slot, dtype=np.int64)
        if len(slots) and not (slots.min() >= 0 and slots.max() < len(pages)):
            wrong = sorted({int(s) for s in slots if not 0 <= s < len(pages)})
            raise IsolationError(f"Rows ask for slots {wrong}, but the pool has 0..{len(pages) - 1}.")
        # Rows of one slot must come to stand together. They often do already (the tokens of a prompt; a batch kept in
        # slot order): then the order is left alone, which saves two copies in every layer.
        runs = _starts(slots)
        order = slots.argsort(kind="stable")
        groups = _starts(slots[order])
        self.grouped = len(runs) == len(groups)  #: rows of a slot already stand together
        self._order = np.arange(len(slots)) if self.grouped else order
        self._starts = runs if self.grouped else groups
        self._counts = np.diff(self._starts, append=len(slots))
        self._slots = slots[self._order[self._starts]]  # the slot of each segment
        # Only these slots' pages are ever looked at again: what happens to the table later is other batches' business.
        table = self.pages.numpy()[self._slots]
        table[self._slots == 0] = 0
        #: R of this batch: pages that its largest adapter uses; 0 means that no row has an adapter.
        self.rank = int(np.flatnonzero(table.any(0))[-1]) + 1 if table.any() else 0
        self._table = table[:, : self.rank]  # (segments, R)
        self._has = table.any(1)  # segments with an adapter
        self._tiles: dict[int, Tiles] = {}
        self.choices: dict = {}  # what `ops.choose` decided, by shape

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def adapters(self) -> int:
        """How many different adapters the batch uses."""
        return int(self._has.sum())

    @property
    def largest(self) -> int:
        """Rows of the adapter that has most."""
        return int(self._counts[self._has].max(initial=0))

    @cached_property
    def slot(self) -> torch.Tensor:
        """(T,) slot of each row, on the device."""
        return torch.from_numpy(self.slots).to(self.device)

    @cached_property
    def order(self) -> torch.Tensor | None:
        """(T,) stable order in which rows of a slot stand together; None if they do already."""
        return None if self.grouped else torch.from_numpy(self._order).to(self.device)

    @cached_property
    def back(self) -> torch.Tensor | None:
        """(T,) where each row stands in `order`; None if the rows are in order."""
        return None if self.grouped else torch.from_numpy(_inverse(self._order)).to(self.device)

    @cached_property
    def segments(self) -> list[Segment]:
        """The batch in `order`, one segment per slot, base rows too."""
        found = []
        for slot, start, count, pages in zip(
            self._slots.tolist(), self._starts.tolist(), self._counts.tolist(), self._table, strict=True
        ):
            pages = pages[: np.flatnonzero(pages)[-1] + 1] if pages.any() else None
            if pages is not None and (np.diff(pages) == 1).all():
                pages = slice(int(pages[0]), int(pages[-1]) + 1)  # a view instead of a copy
            elif pages is not None:
                pages = torch.from_numpy(pages).to(self.device)
            found.append(Segment(slot, start, start + count, pages))
        return found

    @cached_property
    def ends(self) -> torch.Tensor:
        """(segments,) int32: where each segment ends, as grouped_mm wants it."""
        return torch.from_numpy((self._starts + self._counts).astype(np.int32)).to(self.device)

    @cached_property
    def table(self) -> torch.Tensor:
        """(segments, R) pages of each segment, padded by 0 to a multiple of 8: kernels read 16 bytes at a time."""
        padded = np.pad(self._table, ((0, 0), (0, -self.rank % 8)))
        return torch.from_numpy(padded).to(self.device)

    @cached_property
    def row_pages(self) -> torch.Tensor:
        """(T, R) pages of each row, padded by 0."""
        segment = np.repeat(np.arange(len(self._counts)), self._counts)[_inverse(self._order)]
        return torch.from_numpy(self._table[segment]).to(self.device)

    def tiles(self, rows: int) -> Tiles:
        """The batch in tiles of up to `rows` rows each, for ops that fetch an adapter once per tile."""
        if rows not in self._tiles:
            need = -(-self._counts // rows) * self._has  # tiles of each segment
            first = np.cumsum(need) - need
            table = np.repeat(self._table, need, axis=0)
            self._tiles[rows] = self._tiled(int(need.sum()), rows, first * rows, table)
        return self._tiles[rows]

    @cached_property
    def blocks(self) -> Tiles:
        """One tile for each slot from the lowest to the highest in use, whether it has rows or not.

        Contiguous pools only: tile i's adapter need not be fetched, it is row `low + i` of the arena as (S, R, width).
        """
        slots = self._slots[self._has]
        count, rows = int(slots.max() - slots.min()) + 1, self.largest
        first = (self._slots - slots.min()) * rows
        return self._tiled(count, rows, first, np.zeros((count, 0), dtype=np.int64))

    @cached_property
    def low(self) -> int:
        """The lowest slot in use, besides the base."""
        return int(self._slots[self._has].min())

    @cached_property
    def tile_rows(self) -> int:
        """Rows per tile that cost least: a tile costs its pages once, and every cell, empty or not, its row.

        A page's copy is the unit; a row's copy is about one more, and its products an eighth of one per page.
        """
        sizes = [2**k for k in range(max(self.largest, 1).bit_length() + 1)]
        counts = self._counts[self._has]
        return min(
            sizes, key=lambda rows: (-(-counts // rows)).sum() * (3 + self.rank + rows * (1 + self.rank / 8))
        )

    def _tiled(self, count: int, rows: int, first: np.ndarray, table: np.ndarray) -> Tiles:
        """Tiles with the rows of segment g in cells first[g], first[g] + 1, ..."""
        within = np.arange(len(self.slots)) - np.repeat(self._starts, self._counts)
        cells = np.repeat(np.where(self._has, first, -1), self._counts)
        cell_of_row = np.empty_like(self.slots)
        cell_of_row[self._order] = np.where(cells < 0, -1, cells + within)
        return Tiles(count, rows, cell_of_row, table, self.device)


class StaticIndex:
    """The same in memory that stays where it is, for a recorded step: what `gather` and `sgmv` read, at fixed shapes.

    Any batch of `rows` rows whose adapters have up to `rank` pages fits in: there are as many tiles as rows, for the
    case that every row has an adapter of its own. A tile that is not needed has no rows; the kernel leaves it at once.
    """

    static, largest, tile_rows = True, 0, TILE

    def __init__(self, rows: int, rank: int, device: torch.device | str) -> None:
        self.rank, self.count, self.rows = rank, rows, TILE
        self.row_pages = torch.zeros(rows, rank, dtype=torch.long, device=device)
        self.cells_on_device = torch.full((rows * TILE,), -1, dtype=torch.long, device=device)
        self.pages = torch.zeros(rows, rank, dtype=torch.long, device=device)
        self.choices: dict = {}

    def __len__(self) -> int:
        return len(self.row_pages)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return {"row_pages": self.row_pages, "cells": self.cells_on_device, "pages": self.pages}

    def tiles(self, rows: int) -> "StaticIndex":
        """Itself: it has one size of tiles."""
        assert rows == TILE
        return self

    def fill(self, index: Index) -> None:
        """Take over a batch of as many rows, base rows among them."""
        cut = index.tiles(TILE)
        for buffer, new in (
            (self.row_pages, index.row_pages),
            (self.cells_on_device, cut.cells_on_device),
            (self.pages, cut.pages),
        ):
            buffer.fill_(-1 if buffer is self.cells_on_device else 0)
            buffer[tuple(slice(size) for size in new.shape)] = new


def _starts(slots: np.ndarray) -> np.ndarray:
    """Where the runs of equal slots start."""
    return np.flatnonzero(np.diff(slots, prepend=-1))


def _inverse(order: np.ndarray) -> np.ndarray:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse
