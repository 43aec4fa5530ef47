"""Lab 16's checks: books of pages, who is evicted, who goes next, how even that is, and whose tokens these are.

Beside each exercise stand its mutants: mistakes that learners make, which must fail with words of their own.
"""

from types import SimpleNamespace

from labs_lib.lab.check import Diagnosis, answer, exercise, expect, mutant
from labs_lib.serving.arena import Pages
from labs_lib.serving.ledger import jain_index
from labs_lib.serving.pool import Slot
from labs_lib.serving.scheduler import OUTPUT_WEIGHT, PROMPT_WEIGHT, Counters
from labs_lib.serving.tiers import choose_victim
from labs_lib.serving.verdict import misserved

# --- Pages


@exercise(
    "Pages",
    reference="labs_lib.serving.arena:Pages",
    hints=[
        "self._free is a list of page numbers: its length is what is free, pop() takes one, append() puts one back.",
        "take looks at the number of free pages before it takes the first one.",
        "give_back, for each page: del self.owner[page], then self._free.append(page).",
    ],
)
def check_pages(candidate, ref):
    books = candidate(6)
    expect(
        books.free == 6, f"A fresh memory of 6 pages has {books.free!r} free ones: count what nobody owns."
    )
    first = books.take(2, "a")
    expect(first is not None, "take returns None although there are enough pages: is a `return` missing?")
    expect(len(first) == 2, f"take(2, ...) gave {len(first)} pages.")
    expect(0 not in first, "Page 0 was given away: it means 'nothing here' and belongs to nobody.")
    expect(
        books.free == 4, f"Of 6 pages 2 are taken, and free says {books.free}: take them off the free list."
    )
    expect(
        all(books.owner.get(page) == "a" for page in first), "take does not write down whose the pages are."
    )
    second = books.take(3, "b")
    expect(not set(first) & set(second), f"Pages {sorted(set(first) & set(second))} have two owners.")
    _check_too_many(books)
    books.give_back(first)
    expect(
        books.free == 3, f"After 2 pages were given back 3 are free, not {books.free}: put them on the list."
    )
    left = [page for page in first if page in books.owner]
    expect(not left, f"Pages {left} were given back and still have an owner.")
    _check_twice(books, first)
    again = books.take(3, "c")
    expect(again is not None and set(first) <= set(again), "What was given back cannot be taken again.")


def _check_too_many(books) -> None:
    got = books.take(2, "c")  # one page is left
    if got is not None:
        raise Diagnosis(
            f"1 page is free and take(2, ...) gave {got}: with fewer than asked for, return None."
        )
    expect(books.free == 1, "A take that failed must take nothing: look before the first pop.")
    expect("c" not in books.owner.values(), "A take that failed wrote down an owner.")


def _check_twice(books, pages) -> None:
    free = books.free
    try:
        books.give_back(pages[:1])
    except KeyError:
        expect(
            books.free == free, "A page given back twice is on the free list twice: delete its owner first."
        )
        return
    raise Diagnosis(
        "A page given back twice was accepted. Soon it belongs to two tenants: delete its owner with `del`, which "
        "raises KeyError where there is none."
    )


@mutant("Pages", says="return None")
class TakesWhatThereIs(Pages):
    def take(self, count, owner):
        return super().take(min(count, self.free), owner)


@mutant("Pages", says="look before the first pop")
class NoticesTooLate(Pages):
    def take(self, count, owner):
        pages = [self._free.pop() for _ in range(min(count, len(self._free)))]
        if len(pages) < count:
            return None
        self.owner.update(dict.fromkeys(pages, owner))
        return pages


@mutant("Pages", says="two owners")
class LeavesThemOnTheList(Pages):
    @property
    def free(self):
        return self.count - len(self.owner)

    def take(self, count, owner):
        if count > self.free:
            return None
        pages = self._free[-count:]
        self.owner.update(dict.fromkeys(pages, owner))
        return pages


@mutant("Pages", says="whose the pages are")
class ForgetsTheOwner(Pages):
    def take(self, count, owner):
        return [self._free.pop() for _ in range(count)] if count <= len(self._free) else None


@mutant("Pages", says="put them on the list")
class NeverFreed(Pages):
    def give_back(self, pages):
        for page in pages:
            del self.owner[page]


@mutant("Pages", says="still have an owner")
class KeepsTheOwner(Pages):
    def give_back(self, pages):
        self._free.extend(pages)


@mutant("Pages", says="given back twice was accepted")
class AcceptsItTwice(Pages):
    def give_back(self, pages):
        for page in pages:
            self.owner.pop(page, None)
            self._free.append(page)


@mutant("Pages", says="count what nobody owns")
class CountsTheOwned(Pages):
    @property
    def free(self):
        return len(self.owner)


# --- choose_victim


def _resident() -> list[Slot]:
    """Who is least recently used is in use; next comes "c", and "a" is the first in the list."""
    return [
        Slot(1, adapter="a", used=3.0),
        Slot(2, adapter="b", used=1.0, refs=1),
        Slot(3, adapter="c", used=2.0),
        Slot(4, adapter="d", used=4.0),
    ]


@exercise(
    "choose_victim",
    reference="labs_lib.serving.tiers:choose_victim",
    hints=[
        "First a list of the slots that may go: refs is 0 and the adapter is not pinned.",
        "min(..., key=lambda slot: slot.used) finds the one that was used longest ago.",
        "min(idle, key=lambda slot: slot.used, default=None) also knows what to say of an empty list.",
    ],
)
def check_choose_victim(candidate, ref):
    got = candidate(_resident(), set())
    expect(got is not None, "It gives None although three slots are idle: is a `return` missing?")
    expect(not isinstance(got, str), f"It gives {got!r}, the adapter's name: return the slot.")
    expect(
        got.refs == 0,
        "It evicts an adapter that a running request reads: that request would go on with zeros.",
    )
    expect(
        got.adapter != "d", "It evicts the most recently used: `used` is a time, the smallest is longest ago."
    )
    expect(got.adapter != "a", "It evicts the first in the list: which was used longest ago?")
    expect(got.adapter == "c", f"It evicts {got.adapter!r}; 'c' is the idle one that was used longest ago.")
    got = candidate(_resident(), {"c"})
    expect(got is None or got.adapter != "c", "It evicts a pinned adapter.")
    expect(got is not None and got.adapter == "a", "With 'c' pinned the next is 'a'.")
    busy = [Slot(1, adapter="a", refs=2), Slot(2, adapter="b")]
    try:
        got = candidate(busy, {"b"})
    except ValueError as error:
        raise Diagnosis(f"Nobody may be moved, and it fails ({error}): then the answer is None.") from error
    expect(got is None, "Nobody may be moved (one in use, one pinned): then the answer is None.")


@mutant("choose_victim", says="a running request reads")
def ignores_references(resident, pinned):
    return min((s for s in resident if s.adapter not in pinned), key=lambda s: s.used, default=None)


@mutant("choose_victim", says="evicts a pinned adapter")
def ignores_pins(resident, pinned):
    return choose_victim(resident, set())


@mutant("choose_victim", says="most recently used")
def most_recent(resident, pinned):
    return max(
        (s for s in resident if not s.refs and s.adapter not in pinned), key=lambda s: s.used, default=None
    )


@mutant("choose_victim", says="first in the list")
def first_found(resident, pinned):
    return next((s for s in resident if not s.refs and s.adapter not in pinned), None)


@mutant("choose_victim", says="return the slot")
def the_name(resident, pinned):
    slot = choose_victim(resident, pinned)
    return slot and slot.adapter


@mutant("choose_victim", says="and it fails")
def nobody_is_an_error(resident, pinned):
    return min((s for s in resident if not s.refs and s.adapter not in pinned), key=lambda s: s.used)


@mutant("choose_victim", says="is a `return` missing?")
def forgot_to_return(resident, pinned):
    choose_victim(resident, pinned)


# --- Counters


@exercise(
    "Counters",
    reference="labs_lib.serving.scheduler:Counters",
    hints=[
        "charge adds PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output to self.served[tenant].",
        "arrive lifts only a tenant with self.here[tenant] == 0, to "
        "min((self.served[other] for other in self.here), default=self.floor), and never down.",
        "order: sorted(sequences, key=lambda each: (self.served[each.request.tenant], each.id)).",
    ],
)
def check_counters(candidate, ref):
    _check_charge(candidate())
    _check_arrive(candidate)
    _check_leave(candidate())
    _check_order(candidate())


def _check_charge(counters) -> None:
    counters.charge("a", prompt=10, output=5)
    got, right = counters.served["a"], 10 * PROMPT_WEIGHT + 5 * OUTPUT_WEIGHT
    expect(got != 15, "A token counts 1 whichever it is: weigh prompt and output tokens.")
    expect(got != 10 * OUTPUT_WEIGHT + 5 * PROMPT_WEIGHT, "The weights of prompt and output are swapped.")
    expect(got == right, f"10 prompt and 5 output tokens are charged {got}, not {right}.")
    counters.charge("a", output=1)
    got = counters.served["a"]
    expect(got == right + OUTPUT_WEIGHT, f"The next token makes it {got}: add to what was served before.")


def _check_arrive(candidate) -> None:
    counters = candidate()
    for tenant, served in (("a", 100.0), ("b", 40.0)):
        counters.arrive(tenant)
        counters.served[tenant] = served
    counters.arrive("c")
    got = counters.served["c"]
    expect(
        got != 0, "A tenant that comes back starts at 0: idling earned it credit against those who are here."
    )
    expect(
        got != 100, "A newcomer is lifted to the largest counter: it would wait for everybody. The least one."
    )
    expect(got == 40, f"Counters here are 100 and 40, and a newcomer starts at {got}, not 40.")
    counters.served["b"] = 60.0
    counters.arrive("c")
    expect(
        counters.served["c"] == 40,
        "A tenant that is here is lifted again by its second request: only newcomers.",
    )
    expect(counters.here["c"] == 2, f"c has 2 sequences here, the books say {counters.here['c']}.")
    counters.served["d"] = 500.0
    counters.arrive("d")
    expect(counters.served["d"] == 500, "A counter went down: what was served is never forgiven.")


def _check_leave(counters) -> None:
    counters.arrive("a")
    counters.arrive("a")
    counters.served["a"] = 70.0
    counters.leave("a")
    expect("a" in counters.here, "a still has a sequence here, and leave has taken it out: count down.")
    counters.leave("a")
    expect("a" not in counters.here, "With a's last sequence a is no longer here: delete it.")
    counters.arrive("b")
    got = counters.served["b"]
    expect(
        got == 70,
        f"Nobody was here and a left at 70, but b starts at {got}: a would wait until b has caught up.",
    )


def _check_order(counters) -> None:
    waiting = [
        SimpleNamespace(id=i, request=SimpleNamespace(tenant=who))
        for i, who in ((4, "b"), (2, "a"), (1, "b"))
    ]
    counters.served |= {"a": 9.0, "b": 4.0}
    got = [each.id for each in counters.order(waiting)]
    expect(got != [1, 2, 4], "That is the order of arrival: who has been served least goes first.")
    expect(got != [2, 1, 4], "Who was served most goes first: it is the other way round.")
    expect(got != [4, 1, 2], "Among requests of one tenant the earlier one, with the smaller id, goes first.")
    expect(got == [1, 4, 2], f"The order of ids is {got}, not [1, 4, 2].")


@mutant("Counters", says="weigh prompt and output")
class Unweighted(Counters):
    def charge(self, tenant, prompt=0, output=0):
        self.served[tenant] += prompt + output


@mutant("Counters", says="swapped")
class SwappedWeights(Counters):
    def charge(self, tenant, prompt=0, output=0):
        self.served[tenant] += OUTPUT_WEIGHT * prompt + PROMPT_WEIGHT * output


@mutant("Counters", says="add to what was served")
class ChargesOnce(Counters):
    def charge(self, tenant, prompt=0, output=0):
        self.served[tenant] = PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output


@mutant("Counters", says="earned it credit")
class NoLift(Counters):
    def arrive(self, tenant):
        self.here[tenant] += 1


@mutant("Counters", says="largest counter")
class LiftsToTheTop(Counters):
    def arrive(self, tenant):
        if not self.here[tenant]:
            most = max((self.served[other] for other in self.here), default=self.floor)
            self.served[tenant] = max(self.served[tenant], most)
        self.here[tenant] += 1


@mutant("Counters", says="only newcomers")
class LiftsEveryTime(Counters):
    def arrive(self, tenant):
        others = [self.served[other] for other in self.here if other != tenant]
        self.served[tenant] = max(self.served[tenant], min(others, default=self.floor))
        self.here[tenant] += 1


@mutant("Counters", says="never forgiven")
class LiftsDown(Counters):
    def arrive(self, tenant):
        if not self.here[tenant]:
            self.served[tenant] = min((self.served[other] for other in self.here), default=self.floor)
        self.here[tenant] += 1


@mutant("Counters", says="count down")
class LeavesAtOnce(Counters):
    def leave(self, tenant):
        self.floor = self.served[tenant]
        self.here.pop(tenant, None)


@mutant("Counters", says="no longer here")
class NeverLeaves(Counters):
    def leave(self, tenant):
        self.here[tenant] -= 1


@mutant("Counters", says="caught up")
class NoFloor(Counters):
    def leave(self, tenant):
        super().leave(tenant)
        self.floor = 0.0


@mutant("Counters", says="order of arrival")
class ByArrival(Counters):
    def order(self, sequences):
        return sorted(sequences, key=lambda each: each.id)


@mutant("Counters", says="other way round")
class MostServedFirst(Counters):
    def order(self, sequences):
        return sorted(sequences, key=lambda each: (-self.served[each.request.tenant], each.id))


@mutant("Counters", says="smaller id")
class ForgetsTheId(Counters):
    def order(self, sequences):
        return sorted(sequences, key=lambda each: self.served[each.request.tenant])


# --- jain_index


@exercise(
    "jain_index",
    reference="labs_lib.serving.ledger:jain_index",
    hints=[
        "sum(shares) ** 2 is the square of the sum; the other one is a sum of squares.",
        "The number of tenants, len(shares), stands below the line.",
        "return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0",
    ],
)
def check_jain_index(candidate, ref):
    got = candidate([3.0, 3.0, 3.0, 3.0])
    expect(got is not None, "It gives None: is a `return` missing?")
    expect(abs(got - 4) > 1e-9, "Four equal shares give 4: divide by how many there are.")
    expect(abs(got - 1 / 12) > 1e-9, "Four shares of 3 give 1/12: the sum on top is squared.")
    expect(abs(got - 1) < 1e-9, f"Equal shares are perfectly fair, 1, not {got:g}.")
    got = candidate([8.0, 0.0, 0.0, 0.0])
    expect(abs(got - 1) > 1e-9, "One tenant has everything, and it says 1: those with nothing count, too.")
    expect(abs(got - 0.25) < 1e-9, f"One of four has everything: 1/4, not {got:g}.")
    got, right = candidate([4.0, 1.0, 1.0]), ref([4.0, 1.0, 1.0])
    expect(abs(got - right) < 1e-9, f"Shares 4, 1, 1 give {got:g}, not {right:g}: 36 over 3 times 18.")
    for nothing in ([], [0.0, 0.0]):
        try:
            got = candidate(nothing)
        except ZeroDivisionError as error:
            raise Diagnosis(
                f"{nothing} is a division by zero: nobody is worse off than another, so 1."
            ) from error
        expect(got == 1, f"{nothing}: nobody is worse off than another, so 1, not {got:g}.")


@mutant("jain_index", says="divide by how many")
def without_n(shares):
    return len(shares) * jain_index(shares)


@mutant("jain_index", says="sum on top is squared")
def square_forgotten(shares):
    squares = sum(share * share for share in shares)
    return sum(shares) / (len(shares) * squares) if squares else 1.0


@mutant("jain_index", says="those with nothing count")
def drops_the_poor(shares):
    return jain_index([share for share in shares if share])


@mutant("jain_index", says="36 over 3 times 18")
def mean_over_maximum(shares):
    return sum(shares) / len(shares) / max(shares) if any(shares) else 1.0


@mutant("jain_index", says="division by zero")
def nobody_there(shares):
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


# --- misserved


class _Truth:
    """Adapter x says 1, 1, 1 and y says 2, 2, 2; the base says 0, 0, 0; z has been deleted."""

    def __init__(self) -> None:
        self.shas = {"base": None, "gone": "z"}

    def right(self, result) -> bool:
        return result.tokens == [{None: 0, "x": 1, "y": 2, "z": 3}[result.request.adapter]] * 3


def _result(asked: str | None, tokens: list[int], used: str | None = "as asked", error: str | None = None):
    used = asked if used == "as asked" else used
    lease = None if error else SimpleNamespace(adapter=used, slot=1, generation=1)
    request = SimpleNamespace(adapter=asked, tenant=f"tenant of {asked}", prompt=[3], max_tokens=3)
    finish = "error" if error else "length"
    return SimpleNamespace(request=request, tokens=tokens, provenance=lease, error=error, finish=finish)


@exercise(
    "misserved",
    reference="labs_lib.serving.verdict:misserved",
    hints=[
        'Ask first whether result.request.adapter == truth.shas["gone"]: for it, result.error is as it should be.',
        "For all others: an error, another adapter in the provenance, wrong tokens, in this order.",
        'The last line: return "" if truth.right(result) else "tokens of other weights"',
    ],
)
def check_misserved(candidate, ref):
    def accused(*result, **more) -> bool:
        said = candidate(_result(*result, **more), _Truth())
        expect(said is not None, "It gives None: return words, or the empty string if nothing is wrong.")
        expect(
            isinstance(said, str),
            f"It gives {said!r}: return words, or the empty string if nothing is wrong.",
        )
        return bool(said)

    for asked, tokens in (("x", [1, 1, 1]), ("y", [2, 2, 2]), (None, [0, 0, 0])):
        expect(
            not accused(asked, tokens),
            f"It accuses a healthy engine: {asked or 'the base'} got its own tokens.",
        )
    expect(
        not accused("z", [], error="The files are gone."),
        "It accuses a healthy engine: a deleted adapter cannot be served, and its request has failed as it must.",
    )
    expect(
        accused("y", [2, 1, 1], used="y"),
        "The first token is right and the others are another adapter's, and it sees nothing wrong: compare all.",
    )
    expect(
        accused("x", [2, 2, 2], used="x"),
        "The provenance names the right adapter, the tokens are another's, and it sees nothing wrong. The provenance "
        "is what the engine believes.",
    )
    expect(
        accused(None, [1, 1, 1]),
        "A visitor of the base model got a tenant's tokens, and it sees nothing wrong.",
    )
    expect(
        accused("x", [], error="The engine failed at this step."),
        "A request that has done nothing wrong fails, and it sees nothing wrong: whose fault was it?",
    )
    expect(
        accused("x", [1, 1, 1], used="y"),
        "The tokens are right, but the engine says that y made them, and it sees nothing wrong: right by luck.",
    )
    expect(
        accused("z", [3, 3, 3]), "A deleted adapter answers, and it sees nothing wrong: with whose weights?"
    )


@mutant("misserved", says="is what the engine believes")
def trusts_the_provenance(result, truth):
    if result.error:
        return misserved(result, truth)
    wrong = result.provenance.adapter != result.request.adapter or len(set(result.tokens)) > 1
    return "names another adapter" if wrong else ""


@mutant("misserved", says="compare all")
def first_token_only(result, truth):
    first = SimpleNamespace(request=result.request, tokens=result.tokens[:1] * 3)
    return "" if result.error or truth.right(first) else "tokens of other weights"


@mutant("misserved", says="has failed as it must")
def every_failure(result, truth):
    return "fails" if result.error else misserved(result, truth)


@mutant("misserved", says="whose fault was it")
def no_failure(result, truth):
    return "" if result.error else misserved(result, truth)


@mutant("misserved", says="right by luck")
def tokens_only(result, truth):
    return "" if result.tokens and truth.right(result) else misserved(result, truth)


@mutant("misserved", says="with whose weights")
def forgets_the_deleted(result, truth):
    return "" if result.request.adapter == "z" else misserved(result, truth)


@mutant("misserved", says="visitor of the base")
def base_is_nobody(result, truth):
    return "" if result.request.adapter is None else misserved(result, truth)


@mutant("misserved", says="return words")
def true_or_false(result, truth):
    return bool(misserved(result, truth))


# --- short answers


answer(
    "lab16.lru_hits",
    reference=0,
    unit="hits",
    tolerance=0,
    mistakes={
        9: "that is with three slots: two of the three tenants fit now",
        6: "two thirds of the nine hits would be fair, but is the tenant that comes next ever still there?",
        4: "who is there when A comes for the second time? C has just pushed it out",
    },
    hints=[
        "Write down who is in after each request: A, AB, BC, ...",
        "A comes back just after it was evicted.",
    ],
)
answer(
    "lab16.adapter_in_tokens",
    reference=16 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008)) / (32 * 2 * 4096),
    unit="tokens",
    mistakes={
        9.53: "that is one page, one rank: the adapter has sixteen",
        305: "a token leaves keys and values, both: 2 x 4,096 numbers in a layer",
        64: "that is attention only: gate, up and down are adapted, too",
    },
    hints=[
        "One rank in one block: 4 layers of 4,096 + 4,096 numbers and 3 of 4,096 + 11,008.",
        "One token in one block: keys and values, 4,096 numbers each.",
        "16 ranks over one token; the number of blocks and the bytes per number cancel.",
    ],
)


# --- predictions: any sensible number is right, it is the surprise that teaches


answer("lab16.predict_hits", reference=50, within=(0, 100), unit="%")
answer("lab16.predict_cliff", reference=50, within=(0, 100), unit="%")
answer("lab16.predict_silent", reference=8, within=(0, 50), unit="bugs")
