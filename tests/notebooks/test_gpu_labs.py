"""Every lab runs on a CUDA device: a pretended one, in the profile's dtype, with the tiny base and smoke's sizes."""

import os
import subprocess
import sys

import pytest

from labs_lib.build.notebooks import this_course
from labs_lib.paths import root

COURSE = this_course()
T4 = ("03",)  # float32 on the smaller card, and what 4 bits do there
RUNS = [
    (entry, profile)
    for entry in COURSE.manifest.labs
    for profile in ("gpu", "t4")
    if profile == "gpu" or entry.number in T4
]


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "profile"), RUNS, ids=lambda each: getattr(each, "stem", each))
def test_a_lab_runs_on_a_gpu(entry, profile, tmp_path):
    env = {
        **os.environ,
        "PROFILE": profile,
        "MPLBACKEND": "agg",
        "LABS_CACHE": str(tmp_path),
        "LABS_STRICT": "1",
    }
    env |= {"LABS_RECORD": "0"}
    small = ["-m", "tests.pretend_cuda", "--small", "--size", "tiny"]
    run = subprocess.run(
        [sys.executable, *small, COURSE.source_path(entry)],
        cwd=root(),
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"profile {profile} on NVIDIA Pretend" in run.stdout and "base: shipped tiny" in run.stdout
