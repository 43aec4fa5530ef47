"""Slots and pages: who owns what under both policies, and that nobody finds what another left."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from labs_lib.errors import LabsError
from labs_lib.serving.arena import Arena, Pages
from labs_lib.serving.layout import Layout
from labs_lib.serving.pool import KV_PAGE, Pool

WIDTH, CELL, RANKS = 32, 8, 4  # four KV cells to a page of the unified pool
LAYOUT = Layout((), WIDTH, CELL)
POLICIES = ["separate", "unified"]


def small_pool(policy: str = "separate", slots: int = 3, kv_tokens: int = 64, **more) -> Pool:
    return Pool(LAYOUT, slots, RANKS, kv_tokens, policy, **more)


def fill(pool: Pool, name: str, rank: int, tenant: str = "t"):
    return pool.fill(
        name, rank, torch.full((rank, WIDTH), float(len(name) + rank)), gain=False, tenant=tenant
    )


# -- pages ---------------------------------------------------------------------------------------------------------


def test_pages_are_numbered_from_one_and_page_zero_is_never_given():
    pages = Pages(5)
    assert sorted(pages.take(5, "a")) == [1, 2, 3, 4, 5]
    assert pages.take(1, "b") is None
    assert pages.free == 0


def test_too_many_pages_take_nothing():
    pages = Pages(3)
    assert pages.take(4, "a") is None
    assert pages.free == 3
    assert not pages.owner


def test_a_page_given_back_twice_is_an_error():
    pages = Pages(3)
    mine = pages.take(2, "a")
    pages.give_back(mine)
    with pytest.raises(KeyError):
        pages.give_back(mine[:1])
    assert pages.free == 3


def test_a_page_of_nobody_cannot_be_given_back():
    with pytest.raises(KeyError):
        Pages(3).give_back([0])


def test_short_values_leave_the_rest_of_a_page_zero():
    arena = Arena(3, WIDTH, torch.float32, "cpu")
    arena.write([2], torch.ones(1, WIDTH - 5))
    assert arena.data[2].sum() == WIDTH - 5
    assert arena.data[[0, 1, 3]].count_nonzero() == 0


# -- slots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_an_adapter_is_found_where_the_table_says(policy):
    pool = small_pool(policy)
    values = torch.randn(3, WIDTH)
    slot = pool.fill("a", 3, values, gain=True, tenant="t")
    assert pool.find("a") is slot
    assert slot.number > 0
    assert torch.equal(pool.adapters.data[pool.table[slot.number, :3]], values)
    assert (pool.table[slot.number, 3:] == 0).all()
    assert pool.gain_page[slot.number] == slot.pages[-1]


@pytest.mark.parametrize("policy", POLICIES)
def test_an_adapter_without_gains_points_to_the_page_of_zeros(policy):
    pool = small_pool(policy)
    assert pool.gain_page[fill(pool, "a", 2).number] == 0


def test_separate_slots_are_contiguous():
    """The promise on which batched ops view the arena as (slots, ranks, width)."""
    pool = small_pool()
    for name in "abc":
        fill(pool, name, 2)
    slots = pool.adapters.data.view(-1, RANKS, WIDTH)
    assert len(slots) == len(pool.table)
    for slot in pool.resident:
        assert slot.pages == [slot.number * RANKS, slot.number * RANKS + 1]
        assert torch.equal(slots[slot.number, :2], pool.adapters.data[slot.pages])
        assert slots[slot.number, 2:].count_nonzero() == 0
    assert slots[0].count_nonzero() == 0


def test_unified_pages_are_as_many_as_the_rank():
    pool = small_pool("unified")
    free = pool.kv_free
    fill(pool, "a", 1)
    fill(pool, "b", 4)
    assert free - pool.kv_free == 5


def test_more_small_adapters_fit_into_a_unified_pool():
    """Slots of full height waste what a low rank leaves over; pages do not."""
    held = {}
    for policy in POLICIES:
        pool = small_pool(policy, slots=2, kv_tokens=1)
        count = 0
        while pool.fits(1):
            fill(pool, str(count), 1)
            count += 1
        held[policy] = count
    assert held["separate"] == 2
    assert held["unified"] >= 2 * RANKS


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_cleared_is_zero_and_nowhere_listed(policy):
    pool = small_pool(policy)
    slot = pool.fill("a", 4, torch.ones(4, WIDTH), gain=True, tenant="t")
    pages = list(slot.pages)
    assert pool.adapters.data.count_nonzero() == 4 * WIDTH
    pool.clear(slot)
    assert pool.adapters.data.count_nonzero() == 0
    assert pool.find("a") is None
    assert (slot.adapter, slot.pages, slot.gain) == (None, [], False)
    assert pool.table.count_nonzero() == pool.gain_page.count_nonzero() == 0
    assert pages != []


@pytest.mark.parametrize("policy", POLICIES)
def test_the_generation_grows_each_time_a_slot_is_filled(policy):
    """It is what tells an old lease from a new one when the same adapter comes back to the same slot."""
    pool = small_pool(policy, slots=1)
    seen = []
    for _ in range(3):
        slot = fill(pool, "a", RANKS)
        seen.append((slot.number, slot.generation))
        pool.clear(slot)
    assert [generation for _, generation in seen] == [1, 2, 3]
    assert len({number for number, _ in seen}) == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_a_slot_in_use_is_not_cleared(policy):
    pool = small_pool(policy)
    slot = fill(pool, "a", 2)
    slot.refs = 1
    with pytest.raises(AssertionError):
        pool.clear(slot)
    assert pool.find("a") is slot
    assert pool.adapters.data[slot.pages].count_nonzero()


def test_slot_zero_is_the_base_and_is_never_given_away():
    pool = small_pool()
    numbers = {fill(pool, name, 1).number for name in "abc"}
    assert 0 not in numbers
    assert not pool.fits(1)
    assert pool.slots[0].generation == 0


def test_a_full_unified_pool_has_no_room_for_either_use():
    pool = small_pool("unified", slots=1, kv_tokens=8)
    held = pool.take_kv(pool.kv_count - 2)
    assert pool.fits(2)
    assert not pool.fits(3)
    fill(pool, "a", 2)
    assert pool.take_kv(1) is None
    pool.give_kv(held)
    assert pool.fits(4)


def test_both_policies_cost_the_same_bytes_for_the_same_arguments():
    """Up to rounding to pages and the one page of zeros."""
    sizes = {policy: small_pool(policy, slots=6, kv_tokens=640).nbytes for policy in POLICIES}
    page = WIDTH * 4
    assert abs(sizes["separate"] - sizes["unified"]) <= (RANKS + 1) * page + KV_PAGE * CELL * 4


def test_books_without_memory():
    """For the digital twin: the same decisions, no tensor."""
    for policy in POLICIES:
        pool = small_pool(policy, device=None)
        slot = pool.fill("a", 2, None, gain=False, tenant="t")
        assert pool.nbytes == 0
        pool.clear(slot)
        pool.give_kv(pool.take_kv(2))


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_empty_pools_are_refused(arguments):
    with pytest.raises(LabsError, match="at least 1"):
        Pool(LAYOUT, *arguments)


def test_an_unknown_policy_is_refused():
    with pytest.raises(LabsError, match="separate"):
        small_pool("shared")


# -- keys and values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_cells_of_a_page_follow_each_other(policy):
    pool = small_pool(policy)
    (page,) = pool.take_kv(1)
    size = pool.tokens_per_page
    pool.cells()[page * size : (page + 1) * size] = 1.0
    assert (pool.kv.data[page] == 1).all()
    assert pool.kv.data.count_nonzero() == pool.kv.data.shape[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_keys_and_values_are_zeroed_when_given_back(policy):
    pool = small_pool(policy)
    pages = pool.take_kv(2)
    pool.kv.data[pages] = 7.0
    pool.give_kv(pages)
    assert pool.kv.data.count_nonzero() == 0
    with pytest.raises(KeyError):
        pool.give_kv(pages)


@pytest.mark.parametrize("policy", POLICIES)
def test_pages_for_tokens_round_up(policy):
    pool = small_pool(policy)
    size = pool.tokens_per_page
    assert [pool.kv_pages_for(n) for n in (0, 1, size, size + 1)] == [0, 1, 1, 2]


class Traffic(RuleBasedStateMachine):
    """Fill, clear, take and give in any order: no page has two owners, and what nobody owns is zero."""

    policy = "separate"

    def __init__(self) -> None:
        super().__init__()
        self.pool = small_pool(self.policy, slots=3, kv_tokens=32)
        self.kv: list[list[int]] = []
        self.count = 0

    @rule(rank=st.integers(1, RANKS), gain=st.booleans())
    def fill(self, rank, gain):
        if not self.pool.fits(rank):
            return
        self.count += 1
        before = self.pool.slots[self.pool._empty[-1]].generation
        slot = self.pool.fill(f"a{self.count}", rank, torch.ones(rank, WIDTH), gain, "t")
        assert slot.generation == before + 1

    @precondition(lambda self: self.pool.resident)
    @rule(which=st.integers(0, 10))
    def clear(self, which):
        self.pool.clear(self.pool.resident[which % len(self.pool.resident)])

    @rule(count=st.integers(0, 5))
    def take(self, count):
        free = self.pool.kv_free
        pages = self.pool.take_kv(count)
        assert (pages is None) == (count > free)
        if pages:
            self.pool.kv.data[pages] = 2.0
            self.kv.append(pages)

    @precondition(lambda self: self.kv)
    @rule(which=st.integers(0, 10))
    def give(self, which):
        self.pool.give_kv(self.kv.pop(which % len(self.kv)))

    @invariant()
    def every_page_has_one_owner_and_the_rest_is_zero(self):
        pool = self.pool
        adapter_pages = [page for slot in pool.resident for page in slot.pages]
        kv_pages = [page for pages in self.kv for page in pages]
        arenas = [(pool.adapters, adapter_pages), (pool.kv, kv_pages)]
        if pool.adapters is pool.kv:
            arenas = [(pool.kv, adapter_pages + kv_pages)]
            assert pool.kv_free == pool.kv_count - len(adapter_pages) - len(kv_pages)
        for arena, owned in arenas:
            assert len(set(owned)) == len(owned)
            assert 0 not in owned
            free = torch.ones(len(arena.data), dtype=torch.bool)
            free[owned] = False
            assert arena.data[free].count_nonzero() == 0
            assert (arena.data[owned] != 0).all()
        for slot in pool.slots:
            row = pool.table[slot.number]
            assert row[: len(slot.pages)].tolist() == slot.pages
            assert (row[len(slot.pages) :] == 0).all()


class UnifiedTraffic(Traffic):
    policy = "unified"


limits = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestTraffic, TestUnifiedTraffic = Traffic.TestCase, UnifiedTraffic.TestCase
TestTraffic.settings = TestUnifiedTraffic.settings = limits
