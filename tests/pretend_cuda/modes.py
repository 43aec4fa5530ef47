"""The two modes that make CPU tensors behave as if some of them lay on cuda:0.

`Calls` sees what Python calls: it reads device arguments, answers `.device`, moves, and refuses NumPy. `Operators` sees
every operator, in backward too: it lets devices mix only where CUDA does, and passes the tag on to results.
"""

from functools import cache
from itertools import count

import torch
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .tags import CPU, DEVICE, calling, calls, copied, moved, storage, tag, tagged, tensors_in, unwatched

T = torch.Tensor
_draws = count()
# Operators that may take tensors of both devices, whatever their shapes.
CROSSING = {
    "copy_",
    "_to_copy",
    "set_",
    "_has_compatible_shallow_copy_type",
    "_foreach_copy_",
    "lift",
    "lift_fresh",
}
# Operators that are not pointwise and still take a CPU tensor without dimensions, as a number.
TAKES_NUMBERS = {
    "fill_", "fill", "masked_fill", "masked_fill_", "where", "index_fill", "index_fill_", "index_put", "index_put_",
    "_index_put_impl_", "scatter_value", "linspace", "logspace", "normal", "bernoulli_", "_local_scalar_dense",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


def device_of(tensor: torch.Tensor) -> torch.device:
    return DEVICE if tagged(tensor) else CPU


def named(value) -> torch.device | None:
    """The device that an argument names: "cuda", "cuda:0", 0, torch.device(...); None if it names none of the two."""
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        return None
    if isinstance(value, str) and value.split(":")[0] not in ("cuda", "cpu"):
        return None
    device = torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
    if device.type == "cuda":
        if device.index not in (None, 0):
            raise RuntimeError("CUDA error: invalid device ordinal")
        return DEVICE
    return CPU if device.type == "cpu" else None


# What Python asks of a tensor ------------------------------------------------------------------------------------


def _numpy(tensor, *args, **kwargs):
    if tagged(tensor):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
            "first."
        )
    return T.numpy(tensor, *args, **kwargs)


def _array(tensor, *args, **kwargs):
    return T.__array__(tensor, *args, **kwargs) if not tagged(tensor) else _numpy(tensor)


def _to(tensor, *args, **kwargs):
    """`Tensor.to`: the device comes first, or from another tensor, or as a keyword, or not at all."""
    args, kwargs = list(args), dict(kwargs)
    device = kwargs.pop("device", None)
    if args and isinstance(args[0], torch.Tensor):
        other = args.pop(0)
        device, kwargs["dtype"] = device_of(other), other.dtype
    elif args and not isinstance(args[0], (torch.dtype, bool)):
        device = args.pop(0)
        if args:
            kwargs["dtype"] = args.pop(0)
        args = []
    elif args:
        kwargs["dtype"] = args.pop(0)
        args = []
    if kwargs.get("dtype") is None:
        kwargs.pop("dtype", None)
    kwargs.pop("non_blocking", None)
    target = named(device) if device is not None else None
    if target is None and device is not None or tensor.is_meta:  # another kind of device
        return T.to(tensor, device=CPU if target else device, **kwargs)
    result = tensor
    if "dtype" in kwargs or kwargs:
        result = T.to(tensor, **{"dtype": tensor.dtype, **kwargs})
    return moved(result, target) if target else result


def _cuda(tensor, device=None, non_blocking=False, memory_format=None):
    return _to(tensor, DEVICE if device is None else device)


def _cpu(tensor, memory_format=None):
    return _to(tensor, CPU)


def _get_device(tensor):
    return 0 if tagged(tensor) else T.get_device(tensor)


def _answer_device(tensor):
    return DEVICE if tagged(tensor) else T.device.__get__(tensor)


def _answer_is_cuda(tensor):
    return tagged(tensor)


def _answer_is_cpu(tensor):
    return not tagged(tensor) and T.is_cpu.__get__(tensor)


def _set_grad(tensor, grad):
    if isinstance(grad, torch.Tensor) and tagged(grad) != tagged(tensor):
        raise RuntimeError("assigned grad has data located on a different device")
    T.grad.__set__(tensor, grad)


def _pin_memory(tensor, device=None):
    if tagged(tensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return tensor.clone()


ANSWERS = {
    T.device.__get__: _answer_device,
    T.is_cuda.__get__: _answer_is_cuda,
    T.is_cpu.__get__: _answer_is_cpu,
    T.grad.__set__: _set_grad,
    T.get_device: _get_device,
    torch.get_device: _get_device,
    T.numpy: _numpy,
    T.__array__: _array,
    T.to: _to,
    T.cuda: _cuda,
    T.cpu: _cpu,
    T.pin_memory: _pin_memory,
    T.is_pinned: lambda tensor, device=None: False,
    T.record_stream: lambda tensor, stream: None,
}


class Calls(TorchFunctionMode):
    """See the file's first lines."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device or func in _plain_getters():
            return func(*args, **kwargs)
        if isinstance(
            func, OpOverload
        ):  # from another mode (a FLOP counter): `device` is C++'s word, no wish
            return func(*args, **kwargs)
        wanted = named(kwargs["device"]) if kwargs.get("device") is not None else None
        if func in ANSWERS:
            with calling(wanted, (args, kwargs)):
                return ANSWERS[func](*args, **kwargs)
        if wanted is not None:
            kwargs = {**kwargs, "device": CPU}
        elif not tensors_in((args, kwargs)):
            wanted = CPU
        if "pin_memory" in kwargs:
            kwargs = {**kwargs, "pin_memory": False}
        with calling(wanted, (args, kwargs)):
            _check_generator(args, kwargs)
            result = func(*args, **kwargs)
        if func is T.__deepcopy__:  # copies bytes, not tensors
            return tag(result) if tagged(args[0]) else result
        if wanted is DEVICE and isinstance(result, torch.Tensor) and not tagged(result):
            shared = any(_same_memory(result, each) for each in tensors_in((args, kwargs)))  # as_tensor
            return copied(result, DEVICE) if shared else tag(result)
        return result


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        memories = storage(one), storage(other)
        return None not in memories and memories[0]._cdata == memories[1]._cdata


def _check_generator(args, kwargs) -> None:
    """A generator draws for tensors of its own device only."""
    for each in (*args, *kwargs.values()):
        if isinstance(each, torch._C.Generator):
            here, there = (
                "cuda" if on_cuda else "cpu" for on_cuda in (calls()[-1].on_cuda, each.device.type == "cuda")
            )
            if here != there:
                raise RuntimeError(f"Expected a '{here}' device type for generator but found '{there}'")


@cache
def _plain_getters() -> frozenset:
    """What is read most often and has nothing to do with devices."""
    names = (
        "shape",
        "dtype",
        "requires_grad",
        "is_meta",
        "layout",
        "ndim",
        "is_sparse",
        "grad_fn",
        "is_leaf",
    )
    return frozenset(getattr(T, name).__get__ for name in names) | {
        T.size,
        T.dim,
        T.numel,
        T.is_floating_point,
    }


# Operators -------------------------------------------------------------------------------------------------------


def mixed(name: str) -> RuntimeError:
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
        f"(in {name})"
    )


@cache
def _about(func) -> tuple[str, bool, bool]:
    """(name, whether it takes a device, whether a CPU number may stand beside CUDA tensors)."""
    name = func._schema.name.split("::")[1]
    makes = any(argument.name == "device" for argument in func._schema.arguments)
    pointwise = torch.Tag.pointwise in getattr(func, "tags", ())
    return name, makes, pointwise or name in TAKES_NUMBERS or name.startswith("_foreach_")


def check(func, args, tensors: list[torch.Tensor], on_cuda: list[bool]) -> None:
    """Raise what CUDA would raise if these tensors may not meet in this operator."""
    name, _, numbers = _about(func)
    if all(on_cuda) or not any(on_cuda) or name in CROSSING:
        return
    if name in INDEXING:
        here, indices, values = tagged(args[0]), tensors_in(args[1]), tensors_in(args[2:])
        if not here and any(tagged(index) for index in indices):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        if any(tagged(value) != here and (here and value.dim() > 0 or not here) for value in values):
            raise mixed(name)
        return
    if name.startswith(("_foreach_", "_amp_foreach_")):
        lists = [each for each in args if isinstance(each, (list, tuple)) and tensors_in(each)]
        for group in zip(*lists, strict=False):
            here = [each for each in group if each.dim() > 0]
            if len({tagged(each) for each in here}) > 1:
                raise mixed(name)
        return
    for tensor, cuda in zip(tensors, on_cuda, strict=True):
        if not cuda and not (numbers and tensor.dim() == 0):
            raise mixed(name)


# Operators whose kernels add up in an order of their own, so that another library, shape or card rounds otherwise.
SUMS = {
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "sum", "mean", "norm", "linalg_vector_norm", "_softmax",
    "_log_softmax", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math", "rms_norm",
}  # fmt: skip


def _rounded_otherwise(result) -> None:
    """Move each number by up to a last digit of the tensor's typical size."""
    for each in tensors_in(result):
        if each.is_floating_point() and each.numel():
            size = torch.finfo(each.dtype).eps * each.detach().float().square().mean().sqrt()
            each += (size * (2 * torch.rand(each.shape) - 1)).to(each.dtype)


class Operators(TorchDispatchMode):
    """See the file's first lines."""

    def __init__(self, noise: bool = False):
        super().__init__()
        self.noise = noise

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if unwatched():
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            tensors = [each for each in tensors_in((args, kwargs)) if not each.is_meta]
            on_cuda = [tagged(each) for each in tensors]
            check(func, args, tensors, on_cuda)
            name, makes, _ = _about(func)
            call = calls()[-1] if calls() else None
            if makes and call is not None and (call.wanted is not None or not tensors):
                here = call.on_cuda
            else:
                here = tagged(args[0]) if name in INDEXING else any(on_cuda)
            result = func(*args, **kwargs)
            if self.noise and here and name in SUMS:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(next(_draws))
                    _rounded_otherwise(result)
            if here:
                given = {each.untyped_storage()._cdata for each in tensors if each.layout == torch.strided}
                for each in tensors_in(result):
                    if (memory := storage(each)) is not None and memory._cdata not in given:
                        tag(each)
            return result
