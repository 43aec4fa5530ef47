"""Device slots: which adapter lies in which, on which pages, and which pages hold keys and values.

Two policies on the same books. `separate`: slot s owns the pages s*R..s*R+R-1 of an adapter arena for good, so that a
batched op can view the arena as [slots, R, width]; keys and values have an arena of their own. `unified`: one arena,
any page serves either purpose, an adapter of rank r takes just r of them (S-LoRA's unified paging).
"""

from dataclasses import dataclass, field

import torch

from labs_lib.errors import LabsError
from labs_lib.serving.arena import Arena, Pages
from labs_lib.serving.layout import Layout

KV_PAGE = (
    16  # tokens in a page of the separate KV arena; the unified one has as many as fit into an adapter's page
)


@dataclass
class Slot:
    """A place for one adapter on the device. Number 0 is the base model: no pages, generation 0, never evicted."""

    number: int
    generation: int = 0  # grows each time the slot is filled, so that an old lease is told from a new one
    adapter: str | None = None
    pages: list[int] = field(default_factory=list)
    gain: bool = False  # DoRA: the last page holds gains
    refs: int = 0  # running requests
    used: float = 0.0  # when it was last released
    tenant: str = ""  # for whom it was loaded, to say who evicted whom


class Pool:
    """Slots and KV pages within a fixed budget.

    Args:
        layout: what a page is.
        slots: adapters that fit side by side at `max_pages` each.
        max_pages: pages that the largest adapter may take (rank, plus one for DoRA).
        kv_tokens: tokens whose keys and values fit.
        policy: `separate` or `unified`; both take the same number of bytes for the same arguments.
        dtype, device: of the memory. device None keeps books only (for the digital twin).
    """

    def __init__(
        self,
        layout: Layout,
        slots: int,
        max_pages: int,
        kv_tokens: int,
        policy: str = "separate",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = "cpu",
    ) -> None:
        if policy not in ("separate", "unified"):
            raise LabsError(f"policy={policy!r} is not known: 'separate' or 'unified'.")
        if min(slots, max_pages, kv_tokens) < 1:
            raise LabsError("slots, max_rank and kv_tokens must be at least 1.")
        self.layout, self.policy, self.max_pages = layout, policy, max_pages
        self.contiguous = policy == "separate"
        self.adapters: Arena | None = None
        self.kv: Arena | None = None
        if self.contiguous:
            self.tokens_per_page = KV_PAGE
            self._kv_pages = Pages(-(-kv_tokens // KV_PAGE))
            self._pages = None
            if device is not None:
                self.adapters = Arena((slots + 1) * max_pages - 1, layout.width, dtype, device)
                self.kv = Arena(self._kv_pages.count, KV_PAGE * layout.cell, dtype, device)
        else:
            self.tokens_per_page = layout.tokens_per_page
            kv_pages = -(-kv_tokens * layout.cell // layout.width)
            self._pages = self._kv_pages = Pages(slots * max_pages + kv_pages)
            slots = self._pages.count  # as many adapters as pages allow
            if device is not None:
                self.adapters = self.kv = Arena(self._pages.count, layout.width, dtype, device)
        self.slots = [Slot(number) for number in range(slots + 1)]
        self._empty = list(range(slots, 0, -1))
        self._slot_of: dict[str, Slot] = {}
        self.table = torch.zeros(
            slots + 1, max_pages, dtype=torch.long
        )  # page numbers of each slot, padded by 0
        self.gain_page = torch.zeros(slots + 1, dtype=torch.long)  # page 0 (all zeros) where there is no gain

    def find(self, adapter: str) -> Slot | None:
        return self._slot_of.get(adapter)

    @property
    def resident(self) -> list[Slot]:
        return list(self._slot_of.values())

    def fits(self, pages: int) -> bool:
        """Could an adapter of so many pages move in now?"""
        return bool(self._empty) and (self._pages is None or self._pages.free >= pages)

    def fill(self, adapter: str, pages: int, values: torch.Tensor | None, gain: bool, tenant: str) -> Slot:
        """Move an adapter in; `values` (pages, width) are its pages in host memory. Call `fits` before."""
        number = self._empty.pop()
        slot = self.slots[number]
        if self._pages is None:
            slot.pages = list(range(number * self.max_pages, number * self.max_pages + pages))
        else:
            slot.pages = self._pages.take(pages, adapter)
        slot.generation += 1
        slot.adapter, slot.gain, slot.tenant = adapter, gain, tenant
        self._slot_of[adapter] = slot
        self.table[number, :pages] = torch.tensor(slot.pages)
        self.gain_page[number] = slot.pages[-1] if gain else 0
        if self.adapters is not None:
            self.adapters.write(slot.pages, values)
        return slot

    def clear(self, slot: Slot) -> None:
        """Move an adapter out and zero what it leaves."""
        assert slot.refs == 0, "an adapter in use was about to be evicted"
        if self.adapters is not None:
            self.adapters.erase(slot.pages)
        if self._pages is not None:
            self._pages.give_back(slot.pages)
        self.table[slot.number] = 0
        self.gain_page[slot.number] = 0
        del self._slot_of[slot.adapter]
        slot.adapter, slot.pages, slot.gain = None, [], False
        self._empty.append(slot.number)

    def kv_pages_for(self, tokens: int) -> int:
        return -(-tokens // self.tokens_per_page)

    @property
    def kv_free(self) -> int:
        return self._kv_pages.free

    @property
    def kv_count(self) -> int:
        return self._kv_pages.count

    def take_kv(self, pages: int) -> list[int] | None:
        return self._kv_pages.take(pages, "kv")

    def give_kv(self, pages: list[int]) -> None:
        if self.kv is not None and pages:
            self.kv.erase(pages)
        self._kv_pages.give_back(pages)

    def cells(self) -> torch.Tensor:
        """KV memory by the token, (pages * tokens_per_page, cell): token t of page p is row p * tokens_per_page + t."""
        return self.kv.data.view(-1, self.layout.cell)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory, adapters and keys and values together."""
        arenas = {id(arena): arena for arena in (self.adapters, self.kv) if arena is not None}
        return sum(arena.data.nbytes for arena in arenas.values())
