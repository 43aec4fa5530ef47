"""Records survive interruption, other processes and the passing of time."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labs_lib import paths
from labs_lib.errors import LabsError
from labs_lib.measure import Record, context, load_published, load_record, load_records, save_record
from labs_lib.measure import records as module

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.text(), plain, max_size=3), max_size=4))
def test_file_format_round_trips(rows):
    assert json.loads(module._dump([{"name": "x", "rows": rows}])) == [{"name": "x", "rows": rows}]


def test_appends_and_never_changes_what_is_there():
    first = save_record(Record("sweep", [{"lr": 1e-3, "score": 0.5}]), recorded=True)
    before = first.read_text()
    save_record(Record("sweep", [{"lr": 2e-3, "score": 0.6}]), recorded=True)
    assert first.read_text().startswith(before.rstrip().removesuffix("]").rstrip())
    assert [record.rows[0]["score"] for record in load_records("sweep")] == [0.5, 0.6]
    assert load_record("sweep").rows == [{"lr": 2e-3, "score": 0.6}]


def test_file_is_named_by_device_and_has_provenance():
    context.set(lab="02", profile="cpu", device="cpu", seed=7, model="small")
    path = save_record(Record("lora_rank_sweep", []), recorded=True)
    assert path == paths.data() / "measured" / "cpu.lora_rank_sweep.json"
    origin = load_record("lora_rank_sweep").provenance
    wanted = {
        "device",
        "machine",
        "run",
        "lab",
        "profile",
        "model",
        "seed",
        "command",
        "date",
        "commit",
        "versions",
    }
    assert wanted <= set(origin)
    assert origin["seed"] == 7 and origin["date"].endswith("+00:00")
    assert str(paths.root()) not in path.read_text(), "no absolute path leaves the machine"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100mig1g10gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "instinctmi300x"),
        ("?", "gpu"),
    ],
)
def test_gpu_slug(name, slug):
    assert module.gpu_slug(name) == slug


def test_a_missing_record_says_so():
    nothing = load_record("bake_off", device="h100")
    assert not nothing and list(nothing.rows) == []
    assert "no H100 record of 'bake_off' yet" in str(nothing)
    assert "no GPU record" in str(load_record("bake_off", device="gpu"))
    assert load_records("bake_off") == []


def test_which_record_is_chosen():
    def save(device, date, where):
        save_record(
            Record("speed", [{"at": date}], provenance={"device": device, "date": date}), recorded=where
        )

    save("cpu", "2026-01-01", False)
    assert load_record("speed").rows == [{"at": "2026-01-01"}], "a learner's own, when the course has none"
    save("cpu", "2026-01-02", True)
    save("cpu", "2026-01-04", True)
    save("cpu", "2026-01-03", True)
    save("cpu", "2026-01-09", False)
    assert load_record("speed").rows == [{"at": "2026-01-04"}]
    save("h100", "2026-01-01", True)
    assert load_record("speed").device == "h100"
    assert load_record("speed", device="cpu").device == "cpu"
    assert load_record("speed", device="gpu").device == "h100"
    assert not load_record("speed", device="t4")


def test_the_cache_keeps_the_newest_only(monkeypatch):
    monkeypatch.setattr(module, "KEEP_IN_CACHE", 3)
    for i in range(5):
        save_record(Record("mine", [{"i": i}]), recorded=False)
        save_record(Record("ours", [{"i": i}]), recorded=True)
    assert [record.rows[0]["i"] for record in load_records("mine")] == [2, 3, 4]
    assert len(load_records("ours")) == 5


def test_values_become_plain_json():
    import numpy as np
    import torch

    row = {
        "a": np.float32(0.5),
        "b": torch.tensor(2),
        "c": float("nan"),
        "d": (1, np.arange(2)),
        3: torch.float16,
    }
    save_record(Record("odd", [row]))
    assert load_record("odd").rows == [{"a": 0.5, "b": 2, "c": None, "d": [1, [0, 1]], "3": "torch.float16"}]


@pytest.mark.parametrize("name", ["", "../escape", "Rank", "a.b", "a b"])
def test_names_are_checked(name):
    with pytest.raises(ValueError, match="name"):
        save_record(Record(name, []))
    with pytest.raises(ValueError, match="name"):
        load_record(name)


@pytest.mark.parametrize(
    "text", ["[{", '{"name": "x"}', '[{"name": "x", "rows": [], "colour": 3}]', "", "[3]"]
)
def test_a_damaged_file_is_one_clear_sentence(text):
    path = save_record(Record("broken", []), recorded=True)
    path.write_text(text)
    for wrong in (lambda: load_record("broken"), lambda: save_record(Record("broken", []), recorded=True)):
        with pytest.raises(LabsError, match=r"broken\.json is damaged"):
            wrong()
    assert path.read_text() == text, "what is left of it is not overwritten"


def test_an_interrupted_write_leaves_the_old_file(monkeypatch):
    path = save_record(Record("kept", [{"i": 0}]))
    before = path.read_bytes()

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_record(Record("kept", [{"i": 1}]))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"


def test_a_killed_writer_neither_tears_nor_blocks():
    """SIGKILL while the lock is held and the temporary file half written: the next writer goes on."""
    path = save_record(Record("killed", [{"i": 0}]))
    script = textwrap.dedent(
        """
        import os, time
        from labs_lib.measure import records
        def hang(_):
            print("writing", flush=True)
            time.sleep(60)
        records.os.fsync = hang
        records.save_record(records.Record("killed", [{"i": 1}]))
        """
    )
    here = str(module.__file__).split("/labs_lib/")[0]
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": here}
    ) as writer:
        assert writer.stdout.readline() == b"writing\n"
        writer.send_signal(signal.SIGKILL)
    started = time.monotonic()
    save_record(Record("killed", [{"i": 2}]))
    assert time.monotonic() - started < 30
    assert [record.rows[0]["i"] for record in load_records("killed")] == [0, 2]
    assert json.loads(path.read_text())


def _append(i):
    save_record(Record("together", [{"i": i}]), recorded=True)


def test_processes_that_write_at_once_lose_nothing():
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(_append, range(20), chunksize=1)
    assert sorted(record.rows[0]["i"] for record in load_records("together")) == list(range(20))


def test_read_only_folder(monkeypatch):
    if os.geteuid() == 0:

        def refused(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(module, "_replace", refused)  # root writes anywhere
    else:
        module.folder().mkdir(parents=True)
        module.folder().chmod(0o500)
    with pytest.raises(LabsError, match="could not be written"):
        save_record(Record("nowhere", []))


# ---- published figures


@pytest.mark.parametrize("name", ["method_comparison", "papers", "serving"])
def test_published_figures_are_cited(name):
    figures = load_published(name)
    tables = figures.get("tables") or {name: figures}
    for title, table in tables.items():
        assert table["source"]["cite"], title
        assert table["rows"], title
        assert table.get("as_reported") or table["source"]["url"].startswith("https://"), title


def test_method_comparison_is_drawable_and_whole():
    from labs_lib.lab.plots import look

    figures = load_published("method_comparison")
    assert len(figures["rows"]) == 26
    for row in figures["rows"]:
        assert look(row["method"]).label
        assert set(figures["units"]) <= set(row)
        assert all(isinstance(row[key], (int, float)) for key in figures["units"])
    rows = {row["label"]: row for row in figures["rows"]}
    assert rows["DoRA r32"]["train_s"] / rows["LoRA r32"]["train_s"] == pytest.approx(1.26, abs=0.01)


def test_unknown_published_name():
    with pytest.raises(LabsError, match="method_comparison"):
        load_published("rumours")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.text(max_size=30))
def test_names_never_leave_the_folder(name):
    try:
        path = save_record(Record(name, []))
    except ValueError:
        return
    assert path.parent == module.folder()
