"""The window of gathered keys and values: right-aligned, and nothing stays in a row of who had it before."""

import torch

from labs_lib.serving.executor import Window

LAYERS, HEADS, SIZE = 2, 3, 4
CELL = 2 * LAYERS * HEADS * SIZE


def past(rows: int, tokens: int) -> torch.Tensor:
    return torch.randn(rows, tokens, CELL)


def seen_by(window: Window, row: int) -> torch.Tensor:
    """(tokens, cell) of a row, as pages would store them."""
    parts = window.parts[:, row, :, : window.columns]
    return parts.permute(2, 0, 1, 3).flatten(1)


def test_a_window_holds_what_it_was_given_and_hands_back_what_is_new():
    cells = past(2, 5)
    window = Window(cells, LAYERS, HEADS, spare=3)
    assert all(torch.equal(seen_by(window, row), cells[row]) for row in range(2))
    new = past(2, 1)
    states = new.unflatten(2, (2 * LAYERS, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
    for layer in range(LAYERS):
        keys, values = window.update(states[2 * layer], states[2 * layer + 1], layer)
        assert keys.shape == values.shape == (2, HEADS, 6, SIZE)
        assert torch.equal(keys[:, :, 5:], states[2 * layer]) and torch.equal(
            values[:, :, 5:], states[2 * layer + 1]
        )
    assert torch.equal(window.fresh(1), new)


def test_a_row_that_changes_hands_keeps_nothing():
    cells = past(3, 6)
    cells[1] = float("nan")  # what a tenant's overflowing adapter leaves behind
    window = Window(cells, LAYERS, HEADS, spare=2)
    short = past(1, 2)[0]
    window.put(1, short)
    assert torch.equal(seen_by(window, 1)[-2:], short)
    assert not seen_by(window, 1)[:-2].any()
    assert torch.isfinite(window.parts).all()


def test_the_last_row_moves_up():
    cells = past(3, 4)
    window = Window(cells, LAYERS, HEADS, spare=1)
    window.move(2, 0)
    window.rows = 2
    assert torch.equal(seen_by(window, 0), cells[2]) and torch.equal(seen_by(window, 1), cells[1])
    assert window.fresh(1).shape == (2, 1, CELL) and window.capacity == 3
