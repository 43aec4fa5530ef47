"""Counting what a method costs: parameters, bytes, FLOPs. Exact numbers, none of them timed.

Bytes are counted by storage, so tied weights and views count once; a meta-device model counts like a real
one, which is how a laptop answers questions about a 7B model.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. `percent` is of all, adapter included, as PEFT prints it;
    `percent_of_base` is of the frozen ones only (nan if none is frozen). They differ in the third digit."""

    total: int
    trainable: int

    @property
    def frozen(self) -> int:
        return self.total - self.trainable

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total if self.total else float("nan")

    @property
    def percent_of_base(self) -> float:
        return 100 * self.trainable / self.frozen if self.frozen else float("nan")

    def __str__(self) -> str:
        return f"{self.trainable:,} trainable of {self.total:,} parameters ({self.percent:.4g} %)"


def count_parameters(model: nn.Module) -> Parameters:
    """Parameters of a model, shared ones once; works on the meta device and on 4-bit weights.

    bitsandbytes packs several 4-bit weights into one stored number; they are counted unpacked, as PEFT does.
    """
    total = trainable = 0
    for parameter in model.parameters():
        n = parameter.numel()
        if parameter.__class__.__name__ == "Params4bit":
            n *= 2 * parameter.element_size()
        total += n
        trainable += n if parameter.requires_grad else 0
    return Parameters(total, trainable)


def tensor_bytes(*things: Any) -> int:
    """Bytes of all distinct storages reachable from tensors, modules, optimizers, lists, dicts, objects.

    A module brings its parameters and buffers but not its gradients; an optimizer brings its state. A view
    counts the whole storage that it keeps alive.
    """
    storages = {}
    for tensor in tensors_of(things, set()):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def tensors_of(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor reachable from `thing`; `seen` (ids of containers that outlive the walk) stops cycles."""
    if isinstance(thing, torch.Tensor):
        yield thing
        # bitsandbytes keeps the scales and the codebook of a 4-bit weight in an object beside it
        if (state := getattr(thing, "quant_state", None)) is not None:
            yield from tensors_of(state, seen)
        return
    if thing is None or isinstance(thing, (str, bytes, int, float, torch.dtype)) or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        inside = itertools.chain(thing.parameters(), thing.buffers())
    elif isinstance(thing, torch.optim.Optimizer):
        inside = thing.state.values()
    elif isinstance(thing, dict):
        inside = thing.values()
    elif isinstance(thing, Iterable):
        inside = thing
    elif hasattr(thing, "__dict__") and not callable(thing):  # GaLore keeps a projector object in its state
        inside = vars(thing).values()
    else:
        return
    for each in inside:
        yield from tensors_of(each, seen)


@dataclass(frozen=True)
class HeldBytes:
    """What a training run keeps between steps, in bytes."""

    parameters: int
    buffers: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.buffers + self.gradients + self.optimizer


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> HeldBytes:
    """Bytes held now by a model's parameters, buffers and gradients and by an optimizer's state."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return HeldBytes(
        parameters=tensor_bytes(list(model.parameters())),
        buffers=tensor_bytes(list(model.buffers())),
        gradients=tensor_bytes(gradients),
        optimizer=optimizer_state_bytes(optimizer) if optimizer is not None else 0,
    )


def optimizer_state_bytes(
    what: int | nn.Module | torch.optim.Optimizer, *, dtype: torch.dtype = torch.float32, states: int = 2
) -> int:
    """Bytes of an optimizer's state: measured from a real optimizer, computed from a model or a count.

    Given an optimizer, the bytes of the tensors in its state (empty before the first step), whatever their
    dtypes. Given a model (its trainable parameters) or a count, `states` copies in `dtype`: Adam keeps two,
    SGD with momentum one. PyTorch's Adam keeps a 4-byte step counter per tensor besides, which only the
    measurement shows.
    """
    if isinstance(what, torch.optim.Optimizer):
        return tensor_bytes(what)
    if isinstance(what, nn.Module):
        what = count_parameters(what).trainable
    return int(what) * states * dtype.itemsize


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of `function(*args, **kwargs)`, operator by operator; put `.backward()` inside to count it too.

    Counts matrix products, convolutions and attention, 2 FLOPs per multiply-add; elementwise work (norms,
    activations, IA3's scaling) is not counted, nor are bitsandbytes' 4-bit kernels. Causal attention counts
    as full, and a fused attention's backward includes the recomputation of its scores. Source:
    torch.utils.flop_counter, to which this adds PyTorch's fused attention on CPU, which it would otherwise
    count as free, and grouped heads, which torch 2.11 refuses.
    """
    from torch.utils import flop_counter

    aten = torch.ops.aten

    def forward(query, key, value, *_, out_shape=None, **__):
        return flop_counter.sdpa_flop_count(query, *(_as_many_heads(query, part) for part in (key, value)))

    def backward(grad_out, query, key, value, *_, out_shape=None, **__):
        key, value = (_as_many_heads(query, part) for part in (key, value))
        return flop_counter.sdpa_backward_flop_count(grad_out, query, key, value)

    kinds = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    fused = {getattr(aten, f"_scaled_dot_product_{kind}"): forward for kind in kinds}
    fused |= {getattr(aten, f"_scaled_dot_product_{kind}_backward"): backward for kind in kinds}
    with flop_counter.FlopCounterMode(display=False, custom_mapping=fused) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def _as_many_heads(query: torch.Size, part: torch.Size) -> tuple[int, ...]:
    """The shape of keys or values (batch, heads, tokens, size) with as many heads as the query has."""
    return (*part[:-3], query[-3], *part[-2:])
