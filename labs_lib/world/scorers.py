"""Scores of generated copy without a judge model: compliance, fidelity, leakage and exactness.

All of them come from `grammar`'s rules, which never look at the reference text (only `exact` does).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from labs_lib.world.catalogue import Product
from labs_lib.world.grammar import DIMENSIONS, facts_told, obeyed, render
from labs_lib.world.tenants import Tenant, load_tenants


def compliance(text: str, product: Product, style: dict[str, str]) -> float:
    """Share of the style's rules that the text obeys, 0 to 1.

    Steps:
    1. Ask obeyed(text, product, style), which gives True or False for each rule.
    2. Return the mean of its values; True counts as 1, False as 0.
    """
    return fmean(obeyed(text, product, style).values())


def fidelity(text: str, product: Product, style: dict[str, str]) -> float:
    """Share of the facts the style asks for (and the product's name) that the text tells, 0 to 1."""
    return fmean(facts_told(text, product, style).values())


def leaks(text: str, tenant: Tenant | None, tenants: Sequence[Tenant] | None = None) -> list[str]:
    """Slugs of *other* tenants whose mark (house word and sign-off together) the text bears."""
    lines = text.strip("\n").split("\n")
    words = set(" ".join(lines[1:2]).split())
    return [
        other.slug
        for other in (load_tenants() if tenants is None else tenants)
        if (tenant is None or other.slug != tenant.slug)
        and other.mark[0] in words
        and lines[-1] == other.mark[1]
    ]


@dataclass(frozen=True)
class StyleScore:
    """Means over the texts scored, and the per-text values behind them (for confidence intervals)."""

    compliance: float
    fidelity: float
    leakage: float
    exact: float
    per_text: dict[str, list[float]]
    per_rule: dict[str, float]


def score_style(texts: Sequence[str], products: Sequence[Product | dict], tenant: Tenant) -> StyleScore:
    """Score one tenant's generated texts.

    Args:
        texts: generated copy, one per product. products: as Product or as the dict a dataset row holds.

    Raises:
        ValueError: the two do not have the same, positive length.
    """
    if not texts or len(texts) != len(products):
        raise ValueError(
            f"need as many texts as products, at least one: got {len(texts)} and {len(products)}"
        )
    items = [p if isinstance(p, Product) else Product.from_dict(p) for p in products]
    rules = [obeyed(text, item, tenant.style) for text, item in zip(texts, items, strict=True)]
    per_text = {
        "compliance": [fmean(rule.values()) for rule in rules],
        "fidelity": [fidelity(t, p, tenant.style) for t, p in zip(texts, items, strict=True)],
        "leakage": [float(bool(leaks(t, tenant))) for t in texts],
        "exact": [float(t.strip("\n") == render(p, tenant.style)) for t, p in zip(texts, items, strict=True)],
    }
    means = {name: fmean(values) for name, values in per_text.items()}
    per_rule = {dimension: fmean(rule[dimension] for rule in rules) for dimension in DIMENSIONS}
    return StyleScore(**means, per_text=per_text, per_rule=per_rule)
