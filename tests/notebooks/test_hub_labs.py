"""Every lab runs on a model in hub layout, too: a random Llama with grouped heads and an untied head."""

import os
import subprocess
import sys

import pytest

from labs_lib.build.notebooks import this_course
from labs_lib.paths import root

from ..models.hub import hub_folder

COURSE = this_course()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hub_folder(tmp_path_factory.mktemp("hub") / "llama", "llama")


@pytest.mark.slow
@pytest.mark.parametrize("entry", COURSE.manifest.labs, ids=lambda entry: entry.stem)
def test_a_lab_runs_on_a_hub_model(entry, folder):
    env = {**os.environ, "MODEL_ID": str(folder), "PROFILE": "smoke", "MPLBACKEND": "agg", "LABS_RECORD": "0"}
    run = subprocess.run(
        [sys.executable, COURSE.source_path(entry)],
        cwd=root(),
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"base: {folder}" in run.stdout
