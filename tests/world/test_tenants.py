"""The 50 style guides as shipped (distinct, complete, all of the grammar in use) and the loader's refusals."""

import re
from collections import Counter
from itertools import combinations

import pytest
import yaml

from labs_lib.errors import LabsError
from labs_lib.paths import data
from labs_lib.world.catalogue import CATEGORIES, COLLECTIONS, MODELS
from labs_lib.world.grammar import DEFAULT_STYLE, DIMENSIONS, validate_style
from labs_lib.world.tenants import load_tenant, load_tenants, read_tenant

TENANTS = load_tenants()
each_tenant = pytest.mark.parametrize("tenant", TENANTS, ids=lambda tenant: tenant.slug)


def distance(style: dict[str, str], other: dict[str, str]) -> int:
    return sum(style[dimension] != other[dimension] for dimension in DIMENSIONS)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


# ----------------------------------------------------------------------------------------------------- all together


def test_there_are_fifty_in_order_of_their_slugs():
    slugs = [tenant.slug for tenant in TENANTS]
    assert len(slugs) == 50
    assert slugs == sorted(set(slugs))
    assert len({tenant.name for tenant in TENANTS}) == len({tenant.voice for tenant in TENANTS}) == 50


def test_no_two_tenants_share_a_mark():
    shared = [mark for mark, count in Counter(tenant.mark for tenant in TENANTS).items() if count > 1]
    assert shared == []


def test_any_two_tenants_differ_in_at_least_seven_dimensions():
    close = [(a.slug, b.slug) for a, b in combinations(TENANTS, 2) if distance(a.style, b.style) < 7]
    assert close == []


def test_every_tenant_is_far_from_the_default_style():
    assert [t.slug for t in TENANTS if distance(t.style, DEFAULT_STYLE) < 8] == []
    assert (DEFAULT_STYLE["houseword"], DEFAULT_STYLE["signoff"]) not in {
        (t.style["houseword"], t.style["signoff"]) for t in TENANTS
    }


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_every_value_of_the_grammar_is_used(dimension):
    used = Counter(tenant.style[dimension] for tenant in TENANTS)
    least = 4 if dimension in ("houseword", "signoff") else 3
    assert {value for value in DIMENSIONS[dimension] if used[value] < least} == set()


# ------------------------------------------------------------------------------------------------------- one by one


@each_tenant
def test_the_file_has_these_fields_in_this_order(tenant):
    fields = yaml.safe_load((data() / "tenants" / f"{tenant.slug}.yaml").read_text(encoding="utf-8"))
    assert list(fields) == ["name", "sector", "voice", "style"]
    assert list(fields["style"]) == list(DIMENSIONS)
    validate_style(fields["style"])


@each_tenant
def test_the_slug_is_the_name_in_kebab_case(tenant):
    plain = tenant.name.lower().replace("&", "and").replace("'", "")
    assert tenant.slug == re.sub(r"[^a-z0-9]+", "-", plain)


@each_tenant
def test_the_voice_is_a_short_paragraph(tenant):
    sentences = re.findall(r"[.!?](?: |$)", tenant.voice)
    assert 2 <= len(sentences) <= 4
    assert 30 <= len(tenant.voice.split()) < 70
    assert "\n" not in tenant.voice


@each_tenant
def test_the_voice_obeys_its_own_style(tenant):
    """It uses the tenant's house word and noun and no other's, its spelling, and its full stop or exclamation mark."""
    used, style = words(tenant.voice), tenant.style
    assert used & set(DIMENSIONS["houseword"]) == {style["houseword"]}
    assert {noun for noun in DIMENSIONS["noun"] if used & {noun, f"{noun}s"}} <= {style["noun"]}
    assert ("!" in tenant.voice) == (style["mark"] == "excited")
    british = r"\b(colour|neighbour|harbour|labelled|traveller|grey)"
    american = r"\b(color|neighbor|harbor|labeled|traveler|gray)"
    foreign = american if style["spelling"] == "british" else british
    assert not re.search(rf"{foreign}s?\b", tenant.voice, re.IGNORECASE)


@each_tenant
def test_the_voice_names_no_product(tenant):
    """Any tenant may sell any product of the catalogue."""
    assert not words(tenant.voice) & {form for name in CATEGORIES for form in (name, f"{name}s")}
    assert not set(tenant.voice.split()) & {*COLLECTIONS, *MODELS}


@each_tenant
def test_the_guide_holds_all_sixteen_words(tenant):
    assert tenant.guide.split() == list(tenant.style.values())


# ------------------------------------------------------------------------------------------------------------ loader


def test_load_tenant_by_slug():
    tenant = load_tenant("aldermoor-tea")
    assert tenant.name == "Aldermoor Tea"
    assert tenant.mark == ("gentle", "With care")


def test_an_unknown_slug_names_those_that_exist():
    with pytest.raises(LabsError, match=r"No tenant 'acme': one of aldermoor-tea, .*, zinnober-house"):
        load_tenant("acme")


@pytest.fixture
def guide(tmp_path):
    """A function that writes a copy of a good guide with one text replaced, and returns its path."""
    good = (data() / "tenants" / "aldermoor-tea.yaml").read_text(encoding="utf-8")

    def write(old: str, new: str):
        assert old in good
        path = tmp_path / "aldermoor-tea.yaml"
        path.write_text(good.replace(old, new), encoding="utf-8")
        return path

    return write


def test_a_copied_guide_reads_the_same(guide):
    assert read_tenant(guide("", "")) == load_tenant("aldermoor-tea")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("voice:", "tone:", "'voice' is missing"),
        ("style:", "rules:", "'style' is missing"),
        ("  cta: visit\n", "", "style misses cta"),
        ("cta: visit", "cta: beg", "cta: unknown value 'beg': one of order, shop"),
        ("cta:", "mood:", "unknown style dimension 'mood'"),
        ("cta: visit", "cta: [visit]", "unhashable"),
        ("name: Aldermoor Tea", "name: [", "while parsing"),
        ("name: Aldermoor Tea", "name: Aldermoor: Tea", "mapping values are not allowed"),
    ],
)
def test_a_bad_guide_is_one_clear_sentence(guide, old, new, message):
    with pytest.raises(LabsError) as caught:
        read_tenant(guide(old, new))
    said = str(caught.value)
    assert said.startswith("Style guide aldermoor-tea.yaml cannot be used: ")
    assert message in said
    assert said.endswith("Fix it or restore it with git.")
    assert "\n" not in said


@pytest.mark.parametrize(
    "content", [b"", b"- a\n- list\n", b"42\n", b"name: \xff\n", b"style: 3\nname: a\nsector: b\nvoice: 7\n"]
)
def test_a_file_that_is_no_guide_at_all(tmp_path, content):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(LabsError, match=r"^Style guide odd\.yaml cannot be used: "):
        read_tenant(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(LabsError, match=r"^Style guide gone\.yaml cannot be used: "):
        read_tenant(tmp_path / "gone.yaml")


def test_no_guides_at_all_is_an_error_too(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("LABS_HOME", str(tmp_path))
    with pytest.raises(
        LabsError, match=r"No style guides in .*: restore them with `git checkout data/tenants`"
    ):
        load_tenants.__wrapped__()
