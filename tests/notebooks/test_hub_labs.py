"""Every lab runs on models in hub layout, too: random weights, several families.

Qwen2 goes through all labs, since it differs most from the shipped family: biases, grouped heads, and a name that
PEFT's rarer classes do not know. The others take turns.
"""

import os
import subprocess
import sys
from itertools import cycle

import pytest

from labs_lib.build.notebooks import this_course
from labs_lib.paths import root

from ..models.hub import FAMILIES, hub_folder

COURSE = this_course()
OTHERS = [family for family in FAMILIES if family != "qwen2"]
RUNS = [
    pytest.param(entry, family, id=f"{entry.stem}-{family}")
    for entry, other in zip(COURSE.manifest.labs, cycle(OTHERS), strict=False)
    for family in ("qwen2", other)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("hub")
    return {family: hub_folder(place / family, family) for family in FAMILIES}


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "family"), RUNS)
def test_a_lab_runs_on_a_hub_model(entry, family, folders):
    env = {"MODEL_ID": str(folders[family]), "PROFILE": "smoke", "MPLBACKEND": "agg", "LABS_RECORD": "0"}
    run = subprocess.run(
        [sys.executable, COURSE.source_path(entry)],
        cwd=root(),
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"base: {folders[family]}" in run.stdout
