"""Three tiers of adapters with byte budgets: disk, host memory, device slots; loading is off the step path.

What is asked for and not in host memory is read by a loader; what is in host memory moves to the device between two
steps. Least recently used leaves first, never what a running request holds or what is pinned. Everything is named by
the sha256 of an adapter version, never by a tenant's name, so nothing cached can outlive a new version.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from labs_lib.errors import LabsError
from labs_lib.serving.kv import KVCache
from labs_lib.serving.pool import Pool, Slot
from labs_lib.serving.types import Refused


@dataclass(frozen=True)
class HostAdapter:
    """An adapter in host memory: its pages (rank, width), packed as the device wants them."""

    adapter: str
    pages: int
    nbytes: int
    gain: bool = False  # the last page holds DoRA's gains
    values: torch.Tensor | None = None  # None in the digital twin


class Loader(Protocol):
    """Brings adapters from disk into host memory, in the background."""

    def start(self, adapter: str) -> None: ...

    def finished(self) -> list[tuple[str, HostAdapter | Exception]]: ...

    def close(self) -> None: ...


class ThreadLoader:
    """Reads, checks and packs adapters on a thread of its own. `read(adapter)` returns a HostAdapter or raises."""

    def __init__(self, read: Callable[[str], HostAdapter]) -> None:
        self._read = read
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="adapter-loader")
        self._running: dict[str, Future] = {}

    def start(self, adapter: str) -> None:
        self._running[adapter] = self._threads.submit(self._read, adapter)

    def finished(self) -> list[tuple[str, HostAdapter | Exception]]:
        done = [(adapter, future) for adapter, future in list(self._running.items()) if future.done()]
        for adapter, _ in done:
            del self._running[adapter]
        return [(adapter, future.exception() or future.result()) for adapter, future in done]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def choose_victim(resident: Iterable[Slot], pinned: Set[str]) -> Slot | None:
    """The slot whose adapter leaves the device when another needs room, or None if nobody may be moved.

    Args:
        resident: the filled slots; each has `adapter` (its sha256), `refs` (running requests that read it) and
            `used` (when the last of them ended).
        pinned: adapters that stay for good.

    Steps:
        1. Leave out every slot that a running request holds: its pages are being read.
        2. Leave out the pinned ones.
        3. Of the rest take the least recently used; if nothing is left, None.
    """
    idle = [slot for slot in resident if slot.refs == 0 and slot.adapter not in pinned]
    return min(idle, key=lambda slot: slot.used, default=None)


class Tiers:
    """Which adapter is where.

    Args:
        pool: the device slots.
        loader: disk to host.
        host_bytes: budget of the host tier.
        clock: seconds.
        watch: called with (what, adapter, tenant, more) on `load`, `host`, `device`, `evict`, `drop` (of the host
            tier) and `failed`.
    """

    def __init__(
        self,
        pool: Pool,
        loader: Loader,
        host_bytes: int,
        clock: Callable[[], float],
        watch: Callable[..., None] = lambda *event, **more: None,
    ) -> None:
        self.pool, self.loader, self.host_bytes = pool, loader, host_bytes
        self.clock, self.watch = clock, watch
        self.host: OrderedDict[str, HostAdapter] = OrderedDict()  # least recently used first
        self.loading: dict[str, str] = {}  # adapter: the tenant who asked
        self.failed: dict[str, Exception] = {}
        self.pinned: set[str] = set()
        self.prompts: KVCache | None = None  # in a unified pool: whose idle pages adapters may have

    @property
    def host_used(self) -> int:
        return sum(each.nbytes for each in self.host.values())

    def prefetch(self, adapter: str, tenant: str = "") -> None:
        """Have it in host memory soon; returns at once."""
        if adapter not in self.host and adapter not in self.loading and not self.pool.find(adapter):
            self.failed.pop(adapter, None)  # a new request tries again: the file may have been mended
            self.loading[adapter] = tenant
            self.watch("load", adapter, tenant)
            self.loader.start(adapter)

    def poll(self) -> list[str]:
        """Take in what the loader has finished; returns what it was."""
        finished = self.loader.finished()
        for adapter, loaded in finished:
            tenant = self.loading.pop(adapter, "")
            if isinstance(loaded, HostAdapter):
                loaded = self._keep(loaded, tenant)
            if isinstance(loaded, Exception):
                self.failed[adapter] = loaded
                self.watch("failed", adapter, tenant, reason=str(loaded))
        return [adapter for adapter, _ in finished]

    def _keep(self, loaded: HostAdapter, tenant: str) -> Exception | None:
        if loaded.pages > self.pool.max_pages:
            return Refused(
                f"Adapter {loaded.adapter[:12]} needs {loaded.pages} pages (its rank; one more for DoRA), a slot has "
                f"{self.pool.max_pages}: start the server with --max-rank {loaded.pages}."
            )
        if loaded.nbytes > self.host_bytes:
            return Refused(
                f"Adapter {loaded.adapter[:12]} takes {loaded.nbytes:,} bytes, the host tier {self.host_bytes:,}: "
                "raise --host-mb."
            )
        room = self.host_bytes - loaded.nbytes
        for old in list(self.host):
            if self.host_used <= room:
                break
            if old not in self.pinned:
                del self.host[old]
                self.watch("drop", old, tenant)
        self.host[loaded.adapter] = (
            loaded  # pinned ones may exceed the budget: the newest load must not be lost
        )
        self.watch("host", loaded.adapter, tenant)
        return None

    def acquire(self, adapter: str | None, tenant: str) -> Slot | None:
        """A reference to the adapter's slot, moving it onto the device if it is in host memory; None if not now."""
        if adapter is None:
            return self.pool.slots[0]
        slot = self.pool.find(adapter)
        if slot is None:
            loaded = self.host.get(adapter)
            if loaded is None or not self._make_room(loaded.pages, tenant):
                return None
            slot = self.pool.fill(adapter, loaded.pages, loaded.values, loaded.gain, tenant)
            self.watch("device", adapter, tenant, slot=slot.number)
        if adapter in self.host:
            self.host.move_to_end(adapter)
        slot.refs += 1
        return slot

    def release(self, slot: Slot) -> None:
        if slot.number:
            slot.refs -= 1
            slot.used = self.clock()

    def could_free(self, pages: int) -> bool:
        """Would so many pages be free if all that is idle left? If not, nobody should be evicted for them."""
        if self.pool.policy == "separate":
            return True  # one slot is as large as another, so that any victim will do
        idle = (s for s in self.pool.resident if s.refs == 0 and s.adapter not in self.pinned)
        spare = self.prompts.reclaimable if self.prompts else 0
        return self.pool.kv_free + spare + sum(len(slot.pages) for slot in idle) >= pages

    def _make_room(self, pages: int, tenant: str) -> bool:
        if not self.could_free(pages):
            return False
        while not self.pool.fits(pages):
            if not ((self.prompts and self.prompts.drop_idle()) or self.evict_one(tenant)):
                return False
        return True

    def evict_one(self, tenant: str) -> bool:
        """Move the least recently used idle adapter off the device, on behalf of `tenant`; False if there is none."""
        slot = choose_victim(self.pool.resident, self.pinned)
        if slot is None:
            return False
        self.watch("evict", slot.adapter, tenant, of=slot.tenant, slot=slot.number)
        self.pool.clear(slot)
        return True

    def unload(self, adapter: str) -> None:
        """Drop an adapter from both tiers; one that a running request holds is an error."""
        slot = self.pool.find(adapter)
        if slot is not None:
            if slot.refs:
                raise LabsError(
                    f"Adapter {adapter[:12]} serves {slot.refs} running requests: unload it when they end."
                )
            self.watch("evict", adapter, "", of=slot.tenant, slot=slot.number)
            self.pool.clear(slot)
        if self.host.pop(adapter, None):
            self.watch("drop", adapter, "")
        self.pinned.discard(adapter)
