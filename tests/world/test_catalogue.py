"""The catalogue: names owned by one purpose only, products that never change, words that mean one thing only."""

import hashlib
import json
import random
import re
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labs_lib.world import catalogue
from labs_lib.world.catalogue import NAME_PURPOSES, WARRANTIES, Product, names, products, random_product
from labs_lib.world.grammar import DIMENSIONS

LISTS = {
    name: getattr(catalogue, name)
    for name in ("COLLECTIONS", "MODELS", "CATEGORIES", "MATERIALS", "COLOURS", "FEATURES", "TOWNS", "PEOPLE")
}
PURPOSES = list(NAME_PURPOSES)


def sha256(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_purpose_has_as_many_names_as_it_says(purpose):
    owned = names(purpose)
    assert len(owned) == len(set(owned)) == NAME_PURPOSES[purpose]
    collections, models = zip(*(name.split(" ") for name in owned), strict=True)
    assert set(collections) <= set(catalogue.COLLECTIONS)
    assert set(models) <= set(catalogue.MODELS)


@pytest.mark.parametrize(("one", "other"), [*combinations(PURPOSES, 2)])
def test_no_name_serves_two_purposes(one, other):
    assert not set(names(one)) & set(names(other))


def test_names_fit_in_the_pairs_there_are():
    assert sum(NAME_PURPOSES.values()) <= len(catalogue.COLLECTIONS) * len(catalogue.MODELS) == 4096


def test_every_part_of_a_held_out_name_was_seen_in_pretraining():
    """A held-out name is a new pair of known words, not a new word."""
    seen = {part for name in names("pretraining") for part in name.split()}
    assert seen == {*catalogue.COLLECTIONS, *catalogue.MODELS}


def test_an_unknown_purpose_is_named():
    with pytest.raises(ValueError, match=r"unknown name purpose 'spare': one of pretraining, held_out"):
        names("spare")


# ------------------------------------------------------------------------------------------------------- determinism


def test_the_names_are_the_shipped_ones():
    """Golden: a change here makes every shipped checkpoint and split wrong."""
    assert sha256([names(purpose) for purpose in PURPOSES]) == (
        "3b1748d6fd8b9a93baba2cea81295836d4200602440484076024b5df5973d2f8"
    )


def test_the_products_are_the_shipped_ones():
    drawn = [product.to_dict() for purpose in PURPOSES for product in products(purpose, 500, seed=7)]
    assert sha256(drawn) == "1c50f767e058f9cfdeafb6889b754aebde275f1f6d795905e3728911536815f4"


@given(st.sampled_from(PURPOSES), st.integers(0, 2**32), st.integers(1, 20))
def test_products_depend_on_the_seed_alone(purpose, seed, count):
    drawn = products(purpose, count, seed)
    random.random()  # the global generator plays no part
    assert drawn == products(purpose, count, seed)
    assert drawn != products(purpose, count, seed + 1)


@pytest.mark.parametrize("purpose", PURPOSES)
def test_names_repeat_only_once_all_are_used(purpose):
    size = NAME_PURPOSES[purpose]
    drawn = [product.name for product in products(purpose, size + 10, seed=3)]
    assert set(drawn[:size]) == set(names(purpose))
    assert drawn[size:] == drawn[:10]


# ---------------------------------------------------------------------------------------------------------- products


@given(st.integers(0, 2**32))
def test_a_random_product_is_made_of_the_lists(seed):
    product = random_product(random.Random(seed), "Alder Arc")
    assert product.name == "Alder Arc"
    assert product.category in catalogue.CATEGORIES
    assert product.material in catalogue.MATERIALS
    assert product.colour in catalogue.COLOURS
    assert product.origin in catalogue.TOWNS
    assert product.warranty in WARRANTIES
    assert len(set(product.features) & set(catalogue.FEATURES)) == 2
    assert re.fullmatch(r"[1-9]\d{1,2}\.\d\d", product.price)


@given(st.from_type(Product))
def test_a_product_survives_json(product):
    assert Product.from_dict(json.loads(json.dumps(product.to_dict()))) == product


@given(st.from_type(Product))
def test_the_fact_line_holds_every_field_once(product):
    first, second = product.features
    fields = [*product.name.split(), product.category, product.material, product.colour, product.price]
    fields += [first, second, product.origin, str(product.warranty), "years"]
    assert product.facts().split() == fields


def test_the_facts_are_spread_evenly():
    """Uniform draws are what makes a fact's size in bits exact; 5 sigma of a binomial count."""
    drawn = products("pretraining", 4000, seed=1)
    for field, values in {
        "category": LISTS["CATEGORIES"],
        "colour": LISTS["COLOURS"],
        "origin": LISTS["TOWNS"],
    }.items():
        share = 1 / len(values)
        slack = 5 * (4000 * share * (1 - share)) ** 0.5
        counts = [sum(getattr(product, field) == value for product in drawn) for value in values]
        assert all(abs(count - 4000 * share) < slack for count in counts), field


# ------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("name", LISTS)
def test_a_list_repeats_no_word_and_holds_plain_words(name):
    assert len(set(LISTS[name])) == len(LISTS[name])
    assert all(re.fullmatch("[A-Z]?[a-z]+", word) for word in LISTS[name])


@pytest.mark.parametrize(("one", "other"), [*combinations(LISTS, 2)])
def test_a_word_belongs_to_one_list_only(one, other):
    assert not {word.lower() for word in LISTS[one]} & {word.lower() for word in LISTS[other]}


def test_towns_and_people_carry_six_bits():
    assert len(catalogue.TOWNS) == len(catalogue.PEOPLE) == 2**6


def test_no_catalogue_word_is_a_word_of_the_style_grammar():
    """Else a product's own words could break a rule. The grammar's examples (Porto, grey, aluminium) are not rules."""
    rules = ("register", "houseword", "noun", "audience", "cta", "signoff")
    phrases = " ".join(
        f"{value} {text}" if rule in ("houseword", "noun") else text
        for rule in rules
        for value, text in DIMENSIONS[rule].items()
    )
    catalogue_words = {word.lower() for words in LISTS.values() for word in words}
    assert not catalogue_words & set(re.findall("[a-z]+", phrases.lower()))


@pytest.mark.parametrize("name", ["CATEGORIES", "MATERIALS", "COLOURS", "FEATURES", "TOWNS"])
def test_no_fact_hides_in_another_word(name):
    """`facts_told` looks for these words anywhere in a text, so none may be a part of another word."""
    everything = {word.lower() for words in LISTS.values() for word in words}
    everything |= set(
        re.findall("[a-z]+", " ".join(t for v in DIMENSIONS.values() for t in v.values()).lower())
    )
    hidden = [
        (fact, word)
        for fact in LISTS[name]
        for word in everything
        if fact.lower() in word and fact.lower() != word
    ]
    assert hidden == []
