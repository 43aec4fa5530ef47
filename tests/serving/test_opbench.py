"""The microbench measures what it says; no time is asserted."""

from collections import Counter

import pytest

from labs_lib.serving.opbench import bench, draw_slots, regret
from labs_lib.serving.ops import OPS


def test_slots_are_drawn_as_asked():
    assert draw_slots(6, 3) == [1, 1, 2, 2, 3, 3]
    assert draw_slots(2, 5) == [1, 2]
    zipf = Counter(draw_slots(2000, 20, "zipf"))
    assert set(zipf) == set(range(1, 21)) and zipf[1] > 3 * zipf[10] > 0
    mixed = draw_slots(20, 4, order="mixed")
    assert mixed != sorted(mixed) and Counter(mixed) == Counter(draw_slots(20, 4))


@pytest.mark.parametrize("contiguous", [True, False])
def test_one_row_for_each_shape_and_op(contiguous):
    shapes = [(4, 2, 3, 16, 24), (1, 1, 2, 7, 8)]
    rows = bench(shapes, slots=4, contiguous=contiguous, layers=2, rounds=2, min_seconds=1e-4)
    able = set(OPS) - {"loop", "sgmv"} - ({"blocks"} if not contiguous else set())
    assert [row["op"] for row in rows if row["T"] == 4] == [name for name in OPS if name in able]
    assert {row["op"] for row in rows if row["T"] == 1} == able - {"grouped"}, "7 numbers are not 16 bytes"
    assert all(row["microseconds"] > 0 and row["base"] > 0 and row["ratio"] > 0 for row in rows)
    assert [sum(row["chosen"] for row in rows if row["T"] == T) for T in (4, 1)] == [1, 1]


def test_regret_is_against_the_best():
    shape = {"T": 1, "distinct": 1, "rank": 8, "in": 4, "out": 4}
    rows = [
        {**shape, "op": "a", "microseconds": 3.0, "chosen": True},
        {**shape, "op": "b", "microseconds": 2.0, "chosen": False},
    ]
    assert regret(rows) == [{"shape": (1, 1, 8, 4, 4), "best": "b", "chosen": "a", "regret": 1.5}]
