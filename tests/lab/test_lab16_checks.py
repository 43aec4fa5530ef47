"""Lab 16's checks: right answers in other words pass, and what a learner may break in them is told."""

import pytest

from labs_lib.lab.check import FAIL, OK, TODO, find, judge
from labs_lib.serving.scheduler import OUTPUT_WEIGHT, PROMPT_WEIGHT


def verdict(name, candidate):
    return judge(find(name), candidate)


class PagesFromTheTop:
    """Another free list, and give_back in two passes."""

    def __init__(self, count):
        self.count, self.owner = count, {}
        self._free = set(range(1, count + 1))

    @property
    def free(self):
        return len(self._free)

    def take(self, count, owner):
        if len(self._free) < count:
            return None
        pages = sorted(self._free, reverse=True)[:count]
        for page in pages:
            self._free.remove(page)
            self.owner[page] = owner
        return pages

    def give_back(self, pages):
        for page in pages:
            self.owner.pop(page)
        self._free |= set(pages)


def sort_victims(resident, pinned):
    found = None
    for slot in sorted(resident, key=lambda slot: -slot.used):
        if not slot.refs and slot.adapter not in pinned:
            found = slot
    return found


class PlainCounters:
    """Without Counter's and defaultdict's habits."""

    def __init__(self):
        self.served, self.here, self.floor = {}, {}, 0.0

    def arrive(self, tenant):
        if tenant not in self.here:
            here = [self.served[other] for other in self.here]
            start = min(here) if here else self.floor
            self.served[tenant] = max(self.served.get(tenant, 0.0), start)
            self.here[tenant] = 0
        self.here[tenant] += 1

    def charge(self, tenant, prompt=0, output=0):
        more = prompt * PROMPT_WEIGHT + output * OUTPUT_WEIGHT
        self.served[tenant] = self.served.get(tenant, 0.0) + more

    def leave(self, tenant):
        if self.here[tenant] == 1:
            self.floor = self.served[tenant]
            self.here.pop(tenant)
        else:
            self.here[tenant] -= 1

    def order(self, sequences):
        by_arrival = sorted(sequences, key=lambda each: each.id)
        return iter(sorted(by_arrival, key=lambda each: self.served[each.request.tenant]))


def jain_by_moments(shares):
    if not any(shares):
        return 1
    mean = sum(shares) / len(shares)
    return mean**2 / (sum(share**2 for share in shares) / len(shares))


def says_what_it_found(result, truth):
    deleted = result.request.adapter == truth.shas["gone"]
    if bool(result.error) != deleted:
        return f"error {result.error!r}"
    if deleted:
        return ""
    named = result.provenance.adapter == result.request.adapter
    return "" if named and truth.right(result) else f"named {named}"


@pytest.mark.parametrize(
    ("name", "candidate"),
    [
        ("Pages", PagesFromTheTop),
        ("choose_victim", sort_victims),
        ("Counters", PlainCounters),
        ("jain_index", jain_by_moments),
        ("misserved", says_what_it_found),
        ("lab16.adapter_in_tokens", 152.5),
        ("lab16.adapter_in_tokens", 153),
    ],
)
def test_other_ways_of_being_right(name, candidate):
    outcome = verdict(name, candidate)
    assert (outcome.status, outcome.message) == (OK, "")


class TakesStub(PagesFromTheTop):
    def take(self, count, owner):
        raise NotImplementedError("TODO: Pages.take")


def test_a_half_written_class_says_what_is_left():
    outcome = verdict("Pages", TakesStub)
    assert outcome.status == TODO
    assert "Pages.take" in outcome.message


class TwiceByLooking(PagesFromTheTop):
    def give_back(self, pages):
        self._free |= set(pages)
        for page in pages:
            del self.owner[page]


def test_a_page_on_the_free_list_before_its_owner_is_deleted():
    """It raises on the second time, and yet has done harm: with a list the page would be there twice."""
    assert verdict("Pages", TwiceByLooking).status == OK  # a set cannot hold it twice

    class WithAList(TwiceByLooking):
        def __init__(self, count):
            super().__init__(count)
            self._free = list(range(count, 0, -1))

        def take(self, count, owner):
            if len(self._free) < count:
                return None
            pages = [self._free.pop() for _ in range(count)]
            self.owner.update(dict.fromkeys(pages, owner))
            return pages

        def give_back(self, pages):
            self._free += pages
            for page in pages:
                del self.owner[page]

    outcome = verdict("Pages", WithAList)
    assert outcome.status == FAIL
    assert "on the free list twice" in outcome.message
