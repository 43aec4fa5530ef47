"""Pages of keys and values: what a sequence reserves, and prompt pages shared between requests of one adapter.

Keys and values depend on the adapter, so a shared prompt page is identified by the adapter's sha256 and every token up
to its end: the same prompt under another adapter, or another version of it, shares nothing.
"""

from dataclasses import dataclass, field

from labs_lib.serving.pool import Pool


@dataclass
class Entry:
    """A full page of prompt tokens that later requests may read."""

    page: int
    depth: int
    key: tuple
    refs: int = 1
    used: float = 0.0


@dataclass
class Reservation:
    """The KV pages of one sequence, in order; the first `len(shared)` belong to the prefix cache."""

    pages: list[int]
    cached: int = 0  # leading tokens whose keys and values are there already
    shared: list[Entry] = field(default_factory=list)


class KVCache:
    """KV pages of the pool, reserved for the longest a sequence can get, so that no running one is ever stopped."""

    def __init__(self, pool: Pool, prefix_cache: bool = True) -> None:
        self.pool, self.prefix_cache = pool, prefix_cache
        self._entries: dict[tuple, Entry] = {}  # (id of the entry before, or the adapter; the page's tokens)
        self.hits = 0  # tokens not computed again

    @property
    def reclaimable(self) -> int:
        """Pages that only the prefix cache holds."""
        return sum(entry.refs == 0 for entry in self._entries.values())

    def reserve(self, adapter: str | None, prompt: list[int], tokens: int, now: float) -> Reservation | None:
        """Pages for `tokens` in all, the prompt's cached beginning among them; None if there is no room now."""
        shared = self._match(adapter, prompt) if self.prefix_cache else []
        for entry in shared:
            entry.refs += 1
            entry.used = now
        wanted = self.pool.kv_pages_for(tokens) - len(shared)
        while self.pool.kv_free < wanted and self.drop_idle():
            pass
        own = self.pool.take_kv(wanted)
        if own is None:
            for entry in shared:
                entry.refs -= 1
            return None
        cached = len(shared) * self.pool.tokens_per_page
        self.hits += cached
        return Reservation([entry.page for entry in shared] + own, cached, shared)

    def _match(self, adapter: str | None, prompt: list[int]) -> list[Entry]:
        """Entries for the prompt's full pages, from the first on; at least one token is left to compute."""
        size, found, parent = self.pool.tokens_per_page, [], adapter
        for end in range(size, len(prompt), size):
            entry = self._entries.get((parent, tuple(prompt[end - size : end])))
            if entry is None:
                break
            found.append(entry)
            parent = id(entry)
        return found

    def share(self, adapter: str | None, prompt: list[int], reservation: Reservation, now: float) -> None:
        """After prefill: let later requests use the prompt's full pages."""
        if not self.prefix_cache:
            return
        for entry in reservation.shared:
            entry.used = now  # never older than its continuation, which would be dropped with it
        size = self.pool.tokens_per_page
        for depth in range(len(reservation.shared), len(prompt) // size):
            parent = id(reservation.shared[-1]) if reservation.shared else adapter
            key = (parent, tuple(prompt[depth * size : (depth + 1) * size]))
            if key in self._entries:  # a twin in the same batch was first
                break
            entry = Entry(reservation.pages[depth], depth, key, used=now)
            self._entries[key] = entry
            reservation.shared.append(entry)

    def release(self, reservation: Reservation) -> None:
        for entry in reservation.shared:
            entry.refs -= 1
        self.pool.give_kv(reservation.pages[len(reservation.shared) :])

    def drop_idle(self) -> bool:
        """Give up the least recently used idle entry (of equals the deepest)."""
        idle = [entry for entry in self._entries.values() if entry.refs == 0]
        if not idle:
            return False
        entry = min(idle, key=lambda entry: (entry.used, -entry.depth))
        self._forget(entry)
        return True

    def _forget(self, entry: Entry) -> None:
        for child in [
            e for e in self._entries.values() if e.key[0] == id(entry)
        ]:  # else its id could be reused
            self._forget(child)
        del self._entries[entry.key]
        self.pool.give_kv([entry.page])
