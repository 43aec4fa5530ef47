"""The plan for a card: its commands exist, time is shared out, records are not repeated, nothing outlives it."""

import dataclasses
import sys
import time
from importlib import import_module

import pytest
import torch

from labs_lib import cli
from labs_lib.gpu import LABS, PLAN, Step, run_plan
from labs_lib.measure.records import Record, save_record


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    monkeypatch.delenv("LABS_RECORD", raising=False)


def step(name, code, share=0.5, record=""):
    return Step(name, "", (sys.executable, "-c", code, "{minutes}", "{jobs}"), share, record)


def ends(plan, minutes=1.0, **more):
    return {each.name: ended for each, ended in run_plan(tuple(plan), minutes, "h100", **more)}


@pytest.mark.parametrize("each", [s for s in PLAN if s.command[: len(LABS)] == LABS], ids=lambda s: s.name)
def test_every_command_of_the_plan_is_one_that_labs_takes(each, monkeypatch):
    taken = []
    words = [word.format(minutes="1.50", half="0.75", jobs="4") for word in each.command[len(LABS) :]]
    module = import_module(cli.COMMANDS[words[0]][0])
    monkeypatch.setattr(module, "main", lambda args: taken.append(args))
    assert cli.main(words) == 0 and taken


def test_names_and_shares_of_the_plan():
    assert len({s.name for s in PLAN}) == len(PLAN)
    assert sum(s.share for s in PLAN) == pytest.approx(1.0)


def test_steps_end_as_they_end_and_the_next_goes_on(tmp_path):
    note = tmp_path / "args"
    plan = [
        step("good", f"import sys; open({str(note)!r}, 'w').write(' '.join(sys.argv[1:]))"),
        step("bad", "raise SystemExit(3)"),
        step("last", "pass"),
    ]
    assert ends(plan) == {"good": "done", "bad": "failed", "last": "done"}
    minutes, jobs = note.read_text().split()
    assert 0 < float(minutes) <= 1 and int(jobs) >= 1


def test_records_are_made_for_the_course(tmp_path):
    assert ends([step("env", "import os; assert os.environ['LABS_RECORD'] == '1'")]) == {"env": "done"}


def test_what_is_recorded_on_this_card_is_not_repeated():
    save_record(Record("bench_x", [{}], provenance={"device": "h100"}))
    save_record(Record("bench_y", [{}], provenance={"device": "a100"}))
    plan = [step("x", "pass", record="bench_x"), step("y", "pass", record="bench_y")]
    assert ends(plan) == {"x": "done before", "y": "done"}
    assert ends(plan, again=True)["x"] == "done"
    made = dataclasses.replace(plan[0], record="", file="README.md")
    assert ends([made]) == {"x": "done before"}
    assert ends([dataclasses.replace(made, file="data/base/none")]) == {"x": "done"}


def test_one_that_hangs_is_stopped_with_its_children(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time\nwhile True: open({str(alive)!r}, 'a').write('.'); time.sleep(0.05)"
    hang = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    plan = [step("hangs", hang, share=0.01), step("next", "pass", share=0.09)]
    assert ends(plan, minutes=1.0) == {"hangs": "out of time", "next": "done"}
    size = alive.stat().st_size
    time.sleep(0.3)
    assert alive.stat().st_size == size


def test_what_no_time_is_left_for_is_said():
    plan = [step("first", "import time; time.sleep(2)", share=0.9), step("second", "pass", share=0.1)]
    assert ends(plan, minutes=6 / 60) == {"first": "done", "second": "not reached"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_where_to_run(capsys):
    assert cli.main(["gpu"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert cli.main(["gpu", "--list", "--minutes", "30"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [s.name for s in PLAN]
    assert sum(float(line.split()[1]) for line in listed) == pytest.approx(30, abs=0.5)


def test_an_unknown_step_is_named(capsys):
    assert cli.main(["gpu", "--only", "kernel"]) == 2
    assert "no step kernel: choose from tests, kernels" in capsys.readouterr().err
