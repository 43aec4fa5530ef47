"""The room's front door: every name is there, and opening it costs nothing."""

import subprocess
import sys

import pytest

import labs_lib.measure as measure
from labs_lib.measure import context


def test_every_exported_name_resolves():
    for name in measure.__all__:
        assert getattr(measure, name).__module__.startswith("labs_lib.measure"), name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        measure.nonsense  # noqa: B018


def test_importing_the_room_loads_nothing_heavy():
    code = (
        "import sys; import labs_lib.measure, labs_lib.measure.claims, labs_lib.measure.records;"
        "labs_lib.measure.claims.register();"
        "print([m for m in ('torch', 'numpy', 'scipy', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    home = measure.__file__.split("/labs_lib/")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=home, check=True)
    assert done.stdout.strip() == "[]"


def test_context_changes_only_what_is_named():
    context.set(lab="01", profile="cpu")
    context.set(seed=5)
    now = context.current()
    assert (now.lab, now.profile, now.device, now.seed) == ("01", "cpu", "cpu", 5)
    with pytest.raises(TypeError):
        context.set(colour="blue")
    context.reset()
    assert context.current() == context.Context()
