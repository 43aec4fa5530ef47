"""Peak memory of a piece of work: the allocator's own count on CUDA, an exact count of tensor bytes on CPU.

On CPU there is no allocator to ask, and the process' size is noise at this scale. So `TensorBytes` watches
every operator: a storage is counted when an operator first returns it and released when Python and autograd
have both let go. What it counts is exact: every tensor the program holds, saved activations and gradients
included. What it leaves out: scratch space inside one operator, and the allocator's rounding, both of which
CUDA's number contains.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labs_lib.measure.count import tensors_of


@dataclass(frozen=True)
class Peak:
    """Bytes held before the work, at most during it, and after it. `exact` is True for the count on CPU."""

    before: int
    peak: int
    after: int
    exact: bool

    @property
    def extra(self) -> int:
        """Bytes the work needed beyond what was there."""
        return self.peak - self.before


def peak_memory(function: Callable[[], Any], *holding: Any, device: str | torch.device | None = None) -> Peak:
    """Peak memory of `function()` in bytes.

    `holding` (models with their gradients, optimizers, batches) is what exists already and shall count: on
    CPU its bytes are the start value; on CUDA the allocator knows. `device` is taken from `holding`'s first
    parameter or tensor if not given.
    """
    kind = torch.device(device) if device is not None else _device_of(holding)
    if kind.type == "cuda":
        torch.cuda.synchronize(kind)
        torch.cuda.reset_peak_memory_stats(kind)
        before = torch.cuda.memory_allocated(kind)
        function()
        torch.cuda.synchronize(kind)
        return Peak(
            before, torch.cuda.max_memory_allocated(kind), torch.cuda.memory_allocated(kind), exact=False
        )
    counter = TensorBytes(*holding)
    before = counter.now
    with counter:
        result = function()  # kept until `after` is read: what the work returns is part of what it holds
    after = counter.now
    del result
    return Peak(before, counter.peak, after, exact=True)


@contextmanager
def fused_attention() -> Iterator[None]:
    """While it lasts, attention on the meta device is one operator, as on every real device, and keeps no scores.

    There torch would spell it out, and a count would hold (heads, length, length) scores that no device ever holds.
    """
    kept = F.scaled_dot_product_attention

    def attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        if query.device.type != "meta":
            return kept(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if groups := enable_gqa and query.shape[1] // key.shape[1]:
            key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = kept


def _device_of(holding: tuple) -> torch.device:
    for thing in holding:
        if isinstance(thing, torch.nn.Module):
            thing = next(thing.parameters(), None)
        if isinstance(thing, torch.Tensor):
            return thing.device
    return torch.device("cpu")


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of `holding` and of tensors born in its `with` block: `now`, and the highest, `peak`.

    Tensors that existed before but are not in `holding` are told apart by arriving as an argument unseen.
    """

    def __init__(self, *holding: Any):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        for thing in holding:
            for tensor in tensors_of(thing, set()):
                self._count(tensor.untyped_storage())
            if isinstance(thing, torch.nn.Module):
                for parameter in thing.parameters():
                    if parameter.grad is not None:
                        self._count(parameter.grad.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        existing = {storage._cdata for storage in _storages((args, kwargs))}
        if func is torch.ops.aten.lift_fresh.default:  # torch.tensor(...) arrives as its own argument
            existing = set()
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in existing:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        counter = weakref.ref(self)

        def release(_):
            if (this := counter()) is not None:
                this.now -= size
                del this._alive[key]

        self._alive[key] = weakref.ref(storage, release)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [
        leaf.untyped_storage()
        for leaf in tree_leaves(tree)
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided
    ]
