"""The scorers: 1.0 on a reference, exactly one rule less for one slip, and a leak only where another's mark stands."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labs_lib.world.catalogue import COLOURS, Product, products
from labs_lib.world.grammar import DEFAULT_STYLE, DIMENSIONS, facts_told, render
from labs_lib.world.scorers import compliance, fidelity, leaks, score_style
from labs_lib.world.tenants import Tenant, load_tenant, load_tenants

PRODUCTS = st.from_type(Product)
TENANTS = st.from_type(Tenant)
TEA = load_tenant("aldermoor-tea")


@given(PRODUCTS, TENANTS)
def test_a_reference_is_perfect(product, tenant):
    text = render(product, tenant.style)
    score = score_style([text], [product], tenant)
    assert (score.compliance, score.fidelity, score.leakage, score.exact) == (1, 1, 0, 1)
    assert score.per_rule == dict.fromkeys(DIMENSIONS, 1)


@given(PRODUCTS, TENANTS, st.sampled_from(list(DIMENSIONS)), st.data())
def test_one_violation_costs_one_rule(product, tenant, dimension, data):
    value = data.draw(st.sampled_from([v for v in DIMENSIONS[dimension] if v != tenant.style[dimension]]))
    text = render(product, tenant.style | {dimension: value})
    assert compliance(text, product, tenant.style) == 15 / 16
    score = score_style([text], [product], tenant)
    assert score.exact == 0
    assert {rule for rule, kept in score.per_rule.items() if not kept} == {dimension}


@given(PRODUCTS, TENANTS)
def test_copy_without_a_guide_scores_what_the_tenant_shares_with_the_default(product, tenant):
    shared = sum(tenant.style[dimension] == DEFAULT_STYLE[dimension] for dimension in DIMENSIONS)
    assert compliance(render(product, DEFAULT_STYLE), product, tenant.style) == shared / 16


@given(PRODUCTS, TENANTS, st.data())
def test_one_wrong_fact_costs_one_fact_and_no_rule(product, tenant, data):
    wrong = replace(product, colour=data.draw(st.sampled_from([c for c in COLOURS if c != product.colour])))
    text = render(wrong, tenant.style)
    facts = len(facts_told(text, product, tenant.style))
    assert fidelity(text, product, tenant.style) == pytest.approx(1 - 1 / facts)
    assert compliance(text, product, tenant.style) == 1


@given(st.text(), PRODUCTS, TENANTS)
def test_scores_of_any_text_are_shares(text, product, tenant):
    score = score_style([text], [product], tenant)
    assert 0 <= score.compliance <= 3 / 16
    assert 0 <= score.fidelity < 1
    assert score.leakage in (0, 1)
    assert score.exact == 0


# -------------------------------------------------------------------------------------------------------------- leaks


@given(PRODUCTS, TENANTS, TENANTS)
def test_a_leak_names_the_tenant_whose_copy_it_is(product, tenant, other):
    """Every other tenant's copy is recognised as that tenant's, and one's own as nobody else's."""
    expected = [] if other.slug == tenant.slug else [other.slug]
    text = render(product, other.style)
    assert leaks(text, tenant) == expected
    assert leaks(text, None) == [other.slug]
    assert score_style([text], [product], tenant).leakage == len(expected)


@given(PRODUCTS)
def test_copy_without_a_guide_bears_nobody_s_mark(product):
    assert leaks(render(product, DEFAULT_STYLE), None) == []


@given(PRODUCTS, TENANTS, *(st.sampled_from(list(DIMENSIONS[rule])) for rule in ("houseword", "signoff")))
def test_only_the_pair_of_house_word_and_sign_off_is_a_mark(product, tenant, houseword, signoff):
    """Many tenants share a house word, and many a sign-off; a pair that nobody has is nobody's leak."""
    text = render(product, tenant.style | {"houseword": houseword, "signoff": signoff})
    pair = houseword, DIMENSIONS["signoff"][signoff]
    assert leaks(text, None) == [other.slug for other in load_tenants() if other.mark == pair]


def test_leaks_can_be_limited_to_the_tenants_that_are_served():
    product = products("held_out", 1, seed=0)[0]
    other = load_tenant("oakum-and-tar")
    text = render(product, other.style)
    assert leaks(text, TEA, tenants=[TEA, other]) == ["oakum-and-tar"]
    assert leaks(text, TEA, tenants=[TEA]) == []


@pytest.mark.parametrize("text", ["", "\n", "With care", "gentle", "one line\ntwo lines"])
def test_short_texts_do_not_leak(text):
    assert leaks(text, None) == []


# --------------------------------------------------------------------------------------------------------- many texts


def test_scores_are_means_over_texts_and_keep_the_texts_behind_them():
    items = products("held_out", 4, seed=0)
    other = load_tenant("oakum-and-tar")
    texts = [render(item, TEA.style) for item in items]
    texts[1] = render(items[1], other.style)  # leaks
    texts[2] = re.sub("Visit us", "See more", texts[2])  # one rule
    texts[3] = texts[3].replace(items[3].origin, "Rome")  # one fact
    score = score_style(texts, items, TEA)
    shared = sum(TEA.style[dimension] == other.style[dimension] for dimension in DIMENSIONS) / 16
    assert score.per_text["compliance"] == [1, shared, 15 / 16, 15 / 16]
    assert score.per_text["leakage"] == [0, 1, 0, 0]
    assert score.per_text["exact"] == [1, 0, 0, 0]
    assert score.compliance == pytest.approx((1 + shared + 15 / 16 + 15 / 16) / 4)
    assert (score.leakage, score.exact) == (0.25, 0.25)
    assert score.per_rule["cta"] == 0.5 + 0.25 * (other.style["cta"] == "visit")
    assert score.fidelity == pytest.approx((3 + score.per_text["fidelity"][3]) / 4)


@given(st.lists(PRODUCTS, min_size=1, max_size=5), TENANTS)
def test_products_may_be_rows_of_a_dataset(items, tenant):
    texts = [render(item, DEFAULT_STYLE) for item in items]
    assert score_style(texts, [item.to_dict() for item in items], tenant) == score_style(texts, items, tenant)


def test_newlines_around_a_text_do_not_count():
    product = products("held_out", 1, seed=0)[0]
    score = score_style([f"\n{render(product, TEA.style)}\n\n"], [product], TEA)
    assert (score.compliance, score.exact, score.leakage) == (1, 1, 0)


@pytest.mark.parametrize(
    ("texts", "items"), [([], []), (["a"], []), (["a", "b"], products("held_out", 1, 0))]
)
def test_lengths_that_do_not_match_are_refused(texts, items):
    with pytest.raises(ValueError, match=f"at least one: got {len(texts)} and {len(items)}"):
        score_style(texts, items, TEA)
