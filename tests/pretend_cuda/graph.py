"""A CUDA graph without CUDA: what operators did is written down once, and done again on the same memory.

Replaying calls no Python of the step, so a step that reads anything but its buffers gives old answers here, as it would
on a device; and what may not stand in a graph (a number read by the host, a copy between devices) is refused.
"""

import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .tags import storage, tagged, tensors_in

# Operators that wait for the device, or whose result's shape depends on it.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "equal",
    "is_nonzero",
}
_local = threading.local()


def capturing() -> bool:
    return getattr(_local, "capturing", False)


def refuse() -> None:
    """Raise what CUDA raises for an operation that cannot stand in a graph, if one is being captured."""
    if capturing():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


class CUDAGraph:
    """The operators of one captured step, in order."""

    def __init__(self, keep_graph: bool = False):
        self.operators: list[tuple] = []

    def replay(self) -> None:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for func, args, kwargs, fresh in self.operators:
                again = tensors_in(func(*args, **kwargs))
                for at, tensor in fresh:
                    tensor.copy_(again[at])

    def reset(self) -> None:
        self.operators.clear()

    def pool(self) -> tuple[int, int]:
        return (0, 0)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory under a shape of its own: `squeeze_` and its like change a tensor's shape afterwards."""
    return tensor.detach()


class Writing(TorchDispatchMode):
    """Writes down each operator that computes: a view alone shares memory and needs no second time."""

    def __init__(self, graph: CUDAGraph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            name, given = func._schema.name.split("::")[1], tensors_in((args, kwargs))
            chosen = name.startswith("index") and any(each.dtype == torch.bool for each in given[1:])
            if name in WAITS or chosen or len({tagged(each) for each in given if each.dim() > 0}) > 1:
                refuse()
            called, named = args, kwargs
            args, kwargs = tree_map_only(torch.Tensor, _alias, (args, kwargs))
            memories = {storage(each)._cdata for each in given if storage(each) is not None}
            result = func(*called, **named)
            out = enumerate(tensors_in(result))
            fresh = [(at, _alias(each)) for at, each in out if storage(each)._cdata not in memories]
            if fresh or func._schema.is_mutable:
                self.graph.operators.append((func, args, kwargs, fresh))
            return result


class graph:  # noqa: N801  torch.cuda.graph is written so
    """The context in which `graph` is captured."""

    def __init__(self, cuda_graph: CUDAGraph, pool=None, stream=None, capture_error_mode: str = "global"):
        self.writing = Writing(cuda_graph)

    def __enter__(self) -> None:
        _local.capturing = True
        self.writing.__enter__()

    def __exit__(self, *error) -> None:
        self.writing.__exit__(*error)
        _local.capturing = False
