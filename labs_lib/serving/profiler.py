"""Where a step's time goes: a sampling profiler by kind of work, and what the hardware would need at least.

A timer interrupts the main thread every millisecond and looks which function it is in. Unlike a tracing profiler this
costs nothing per call, so it does not make code of many small calls look slower than it is.
"""

import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from labs_lib.serving.layout import Layout

LINEAR, ADAPTER, ATTENTION = "base linear layers", "adapter ops", "attention and keys/values"
REST, SAMPLE, SCHEDULE = "rest of the model", "choosing tokens", "scheduler and ledger"
KINDS = (LINEAR, ADAPTER, ATTENTION, REST, SAMPLE, SCHEDULE)

# (end of the file's path, function or "", kind): the innermost frame that is listed decides.
PLACES = (
    ("torch/nn/modules/linear.py", "", LINEAR),
    ("serving/ops.py", "", ADAPTER),
    ("serving/sgmv.py", "", ADAPTER),
    ("serving/batch.py", "", ADAPTER),
    ("serving/layers.py", "", ADAPTER),
    ("serving/executor.py", "_index_of", ADAPTER),
    ("serving/executor.py", "_use", ADAPTER),
    ("serving/executor.py", "_sample", SAMPLE),
    ("serving/executor.py", "sample", SAMPLE),
    ("serving/executor.py", "_forward", REST),
    ("serving/executor.py", "", ATTENTION),
    ("integrations/sdpa_attention.py", "", ATTENTION),
    ("masking_utils.py", "", ATTENTION),
    ("serving/engine.py", "", SCHEDULE),
    ("serving/scheduler.py", "", SCHEDULE),
    ("serving/tiers.py", "", SCHEDULE),
    ("serving/pool.py", "", SCHEDULE),
    ("serving/kv.py", "", SCHEDULE),
    ("serving/ledger.py", "", SCHEDULE),
)


def kind_of(frame: FrameType | None) -> str:
    """Which kind of work a stack belongs to."""
    while frame is not None:
        name, function = frame.f_code.co_filename.replace("\\", "/"), frame.f_code.co_name
        for end, wanted, kind in PLACES:
            if name.endswith(end) and wanted in ("", function):
                return kind
        if "/transformers/" in name:
            return REST
        frame = frame.f_back
    return SCHEDULE


def shares(step: Callable[[], object], seconds: float = 2.0, every: float = 0.001) -> dict[str, float]:
    """Call `step` again and again; the share of time in each kind of work. On the main thread, on the CPU only.

    Empty where the system has no such timer (Windows).
    """
    if not hasattr(signal, "setitimer"):
        return {}
    seen: Counter = Counter()

    def look(number: int, frame: FrameType | None) -> None:
        seen[kind_of(frame)] += 1

    before = signal.signal(signal.SIGALRM, look)
    try:
        signal.setitimer(signal.ITIMER_REAL, every, every)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            step()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    total = sum(seen.values()) or 1
    return {kind: seen[kind] / total for kind in KINDS}


class _Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def operations(step: Callable[[], object]) -> int:
    """Tensor operations that one call dispatches, views included: each costs a microsecond or more on the CPU."""
    with _Count() as counter:
        step()
    return counter.calls


def floor(model, layout: Layout, rows: int, rank: int, adapters: int, past: int) -> dict[str, float]:
    """What a decode step has to do at least: FLOPs and bytes, and milliseconds at the speed measured here and now.

    `linear_ms` and `adapter_ms` are the step's matrix products and nothing else, one call after the other: base layers
    on all rows, and for the adapters two batched products per layer on weights that need no gathering.
    """
    head = model.get_output_embeddings().weight
    sizes = [(spec.in_features, spec.out_features) for spec in layout.linears]
    number = head.element_size()
    base = 2 * rows * (sum(i * o for i, o in sizes) + head.numel())
    lora = 2 * rows * rank * sum(i + o for i, o in sizes)
    gathered = adapters * rank * sum(i + o for i, o in sizes) * number
    weights = (sum(i * o for i, o in sizes) + head.numel()) * number
    cells = rows * past * layout.cell * number
    machine = limits(head)
    linear, adapter = _products(head, sizes, rows, rank, adapters)
    return {
        "base_flops": base,
        "adapter_flops": lora,
        "weight_bytes": weights,
        "adapter_bytes": gathered,
        "kv_bytes": cells,
        "flops_ms": round(1e3 * (base + lora) / machine.rate, 4),
        "bytes_ms": round(1e3 * (weights + gathered + cells) / machine.read, 4),
        "linear_ms": round(1e3 * linear, 4),
        "adapter_ms": round(1e3 * adapter, 4),
    }


def best_seconds(function: Callable[[], object], like: torch.Tensor, times: int = 7, calls: int = 5) -> float:
    """Seconds of one call: the fastest of several rounds."""
    function()
    found = []
    for _ in range(times):
        if like.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        if like.is_cuda:
            torch.cuda.synchronize()
        found.append((time.perf_counter() - started) / calls)
    return min(found)


@dataclass(frozen=True)
class Limits:
    """What the machine does at best, measured: bytes a second when it reads or copies, FLOPs a second in products."""

    read: float
    copy: float  # read and written bytes together
    rate: float

    def seconds(self, nbytes: float, flops: float) -> float:
        """The least time for work that moves so many bytes and needs so many FLOPs: the roofline.

        Source: Williams, Waterman, Patterson 2009, "Roofline", Communications of the ACM 52(4).
        """
        return max(nbytes / max(self.read, self.copy), flops / self.rate)


@torch.inference_mode()
def limits(like: torch.Tensor) -> Limits:
    """Measured with tensors like `like`, as large as it takes to keep its device busy for a while."""

    def product(n: int) -> float:
        square = torch.randn(n, n, device=like.device, dtype=like.dtype)
        return best_seconds(lambda: square @ square, like)

    n, count = 512, 1 << 24
    while (seconds := product(n)) < 1e-3 and n < 8192:
        n *= 2
    large = torch.ones(count, device=like.device, dtype=like.dtype)
    while (reading := best_seconds(large.sum, like)) < 1e-3 and count < 1 << 29:
        count *= 2
        large = torch.ones(count, device=like.device, dtype=like.dtype)
    other = torch.empty_like(large)
    copying = best_seconds(lambda: other.copy_(large), like)
    return Limits(large.nbytes / reading, 2 * large.nbytes / copying, 2 * n**3 / seconds)


@torch.inference_mode()
def _products(
    like: torch.Tensor, sizes: Sequence[tuple[int, int]], rows: int, rank: int, adapters: int
) -> tuple[float, float]:
    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=like.device, dtype=like.dtype)

    layers = [(new(rows, i), new(o, i)) for i, o in sizes] + [(new(rows, like.shape[1]), like)]
    each = -(-rows // max(1, adapters))
    updates = [
        (new(adapters, each, i), new(adapters, i, rank), new(adapters, rank, o), new(adapters, each, o))
        for i, o in sizes
    ]

    def base() -> None:
        for x, W in layers:
            F.linear(x, W)

    def lora() -> None:
        for x, A, B, y in updates:
            y.baddbmm_(torch.bmm(x, A), B)

    return best_seconds(base, like), best_seconds(lora, like) if adapters else 0.0
