"""`labs doctor`: the findings on this machine, and what a broken one is told."""

import argparse

import pytest

from labs_lib import doctor
from labs_lib.errors import LabsError


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Nothing in a test leaves the machine."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def test_every_check_gives_a_finding_here(capsys):
    status = doctor.main(argparse.Namespace())
    out = capsys.readouterr().out
    for topic in ("Python", "Packages", "GPU", "bitsandbytes", "Memory", "Disk", "Data", "Hub", "Profile"):
        assert f" {topic} " in out
    assert status == ("PROBLEM" in out)


def test_a_closed_hub_is_a_note_with_what_it_means():
    level, _, text = doctor.hub()
    assert level == "note" and "does not answer; the labs need no hub" in text


def test_a_hub_switched_off_is_not_asked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "switched off" in doctor.hub().text


def test_too_little_disk_and_memory_are_told(monkeypatch):
    monkeypatch.setattr(doctor, "DISK_GB", 1e9)
    monkeypatch.setattr(doctor, "MEMORY_GB", 1e9)
    assert doctor.disk().level == "PROBLEM" and "make room" in doctor.disk().text
    assert doctor.memory().level == "note" and "close other programs" in doctor.memory().text


def test_a_container_s_share_of_the_memory_counts(monkeypatch, tmp_path):
    for text, granted in (("max\n", float("inf")), ("2000000000\n", 2e9), ("", float("inf"))):
        (tmp_path / "memory.max").write_text(text)
        assert doctor.memory_granted(tmp_path / "memory.max") == granted
    assert doctor.memory_granted(tmp_path / "none") == float("inf")
    monkeypatch.setattr(doctor, "memory_granted", lambda: 2e9)
    assert doctor.memory().level == "note" and "of 2.0 GB free" in doctor.memory().text


@pytest.mark.parametrize(
    "reason", [LabsError("data/x is missing: restore it"), ImportError("no torch"), OSError("io")]
)
def test_a_check_that_breaks_down_is_a_problem_not_a_traceback(monkeypatch, capsys, reason):
    def data():
        raise reason

    monkeypatch.setattr(doctor, "CHECKS", (data,))
    assert doctor.main(argparse.Namespace()) == 1
    assert f"Data          {reason}" in capsys.readouterr().out


def test_the_wrong_python_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "supported", lambda version: False)
    assert doctor.python().level == "PROBLEM"
