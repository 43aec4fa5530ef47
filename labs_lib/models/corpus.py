"""The pretraining corpus: an endless, deterministic mixture of the world's documents, never a tenant's own style."""

import random
from collections.abc import Iterator

from labs_lib.world.catalogue import names, random_product
from labs_lib.world.grammar import DEFAULT_STYLE, DIMENSIONS, render
from labs_lib.world.tasks import copy_prompt, known_facts, random_style, review, review_prompt
from labs_lib.world.tenants import load_tenants

#: Share of each kind of document, by stage of pretraining. Copy is learned first; facts are then cheap (14 tokens each
#: against 98) but need many readings, and in the first stage they are too small a part of the loss to be learned.
WRITING = {"guided": 0.50, "partial": 0.08, "default": 0.10, "fact": 0.26, "review": 0.06}
FACTS = {"guided": 0.18, "partial": 0.03, "default": 0.04, "fact": 0.70, "review": 0.05}


def documents(seed: int, mixture: dict[str, float] = WRITING) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs, drawn by the shares of `mixture`.

    `guided` copy obeys a full guide in the prompt; `partial` guides leave some dimensions to the default style;
    `default` copy has no guide; `fact` answers a closed-book question; `review` judges a plain review.
    """
    rng = random.Random(seed)
    taken = {tuple(t.style[d] for d in DIMENSIONS) for t in load_tenants()}
    facts, pool = known_facts(), names("pretraining")
    while True:
        kind = rng.choices(list(mixture), mixture.values())[0]
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
