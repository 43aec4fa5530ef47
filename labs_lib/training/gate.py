"""The quality gate: no adapter is published before rules have read what the server would write with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labs_lib.world.scorers import StyleScore
    from labs_lib.world.tenants import Tenant

MOST_TOKENS = 80  # of a text


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


@dataclass(frozen=True)
class Candidate:
    """An adapter to be judged: whose it would be, and held-out rows with `prompt` and `product` to write for."""

    folder: Path
    tenant: "Tenant"
    rows: dict

    @classmethod
    def of(cls, folder: Path, slug: str, split: str = "validation", rows: int = 16) -> "Candidate":
        """For one of the shipped tenants, the first rows of a split."""
        from labs_lib.world.tasks import load_task
        from labs_lib.world.tenants import load_tenant

        return cls(folder, load_tenant(slug), load_task("style", tenant=slug)[split][:rows])


def read_by_rules(model, tokenizer, candidates: Mapping[str, Candidate]) -> "dict[str, StyleScore]":
    """Let the serving engine write with all candidates, in batches of strangers as in a server, and score each.

    `model` is the base, on its device; the engine gets a copy of its modules that shares the weights.
    """
    from labs_lib.serving.adapter import digest_of, preflight
    from labs_lib.serving.arms import share
    from labs_lib.serving.engine import Engine
    from labs_lib.serving.types import Request
    from labs_lib.world.scorers import score_style

    shas = {name: digest_of(each.folder) for name, each in candidates.items()}
    folders = {shas[name]: each.folder for name, each in candidates.items()}
    requests = []
    for name, each in candidates.items():
        for number, ids in enumerate(tokenizer(each.rows["prompt"])["input_ids"]):
            request = Request(ids, name, shas[name], MOST_TOKENS, stop_ids=(tokenizer.eos_token_id,))
            requests.append((number, request))
    # Row i of every tenant before row i + 1 of any: neighbours in a batch are strangers.
    requests = [request for _, request in sorted(requests, key=lambda pair: pair[0])]
    batch = min(64, len(requests))
    settings = {
        "slots": min(len(folders), 64),
        "max_rank": max(preflight(folder).pages for folder in folders.values()),
        "max_batch": batch,
        "kv_tokens": batch * (max(len(each.prompt) for each in requests) + MOST_TOKENS + 16),
        "queue_limit": len(requests),
        "prefix_cache": False,
    }
    with Engine(share(model), folders.__getitem__, **settings) as engine:
        results = engine.generate(requests)
    texts: dict[str, list[str]] = {name: [] for name in candidates}
    for result in results:
        texts[result.request.tenant].append(tokenizer.decode(result.tokens, skip_special_tokens=True))
    return {
        name: score_style(texts[name], each.rows["product"], each.tenant) for name, each in candidates.items()
    }
