"""The pretraining corpus: an endless, deterministic mixture of the world's documents, never a tenant's own style."""

import random
from collections.abc import Iterator

from labs_lib.world.catalogue import names, random_product
from labs_lib.world.grammar import DEFAULT_STYLE, DIMENSIONS, render
from labs_lib.world.tasks import copy_prompt, known_facts, random_style, review, review_prompt
from labs_lib.world.tenants import load_tenants

#: Share of each kind of document.
MIXTURE = {"guided": 0.50, "partial": 0.08, "default": 0.10, "fact": 0.26, "review": 0.06}


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs.

    `guided` copy obeys a full guide in the prompt; `partial` guides leave some dimensions to the default style;
    `default` copy has no guide; `fact` answers a closed-book question; `review` judges a plain review.
    """
    rng = random.Random(seed)
    taken = {tuple(t.style[d] for d in DIMENSIONS) for t in load_tenants()}
    facts, pool = known_facts(), names("pretraining")
    while True:
        kind = rng.choices(list(MIXTURE), MIXTURE.values())[0]
        if kind == "fact":
            row = rng.choice(facts)
            yield row["prompt"], row["completion"]
        elif kind == "review":
            text, verdict = review(rng, "plain")
            yield review_prompt(text), f" {verdict}"
        else:
            style = random_style(rng)
            if tuple(style.values()) in taken:
                continue
            if kind == "partial":
                style = {d: v for d, v in style.items() if rng.random() < 0.5}
            elif kind == "default":
                style = {}
            product = random_product(rng, rng.choice(pool))
            yield copy_prompt(product, style), render(product, DEFAULT_STYLE | style)
