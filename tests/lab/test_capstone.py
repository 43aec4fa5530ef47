"""The capstone's customer is new, its texts obey its rules, and the rubric tells a good answer from a bad one."""

import re

import pytest

from labs_lib.lab.advisor import advisor
from labs_lib.lab.capstone import BUDGET, STEPS, capstone_task, capstone_tenant, rubric
from labs_lib.measure.advice import read_methods
from labs_lib.models.base import load_base
from labs_lib.world.catalogue import Product
from labs_lib.world.grammar import facts_told, obeyed
from labs_lib.world.tenants import load_tenants


def test_nobody_has_the_customer_s_style():
    style = capstone_tenant().style
    tenants = load_tenants()
    assert all(style.keys() == tenant.style.keys() for tenant in tenants)
    shared = {tenant.slug: sum(style[k] == v for k, v in tenant.style.items()) for tenant in tenants}
    assert max(shared.values()) < len(style) - 4, "several rules apart from everybody"


def test_its_texts_obey_its_rules_and_hold_back_the_test_s_products():
    tenant, task = capstone_tenant(), capstone_task(texts=8)
    assert len(task["train"]["completion"]) == 8
    for rows in task.values():
        for text, facts in zip(rows["completion"], rows["product"], strict=True):
            product = Product.from_dict(facts)
            assert all(obeyed(text, product, tenant.style).values())
            assert all(facts_told(text, product, tenant.style).values())
    assert not set(task["train"]["prompt"]) & set(task["test"]["prompt"])


def answers(card):
    """Question -> yes or no: the first column and the last, which lie more than one space apart."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in card.text.splitlines()[1:]]
    return {cell[0]: cell[-1] for cell in cells}


def test_the_rubric_refuses_a_base_that_was_never_trained():
    model, tokenizer = load_base("tiny")
    met = answers(rubric(model, tokenizer, trained=0, steps=STEPS + 1, rows=4))
    assert met == {
        "trained numbers": "no",
        "steps": "no",
        "rules kept": "no",
        "facts told": met["facts told"],
        "old facts kept": met["old facts kept"],
        "FLOPs more per request": "yes",
    }
    assert answers(rubric(model, tokenizer, trained=BUDGET, steps=STEPS, rows=4))["trained numbers"] == "yes"


@pytest.fixture
def methods():
    return read_methods()


def test_without_a_notebook_the_advisor_prints_its_first_answer(methods, capsys):
    advisor(methods)
    assert next(iter(methods)) in capsys.readouterr().out


def test_the_form_asks_again_when_a_constraint_changes(methods, monkeypatch):
    import IPython
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(IPython.display, "display", shown.append)
    advisor(methods)
    form = shown[0]
    *fields, answer = form.children
    before = answer.value
    size = next(field for field in fields if "trained" in field.description)
    size.value = 1_000
    assert answer.value != before
    size.value = None
    assert answer.value == before
