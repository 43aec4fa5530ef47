"""The scoreboard says what the records say, and nobody else says it."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
import yaml

from labs_lib import paths
from labs_lib.measure import records, scoreboard
from labs_lib.measure.claims import claim, register
from labs_lib.measure.rules import DEPENDS, FAILS, HOLDS, UNKNOWN, VERDICTS


@pytest.fixture
def observe(monkeypatch):
    """observe(claim, value, ...) keeps a record as a lab does that runs on `device`."""
    monkeypatch.setenv("LABS_RECORD", "1")

    def keep(id_, verdict, value=1.0, part="", condition="", device="cpu", lab="06", ci=None):
        row = {"claim": id_, "part": part, "condition": condition, "value": value, "ci": ci, "n": None}
        row |= {"unit": "x", "verdict": verdict}
        records.save_record(
            records.Record(f"claims_lab{lab}", [row], provenance={"run": "one", "device": device})
        )

    return keep


def stands(id_):
    return {each.id: found for each, found in scoreboard.board()}[id_]


def lines(given):
    return scoreboard.markdown(given, lambda number: f"[{number}](lab{number}.ipynb)").splitlines()[2:]


def test_without_records_nothing_is_told():
    given = scoreboard.board()
    assert len(given) == len(register()) and scoreboard.tally(given) == {scoreboard.OPEN: len(given)}
    assert all(scoreboard.OPEN in line for line in lines(given))


def test_a_record_is_a_line_with_value_interval_device_and_lab(observe):
    observe(48, FAILS, 0.498, condition="Adam", ci=[0.389, 0.606])
    (line,) = (line for line in lines(scoreboard.board()) if line.startswith("| 48 |"))
    assert f"✗ {FAILS} | Adam: 0.498 [0.389, 0.606] x | cpu | [06](lab06.ipynb) |" in line
    assert scoreboard.summary(scoreboard.board()) == (
        f"Of the chapter's {len(register())} claims 1 fail and {len(register()) - 1} are not measured yet."
    )


def test_parts_have_lines_and_many_conditions_a_count(observe):
    observe(27, HOLDS, 1.7, part="speed")
    for value in (0.1, 0.2, 0.3, 4.0):
        observe(27, FAILS if value > 1 else HOLDS, value, part="quality", condition=f"seed {value}")
    told = ["speed: 1.7 x", "quality: 0.1 to 4 x, 3 of 4 hold"]  # in the register's order
    assert scoreboard.evidence(stands(27)).split("<br>") == told
    assert scoreboard.verdict(stands(27)) == DEPENDS


def test_a_gpu_that_tells_outweighs_a_cpu_that_cannot(observe):
    observe(34, UNKNOWN)
    assert scoreboard.verdict(stands(34)) == UNKNOWN
    observe(34, HOLDS, 5.0, device="h100")
    assert scoreboard.verdict(stands(34)) == HOLDS
    assert scoreboard.evidence(stands(34)) == "cpu: 1 x<br>h100: 5 x"


def test_the_picture_has_a_tile_for_each_claim_and_is_the_same_each_time(observe):
    observe(6, HOLDS)
    picture = scoreboard.svg(scoreboard.board())
    assert picture == scoreboard.svg(scoreboard.board())
    titles = [node.text for node in ElementTree.fromstring(picture).iter() if node.tag.endswith("title")]
    assert len(titles) == len(register())
    assert f"Claim 6, {HOLDS}: {claim(6).says}" in titles


def test_no_verdict_is_typed_by_hand(monkeypatch):
    """Verdicts stand in records, which `observe` writes and another test holds against the rules, and nowhere else."""
    monkeypatch.delenv("LABS_HOME")
    home = paths.root()
    entries = yaml.safe_load((home / "data" / "claims.yaml").read_text())["claims"]
    keys = {key for entry in entries for key in (entry, *entry.get("parts", {}).values()) for key in key}
    assert not any("verdict" in key for key in keys)
    readme = (home / "README.md").read_text()
    typed = re.sub(
        r"(<!-- scoreboard:begin -->).*?(<!-- scoreboard:end -->)", r"\1\2", readme, flags=re.DOTALL
    )
    assert typed != readme, "the README has no scoreboard"
    texts = {"README.md": typed}
    texts |= {path.name: path.read_text() for path in sorted((home / "solutions").glob("*.py"))}
    words = "|".join(map(re.escape, VERDICTS))
    for name, text in texts.items():
        found = re.search(rf"\bclaim \d+[^.\n]{{0,40}}\b(is|:) *\**({words})\b", text, flags=re.IGNORECASE)
        assert not found, f"{name}: {found.group()!r} is a verdict in prose"
        assert not re.search(rf"verdict *= *[\"']({words})", text), name
