"""A `torch.cuda` that tells of one card, and the other doors of torch that a device comes in by.

`Pretend` applies the patches, which stand in `_patches`, and takes them back.
"""

import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch

from .graph import CUDAGraph, capturing, graph, refuse
from .modes import Calls, Operators, named
from .tags import CPU, DEVICE, HELD, copied, tensors_in

GIB = 2**30
CARDS = {  # profile -> name, memory, compute capability, multiprocessors
    "gpu": ("NVIDIA Pretend 24GB", 24 * GIB, (8, 0), 108),
    "t4": ("NVIDIA Pretend 15GB", 15 * GIB, (7, 5), 40),
}


class Generator(torch._C.Generator):
    """A generator of either device, drawing the CPU's numbers."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.on_cuda = named(device) == DEVICE
        return made

    def __init__(self, device="cpu"):
        super().__init__()

    @property
    def device(self) -> torch.device:
        return DEVICE if self.on_cuda else CPU


class Event:
    """Everything is done as soon as it is asked for, so an event is a reading of the clock."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        self._timing, self._at = enable_timing, None

    def record(self, stream=None) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        if not (self._timing and end._timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        return (end._at - self._at) * 1e3

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass


class Stream:
    """Work is done when it is called, whichever stream it is meant for."""

    def __init__(self, device=None, priority=0, **kwargs):
        self.device = DEVICE
        self.cuda_stream = 0

    def record_event(self, event=None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def is_capturing(self) -> bool:
        return capturing()

    wait_stream = wait_event = lambda self, other: None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def _properties(card) -> SimpleNamespace:
    name, memory, (major, minor), processors = card
    return SimpleNamespace(
        name=name,
        total_memory=memory,
        major=major,
        minor=minor,
        multi_processor_count=processors,
        max_threads_per_multi_processor=2048,
        L2_cache_size=40 * 2**20,
        warp_size=32,
        gcnArchName="",
        is_integrated=0,
    )


def _of_cuda(card) -> dict:
    """What `torch.cuda` shall say."""
    name, memory, capability, _ = card
    main = Stream()
    none = lambda *args, **kwargs: None  # noqa: E731
    waits = lambda *args, **kwargs: refuse()  # noqa: E731
    statistics = lambda: {  # noqa: E731
        "allocated_bytes.all.current": HELD.now,
        "allocated_bytes.all.peak": HELD.peak,
    }
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": none,
        "_lazy_init": none,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": none,
        "device": lambda *args: nullcontext(),
        "device_of": lambda *args: nullcontext(),
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: _properties(card),
        "get_arch_list": lambda: [f"sm_{capability[0]}{capability[1]}"],
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability >= (8, 0),
        "synchronize": waits,
        "empty_cache": none,
        "ipc_collect": none,
        "mem_get_info": lambda device=None: (memory - HELD.now, memory),
        "memory_allocated": lambda device=None: HELD.now,
        "memory_reserved": lambda device=None: HELD.now,
        "max_memory_allocated": lambda device=None: HELD.peak,
        "max_memory_reserved": lambda device=None: HELD.peak,
        "memory_stats": lambda device=None: statistics(),
        "reset_peak_memory_stats": lambda device=None: HELD.reset_peak(),
        "reset_accumulated_memory_stats": none,
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: main,
        "default_stream": lambda device=None: main,
        "is_current_stream_capturing": capturing,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 0),
        "manual_seed": none,
        "manual_seed_all": none,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": none,
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": none,
    }


class Pretend:
    """A context in which torch has one CUDA device.

    Args:
        profile: names the card in CARDS.
        noise: sums on the device are off by up to a last digit, each time by another: as if every call were another
            kernel. What holds with it does not depend on the order in which a card adds up.
    """

    def __init__(self, profile: str = "gpu", noise: bool = False):
        self.card = CARDS[profile]
        self._modes = partial(modes, noise)
        self._stack = ExitStack()

    def __enter__(self) -> "Pretend":
        import bitsandbytes  # noqa: F401  its library is chosen on import: the CPU's, which there is

        HELD.clear()
        for patch in self._patches():
            self._stack.enter_context(patch)
        self._stack.enter_context(self._modes())
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()
        HELD.clear()

    def _patches(self):
        cuda = _of_cuda(self.card)
        yield mock.patch.multiple(torch.cuda, create=True, **cuda)
        for module in (torch.cuda.memory, torch.cuda.random):
            yield mock.patch.multiple(
                module, **{name: value for name, value in cuda.items() if name in vars(module)}
            )
        yield mock.patch.multiple(
            torch.accelerator,
            is_available=lambda: True,
            current_accelerator=lambda check_available=False: torch.device("cuda"),
            device_count=lambda: 1,
            current_device_index=lambda: 0,
            set_device_index=lambda device: None,
            current_stream=lambda device=None: cuda["current_stream"](),
            synchronize=lambda device=None: None,
        )
        yield mock.patch.object(torch.version, "cuda", "12.8")
        yield mock.patch.object(torch, "Generator", Generator)
        yield mock.patch.object(torch, "load", _loading(torch.load))
        # The engine calls Python again (custom functions, hooks) while the mode is off: it is put on for them.
        backward = torch.autograd.graph._engine_run_backward
        for module in (torch.autograd, torch.autograd.graph):
            yield mock.patch.object(module, "_engine_run_backward", _within(Calls, backward))
        pushes = torch._C._autograd._push_saved_tensors_default_hooks  # so are the hooks of a checkpoint
        yield mock.patch.object(
            torch._C._autograd,
            "_push_saved_tensors_default_hooks",
            lambda pack, unpack: pushes(_within(Calls, pack), _within(Calls, unpack)),
        )
        yield mock.patch.object(
            threading.Thread, "_bootstrap_inner", _within(self._modes, threading.Thread._bootstrap_inner)
        )


@contextmanager
def modes(noise: bool = False):
    """Both modes, for the thread that calls."""
    with Operators(noise), Calls():
        yield


def _within(context, function):
    def wrapped(*args, **kwargs):
        with context():
            return function(*args, **kwargs)

    return wrapped


def _loading(load):
    """torch.load that knows where "cuda" is."""

    def wrapped(*args, map_location=None, **kwargs):
        device = named(map_location)
        loaded = load(*args, map_location=CPU if device else map_location, **kwargs)
        if device != DEVICE:
            return loaded
        for tensor in tensors_in(loaded):
            tensor.data = copied(tensor, DEVICE)
        return loaded

    return wrapped
