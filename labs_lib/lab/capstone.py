"""The capstone of lab 19: a customer that nobody has seen, its texts, and the rubric that judges a model for it."""

from typing import TYPE_CHECKING

from labs_lib.lab.cards import Card, table
from labs_lib.world.tenants import Tenant

if TYPE_CHECKING:
    from torch import nn

BUDGET, STEPS = 20_000, 60  # trained numbers, optimiser steps
RULES, FACTS, KEPT = 0.9, 0.95, 0.5  # shares that the rubric asks for


def capstone_tenant() -> Tenant:
    """Tidewrack & Thrum, invented like all others: a combination of rules that no tenant of the course has."""
    style = {
        "headline": "lowercase",
        "register": "warm",
        "houseword": "timeless",
        "noun": "item",
        "audience": "families",
        "mark": "calm",
        "layout": "numbers",
        "order": "pricefirst",
        "features": "listed",
        "emphasis": "slanted",
        "spelling": "british",
        "currency": "codebefore",
        "origin": "labelled",
        "warranty": "guaranteed",
        "cta": "visit",
        "signoff": "workshop",
    }
    voice = "We mend more than we sell. Say the price first and softly, number what it can do, and end at the bench."
    return Tenant("tidewrack-and-thrum", "Tidewrack & Thrum", "repairers by the harbour", voice, style)


def capstone_task(texts: int = 48) -> dict[str, dict]:
    """`train`: so many of the tenant's texts; `test`: held-out products; rows as `load_task("style", ...)` has them."""
    from labs_lib.world.catalogue import Product
    from labs_lib.world.grammar import render
    from labs_lib.world.tasks import load_task
    from labs_lib.world.tenants import load_tenants

    style, given = capstone_tenant().style, load_task("style", tenant=load_tenants()[0].slug)
    task = {}
    for split, count in (("train", texts), ("test", None)):
        rows = given[split][:count] if count else given[split][:]
        completions = [render(Product.from_dict(product), style) for product in rows["product"]]
        task[split] = {**rows, "completion": completions}
    return task


def rubric(model: "nn.Module", tokenizer, trained: int, steps: int, rows: int = 32) -> Card:
    """Six questions about a model for the unseen tenant, each with what is asked, what was found, and yes or no."""
    from statistics import fmean

    from labs_lib.measure.quality import recall, style_quality
    from labs_lib.models.base import load_base
    from labs_lib.training.costs import request_flops
    from labs_lib.world.tasks import known_facts

    test = {key: values[:rows] for key, values in capstone_task()["test"].items()}
    quality = style_quality(model, tokenizer, test, capstone_tenant())
    known = known_facts()[:256]
    kept = fmean(recall(model, tokenizer, {k: [fact[k] for fact in known] for k in ("prompt", "completion")}))
    more = request_flops(model) / request_flops(load_base(model.config.name_or_path)[0]) - 1
    questions = (
        ("trained numbers", f"1 to {BUDGET:,}", f"{trained:,}", 0 < trained <= BUDGET),
        ("steps", f"at most {STEPS}", f"{steps}", steps <= STEPS),
        ("rules kept", f"{RULES:.0%} or more", f"{quality.compliance:.1%}", quality.compliance >= RULES),
        ("facts told", f"{FACTS:.0%} or more", f"{quality.fidelity:.1%}", quality.fidelity >= FACTS),
        ("old facts kept", f"{KEPT:.0%} or more", f"{kept:.1%}", kept >= KEPT),
        ("FLOPs more per request", "none", f"{more:.2%}", abs(more) < 1e-6),
    )
    return table(
        [
            {"question": what, "asked": asked, "found": found, "met": "yes" if met else "no"}
            for what, asked, found, met in questions
        ]
    )
