"""The Triton kernels against the loop: on a GPU, or in Triton's interpreter, which runs them as numpy on the CPU.

Triton comes with torch for CUDA. Elsewhere, with Triton installed next to the course (`pip install triton`):
`TRITON_INTERPRET=1 pytest tests/serving/test_sgmv.py`. The interpreter cannot multiply bfloat16.
"""

import importlib.util
import os

import pytest
import torch

from labs_lib.serving.batch import Index, StaticIndex
from labs_lib.serving.ops import choose, loop, sgmv
from labs_lib.serving.tuning import Expand, Shrink

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it as it is imported
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not CUDA and not INTERPRETED, reason="needs a CUDA device, or TRITON_INTERPRET=1"),
]
DEVICE = "cuda" if CUDA and not INTERPRETED else "cpu"
SLOW = pytest.mark.slow
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


def kernels():
    from labs_lib.serving import sgmv as module

    return module


def pool(ranks, inputs, outputs, dtype, seed=0):
    """An arena whose pages lie anywhere; the pages of nobody hold NaN."""
    draw = torch.Generator().manual_seed(seed)
    table = torch.zeros(len(ranks) + 1, max(ranks), dtype=torch.long)
    places = (torch.randperm(sum(ranks) + 5, generator=draw) + 1).tolist()
    for slot, rank in enumerate(ranks, 1):
        table[slot, :rank] = torch.tensor([places.pop() for _ in range(rank)])
    arena = torch.full((sum(ranks) + 6, 3 + inputs + outputs + 2), torch.nan)
    used = table[table > 0]
    arena[used] = torch.randn(len(used), arena.shape[1], generator=draw) / inputs**0.5
    arena[0] = 0
    return table, arena.to(dtype)


@SLOW
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=GPU)], ids=str
)
@pytest.mark.parametrize(
    ("ranks", "slots", "inputs", "outputs"),
    [
        ([1], [1], 40, 24),  # one row
        ([4, 2, 3], [3, 0, 1, 1, 2, 0, 3], 300, 130),  # mixed, base rows, split sums, ragged blocks
        ([8, 16], [1] * 45 + [2] * 30 + [0] * 5, 128, 64),  # several tiles of one adapter
        ([20, 33], [2, 1, 2], 96, 70),  # more ranks than one block of 16
        ([2, 3], [0, 0], 16, 16),  # nobody has an adapter
        ([64, 8], [1, 2, 0], 1030, 258),  # odd widths, one of the ranks that cards are measured at
        ([8] * 64, list(range(1, 65)), 72, 40),  # 64 rows, each with its own
    ],
    ids=["row", "mixed", "tiles", "ranks", "base", "odd", "distinct"],
)
def test_the_kernels_equal_the_loop(ranks, slots, inputs, outputs, dtype):
    table, arena = pool(ranks, inputs, outputs, dtype)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(len(slots), 2 * inputs, generator=draw).to(dtype)[
        :, :inputs
    ]  # rows with a stride of their own
    a, b = arena[:, 3 : 3 + inputs], arena[:, 3 + inputs : 3 + inputs + outputs]
    on_host = Index(slots, table)
    truth = loop(x.double(), a.double(), b.double(), on_host)
    scale = loop(x.double().abs(), a.double().abs(), b.double().abs(), on_host)

    index = Index(slots, table, device=DEVICE)
    there = arena.to(DEVICE)
    a, b = there[:, 3 : 3 + inputs], there[:, 3 + inputs : 3 + inputs + outputs]
    rounding = 1e-5 if dtype == torch.float32 else 2e-2 if dtype == torch.bfloat16 else 2e-3
    delta = sgmv(x.to(DEVICE), a, b, index)
    assert delta.dtype == dtype
    assert ((delta.cpu() - truth).abs() <= rounding * scale).all()
    assert (delta.cpu()[torch.tensor(slots) == 0] == 0).all()

    base = torch.randn(truth.shape, generator=draw).to(dtype)
    out = base.clone().to(DEVICE)
    assert sgmv(x.to(DEVICE), a, b, index, out=out) is out
    assert ((out.cpu() - base - truth).abs() <= rounding * (scale + base.abs())).all()
    assert torch.equal(sgmv(x.to(DEVICE), a, b, index), delta), "the same every time"


def test_a_recorded_steps_index_gives_the_same_and_its_empty_tiles_nothing():
    table, arena = pool([4, 7, 2], 80, 50, torch.float32)
    there = arena.to(DEVICE)
    a, b = there[:, 3:83], there[:, 83:133]
    held = StaticIndex(8, 8, DEVICE)
    for slots in ([1, 2, 3, 0, 1, 0, 0, 0], [0] * 7 + [3], [2] * 8):
        index = Index(slots, table, device=DEVICE)
        held.fill(index)
        x = torch.randn(8, 80, device=DEVICE)
        assert torch.equal(sgmv(x, a, b, held), sgmv(x, a, b, index))
        assert (held.cells_on_device.view(-1, 16)[index.tiles(16).count :] == -1).all()


@pytest.mark.parametrize("how", [(32, 64, 2, 2), (64, 512, 4, 3), (256, 1, 8, 2)])
def test_the_pieces_sizes_change_nothing(how):
    """But the order of the sums: every candidate must be right, whatever the tuning finds."""
    table, arena = pool([16, 3], 300, 130, torch.float32)
    there = arena.to(DEVICE)
    a, b = there[:, 3:303], there[:, 303:433]
    index = Index([1, 0, 2, 2], table, device=DEVICE)
    x = torch.randn(4, 300)
    truth = loop(x.double(), arena[:, 3:303].double(), arena[:, 303:433].double(), Index([1, 0, 2, 2], table))
    h = kernels().shrink(x.to(DEVICE), a, index, Shrink(*how))
    out = kernels().expand(h, b, index, torch.zeros(4, 130, device=DEVICE), Expand(how[0], how[2]))
    torch.testing.assert_close(out.cpu().double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_arena_of_more_than_two_billion_numbers():
    """1,000 adapters of a 7B model: places in it do not fit into 32 bits."""
    inputs, outputs, width = 64, 48, 1 << 21
    pages = 1100
    try:
        arena = torch.empty(pages, width, dtype=torch.float16, device=DEVICE)  # touched where it is read only
    except (RuntimeError, MemoryError):
        pytest.skip("needs 5 GB of memory")
    table = torch.tensor([[0, 0], [pages - 1, pages - 2]])
    used = arena[pages - 2 :, width - inputs - outputs :]
    used.copy_(torch.randn(2, inputs + outputs) / 8)
    arena[0, width - inputs - outputs :] = 0
    assert (pages - 1) * width > 2**31
    a, b = arena[:, width - inputs - outputs : width - outputs], arena[:, width - outputs :]
    index = Index([1, 0], table, device=DEVICE)
    x = torch.randn(2, inputs, dtype=torch.float16, device=DEVICE)
    truth = x[:1].double() @ a[[pages - 1, pages - 2]].double().T @ b[[pages - 1, pages - 2]].double()
    found = sgmv(x, a, b, index)
    torch.testing.assert_close(found[:1].double(), truth, rtol=1e-2, atol=1e-2)
    assert not found[1].any()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [8, 16, 64])
def test_the_layers_of_a_7b_model(rank, dtype):
    """At the sizes that are measured, every op and both ways to add to a layer's output."""
    from labs_lib.serving.graphs import Beside
    from labs_lib.serving.opbench import Case

    case = Case(33, 32, rank, [(4096, 4096), (4096, 11008), (11008, 4096)], device=DEVICE, dtype=dtype)
    case.check(case.able)
    case.beside(Beside(torch.device(DEVICE)))()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_gpu_gets_the_kernels():
    table, _ = pool([4, 2], 32, 32, torch.float16)
    index = Index([1, 2, 0], table, device="cuda")
    assert choose(index, torch.zeros(3, 32, dtype=torch.float16, device="cuda"), 32, 32) == "sgmv"
