"""The fleet in data/fleet: an adapter for every customer, as the record says, and good enough to be published."""

import pytest

from labs_lib.measure.records import load_record
from labs_lib.models.base import load_base
from labs_lib.serving.adapter import check_weights
from labs_lib.serving.layout import Layout
from labs_lib.training.fleet import Recipe
from labs_lib.training.fleet_run import SHIPPED_FOR, fleet_folders, shipped
from labs_lib.training.gate import Candidate, gate, read_by_rules
from labs_lib.world.build import shipped_files, verify
from labs_lib.world.tenants import load_tenants

SLUGS = [tenant.slug for tenant in load_tenants()]


@pytest.fixture(scope="module")
def base():
    return load_base(SHIPPED_FOR)


def test_every_customer_has_an_adapter_that_the_engine_takes(base):
    assert sorted(path.name for path in shipped().iterdir()) == SLUGS
    layout = Layout.of(base[0])
    for slug in SLUGS:
        files = {path.name for path in (shipped() / slug).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}
        manifest = check_weights(shipped() / slug, layout)
        assert manifest.rank == Recipe().rank and manifest.base_name == SHIPPED_FOR


def test_checksums_cover_them():
    names = [name for name in shipped_files() if name.startswith("fleet/")]
    assert len(names) == 2 * len(SLUGS)
    verify(*names)


def test_the_record_is_of_this_fleet():
    record = load_record("fleet", device="cpu")
    rows = {row["tenant"]: row for row in record.rows if row["section"] == "tenant"}
    assert list(rows) == SLUGS and record.provenance["recipe"] == Recipe().to_dict()
    assert sum(not row["refused"] for row in rows.values()) >= 45
    for slug, row in rows.items():
        assert row["nbytes"] == sum(file.stat().st_size for file in (shipped() / slug).iterdir())
    assert {row["section"] for row in record.rows} == {"tenant", "step"}


def test_some_of_them_read_live(base):
    folders = fleet_folders(SLUGS[::12])
    assert set(folders.values()) == {shipped() / slug for slug in SLUGS[::12]}
    model, tokenizer = base
    scores = read_by_rules(
        model, tokenizer, {slug: Candidate.of(folder, slug, "test", 2) for slug, folder in folders.items()}
    )
    passed = {slug: not gate(score) for slug, score in scores.items()}
    assert sum(passed.values()) >= len(passed) - 1, passed
