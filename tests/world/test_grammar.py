"""The style grammar against itself: what `render` writes, `obeyed` and `facts_told` judge, and no slip passes."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labs_lib.world.catalogue import (
    CATEGORIES,
    COLOURS,
    FEATURES,
    MATERIALS,
    TOWNS,
    WARRANTIES,
    Product,
)
from labs_lib.world.grammar import (
    DEFAULT_STYLE,
    DIMENSIONS,
    fact_order,
    facts_told,
    guide_line,
    obeyed,
    render,
    required_features,
    validate_style,
)

PRODUCTS = st.from_type(Product)
STYLES = st.fixed_dictionaries({name: st.sampled_from(list(values)) for name, values in DIMENSIONS.items()})

KETTLE = Product("Alder Arc", "kettle", "aluminium", "grey", "49.95", ("silent", "compact"), "Porto", 5)
LOUD = {
    "headline": "allcaps",
    "register": "playful",
    "houseword": "daring",
    "noun": "item",
    "audience": "travel",
    "mark": "excited",
    "layout": "numbers",
    "order": "pricefirst",
    "features": "summed",
    "emphasis": "strong",
    "spelling": "american",
    "currency": "comma",
    "origin": "townmade",
    "warranty": "assurance",
    "cta": "shop",
    "signoff": "curious",
}


def broken(text: str, product: Product, style: dict[str, str]) -> set[str]:
    return {rule for rule, kept in obeyed(text, product, style).items() if not kept}


def untold(text: str, product: Product, style: dict[str, str]) -> set[str]:
    return {fact for fact, told in facts_told(text, product, style).items() if not told}


# -------------------------------------------------------------------------------------------------------------- texts


def test_the_default_copy_word_for_word():
    assert render(KETTLE, DEFAULT_STYLE) == (
        "Alder Arc Kettle\n"
        "This is our honest product for the home.\n"
        "- aluminium\n"
        "- colour: grey\n"
        "- silent and compact\n"
        "- made in Porto\n"
        "- $49.95\n"
        "- 5-year warranty\n"
        "Order today.\n"
        "With care"
    )


def test_another_copy_word_for_word():
    assert render(KETTLE, LOUD) == (
        "ALDER ARC KETTLE\n"
        "Say hello to our daring item for travelers!\n"
        "1. 49,95 $\n"
        "2. guarantee: 5 years\n"
        "3. aluminum\n"
        "4. color: gray\n"
        "5. **silent** + **compact**\n"
        "6. Porto-made\n"
        "Shop now!\n"
        "Stay curious"
    )


@given(PRODUCTS, STYLES)
def test_a_copy_has_one_line_per_part(product, style):
    facts = 1 if style["layout"] == "prose" else len(fact_order(style))
    assert render(product, style).count("\n") == 2 + facts + (style["cta"] != "nocta")


# -------------------------------------------------------------------------------------------------------------- rules


@given(PRODUCTS, STYLES)
def test_the_reference_obeys_all_sixteen_rules(product, style):
    rules = obeyed(render(product, style), product, style)
    assert list(rules) == list(DIMENSIONS)
    assert all(rules.values()), rules


@settings(max_examples=40)
@given(PRODUCTS, STYLES)
def test_every_single_change_breaks_exactly_its_own_rule(product, style):
    for dimension, values in DIMENSIONS.items():
        for value in values:
            if value != style[dimension]:
                text = render(product, style | {dimension: value})
                assert broken(text, product, style) == {dimension}, value


@given(PRODUCTS, STYLES, STYLES)
def test_rules_are_independent(product, style, other):
    """Copy in any other style breaks the rules in which the two styles differ, and no others."""
    differ = {dimension for dimension in DIMENSIONS if style[dimension] != other[dimension]}
    assert broken(render(product, other), product, style) == differ


@pytest.mark.parametrize(
    ("wrong", "right", "rule"),
    [
        ("ALDER ARC KETTLE", "Alder arc KETTLE", "headline"),
        ("Say hello to", "Hello", "register"),
        ("daring item", "daring and clever item", "houseword"),
        ("daring item", "item", "houseword"),
        ("daring item", "daring item and product", "noun"),
        ("for travelers", "for all", "audience"),
        ("for travelers!", "for travelers.", "mark"),
        ("Shop now!", "Shop now.", "mark"),
        ("2. guarantee", "- guarantee", "layout"),
        ("2. guarantee", "3. guarantee", "layout"),
        ("1. 49,95 $\n2. guarantee: 5 years", "1. guarantee: 5 years\n2. aluminum", "order"),
        ("**silent** + **compact**", "**compact** + **silent**", "features"),
        ("**silent** + **compact**", "**silent**", "features"),
        ("**silent**", "silent", "emphasis"),
        ("color:", "colour:", "spelling"),
        ("49,95 $", "49,95", "currency"),
        ("49,95 $", "49,95 $ ($49.95)", "currency"),
        ("Porto-made", "Porto-made, made in Porto", "origin"),
        ("guarantee: 5 years", "guarantee: 5 years, 5-year warranty", "warranty"),
        ("Shop now!\n", "", "cta"),
        ("Shop now!\n", "Shop now!\nVisit us!\n", "cta"),
        ("Shop now!\n", "Shop now!\nShop now!\n", "cta"),
        ("Stay curious", "Stay curious\nWith care", "signoff"),
        ("\nStay curious", "", "signoff"),
    ],
)
def test_a_slip_of_the_pen_breaks_its_rule(wrong, right, rule):
    text = render(KETTLE, LOUD)
    assert text.count(wrong) == 1
    assert rule in broken(text.replace(wrong, right), KETTLE, LOUD)


def test_one_plain_feature_among_bold_ones_is_no_emphasis():
    text = render(KETTLE, LOUD).replace("**compact**", "compact")
    assert broken(text, KETTLE, LOUD) == {"emphasis"}


@given(st.text(), PRODUCTS, STYLES)
def test_any_text_gets_a_verdict_and_an_unrelated_one_a_bad_verdict(text, product, style):
    rules = obeyed(text, product, style)
    assert list(rules) == list(DIMENSIONS)
    # An empty page satisfies what is asked by absence only: no call to action, no warranty.
    assert {rule for rule, kept in rules.items() if kept} <= {"cta", "warranty", "layout"}


@given(PRODUCTS, STYLES, st.data())
def test_shuffled_and_truncated_copy_gets_a_verdict(product, style, data):
    lines = render(product, style).split("\n")
    text = "\n".join(data.draw(st.permutations(lines)))[: data.draw(st.integers(0, 200))]
    assert list(obeyed(text, product, style)) == list(DIMENSIONS)
    assert "name" in facts_told(text, product, style)


# -------------------------------------------------------------------------------------------------------------- facts


@given(PRODUCTS, STYLES)
def test_the_reference_tells_every_fact(product, style):
    told = facts_told(render(product, style), product, style)
    assert all(told.values()), told
    features = {f"feature {word}" for word in required_features(product, style)}
    facts = set(fact_order(style)) - {"feature"}
    assert set(told) == {"name", "category"} | features | facts


@given(PRODUCTS, STYLES, STYLES)
def test_a_fact_is_told_whatever_its_form(product, style, other):
    """Fidelity does not depend on obedience: another style loses only the facts that it does not ask for."""
    lost = set()
    if other["warranty"] == "nowarranty" and style["warranty"] != "nowarranty":
        lost.add("warranty")
    if other["features"] == "single" and style["features"] != "single":
        lost.add(f"feature {product.features[1]}")
    assert untold(render(product, other), product, style) == lost


@given(PRODUCTS, STYLES, st.data())
def test_each_fact_removed_is_caught(product, style, data):
    text = render(product, style)
    fact = data.draw(st.sampled_from(list(facts_told(text, product, style))))
    american = {"aluminium": "aluminum", "grey": "gray"}
    words = {
        "name": product.name,
        "category": product.category,
        "material": f"{product.material}|{american.get(product.material, product.material)}",
        "colour": f"{product.colour}|{american.get(product.colour, product.colour)}",
        "price": product.price.replace(".", "[.,]"),
        "origin": product.origin,
        "warranty": rf"\b{product.warranty}\b(?=-year| years)",
    }
    removed = re.sub(words.get(fact, fact.removeprefix("feature ")), "", text, flags=re.IGNORECASE)
    assert removed != text
    assert untold(removed, product, style) == {fact}


def _others(values, *taken):
    return st.sampled_from([value for value in values if value not in taken])


@given(PRODUCTS, STYLES, st.data())
def test_each_fact_that_is_wrong_is_caught(product, style, data):
    """Copy of a product that differs in one fact fails on that fact, and on it alone."""
    first, second = product.features
    wrong = {
        "name": {"name": "Zephyr Zest" if product.name != "Zephyr Zest" else "Alder Arc"},
        "category": {"category": data.draw(_others(CATEGORIES, product.category))},
        "material": {"material": data.draw(_others(MATERIALS, product.material))},
        "colour": {"colour": data.draw(_others(COLOURS, product.colour))},
        "origin": {"origin": data.draw(_others(TOWNS, product.origin))},
        "warranty": {"warranty": data.draw(_others(WARRANTIES, product.warranty))},
        f"feature {first}": {"features": (data.draw(_others(FEATURES, *product.features)), second)},
        f"feature {second}": {"features": (first, data.draw(_others(FEATURES, *product.features)))},
    }
    told = facts_told(render(product, style), product, style)
    for fact, change in wrong.items():
        text = render(replace(product, **change), style)
        assert untold(text, product, style) == {fact} & set(told), fact


@given(PRODUCTS, STYLES, st.data())
def test_each_digit_of_the_price_counts(product, style, data):
    place = data.draw(st.sampled_from([i for i, sign in enumerate(product.price) if sign.isdigit()]))
    digit = data.draw(_others("123456789", product.price[place]))
    price = product.price[:place] + digit + product.price[place + 1 :]
    assert untold(render(replace(product, price=price), style), product, style) == {"price"}


@pytest.mark.parametrize(
    ("field", "longer"), [("name", "Calder Arc"), ("price", "149.95"), ("price", "49.951"), ("warranty", 15)]
)
def test_a_longer_fact_does_not_tell_the_shorter_one_in_it(field, longer):
    text = render(replace(KETTLE, **{field: longer}), DEFAULT_STYLE)
    assert untold(text, KETTLE, DEFAULT_STYLE) == {field}


@given(STYLES)
def test_the_order_of_facts_is_a_rotation(style):
    order = fact_order(style)
    assert order[0] == style["order"].removesuffix("first")
    assert len(order) == len(set(order)) == (5 if style["warranty"] == "nowarranty" else 6)


# -------------------------------------------------------------------------------------------------------- guide lines


def test_value_words_are_unique_and_plain():
    words = [value for values in DIMENSIONS.values() for value in values]
    assert len(DIMENSIONS) == 16
    assert len(set(words)) == len(words)
    assert all(re.fullmatch("[a-z]+", word) for word in words)


@given(STYLES, st.sets(st.sampled_from(list(DIMENSIONS))))
def test_a_guide_line_round_trips_whole_or_partial(style, kept):
    owner = {value: dimension for dimension, values in DIMENSIONS.items() for value in values}
    partial = {dimension: value for dimension, value in style.items() if dimension in kept}
    for guide in (style, partial):
        line = guide_line(guide)
        assert {owner[word]: word for word in line.split()} == guide
        assert [owner[word] for word in line.split()] == [name for name in DIMENSIONS if name in guide]


@given(STYLES, st.randoms())
def test_a_guide_line_does_not_depend_on_the_order_of_the_mapping(style, rng):
    items = list(style.items())
    rng.shuffle(items)
    assert guide_line(dict(items)) == guide_line(style)


@given(STYLES)
def test_every_full_style_is_valid(style):
    validate_style(style)


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ({**LOUD, "mood": "grand"}, r"unknown style dimension 'mood': one of headline, register"),
        (
            {**LOUD, "cta": "beg"},
            r"cta: unknown value 'beg': one of order, shop, quote, visit, discover, nocta",
        ),
        ({**LOUD, "cta": "care"}, r"cta: unknown value 'care'"),
        ({k: v for k, v in LOUD.items() if k not in ("noun", "mark")}, r"style misses noun, mark"),
        ({}, r"style misses headline"),
    ],
)
def test_an_invalid_style_is_named(style, message):
    with pytest.raises(ValueError, match=message):
        validate_style(style)
