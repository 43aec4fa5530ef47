"""The calculator: the chapter's figures from the chapter's inputs, and what changes them."""

from dataclasses import replace

import pytest

from labs_lib.errors import LabsError
from labs_lib.serving.cost import DESIGNS, Inputs, cards, cards_needed, saving


def test_copies_onto_cards():
    assert cards_needed(50, 13.5, 80) == 10  # five on each
    assert cards_needed(51, 13.5, 80) == 11
    assert cards_needed(50, 13.5, 80, room_gb=13.0) == 17  # three
    assert cards_needed(50, 70, 80) == 50
    assert cards_needed(1, 40, 80) == cards_needed(2, 40, 80) == 1
    with pytest.raises(LabsError, match=r"90 GB does not fit"):
        cards_needed(1, 80, 80, room_gb=10)


def test_the_chapters_inputs_give_the_chapters_figures():
    alone, packed, shared = cards(Inputs()).values()
    assert (alone, shared) == (50, 1) and saving(alone, shared) == pytest.approx(98)
    assert alone * Inputs().card_dollars == 150_000
    assert packed == 10 and saving(packed, shared) == pytest.approx(90)


def test_traffic_buys_cards_too():
    busy = replace(Inputs(), load=200.0)
    assert cards(busy) == dict(
        zip(DESIGNS, (50, 20, 23), strict=True)
    )  # unmerged is slower: more cards, not fewer
    calm = replace(Inputs(), load=0.0)
    assert cards(calm)[DESIGNS[2]] == 1
    with pytest.raises(LabsError, match="does not fit"):
        cards(replace(Inputs(), adapter_gb=2.0))
