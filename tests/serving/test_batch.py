"""The tables that the ops read: each row in one place, each place with the right pages."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labs_lib.serving.batch import Index

TABLE = torch.tensor([[0, 0, 0], [5, 2, 0], [1, 3, 4], [9, 0, 0], [0, 0, 0]])
PAGES = {0: [], 1: [5, 2], 2: [1, 3, 4], 3: [9], 4: []}
batches = st.lists(st.integers(0, 4), max_size=25)


@settings(deadline=None)
@given(slots=batches, rows=st.integers(1, 9))
def test_tiles_hold_each_row_with_an_adapter_once(slots, rows):
    index = Index(slots, TABLE)
    cut = index.tiles(rows)
    held = cut.cells[cut.cells >= 0]
    assert sorted(held) == [row for row, slot in enumerate(slots) if PAGES[slot]]
    assert (cut.cells[cut.cell_of_row[held]] == held).all()
    for tile in range(cut.count):
        members = [slots[row] for row in cut.cells[tile * rows : (tile + 1) * rows] if row >= 0]
        assert len(set(members)) == 1, "a tile has one slot and is not empty"
        assert [page for page in cut.table[tile] if page] == PAGES[members[0]]
    assert cut.count == sum(-(-slots.count(slot) // rows) for slot in set(slots) if PAGES[slot])


@settings(deadline=None)
@given(slots=batches)
def test_segments_cover_the_batch_in_order(slots):
    index = Index(slots, TABLE)
    order = list(range(len(slots))) if index.order is None else index.order.tolist()
    at = 0
    for slot, start, stop, pages in index.segments:
        assert start == at < stop
        assert {slots[row] for row in order[start:stop]} == {slot}
        assert (pages is None) == (not PAGES[slot])
        if pages is not None:
            assert np.arange(10)[pages].tolist() == PAGES[slot]
        at = stop
    assert at == len(slots) and sorted(order) == list(range(len(slots)))
    if index.back is not None:
        assert [order[place] for place in index.back.tolist()] == list(range(len(slots)))


@settings(deadline=None)
@given(slots=batches)
def test_the_rows_pages(slots):
    index = Index(slots, TABLE)
    assert [[page for page in row if page] for row in index.row_pages.tolist()] == [PAGES[s] for s in slots]
    assert index.rank == max((len(PAGES[slot]) for slot in slots), default=0)
    assert index.adapters == len({slot for slot in slots if PAGES[slot]})


def test_rows_that_stand_together_stay_where_they_are():
    assert Index([3, 3, 1, 0, 2, 2], TABLE).order is None, "grouped, though not sorted"
    assert Index([3, 1, 3], TABLE).order.tolist() == [1, 0, 2], "stable"


def test_blocks_span_the_slots_in_use_and_are_aligned_when_full():
    table = torch.arange(12).view(6, 2) * (torch.arange(6) > 0)[:, None]
    index = Index([2, 2, 3, 3, 4, 4], table, contiguous=True)
    assert (index.low, index.blocks.count, index.blocks.rows, index.blocks.aligned) == (2, 3, 2, True)
    index = Index([0, 4, 2, 2], table, contiguous=True)
    assert (index.low, index.blocks.count, index.blocks.rows, index.blocks.aligned) == (2, 3, 2, False)
    assert index.blocks.cells.tolist() == [2, 3, -1, -1, 1, -1]
    assert index.blocks.base.flatten().tolist() == [True, False, False, False]


def test_slot_0_has_no_pages_whatever_the_table_says():
    table = TABLE.clone()
    table[0] = torch.tensor([7, 8, 0])
    index = Index([0, 3, 0], table)
    assert index.row_pages.tolist() == [[0], [9], [0]]
    assert [segment.pages is None for segment in Index([0, 0, 3], table).segments] == [True, False]


def test_a_batch_without_adapters():
    for slots in ([], [0, 0], [4]):
        index = Index(slots, TABLE)
        assert (index.rank, index.adapters, index.largest, len(index)) == (0, 0, 0, len(slots))
