"""The tests that need a card hold on the pretended one, so that they are right when a real one is there."""

import os
import subprocess
import sys

import pytest

from labs_lib.paths import root


@pytest.mark.slow
def test_what_a_card_is_asked_holds_on_the_pretended_one():
    command = (sys.executable, "-m", "tests.pretend_cuda", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    run = subprocess.run(
        [*command, "tests/training/test_on_a_card.py"],
        cwd=root(),
        env=os.environ | {"PROFILE": "gpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "skipped" not in run.stdout, "it was told that there is a card"
