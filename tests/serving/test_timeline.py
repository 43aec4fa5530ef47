"""The ledger's events as rows and figures: nothing lost, nothing counted twice, and the figures say what is there."""

import io

import matplotlib as mpl
import pytest

mpl.use("Agg")
import matplotlib.pyplot as plt
from hypothesis import given, settings
from hypothesis import strategies as st

from labs_lib.errors import LabsError
from labs_lib.lab.serving_plots import latency_breakdown, tier_timeline
from labs_lib.serving.engine import Engine
from labs_lib.serving.ledger import Ledger
from labs_lib.serving.timeline import Interval, breakdown, evictions, intervals, load_time, residency
from labs_lib.serving.types import Provenance, Request, Result, Timing

from .conftest import small_model


class Script:
    """A ledger written by hand: `at(seconds).watch(...)`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ledger = Ledger(lambda: self.now)

    def at(self, now: float) -> Ledger:
        self.now = 100.0 + now  # an engine's clock does not start at zero
        return self.ledger

    def end(self, now: float, tenant: str, timing: Timing, id: int = 1, adapter: str | None = None) -> None:
        request = Request([1, 2], tenant, adapter)
        self.at(now).end(Result(id, request, [3], "length", Provenance(adapter, 0, 0), timing))


@pytest.fixture
def script() -> Script:
    """Acme's adapter is loaded, serves, and makes room for bolt's; the host drops it; bolt's load fails once."""
    script = Script()
    script.at(0).watch("load", "aaaa", "acme")
    script.at(2).watch("host", "aaaa", "acme")
    script.at(3).watch("device", "aaaa", "acme", slot=1)
    script.at(3).watch("admit", "aaaa", "acme", id=1, slot=1)
    script.at(4).watch("load", "bbbb", "bolt")
    script.at(5).watch("failed", "bbbb", "bolt", reason="no file")
    script.at(6).watch("load", "bbbb", "bolt")
    script.end(7, "acme", Timing(queue=1, load=2, prefill=1, decode=3), id=1, adapter="aaaa")
    script.at(8).watch("host", "bbbb", "bolt")
    script.at(8).watch("drop", "aaaa", "bolt")
    script.at(8).watch("evict", "aaaa", "bolt", of="acme", slot=1)
    script.at(8).watch("device", "bbbb", "bolt", slot=1)
    script.at(10).watch("admit", "bbbb", "bolt", id=2, slot=1)
    return script


def test_each_stay_is_one_row(script):
    rows = {(each.adapter, each.what, each.start): each for each in intervals(script.ledger)}
    assert rows["aaaa", "loading", 0.0].end == 2
    assert rows["aaaa", "host", 2.0].ended == "drop"
    assert rows["aaaa", "running", 3.0] == Interval("aaaa", "running", 3.0, 7.0, "acme", "length", "", 1, 1)
    assert rows["bbbb", "loading", 4.0].ended == "failed"
    assert rows["bbbb", "loading", 6.0].ended == "host"
    assert len(rows) == 9


def test_an_eviction_says_whose_and_for_whom(script):
    (gone,) = [each for each in intervals(script.ledger) if each.ended == "evict"]
    assert (gone.adapter, gone.tenant, gone.by, gone.start, gone.end, gone.slot) == (
        "aaaa",
        "acme",
        "bolt",
        3,
        8,
        1,
    )
    assert evictions(script.ledger) == {("acme", "bolt"): 1}


def test_what_is_open_ends_with_the_record_or_at_a_given_time(script):
    def open_rows(**more):
        return {each.what: each for each in intervals(script.ledger, **more) if not each.ended}

    assert {what: each.end for what, each in open_rows().items()} == {"host": 10, "device": 10, "running": 10}
    assert {each.end for each in open_rows(until=112.0).values()} == {12}


def test_a_record_that_lost_its_beginning_starts_at_zero(script):
    """The ledger keeps the last events only."""
    late = list(script.ledger.events)[8:]  # from bolt's "host" on
    (gone,) = [each for each in intervals(late) if each.ended == "evict"]
    assert (gone.start, gone.end, gone.tenant, gone.by) == (0, 0, "acme", "bolt")
    assert all(each.seconds >= 0 for each in intervals(late))


def test_no_events_no_rows():
    assert intervals([]) == []
    assert load_time([]) == 0.0


def test_sums(script):
    rows = intervals(script.ledger)
    assert residency(rows) == {"aaaa": 5.0, "bbbb": 2.0}
    assert load_time(rows) == 2.0


def test_requests_that_ended_in_the_queue_have_no_row():
    script = Script()
    script.at(0).watch("end", None, "t", id=1, finish="abort")
    assert intervals(script.ledger) == []


def test_the_mean_breakdown_adds_up(script):
    script.end(11, "acme", Timing(queue=3, load=0, prefill=1, decode=5), id=3)
    script.end(12, "bolt", Timing(queue=0, load=0, prefill=1, decode=1), id=4)
    acme, bolt = breakdown(script.ledger)
    assert (acme.tenant, acme.requests) == ("acme", 2)
    assert (acme.queue, acme.load, acme.prefill, acme.decode) == (2, 1, 1, 4)
    assert (acme.ttft, acme.total) == (4, 8)
    assert bolt.total == 2


def test_the_median_is_one_request_so_that_its_parts_add_up():
    script = Script()
    timings = [Timing(9, 0, 1, 0), Timing(0, 3, 1, 1), Timing(0, 0, 1, 1)]
    for i, timing in enumerate(timings):
        script.end(i, "t", timing, id=i)
    (row,) = breakdown(script.ledger, "median")
    assert (row.queue, row.load, row.prefill, row.decode) == (0, 3, 1, 1)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["load", "host", "failed", "device", "evict", "drop"]), st.sampled_from("abc")),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_any_order_of_events_gives_rows_within_the_record(events):
    script = Script()
    for i, (what, adapter) in enumerate(events):
        script.at(i).watch(what, adapter, "t", **({"of": "t"} if what == "evict" else {}))
    for each in intervals(script.ledger):
        assert 0 <= each.start <= each.end <= max(len(events) - 1, 0)


@pytest.fixture(scope="module")
def served(zoo) -> Ledger:
    """A real run: more adapters than slots, and a host tier that holds two."""
    with Engine(
        small_model(), zoo.folder_of, slots=2, max_rank=8, max_batch=3, host_bytes=2 * 5 * 5000
    ) as engine:
        names = ["plain", "attention", "base", "rslora", "plain", "rank-one", "attention", "base", "plain"]
        for _ in range(2):
            engine.generate(
                [Request([5, 6, i + 7], name, zoo.shas.get(name), 5) for i, name in enumerate(names)]
            )
        return engine.ledger


def test_a_real_run_is_told_as_it_was(served):
    rows = intervals(served)
    counts = served.counts
    assert sum(each.ended == "evict" for each in rows) == counts["evict"] > 0
    assert sum(each.what == "running" for each in rows) == counts["admit"] == 18
    assert sum(each.what == "device" for each in rows) == counts["device"]
    for each in rows:
        if each.what == "running" and each.adapter is not None:
            assert any(
                stay.start <= each.start and each.end <= stay.end
                for stay in rows
                if (stay.what, stay.adapter, stay.slot) == ("device", each.adapter, each.slot)
            ), "a request ran while its adapter was not there"
    at_once = [(each.start, 1) for each in rows if each.what == "device"]
    at_once += [(each.end, -1) for each in rows if each.what == "device"]
    level = 0
    for _, change in sorted(at_once):
        level += change
        assert level <= 2, "more adapters on the device than slots"


# -- figures -------------------------------------------------------------------------------------------------------


def texts(fig) -> str:
    return " ".join(text.get_text() for text in fig.findobj(mpl.text.Text))


def test_the_timeline_shows_lanes_evictions_and_who_needed_the_room(script):
    fig, alt = tier_timeline(script.ledger)
    shown = texts(fig)
    for part in (
        "acme",
        "bolt",
        "for bolt",
        "1 evictions among 2 adapters",
        "device slot, serving",
        "time (s)",
    ):
        assert part in shown
    assert "acme was on the device longest, 50% of the time" in alt
    assert "1 of them for bolt" in alt
    plt.close(fig)


def test_a_window_and_a_choice_of_lanes(script):
    fig, alt = tier_timeline(script.ledger, {"aaaa": "Acme Inc."}, lanes=1, start=2, end=6, title="Calm")
    assert "Acme Inc." in texts(fig)
    assert "1 more are not drawn" in alt
    assert "There were 0 evictions." in alt
    assert "75% of the time" in alt  # on the device from 3, in a window from 2 to 6
    plt.close(fig)


def test_two_versions_of_a_tenant_are_told_apart():
    script = Script()
    for i, sha in enumerate(("aaaa1111", "bbbb2222")):
        script.at(i).watch("device", sha, "acme", slot=i + 1)
    script.at(2).watch("load", "cccc3333", "bolt")
    fig, _ = tier_timeline(script.ledger)
    assert "acme aaaa11" in texts(fig)
    assert "acme bbbb22" in texts(fig)
    plt.close(fig)


def test_the_breakdown_shows_tenants_parts_and_counts(script):
    script.end(11, "bolt", Timing(queue=0.5, load=0, prefill=1, decode=1), id=4)
    fig, alt = latency_breakdown(script.ledger)
    shown = texts(fig)
    for part in ("acme takes longest: 43% of it is decode", "7  (n=1)", "2.5  (n=1)", "load adapter", "(s)"):
        assert part in shown
    assert "the fastest drawn, bolt, takes 2.5 s" in alt
    plt.close(fig)


def test_without_decode_it_is_the_time_to_first_token(script):
    fig, alt = latency_breakdown(script.ledger, phases=("queue", "load", "prefill"))
    assert "acme waits longest for its first token: 50% of it is load adapter" in texts(fig)
    assert "time to first token" in alt
    plt.close(fig)


def test_figures_of_a_real_run_can_be_drawn(served):
    for fig, alt in (tier_timeline(served), latency_breakdown(served, how="median", tenants=3)):
        file = io.BytesIO()
        fig.savefig(file, format="png")
        assert len(file.getvalue()) > 10_000
        assert len(alt.split()) > 20
        plt.close(fig)


def test_nothing_to_draw_is_said():
    with pytest.raises(LabsError, match="serve some"):
        tier_timeline(Script().ledger)
    with pytest.raises(LabsError, match="serve some"):
        latency_breakdown(Script().ledger)


def test_an_unknown_phase_is_refused(script):
    with pytest.raises(LabsError, match="queue, load"):
        latency_breakdown(script.ledger, phases=["lunch"])
