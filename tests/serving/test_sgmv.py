"""The Triton kernels against the loop: on a GPU, or in Triton's interpreter, which runs them as numpy on the CPU.

Triton comes with torch for CUDA. Elsewhere, with Triton installed next to the course (`pip install triton`):
`TRITON_INTERPRET=1 pytest tests/serving/test_sgmv.py`. The interpreter cannot multiply bfloat16.
"""

import importlib.util
import os

import pytest
import torch

from labs_lib.serving.batch import Index
from labs_lib.serving.ops import choose, loop, sgmv

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it as it is imported
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not CUDA and not INTERPRETED, reason="needs a CUDA device, or TRITON_INTERPRET=1"),
]
DEVICE = "cuda" if CUDA and not INTERPRETED else "cpu"
SLOW = pytest.mark.slow
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


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
    ],
    ids=["row", "mixed", "tiles", "ranks", "base"],
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


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_gpu_gets_the_kernels():
    table, _ = pool([4, 2], 32, 32, torch.float16)
    index = Index([1, 2, 0], table, device="cuda")
    assert choose(index, torch.zeros(3, 32, dtype=torch.float16, device="cuda"), 32, 32) == "sgmv"
