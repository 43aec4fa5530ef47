"""Every op gives every row its own adapter's update, whatever the batch, and nothing of anybody else's."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from labs_lib.errors import LabsError
from labs_lib.serving.batch import Index
from labs_lib.serving.ops import OPS, choose, fits_grouped, loop
from labs_lib.serving.types import IsolationError

torch.set_num_threads(1)
FAST = [name for name in OPS if name not in ("loop", "sgmv")]


class World:
    """A pool with adapters of the given ranks, and a batch.

    In a contiguous pool, slot s owns R pages and the unused ones are zeros. In the other kind, an adapter's pages lie
    anywhere, and all other pages hold NaN: keys and values of strangers, which no op may touch.
    """

    def __init__(self, ranks, slots, contiguous, inputs=12, outputs=20, seed=0, dtype=torch.float32):
        draw = torch.Generator().manual_seed(seed)
        R, S = max([*ranks, 1]) + 1, len(ranks) + 1
        width = 3 + inputs + 5 + outputs + 2
        self.table = torch.zeros(S, R, dtype=torch.long)
        if contiguous:
            self.arena = torch.zeros(S * R, width)
            for slot, rank in enumerate(ranks, 1):
                self.table[slot, :rank] = slot * R + torch.arange(rank)
        else:
            self.arena = torch.full((S * R + 7, width), torch.nan)
            self.arena[0] = 0
            free = (torch.randperm(len(self.arena) - 1, generator=draw) + 1).tolist()
            for slot, rank in enumerate(ranks, 1):
                self.table[slot, :rank] = torch.tensor([free.pop() for _ in range(rank)])
        used = self.table[self.table > 0]
        self.arena[used] = torch.randn(len(used), width, generator=draw)
        self.arena = self.arena.to(dtype)
        self.a = self.arena[:, 3 : 3 + inputs]
        self.b = self.arena[:, 8 + inputs : 8 + inputs + outputs]
        self.x = torch.randn(len(slots), inputs, generator=draw).to(dtype)
        self.slots = torch.tensor(slots, dtype=torch.long)
        self.index = Index(slots, self.table, contiguous)

    def run(self, name, x=None, out=None):
        return OPS[name](self.x if x is None else x, self.a, self.b, self.index, out=out)

    def truth(self):
        """The update in float64, and the sum of its terms' absolute values: what rounding is measured against."""
        x, a, b = self.x.double(), self.a.double(), self.b.double()
        return loop(x, a, b, self.index), loop(x.abs(), a.abs(), b.abs(), self.index)

    def able(self, name):
        if name == "grouped":
            return hasattr(torch.nn.functional, "grouped_mm") and fits_grouped(self.x, self.b.shape[1])
        return name != "blocks" or self.index.contiguous


ALIGNED = st.sampled_from([4, 12, 20])


@st.composite
def worlds(draw, sizes=ALIGNED):
    ranks = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    slots = draw(st.lists(st.integers(0, len(ranks)), max_size=40))
    arrange = draw(st.sampled_from([list, sorted, lambda slots: sorted(slots, key=lambda s: (s * 5 % 7, s))]))
    return World(
        ranks, arrange(slots), draw(st.booleans()), draw(sizes), draw(sizes), draw(st.integers(0, 9))
    )


EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", FAST)
@EXAMPLES
@given(world=worlds())
def test_every_op_equals_the_loop_in_double_precision(name, world):
    if not world.able(name):
        return
    truth, scale = world.truth()
    delta = world.run(name)
    assert delta.shape == truth.shape and delta.dtype == world.x.dtype
    assert ((delta - truth).abs() <= 1e-5 * scale).all()
    assert (delta[world.slots == 0] == 0).all(), "a base row got something"

    base = torch.randn(truth.shape)
    given_out = base.clone()
    assert world.run(name, out=given_out) is given_out
    assert ((given_out - base - truth).abs() <= 1e-5 * scale + 1e-6).all()
    assert (given_out == base)[world.slots == 0].all()


@EXAMPLES
@given(world=worlds(st.integers(1, 9)))
def test_odd_widths_and_strided_inputs(world):
    """Nothing but grouped_mm asks for alignment; x and out may themselves be slices."""
    truth, scale = world.truth()
    wide = torch.zeros(len(world.x), 2 * world.x.shape[1])
    wide[:, ::2] = world.x
    into = torch.zeros(len(world.x), 3 + world.b.shape[1])
    for name in FAST:
        if world.able(name):
            into.zero_()
            world.run(name, x=wide[:, ::2], out=into[:, 3:])
            assert ((into[:, 3:] - truth).abs() <= 1e-5 * scale).all(), name
            assert (into[:, :3] == 0).all(), name


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_one_tenant_uploads_touches_nobody_else(name, value, contiguous):
    """Bit for bit, with the weights of one adapter poisoned, and then with one row's input."""
    slots = [3, 0, 1, 2, 3, 1, 0, 2, 2, 4]
    clean, spoilt = (World([2, 3, 4, 1], slots, contiguous) for _ in range(2))
    if not clean.able(name):
        return
    theirs = spoilt.table[2][spoilt.table[2] > 0]
    spoilt.arena[theirs] = value
    before, after, other = clean.run(name), spoilt.run(name), clean.slots != 2
    assert torch.equal(before[other], after[other])
    assert not after[~other].isfinite().any()

    for row in (0, 3):  # row 0 is the one that stands in empty cells
        x = clean.x.clone()
        x[row] = value
        after, other = clean.run(name, x=x), torch.arange(len(slots)) != row
        assert torch.equal(before[other], after[other])


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("slots", [[], [0], [0, 0, 0], [2], [1, 0, 0], [4, 4, 4], [5], [5, 0, 1]], ids=str)
def test_small_batches(name, slots):
    """Empty, base only, one row, one adapter, an adapter without ranks."""
    world = World([1, 2, 3, 4, 0], slots, True)
    truth, scale = world.truth()
    for out in (None, torch.zeros_like(truth, dtype=torch.float32)):
        delta = world.run(name, out=out)
        assert delta.shape == (len(slots), 20)
        assert ((delta - truth).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("name", [*FAST, "loop"])
@pytest.mark.parametrize("slots", [[1, 2, 3], [3, 0, 1, 1, 2, 3, 3], [2, 2, 0, 0, 1, 1, 1]], ids=str)
def test_gradients_are_those_of_the_loop(name, slots):
    """The arena trains through the same ops: all gradients, of pages in use and of pages that nobody used."""

    def gradients(op, with_out, dtype=torch.float32 if name == "grouped" else torch.float64):
        world = World([2, 3, 1], slots, True)
        arena = world.arena.to(dtype).requires_grad_()
        x, base = world.x.to(dtype).requires_grad_(), torch.ones(len(slots), 20, dtype=dtype).requires_grad_()
        a, b = arena[:, 3:15], arena[:, 20:40]
        y = op(x, a, b, world.index, out=base.clone()) if with_out else op(x, a, b, world.index) + base
        (y**2).sum().backward()
        return arena.grad, x.grad, base.grad

    for with_out in (False, True):
        for mine, theirs in zip(gradients(OPS[name], with_out), gradients(loop, False), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", FAST)
def test_half_precision(name):
    world = World([8, 3, 8], [1, 2, 3, 0, 1, 1], True, 16, 32, dtype=torch.bfloat16)
    truth, scale = world.truth()
    delta = world.run(name)
    assert delta.dtype == torch.bfloat16
    assert ((delta - truth).abs() <= 0.02 * scale).all()


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def moves(world, name):
    """How many calls of an op copy rows or weights."""
    world.run(name)  # what the index derives is derived once
    out = torch.zeros(len(world.x), 20)
    with Calls() as calls:
        world.run(name, out=out)
    return sum(
        call in ("index_select", "index", "embedding", "cat", "clone", "copy_") for call in calls.names
    )


def test_rows_in_slot_order_are_not_copied():
    in_order, mixed, alone = [1, 1, 2, 2, 3, 3], [3, 1, 2, 1, 3, 2], [1, 1, 1, 3, 2, 2]
    worlds = [World([4, 4, 4], slots, True) for slots in (in_order, mixed, alone)]
    assert [moves(world, "segments") for world in worlds] == [0, 3, 0]
    assert [moves(world, "blocks") for world in worlds] == [0, 2, 2]
    assert [moves(world, "gather") for world in worlds] == [2, 2, 2], "a copy of A and a copy of B"


def test_a_slot_that_is_not_there_is_refused():
    """-1 would index the last slot: base rows with another tenant's adapter, a fault that real engines shipped."""
    table = torch.zeros(3, 2, dtype=torch.long)
    for slots in ([0, -1, 1], [3], torch.tensor([1, 7])):
        with pytest.raises(IsolationError, match=r"pool has 0\.\.2"):
            Index(slots, table)


@pytest.mark.parametrize("name", FAST)
def test_what_happens_to_the_table_later_is_not_this_batch_s_business(name):
    """A slot remapped while a step is under way: the step goes on with the pages it was given."""
    world = World([2, 3], [1, 2, 0, 2], True)
    truth, scale = world.truth()
    world.table[:] = 0
    assert ((world.run(name) - truth).abs() <= 1e-5 * scale).all() and truth.any()


def test_what_cannot_work_says_what_to_do():
    with pytest.raises(LabsError, match="use gather"):
        World([2], [1], False).run("blocks")
    with pytest.raises(LabsError, match="use segments"):
        World([2], [1], True, inputs=7).run("grouped")


@EXAMPLES
@given(world=worlds(st.integers(1, 20)))
def test_choose_takes_an_op_that_works(world):
    name = choose(world.index, world.x, world.x.shape[1], world.b.shape[1])
    assert world.able(name)
    truth, scale = world.truth()
    assert ((world.run(name) - truth).abs() <= 1e-5 * scale).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(name, dtype):
    world = World([8, 3, 8, 16], [3, 0, 1, 2, 3, 1, 4] * 5, True, 64, 96, dtype=dtype)
    truth, scale = world.truth()
    index = Index(world.slots, world.table, True, "cuda")
    out = torch.zeros(truth.shape, dtype=dtype, device="cuda")
    OPS[name](world.x.cuda(), world.arena.cuda()[:, 3:67], world.arena.cuda()[:, 72:168], index, out=out)
    assert ((out.cpu() - truth).abs() <= (1e-5 if dtype == torch.float32 else 0.02) * scale).all()
