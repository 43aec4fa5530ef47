"""Device memory in pages: who owns which, and the promise that a freed page holds nothing.

`Pages` only keeps the books, so the digital twin runs it without memory; `Arena` is the memory. Page 0 belongs to
nobody, is zero for ever, and stands for "nothing here" wherever a page number is needed.
"""

from collections.abc import Hashable

import torch


class Pages:
    """The books of a memory of `count` pages: which are free, and whose the others are. No memory is touched here.

    Pages are numbered 1..count. Any free page is as good as any other, so there are no gaps to close. A page given
    back twice would soon be given out twice, to two tenants: that must fail at once.

    Steps:
        1. `free`: how many pages nobody owns.
        2. `take`: if fewer than `count` are free, return None and take none. Otherwise take `count` pages off the
           free list, write down their owner, and return them.
        3. `give_back`: for each page, delete its owner (a KeyError here is a page given back twice), then put it on
           the free list.
    """

    def __init__(self, count: int) -> None:  # keep
        self.count = count
        self._free = list(range(count, 0, -1))  # a stack: page 1 comes first
        self.owner: dict[int, Hashable] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int, owner: Hashable) -> list[int] | None:
        """`count` pages for `owner`, or None (and nothing taken) if there are fewer."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self.owner.update(dict.fromkeys(pages, owner))
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Free these pages."""
        for page in pages:
            del self.owner[page]  # a KeyError here is a page freed twice
            self._free.append(page)


class Arena:
    """Memory for `count` pages of `width` numbers, and page 0."""

    def __init__(self, count: int, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.pages = Pages(count)
        self.data = torch.zeros(count + 1, width, dtype=dtype, device=device)

    def write(self, pages: list[int], values: torch.Tensor) -> None:
        """Fill pages with `values` (len(pages), width or less); the rest of each page stays zero."""
        index = torch.tensor(pages, device=self.data.device)
        self.data[index, : values.shape[1]] = values.to(self.data, non_blocking=True)

    def erase(self, pages: list[int]) -> None:
        """Zero pages before somebody else gets them: what one tenant leaves, the next must not be able to read."""
        self.data[torch.tensor(pages, dtype=torch.long, device=self.data.device)] = 0
