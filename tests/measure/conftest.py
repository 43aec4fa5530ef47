"""Records of a test go to a folder of its own; the context starts empty."""

import pytest

from labs_lib import paths
from labs_lib.measure import claims, context


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """Own cache, own course folder for records (with the real register), no context, nothing observed."""
    monkeypatch.setenv("LABS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LABS_RECORD", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    (home / "data").mkdir()
    for name in ("claims.yaml", "published"):
        (home / "data" / name).symlink_to(paths.data() / name)
    monkeypatch.setenv("LABS_HOME", str(home))
    context.reset()
    claims._observed.clear()
    yield
    context.reset()
    claims._observed.clear()
