"""What serving many fine-tuned models costs: a calculator whose inputs are stated, for three designs.

Two things make a card necessary: memory, which an idle model takes as well, and traffic. The chapter's case study
counts one card per model, which is neither.
"""

import math
from dataclasses import dataclass

from labs_lib.errors import LabsError

DESIGNS = ("a card per copy", "copies packed onto cards", "one base, adapters in its batches")


def cards_needed(copies: int, copy_gb: float, card_gb: float, room_gb: float = 0.0) -> int:
    """How many cards hold `copies` whole models.

    Args:
        copy_gb: weights of one copy.
        card_gb: memory of a card.
        room_gb: what each copy needs beside its weights: keys and values, activations.

    Raises LabsError if not even one copy fits onto a card.

    Steps:
        1. Copies on one card: card_gb over what a copy needs in all, rounded down. A third of a model serves nobody.
        2. None? Then say so, with LabsError.
        3. Cards: copies over that, rounded up.
    """
    each = math.floor(card_gb / (copy_gb + room_gb))
    if each < 1:
        raise LabsError(f"A copy of {copy_gb + room_gb:g} GB does not fit onto a card of {card_gb:g} GB.")
    return math.ceil(copies / each)


@dataclass(frozen=True)
class Inputs:
    """Everything that the calculator assumes. Change any of it; `replace(inputs, load=200)` is another company.

    Attributes:
        tenants: fine-tuned models.
        copy_gb: weights of one; 13.5 is Llama-2-7B in half precision.
        adapter_gb: one adapter.
        card_gb, card_dollars: memory and monthly price of a card. The chapter: 50 cards for more than $150,000.
        room_gb: beside the weights of every model that runs.
        load: requests per second, of all tenants together.
        card_rate: requests per second that a card answers with one merged model.
        kept: share of that rate which is left when adapters are applied in the batch.
    """

    tenants: int = 50
    copy_gb: float = 13.476831232
    adapter_gb: float = 0.02
    card_gb: float = 80.0
    card_dollars: float = 3000.0
    room_gb: float = 0.0
    load: float = 1.0
    card_rate: float = 10.0
    kept: float = 0.9


def cards(inputs: Inputs) -> dict[str, int]:
    """Cards that each design of `DESIGNS` needs: enough memory, and enough speed for the load.

    A packed card is shared by its copies, so that it is as fast as a card with one. Every card of the last design has
    the base and all adapters, so that any of them can answer anybody.
    """
    for_load = math.ceil(inputs.load / inputs.card_rate)
    packed = cards_needed(inputs.tenants, inputs.copy_gb, inputs.card_gb, inputs.room_gb)
    together = inputs.copy_gb + inputs.tenants * inputs.adapter_gb
    cards_needed(1, together, inputs.card_gb, inputs.room_gb)  # or it says that they do not fit
    shared = max(1, math.ceil(inputs.load / (inputs.card_rate * inputs.kept)))
    found = (max(inputs.tenants, for_load), max(packed, for_load), shared)
    return dict(zip(DESIGNS, found, strict=True))


def saving(before: float, after: float) -> float:
    """Percent saved."""
    return 100 * (1 - after / before)
