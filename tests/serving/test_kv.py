"""Pages of keys and values: who may read which, and that each is accounted for at any time."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from labs_lib.serving.kv import KVCache, Reservation
from labs_lib.serving.layout import Layout
from labs_lib.serving.pool import KV_PAGE, Pool

POLICIES = ["separate", "unified"]


def cache(pages: int = 8, policy: str = "separate", prefix_cache: bool = True) -> KVCache:
    """A page holds 16 tokens under both policies; books only."""
    layout = Layout((), KV_PAGE * 4, 4)
    slots = 1 if policy == "separate" else pages  # a unified pool lends adapters' pages too
    tokens = pages * KV_PAGE if policy == "separate" else 1
    pool = Pool(layout, slots, 1, tokens, policy, device=None)
    assert pool.tokens_per_page == KV_PAGE
    return KVCache(pool, prefix_cache)


def tokens(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def serve(kv: KVCache, adapter: str | None, prompt: list[int], now: float, more: int = 1) -> Reservation:
    """Reserve, prefill, share: what the engine does with a request that starts."""
    reservation = kv.reserve(adapter, prompt, len(prompt) + more, now)
    assert reservation is not None
    kv.share(adapter, prompt, reservation, now)
    return reservation


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sequence_gets_pages_for_its_whole_length(policy):
    kv = cache(8, policy)
    free = kv.pool.kv_free
    reservation = kv.reserve("a", tokens(20), 20 + 13, 0.0)
    assert len(reservation.pages) == len(set(reservation.pages)) == 3
    assert reservation.cached == 0
    assert kv.pool.kv_free == free - 3
    kv.release(reservation)
    assert kv.pool.kv_free == free


def test_the_same_prompt_of_the_same_adapter_is_shared():
    kv = cache()
    first = serve(kv, "a", tokens(40), 0.0)
    second = kv.reserve("a", tokens(40), 41, 1.0)
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    assert second.cached == kv.hits == 32


@pytest.mark.parametrize("other", [None, "b", "a2", 0, ""])
def test_nothing_is_shared_with_another_adapter_or_the_base(other):
    kv = cache()
    first = serve(kv, "a", tokens(40), 0.0)
    second = kv.reserve(other, tokens(40), 41, 1.0)
    assert second.cached == 0
    assert not set(second.pages) & set(first.pages)


def test_a_page_is_only_shared_with_everything_before_it_equal():
    """Keys and values of a page depend on all tokens before it, not just on its own."""
    kv = cache()
    serve(kv, "a", tokens(16) + tokens(17, 50), 0.0)
    other = kv.reserve("a", tokens(16, 1) + tokens(17, 50), 34, 1.0)
    assert other.cached == 0
    same_start = kv.reserve("a", tokens(16) + tokens(17, 60), 34, 1.0)
    assert same_start.cached == 16


def test_at_least_one_token_is_left_to_compute():
    """Its logits give the first new token."""
    kv = cache()
    serve(kv, "a", tokens(32), 0.0)
    assert kv.reserve("a", tokens(32), 33, 1.0).cached == 16
    assert kv.reserve("a", tokens(33), 34, 1.0).cached == 32


def test_only_full_pages_of_the_prompt_are_shared():
    """A page with output tokens in it grows: another request must not read it."""
    kv = cache()
    serve(kv, "a", tokens(31), 0.0, more=20)
    assert len(kv._entries) == 1


def test_shared_pages_outlive_their_first_owner_and_their_last_reader():
    kv = cache()
    first = serve(kv, "a", tokens(20), 0.0)
    second = serve(kv, "a", tokens(20), 1.0)
    kv.release(first)
    assert kv.reclaimable == 0
    kv.release(second)
    assert kv.reclaimable == 1
    assert kv.pool.kv_free == kv.pool.kv_count - 1
    assert serve(kv, "a", tokens(20), 2.0).cached == 16


def test_twins_in_one_batch_keep_one_copy():
    """Both computed the page, since neither was there when the other started."""
    kv = cache()
    twins = [kv.reserve("a", tokens(20), 21, 0.0) for _ in range(2)]
    for twin in twins:
        kv.share("a", tokens(20), twin, 0.0)
    assert len(kv._entries) == 1
    for twin in twins:
        kv.release(twin)
    assert kv.pool.kv_free == kv.pool.kv_count - 1


def test_a_page_in_use_is_never_dropped():
    kv = cache(pages=4)
    serve(kv, "a", tokens(40), 0.0)  # three pages, two of them shared
    assert not kv.drop_idle()
    assert kv.reserve("b", tokens(20), 32, 1.0) is None
    assert kv.reserve("b", tokens(10), 16, 1.0) is not None


def test_what_does_not_fit_takes_nothing_and_holds_nothing():
    kv = cache(pages=4)
    kv.release(serve(kv, "a", tokens(33), 0.0))
    assert kv.reserve("a", tokens(33), 200, 1.0) is None
    assert kv.pool.kv_free == kv.pool.kv_count - kv.reclaimable
    assert all(entry.refs == 0 for entry in kv._entries.values())


def test_the_least_recently_used_prompt_is_dropped_first():
    kv = cache(pages=4)
    for now, name in enumerate("ab"):
        kv.release(serve(kv, name, tokens(17), float(now)))
    kv.release(serve(kv, "a", tokens(17), 5.0))
    kv.release(kv.reserve("c", tokens(40), 48, 6.0))  # three pages: one entry has to go
    assert kv.reserve("a", tokens(17), 18, 7.0).cached == 16
    assert kv.reserve("b", tokens(17), 18, 7.0).cached == 0


def test_the_end_of_a_prompt_is_dropped_before_its_beginning():
    """A beginning is of use without its end, not the reverse: dropping it would lose both."""
    kv = cache(pages=8)
    kv.release(serve(kv, "a", tokens(17), 0.0))
    longer = kv.reserve("a", tokens(49), 50, 1.0)  # finds the first page, computes two more
    kv.share("a", tokens(49), longer, 2.0)  # prefill took a second
    kv.release(longer)
    assert kv.drop_idle()
    assert kv.reserve("a", tokens(49), 50, 3.0).cached == 32


def test_a_dropped_beginning_takes_its_continuations_along():
    """They could never be found again, and an entry that reused its place would lend them to a wrong prompt."""
    kv = cache()
    kv.release(serve(kv, "a", tokens(49), 0.0))
    root = next(entry for entry in kv._entries.values() if entry.depth == 0)
    kv._forget(root)
    assert not kv._entries
    assert kv.pool.kv_free == kv.pool.kv_count


def test_without_prefix_cache_nothing_is_kept():
    kv = cache(prefix_cache=False)
    kv.release(serve(kv, "a", tokens(40), 0.0))
    assert kv.pool.kv_free == kv.pool.kv_count
    assert serve(kv, "a", tokens(40), 1.0).cached == kv.hits == 0


ALPHABET = st.sampled_from(
    [tokens(17), tokens(33), tokens(40), tokens(16, 3) + tokens(20), tokens(5), tokens(64)]
)


class Traffic(RuleBasedStateMachine):
    """Requests come, prefill, and go in any order, time moving on; the model is a list of what is out."""

    policy = "separate"

    def __init__(self) -> None:
        super().__init__()
        self.kv = cache(9, self.policy)
        self.now = 0.0
        self.out: list[tuple[str | None, list[int], Reservation]] = []
        self.wrote: dict[int, tuple] = {}  # page: (adapter, all tokens up to the page's end), as computed

    @rule(adapter=st.sampled_from([None, "a", "b"]), prompt=ALPHABET, more=st.integers(1, 20))
    def start(self, adapter, prompt, more):
        self.now += 1
        size = KV_PAGE
        found = self.kv._match(adapter, prompt)
        idle = sum(entry.refs == 0 for entry in self.kv._entries.values() if entry not in found)
        room = len(found) + self.kv.pool.kv_free + idle
        reservation = self.kv.reserve(adapter, prompt, len(prompt) + more, self.now)
        assert (reservation is None) == (self.kv.pool.kv_pages_for(len(prompt) + more) > room)
        if reservation is None:
            return
        assert reservation.cached == size * len(reservation.shared) < len(prompt)
        held = {page for _, _, other in self.out for page in other.pages[len(other.shared) :]}
        assert not held & set(reservation.pages), "a page that another sequence writes to"
        for i, page in enumerate(reservation.pages[: len(reservation.shared)]):
            assert self.wrote[page] == (adapter, tuple(prompt[: (i + 1) * size])), "keys of somebody else"
        for i in range(len(reservation.shared), len(prompt) // size):
            self.wrote[reservation.pages[i]] = adapter, tuple(prompt[: (i + 1) * size])
        self.now += 1
        self.kv.share(adapter, prompt, reservation, self.now)
        self.out.append((adapter, prompt, reservation))

    @precondition(lambda self: self.out)
    @rule(which=st.integers(0, 20))
    def end(self, which):
        self.kv.release(self.out.pop(which % len(self.out))[2])

    @rule()
    def drop(self):
        idle = self.kv.reclaimable
        assert self.kv.drop_idle() == bool(idle)

    @invariant()
    def every_page_is_accounted_for(self):
        own = [page for _, _, each in self.out for page in each.pages[len(each.shared) :]]
        shared = [entry.page for entry in self.kv._entries.values()]
        assert len(set(own + shared)) == len(own) + len(shared)
        assert self.kv.pool.kv_free + len(own) + len(shared) == self.kv.pool.kv_count

    @invariant()
    def references_are_those_that_are_out(self):
        for entry in self.kv._entries.values():
            assert entry.refs == sum(entry in each.shared for _, _, each in self.out)
        known = {id(entry) for entry in self.kv._entries.values()}
        for entry in self.kv._entries.values():
            assert isinstance(entry.key[0], str | None) or entry.key[0] in known, (
                "an entry without its beginning"
            )

    def teardown(self):
        for _, _, reservation in self.out:
            self.kv.release(reservation)
        while self.kv.drop_idle():
            pass
        assert self.kv.pool.kv_free == self.kv.pool.kv_count


class UnifiedTraffic(Traffic):
    policy = "unified"


TestTraffic, TestUnifiedTraffic = Traffic.TestCase, UnifiedTraffic.TestCase
TestTraffic.settings = TestUnifiedTraffic.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None
)
