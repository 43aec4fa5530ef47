"""Side by side: the row that answers is found in either form of the record; a missing card is told, not filled in."""

import pytest

from labs_lib.measure.records import Record
from labs_lib.serving import sides
from labs_lib.serving.sides import ADDED, THROUGHPUT, added_ms, headline, serving_sides

CPU = [
    {"section": "throughput", "arm": "base", "pattern": "uniform", "adapters": 50, "of_base": 1.0},
    {"section": "throughput", "arm": "engine", "pattern": "zipf", "adapters": 50, "of_base": 0.9},
    {"section": "throughput", "arm": "engine", "pattern": "uniform", "adapters": 50, "of_base": 0.7},
    {"section": "decode", "arm": "base", "batch": 32, "ms": 2.0},
    {"section": "decode", "arm": "engine:loop", "batch": 32, "ms": 9.0},
    {"section": "decode", "arm": "engine", "batch": 32, "ms": 3.5},
]
GPU = [
    {"section": "grid", "arm": "engine", "batch": 32, "rank": 16, "missing": "needs 99 GB"},
    {"section": "grid", "arm": "engine", "batch": 32, "rank": 64, "ms": 9.0, "added_ms": 1.75},
    {"section": "grid", "arm": "engine", "batch": 32, "rank": 8, "ms": 7.5, "added_ms": 0.25},
    {"section": "grid", "arm": "engine", "batch": 1, "rank": 8, "ms": 7.5, "added_ms": 0.125},
    {"section": "fleet", "arm": "engine", "adapters": 1000, "rank": 8, "of_base": 0.5},
    {"section": "fleet", "arm": "engine", "adapters": 100, "rank": 64, "of_base": 0.8},
    {"section": "fleet", "arm": "engine", "adapters": 100, "rank": 8, "of_base": 0.95}
    | {"of_base_lo": 0.9, "of_base_hi": 1.0},
]


def test_the_rows_that_answer():
    found = headline(CPU)
    assert found[THROUGHPUT]["of_base"] == 0.7, "of both patterns the one that favours nobody"
    assert found[ADDED]["ms"] == 3.5 and added_ms(found[ADDED], CPU) == 1.5
    found = headline(GPU)
    assert found[THROUGHPUT]["of_base"] == 0.95 and added_ms(found[ADDED], GPU) == 0.25
    assert headline([{"section": "oracle", "answers": 3}]) == {}


@pytest.fixture
def empty(monkeypatch, tmp_path):
    monkeypatch.setattr(sides, "load_records", lambda name, device: made.get(device, []))
    made = {}
    return made


def record(rows, device, model) -> Record:
    return Record(
        "bench_serving", rows, provenance={"device": device, "date": "2", "settings": {"model": model}}
    )


def test_with_and_without_a_card(empty):
    assert "no GPU record yet" in serving_sides().note
    empty["cpu"] = [record(CPU, "cpu", "small"), record([{"section": "oracle"}], "cpu", "small")]
    found = serving_sides()
    assert [row["cpu, small"] for row in found.rows] == ["0.70 (50 adapters)", "+1.5 (batch 32)"]
    assert "cpu: 50 adapters keep 70%" in found.note and "no GPU record yet" in found.note
    empty["gpu"] = [record(GPU, "h100", "llama-2-7b")]
    found = serving_sides()
    assert [row["h100, llama-2-7b"] for row in found.rows] == [
        "0.95 [0.90, 1.00] (100 adapters)",
        "+0.25 (batch 32)",
    ]
    assert "h100: 100 adapters keep 95%" in found.note and "no GPU record" not in found.note
    assert all("published, A100, 7B" in row and "the chapter" in row for row in found.rows)


def test_the_courses_own_records_can_be_set_side_by_side():
    assert any("cpu, small" in row for row in serving_sides().rows)
