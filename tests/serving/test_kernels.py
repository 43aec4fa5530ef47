"""`labs bench kernels`: what it counts is right by hand, what is wrong is not timed, what is not reached is said."""

from types import SimpleNamespace

import pytest
import torch

from labs_lib.errors import LabsError
from labs_lib.serving import kernels, tuning
from labs_lib.serving.kernels_report import figure, tables
from labs_lib.serving.opbench import Case
from labs_lib.serving.ops import OPS
from labs_lib.serving.profiler import Limits, limits


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(kernels, "MOST", 2)  # nobody looks at the times here


SMALL = {"model": "32x48", "rows": (1, 4), "ranks": (4,), "rounds": 2}


def test_linears_are_those_of_the_twin():
    assert kernels.linears_of("llama-2-7b") == [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    assert kernels.linears_of("llama-3.2-1b")[1] == (2048, 512), "grouped keys"
    with pytest.raises(LabsError, match="HIDDENxINTERMEDIATE"):
        kernels.linears_of("llama")


def test_the_least_work_by_hand():
    nbytes, flops = kernels.work([(3, 5), (5, 2)], rows=4, adapters=2, rank=6, itemsize=2)
    assert nbytes == 2 * (25 + 2 * 6 * 15 + 4 * 15) and flops == 2 * 4 * (25 + 6 * 15)
    assert kernels.work([(3, 5)], rows=4, adapters=0, rank=6, itemsize=4) == (4 * (15 + 32), 2 * 4 * 15)
    machine = Limits(read=10.0, copy=8.0, rate=100.0)
    assert machine.seconds(20, 100) == 2.0 and machine.seconds(20, 500) == 5.0


def test_the_machine_is_measured():
    found = limits(torch.empty(1))
    assert min(found.read, found.copy, found.rate) > 1e6


def test_each_op_with_and_without_the_layers(tmp_path):
    rows = kernels.run(kernels.Plan(**SMALL))
    ops = [row for row in rows if row["section"] == "ops"]
    able = set(kernels.Plan().ops) - {"sgmv"}
    for layers in ("seven linears", "32 to 48"):
        for count in (1, 4):
            arms = {row["arm"] for row in ops if row["layers"] == layers and row["rows"] == count}
            assert arms == {"base", *able, *(f"with {op}" for op in able)}
    assert all(row["us"] > 0 and row["least_us"] > 0 and row["bytes"] > 0 for row in ops)
    assert all(row["off"] < 1e-4 for row in ops if row["arm"] != "base")
    text = tables(rows)
    assert "seven linears, rank 4" in text and "loop as PEFT's" in text and "Not reached" not in text
    assert figure(rows, tmp_path / "roof.png").stat().st_size > 10_000
    assert figure(rows[:1], tmp_path / "none.png") is None


def test_what_time_does_not_reach_is_said():
    rows = kernels.run(kernels.Plan(**SMALL, minutes=0.0))
    (said,) = [row for row in rows if row["section"] == "not reached"]
    assert len(said["what"]) == 4
    assert "Not reached in 0 minutes: seven linears, rank 4, 4 rows" in tables(rows)


def test_a_wrong_op_is_not_timed(monkeypatch):
    def wrong(x, a, b, index, out):
        return out.add_(1.0)

    monkeypatch.setitem(OPS, "gather", wrong)
    with pytest.raises(LabsError, match="gather is wrong by"):
        kernels.run(kernels.Plan(**SMALL))


def test_the_loop_as_peft_writes_it_is_right():
    case = Case(5, 2, 3, [(8, 12)], order="mixed")
    assert case.check(["peft"])["peft"] < 1e-5


def test_bad_arguments_are_refused():
    good = {"ops": "gather", "rounds": 1, "threads": 1, "minutes": 1.0, "device": "cpu"}
    for wrong, message in (
        ({"ops": "speed"}, "no op 'speed'"),
        ({"rounds": 0}, "at least 1"),
        ({"device": "cuda"}, "no CUDA device"),
    ):
        if wrong.get("device") == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(LabsError, match=message):
            kernels.main(SimpleNamespace(**(good | wrong)))


# -- the table of pieces --------------------------------------------------------------------------------------------


def shape(half="shrink", rows=16, ranks=16, itemsize=2, tiles=32, size=4096) -> tuning.Shape:
    return tuning.Shape(half, rows, ranks, itemsize, tiles, size)


def test_default_pieces_fit_a_small_gpu():
    """A T4 has 64 KB of shared memory for a block; pieces must be powers of two, and blocks wide enough to multiply."""
    for rows in (16, 64):
        for ranks in (16, 32, 64, 128):
            for itemsize in (2, 4):
                each = shape(rows=rows, ranks=ranks, itemsize=itemsize)
                first = tuning.default(each)
                assert first.stages * first.block * (rows + ranks) * itemsize <= 64 << 10 or first.block == 32
                for how in (*tuning.candidates(each), *tuning.candidates(each._replace(half="expand"))):
                    assert how.block >= 32 and how.block & (how.block - 1) == 0
                    assert how.warps & (how.warps - 1) == 0


def test_the_first_candidate_is_the_default_and_none_comes_twice():
    for half in tuning.HALVES:
        found = tuning.candidates(shape(half))
        assert found[0] == tuning.default(shape(half)) and len(set(found)) == len(found) > 5


def test_the_nearest_tuned_shape_is_taken():
    rows = [
        {**shape(tiles=1)._asdict(), **tuning.Shrink(64, 128, 2, 4)._asdict()},
        {**shape(tiles=64)._asdict(), **tuning.Shrink(128, 512, 4, 3)._asdict()},
        {**shape("expand")._asdict(), **tuning.Expand(512, 8)._asdict()},
    ]
    assert tuning.nearest(shape(tiles=2), rows) == tuning.Shrink(64, 128, 2, 4)
    assert tuning.nearest(shape(tiles=32), rows) == tuning.Shrink(128, 512, 4, 3)
    assert tuning.nearest(shape("expand", size=11008), rows) == tuning.Expand(512, 8)
    assert tuning.nearest(shape(ranks=64), rows) is None, "other ranks need other sizes"


def test_pieces_come_from_the_devices_record(monkeypatch):
    from labs_lib.measure import records

    row = {**shape()._asdict(), **tuning.Shrink(64, 128, 2, 4)._asdict()}
    monkeypatch.setattr(records, "load_record", lambda name, device: SimpleNamespace(rows=[row]))
    tuning.forget()
    try:
        assert tuning.pieces(shape(tiles=16), "cpu") == tuning.Shrink(64, 128, 2, 4)
        assert tuning.pieces(shape("expand"), "cpu") == tuning.default(shape("expand"))
    finally:
        tuning.forget()


def test_an_op_that_this_card_refuses_costs_only_its_own_rows(monkeypatch):
    def refuses(x, a, b, index, out):
        raise RuntimeError("compute capability 9.0 is needed")

    monkeypatch.setitem(OPS, "grouped", refuses)
    rows = kernels.run(kernels.Plan(**(SMALL | {"rows": (4,)})))
    refused = [row for row in rows if row["section"] == "refused"]
    assert len(refused) == 2 and all("compute capability" in row["why"] for row in refused)
    assert {row["arm"] for row in rows if row["section"] == "ops"} >= {"base", "with gather", "peft"}
    assert tables(rows)
