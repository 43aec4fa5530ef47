"""Which tensors are said to lie on cuda:0, and how many bytes they take.

A tag belongs to a storage, not to a tensor: views, `detach()`, parameters and `.data` share it as they share memory. It
goes when the storage goes (a weak reference, as in labs_lib.measure.memory), so the count of bytes is exact.
"""

import threading
import weakref
from contextlib import contextmanager

import torch

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")


class Held:
    """Bytes of all tagged storages: now, and the most since `reset`."""

    def __init__(self):
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        self._lock = threading.RLock()  # a callback may come in the middle of anything

    def __contains__(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata in self._alive

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def release(_):
            with self._lock:
                del self._alive[key]
                self.now -= size

        with self._lock:
            if key not in self._alive:
                self._alive[key] = weakref.ref(storage, release)
                self.now += size
                self.peak = max(self.peak, self.now)

    def reset_peak(self) -> None:
        self.peak = self.now

    def clear(self) -> None:
        """Forget all tags: what is still alive lies on the CPU again."""
        with self._lock:
            self._alive.clear()
            self.now = self.peak = 0


HELD = Held()
_local = threading.local()


def storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The memory behind a tensor; None for what has none (sparse, meta)."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return None
    return tensor.untyped_storage()


def tagged(tensor: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        memory = storage(tensor)
        return memory is not None and memory in HELD


def tag(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        if (memory := storage(tensor)) is not None:
            HELD.add(memory)
    return tensor


def unwatched() -> bool:
    """Whether this thread is copying between devices just now, which no rule applies to."""
    return getattr(_local, "copying", False)


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of the numbers on the other device, outside of autograd."""
    from .graph import refuse

    refuse()
    _local.copying = True
    try:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            copy = tensor.detach().clone()
    finally:
        _local.copying = False
    return tag(copy) if device.type == "cuda" else copy


class Move(torch.autograd.Function):
    """A copy to the other device, whose gradient comes back to where the tensor is."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        ctx.back = DEVICE if tagged(tensor) else CPU
        return copied(tensor, device)

    @staticmethod
    def backward(ctx, gradient):
        back = gradient if tagged(gradient) == (ctx.back == DEVICE) else copied(gradient, ctx.back)
        return back, None


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`: itself if it is there, else a copy that autograd knows of."""
    if tagged(tensor) == (device.type == "cuda"):
        return tensor
    return Move.apply(tensor, device)


# What Python is calling now: the device it named, or else the device of its tensors. C++ makes tensors on the way
# (a mask, a range of positions) that no caller names; they lie where the call's own tensors lie.


class Call:
    def __init__(self, wanted: torch.device | None, arguments: tuple):
        self.wanted, self._arguments, self._found = wanted, arguments, None

    @property
    def on_cuda(self) -> bool:
        if self.wanted is not None:
            return self.wanted.type == "cuda"
        if self._found is None:
            self._found = any(tagged(tensor) for tensor in tensors_in(self._arguments))
        return self._found


def calls() -> list[Call]:
    if not hasattr(_local, "calls"):
        _local.calls = []
    return _local.calls


@contextmanager
def calling(wanted: torch.device | None, arguments: tuple):
    calls().append(Call(wanted, arguments))
    try:
        yield
    finally:
        calls().pop()


def tensors_in(tree) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dictionaries, in order."""
    found, waiting = [], [tree]
    while waiting:
        each = waiting.pop()
        if isinstance(each, torch.Tensor):
            found.append(each)
        elif isinstance(each, (list, tuple)):
            waiting.extend(reversed(each))
        elif isinstance(each, dict):
            waiting.extend(reversed(each.values()))
    return found
