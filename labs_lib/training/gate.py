"""The quality gate: no adapter is published before rules have read what the server would write with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labs_lib.world.scorers import StyleScore


@dataclass(frozen=True)
class Bar:
    """What an adapter must reach on held-out products: shares of rules obeyed and of facts told, and no leak."""

    compliance: float = 0.95
    fidelity: float = 0.95
    leakage: float = 0.0


def gate(score: "StyleScore", bar: Bar | None = None) -> list[str]:
    """Why an adapter must not be published; an empty list lets it pass.

    Args:
        score: has compliance, fidelity and leakage, each a share from 0 to 1.

    Steps:
        1. Compliance below the bar is a reason, and so is fidelity below it: say the figure and the bar.
        2. Leakage above the bar is a reason: for it more is worse.
        3. All reasons that apply, not just the first. A figure that is no number (nan) passes no bar.
    """
    bar, reasons = bar or Bar(), []
    for name in ("compliance", "fidelity"):
        value, least = getattr(score, name), getattr(bar, name)
        if not value >= least:
            reasons.append(f"{name} {value:.3f} is below {least:g}")
    if not score.leakage <= bar.leakage:
        reasons.append(f"leakage {score.leakage:.3f}: texts with another tenant's mark")
    return reasons


def read_by_rules(
    model, tokenizer, folders: Mapping[str, Path], split: str = "validation", rows: int = 16
) -> "dict[str, StyleScore]":
    """Let the serving engine write for the tenants' held-out products, all tenants in its batches, and score each.

    Args:
        model: the base, on its device; the engine gets a copy of its modules that shares the weights.
        folders: each tenant's adapter, by the tenant's slug.
        rows: products per tenant, the first of the split.
    """
    from labs_lib.serving.adapter import digest_of, preflight
    from labs_lib.serving.arms import share
    from labs_lib.serving.engine import Engine
    from labs_lib.serving.types import Request
    from labs_lib.world.scorers import score_style
    from labs_lib.world.tasks import load_task
    from labs_lib.world.tenants import load_tenant

    shas = {slug: digest_of(folder) for slug, folder in folders.items()}
    by_sha = {shas[slug]: folder for slug, folder in folders.items()}
    products: dict[str, Sequence[dict]] = {}
    requests = []
    for slug in folders:
        held_out = load_task("style", tenant=slug)[split][:rows]
        products[slug] = held_out["product"]
        for ids in tokenizer(held_out["prompt"])["input_ids"]:
            requests.append(Request(ids, slug, shas[slug], 80, stop_ids=(tokenizer.eos_token_id,)))
    # Row i of every tenant before row i + 1 of any: batches of strangers, as in a server.
    order = sorted(range(len(requests)), key=lambda i: i % rows)
    batch = min(64, len(requests))
    longest = max(len(each.prompt) for each in requests) + 80
    rank = max(preflight(folder).pages for folder in folders.values())
    settings = {"slots": min(len(folders), 64), "max_rank": rank, "max_batch": batch}
    settings |= {"kv_tokens": batch * (longest + 16), "queue_limit": len(requests)}
    with Engine(share(model), by_sha.__getitem__, prefix_cache=False, **settings) as engine:
        results = engine.generate([requests[i] for i in order])
    texts: dict[str, list[str]] = {slug: [] for slug in folders}
    for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0]):
        texts[result.request.tenant].append(tokenizer.decode(result.tokens, skip_special_tokens=True))
    return {slug: score_style(texts[slug], products[slug], load_tenant(slug)) for slug in folders}
