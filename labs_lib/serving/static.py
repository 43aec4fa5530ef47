"""Decode steps whose shapes and addresses never change, so that a GPU can replay them as one recorded graph.

A forward pass is hundreds of kernels, and on a GPU that decodes, launching them takes longer than running them. A
CUDA graph is launched once: but it repeats the same kernels, on the same addresses, with the same shapes. So here a
step reads its batch from buffers alone, and the host writes into the buffers before each step:

    token, position, place    of each row; `place` is where its new keys and values go in the pages
    index, gains              which pages each row's adapter has (`batch.StaticIndex`), and which holds DoRA's gains
    window                    keys and values, each row's from column 0, so that a token's column is its position

Rows without a sequence compute along as rows of the base model: they see their own column 0, write zeros to page 0,
which is zeros, and nobody reads what they say. A step exists for few `Kind`s of batch; `graphs` records each of them.
"""

from collections.abc import Sequence as Rows
from types import SimpleNamespace
from typing import NamedTuple

import torch

from labs_lib.serving.batch import Index, StaticIndex
from labs_lib.serving.graphs import Recorder

SMALLEST = 64  # columns
LEAST_RANKS = 8


def row_bucket(rows: int) -> int:
    """1, 2, 4, 8, ...: the rows that a batch is filled up to."""
    return 1 << max(0, rows - 1).bit_length()


def column_bucket(columns: int) -> int:
    """64, 128, 192, 256, 384, 512, 768, 1024, ...: at most half as much again as is needed, above 128."""
    if columns <= SMALLEST:
        return SMALLEST
    power = row_bucket(columns)
    return 3 * power // 4 if columns <= 3 * power // 4 and power >= 4 * SMALLEST else power


def rank_bucket(ranks: int) -> int:
    """0 for a batch without adapters, else 8, 16, 32, ...: pages that each row's list has room for."""
    return max(LEAST_RANKS, row_bucket(ranks)) if ranks else 0


class Kind(NamedTuple):
    """What a recorded step is for: one of these serves every mix of adapters that fits."""

    rows: int
    columns: int
    ranks: int  # 0: all rows are the base model's, whose step has no adapter kernels at all
    gains: bool  # some row has DoRA's gains


class StaticWindow:
    """The cache that the model sees: `parts` is (2 x layers, rows, heads, columns, size), as in `executor.Window`.

    Args:
        position: (rows,) buffer: the column of each row's new token.
    """

    def __init__(self, parts: torch.Tensor, position: torch.Tensor) -> None:
        self.parts, self.position = parts, position
        self.row = torch.arange(parts.shape[1], device=parts.device)

    def put(self, row: int, cells: torch.Tensor) -> None:
        """Give a row to a sequence with `cells` (tokens, cell); nothing stays of who had it before."""
        layers, _, heads, _, size = self.parts.shape
        mine = self.parts[:, row]
        mine[:, :, : len(cells)] = cells.unflatten(1, (layers, heads, size)).permute(1, 2, 0, 3)
        mine[:, :, len(cells) :] = 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each attention layer with (rows, heads, 1, size): all columns back, the mask hides empty ones."""
        mine = self.parts[2 * layer], self.parts[2 * layer + 1]
        for part, new in zip(mine, (keys, values), strict=True):
            part[self.row, :, self.position] = new[:, :, 0]
        return mine

    def fresh(self) -> torch.Tensor:
        """(rows, cell): what was just written, as pages store it."""
        return self.parts[:, self.row, :, self.position].flatten(1)


class StaticStep:
    """A decode step of one kind. Calling it computes from buffers alone; `fill` and `seat` write them.

    Args:
        executor: whose model, pages and layers' `step` are used.
        memory: numbers for the window, which all kinds share: whoever uses another kind next fills it anew.
    """

    def __init__(self, executor, kind: Kind, memory: torch.Tensor) -> None:
        config, layout, device = executor.model.config, executor.layout, executor.device
        self.executor, self.kind = executor, kind
        heads = config.num_key_value_heads
        shape = (2 * config.num_hidden_layers, kind.rows, heads, kind.columns)
        size = layout.cell // (shape[0] * heads)
        self.numbers = torch.zeros(3, kind.rows, dtype=torch.long, device=device)
        self.token, self.position, self.place = self.numbers
        self.window = StaticWindow(
            memory[: kind.rows * kind.columns * layout.cell].view(*shape, size), self.position
        )
        self.column = torch.arange(kind.columns, device=device)
        self.index = StaticIndex(kind.rows, kind.ranks, device) if kind.ranks else None
        self.gain_page = torch.zeros(kind.rows, dtype=torch.long, device=device) if kind.gains else None
        self._host = torch.zeros(3, kind.rows, dtype=torch.long, pin_memory=device.type == "cuda")

    def seat(self, index: Index | None, gains: torch.Tensor | None) -> None:
        """Who uses which adapter, for as long as nobody joins or leaves."""
        if self.index is not None:
            self.index.fill(index)
        if self.gain_page is not None:
            self.gain_page.copy_(gains)

    def fill(self, tokens: list[int], positions: list[int], places: list[int]) -> None:
        """The next token of each row, in one copy. The step before is over: its tokens were read."""
        self._host.copy_(torch.tensor([tokens, positions, places]))
        self.numbers.copy_(self._host, non_blocking=True)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Everything that a step reads besides weights and pages."""
        found = {"numbers": self.numbers, "column": self.column, "row": self.window.row}
        found["window"] = self.window.parts
        if self.index is not None:
            found |= self.index.buffers
        if self.gain_page is not None:
            found["gain_page"] = self.gain_page
        return found

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The best token of each row (rows,), and logits (rows, vocabulary)."""
        executor, dtype = self.executor, self.executor.dtype
        hidden = torch.zeros(self.kind.rows, self.kind.columns, dtype=dtype, device=self.column.device)
        hidden.masked_fill_(self.column > self.position[:, None], torch.finfo(dtype).min)
        executor.apply(self.index, self.gain_page, recorded=True)
        out = executor.model(
            input_ids=self.token[:, None],
            position_ids=self.position[:, None],
            attention_mask=hidden[:, None, None],
            past_key_values=self.window,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1].float()
        # Rows without a sequence all write to cell 0, of page 0: zeros, so that it stays what it is.
        fresh = self.window.fresh().masked_fill_(self.place[:, None] == 0, 0)
        executor.pool.cells().index_copy_(0, self.place, fresh)
        return logits.argmax(-1), logits


class StaticDecoder:
    """Decode by static steps: seats sequences in rows, takes the kind of step that fits, and runs it.

    Args:
        executor: a `ModelExecutor`; its `step` says how adapters are applied.
        rows: that will run together at most: the window's memory is at least that of the smallest window for them.
    """

    def __init__(self, executor, rows: int) -> None:
        self.executor, self.least = executor, row_bucket(rows) * SMALLEST
        slot = executor.pool.slots[0]
        self.empty = SimpleNamespace(id=None, slot=slot, request=SimpleNamespace(adapter=None, temperature=0))
        self.recorder = Recorder(executor.device)
        self._memory: torch.Tensor | None = None
        self._steps: dict[Kind, StaticStep] = {}
        self.forget()

    def forget(self) -> None:
        """Nobody has a row: the next step gathers keys and values anew."""
        self.rows = self.columns = 0
        self.seats: list = []
        self._kind: Kind | None = None

    def decode(self, rows: Rows) -> list[int]:
        """One more token for each sequence, in the order given."""
        step = self._ready(rows)
        live = [seat is not self.empty for seat in self.seats]
        positions = [seat.length - 1 if here else 0 for seat, here in zip(self.seats, live, strict=True)]
        step.fill(
            [seat.tokens[-1] if here else 0 for seat, here in zip(self.seats, live, strict=True)],
            positions,
            [
                self.executor._place(seat, at) if here else 0
                for seat, at, here in zip(self.seats, positions, live, strict=True)
            ],
        )
        best, logits = self.recorder.run(step.kind, step)
        said = self.executor.pick(best.tolist(), logits, self.seats)
        by_id = {seat.id: token for seat, token in zip(self.seats, said, strict=True)}
        return [by_id[row.id] for row in rows]

    def _ready(self, rows: Rows) -> StaticStep:
        """The step for these sequences, each of them in a row of its window."""
        here = {row.id for row in rows}
        known = {seat.id for seat in self.seats}
        long = column_bucket(max(row.length for row in rows))
        wide = row_bucket(len(rows))
        # Larger as soon as needed; smaller only if much too large, so that nobody's coming and going moves everybody.
        if not (wide <= self.rows <= 2 * wide and long <= self.columns <= 2 * long):
            return self._gather(rows, wide, long)
        if here != known - {None}:
            self.seats = [seat if seat.id in here else self.empty for seat in self.seats]
            new = [row for row in rows if row.id not in known]
            free = [at for at, seat in enumerate(self.seats) if seat is self.empty]
            window = self._steps[self._kind].window
            for row, at in zip(new, free, strict=False):
                self.seats[at] = row
                self._put(window, at, row)
            return self._seat()
        return self._steps[self._kind]

    def _gather(self, rows: Rows, wide: int, long: int) -> StaticStep:
        """Another shape of window: every sequence's past comes from its pages."""
        self.rows, self.columns = wide, long
        self.seats = [*rows, *[self.empty] * (wide - len(rows))]
        step = self._seat()
        for at, seat in enumerate(self.seats):
            if seat is self.empty:
                step.window.parts[:, at] = 0
            else:
                self._put(step.window, at, seat)
        return step

    def _put(self, window: StaticWindow, at: int, row) -> None:
        places = self.executor._places(row, row.length - 1)
        window.put(at, self.executor.pool.cells()[places.to(self.executor.device)])

    def _seat(self) -> StaticStep:
        """The step of the kind that these seats need, and their adapters in its buffers."""
        executor = self.executor
        index, gains = executor._index_of(self.seats, 1), executor._gains_of(self.seats, 1)
        ranks = index.rank if index is not None else 0
        kind = Kind(self.rows, self.columns, rank_bucket(ranks), gains is not None)
        if kind not in self._steps:
            need = max(self.least, self.rows * self.columns) * executor.layout.cell
            if self._memory is None or need > len(self._memory):
                self._steps.clear()
                self.recorder.clear()  # what was recorded would write to memory that is no longer ours
                self._memory = None  # before the new one, not beside it
                self._memory = torch.zeros(need, dtype=executor.dtype, device=executor.device)
            self._steps[kind] = StaticStep(executor, kind, self._memory)
        self._kind, step = kind, self._steps[kind]
        step.seat(index, gains)
        return step
