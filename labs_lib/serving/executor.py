"""Running the model on a batch: paged keys and values in, one token per row out.

transformers' own forward runs; keys and values reach it through `Window`, which it takes for its cache. A window is
the batch's past, gathered from its pages into one tensor with every row right-aligned, so that the next token of
every row falls into the same column. It is kept from step to step: who leaves frees a row, who joins gets one. New
cells are also written back to their pages, which remain the one place where a sequence's past lives.

On a GPU decode steps are recorded instead, and replayed (`static`); prefill, which is long and always of another
shape, runs as above.
"""

import copy
import logging
from collections.abc import Sequence as Rows

import torch
from transformers import PreTrainedModel

from labs_lib.errors import LabsError
from labs_lib.serving.batch import Index, StaticIndex
from labs_lib.serving.graphs import Beside, CaptureError
from labs_lib.serving.layers import Step, install, uninstall
from labs_lib.serving.layout import Layout
from labs_lib.serving.ops import STATIC
from labs_lib.serving.pool import Pool
from labs_lib.serving.static import StaticDecoder

log = logging.getLogger(__name__)

GRAPHS = ("auto", "on", "off")
SPARE = 16  # columns a window can grow by before it is gathered again; until then it may be so much too long


def check_model(model: PreTrainedModel) -> None:
    """Refuse what the engine would serve wrong: rotary tables that depend on who else is in the batch, no KV heads."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise LabsError(
            f"The model's rotary embedding is {kind!r}: it depends on the longest row of a batch, so a tenant's tokens "
            "would depend on its neighbours. Serve a model with fixed rotary embeddings."
        )
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise LabsError(
            'Load the model with attn_implementation="sdpa": the engine brings its own attention mask.'
        )


class Window:
    """The keys and values that one forward pass sees, the past first, then what is new.

    `parts` is (2 x layers, rows, heads, columns, size): each layer's keys, then its values. A head's columns lie side
    by side, which attention reads faster than the pages' order of token by token.

    Args:
        past: (rows, columns, cell), as pages store them.
        layers, heads: of the model's keys.
        spare: columns to grow by.
    """

    def __init__(self, past: torch.Tensor, layers: int, heads: int, spare: int) -> None:
        self.rows, self.columns, cell = past.shape
        self.layout = (2 * layers, heads, cell // (2 * layers * heads))
        self.parts = past.new_zeros(2 * layers, self.rows, heads, self.columns + spare, self.layout[2])
        self.parts[:, :, :, : self.columns] = past.unflatten(2, self.layout).permute(2, 0, 3, 1, 4)

    @property
    def capacity(self) -> int:
        """Rows that there is memory for; the first `rows` of them are in use."""
        return self.parts.shape[1]

    @property
    def full(self) -> bool:
        return self.columns == self.parts.shape[3]

    def put(self, row: int, past: torch.Tensor) -> None:
        """Give a row to a sequence with cells `past` (tokens, cell); nothing stays of who had it before."""
        mine = self.parts[:, row]
        mine.zero_()
        mine[:, :, self.columns - len(past) : self.columns] = past.unflatten(1, self.layout).permute(
            1, 2, 0, 3
        )

    def move(self, row: int, to: int) -> None:
        self.parts[:, to] = self.parts[:, row]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each attention layer with (rows, heads, new, size); returns its keys and values, past and new."""
        end = self.columns + keys.shape[2]
        mine = self.parts[2 * layer : 2 * layer + 2, : self.rows, :, :end]
        mine[0, :, :, self.columns :] = keys
        mine[1, :, :, self.columns :] = values
        return mine[0], mine[1]

    def only(self, rows: slice) -> "Window":
        """The same memory for some of the rows."""
        some = copy.copy(self)
        some.parts, some.rows = self.parts[:, rows], rows.stop - rows.start
        return some

    def fresh(self, new: int) -> torch.Tensor:
        """(rows, new, cell): the cells behind the past, as pages store them."""
        fresh = self.parts[:, : self.rows, :, self.columns : self.columns + new]
        return fresh.permute(1, 3, 0, 2, 4).flatten(2)


class ModelExecutor:
    """Prefill and decode on a real model.

    Args:
        model: a Llama-family causal language model; its linear layers are wrapped while the executor is open.
        pool: slots and KV pages on the model's device.
        op: how the adapters of a batch are applied (`ops.OPS`), or `auto`: by shape.
        graphs: whether decode steps are static ones (`static`), recorded on CUDA: `on`, `off`, or `auto`: on CUDA, as
            long as `op` can be recorded and recording works.
        rows: that will run together at most.
    """

    keeps_order = False  # whether the window's rows must lie as `decode` is given them

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        pool: Pool,
        op: str = "auto",
        graphs: str = "auto",
        rows: int = 32,
    ) -> None:
        check_model(model)
        if graphs == "on" and op not in ("auto", *STATIC):
            raise LabsError(
                f"op={op!r} makes shapes that depend on the batch, which cannot be recorded: use "
                f"{' or '.join(STATIC)}, or graphs off."
            )
        self._attach(model, layout, pool, graphs if op in ("auto", *STATIC) else "off", rows)
        self.step = Step(pool.adapters.data, layout, op)
        install(model, self.step)

    def _attach(
        self, model: PreTrainedModel, layout: Layout, pool: Pool, graphs: str = "off", rows: int = 32
    ) -> None:
        if graphs not in GRAPHS:
            raise LabsError(f"graphs={graphs!r} is not known: {', '.join(GRAPHS)}.")
        self.model, self.layout, self.pool = model, layout, pool
        self.device, self.dtype = model.device, model.get_input_embeddings().weight.dtype
        self._window: Window | None = None
        self._batch: list = []  # the sequences in the window, by row
        self._index: Index | None = None  # of the batch
        on_gpu = self.device.type == "cuda"
        self.graphs = graphs
        self._static = StaticDecoder(self, rows) if graphs == "on" or (graphs == "auto" and on_gpu) else None
        self._beside = Beside(self.device) if self._static is not None and on_gpu else None

    def close(self) -> None:
        uninstall(self.model)

    @torch.inference_mode()
    def prefill(self, rows: Rows) -> list[int]:
        """Run the prompts of new sequences; returns the first token of each.

        Prompts are right-aligned like the past, so that the last column predicts the next token of every row.
        """
        cached = [row.reservation.cached for row in rows]
        new = max(len(row.request.prompt) - c for row, c in zip(rows, cached, strict=True))
        past = max(cached)
        tokens = torch.zeros(len(rows), new, dtype=torch.long)
        positions = torch.zeros(len(rows), new, dtype=torch.long)
        past_cells = torch.zeros(len(rows), past, dtype=torch.long)  # cell 0 is of page 0: zeros
        new_cells = torch.zeros(len(rows), new, dtype=torch.long)
        seen = torch.zeros(len(rows), past + new, dtype=torch.bool)
        for i, (row, have) in enumerate(zip(rows, cached, strict=True)):
            prompt, places = row.request.prompt, self._places(row, len(row.request.prompt))
            count = len(prompt) - have
            tokens[i, new - count :] = torch.tensor(prompt[have:])
            positions[i, new - count :] = torch.arange(have, len(prompt))
            past_cells[i, past - have :] = places[:have]
            new_cells[i, new - count :] = places[have:]
            seen[i, past - have : past] = True
            seen[i, past + new - count :] = True
        columns = torch.arange(past + new)
        causal = columns[None, :] <= columns[past:, None]
        own = (
            columns[None, :] == columns[past:, None]
        )  # a padding column sees itself, or its softmax would be NaN
        window = self._window_of(past_cells, new)
        self._use(self._index_of(rows, new), rows, new)
        logits = self._forward(tokens, positions, (causal & seen[:, None, :]) | own, window)
        real = seen[:, past:].to(self.device)
        self.pool.cells()[new_cells.to(self.device)[real]] = window.fresh(new)[real]
        return self._sample(logits, rows)

    @torch.inference_mode()
    def decode(self, rows: Rows) -> list[int]:
        """One more token for each sequence. The batch should come in slot order: neighbours share an adapter."""
        if self._static is not None:
            try:
                return self._static.decode(rows)
            except CaptureError as error:
                if self.graphs == "on":
                    raise
                log.warning("%s From now on without.", error)
                self._static = None
        if self._window is None or self._window.full or not self._join(rows):
            self._gather(rows)
        window, batch = self._window, self._batch
        lengths = [row.length - 1 for row in batch]  # cells filled so far; the last token has none yet
        tokens = torch.tensor([[row.tokens[-1]] for row in batch])
        positions = torch.tensor(lengths)[:, None]
        self._use(self._index, batch, 1)
        seen = self._seen[: window.rows, None, : window.columns + 1]
        logits = self._forward(tokens, positions, seen, window)
        places = torch.tensor([self._place(row, length) for row, length in zip(batch, lengths, strict=True)])
        self.pool.cells()[places.to(self.device)] = window.fresh(1)[:, 0]
        window.columns += 1
        said = dict(zip((row.id for row in batch), self._sample(logits, batch), strict=True))
        return [said[row.id] for row in rows]

    def forget(self) -> None:
        """Drop the window: the next decode step gathers anew."""
        self._window, self._batch = None, []
        if self._static is not None:
            self._static.forget()

    def _gather(self, rows: Rows) -> None:
        """A new window for these sequences, in this order."""
        lengths = [row.length - 1 for row in rows]
        past = max(lengths)
        cells = torch.zeros(len(rows), past, dtype=torch.long)
        self._seen = torch.ones(len(rows), past + SPARE, dtype=torch.bool)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            cells[i, past - length :] = self._places(row, length)
            self._seen[i, : past - length] = False
        self._window, self._batch = self._window_of(cells, SPARE), list(rows)
        self._index = self._index_of(rows, 1)

    def _join(self, rows: Rows) -> bool:
        """Free the rows of who has left and give rows to who is new; False if the window must be gathered anew."""
        here, known = {row.id for row in rows}, {row.id for row in self._batch}
        if here == known:
            return True
        window, batch = self._window, self._batch
        new = [row for row in rows if row.id not in known]
        free = [i for i, row in enumerate(batch) if row.id not in here]
        longest = max((row.length - 1 for row in new), default=0)
        if (
            self.keeps_order
            or len(rows) > window.capacity
            or 2 * len(new) > len(rows)
            or longest > window.columns
        ):
            return False
        for row in new:
            at, past = free.pop(0) if free else len(batch), row.length - 1
            batch[at : at + 1] = [row]
            window.put(at, self.pool.cells()[self._places(row, past).to(self.device)])
            self._seen[at] = True
            self._seen[at, : window.columns - past] = False
        for at in reversed(free):  # no gaps: the last row moves up
            last = batch.pop()
            if at < len(batch):
                batch[at] = last
                window.move(len(batch), at)
                self._seen[at] = self._seen[len(batch)]
        window.rows = len(batch)
        self._index = self._index_of(batch, 1)
        return True

    def _window_of(self, cells: torch.Tensor, spare: int) -> Window:
        past = self.pool.cells()[cells.to(self.device)]
        config = self.model.config
        return Window(past, config.num_hidden_layers, config.num_key_value_heads, spare)

    def _places(self, row, count: int) -> torch.Tensor:
        """Rows of `pool.cells()` for the first `count` tokens of a sequence."""
        size = self.pool.tokens_per_page
        pages = torch.tensor(row.reservation.pages[: -(-count // size)], dtype=torch.long)
        return (pages[:, None] * size + torch.arange(size)).flatten()[:count]

    def _place(self, row, position: int) -> int:
        size = self.pool.tokens_per_page
        return row.reservation.pages[position // size] * size + position % size

    def _index_of(self, rows: Rows, tokens: int) -> Index | None:
        """Which slot each of the forward pass's rows uses, `tokens` per sequence; None if all are the base model's."""
        slots = [row.slot.number for row in rows for _ in range(tokens)]
        if not any(slots):
            return None
        return Index(
            torch.tensor(slots), self.pool.table, contiguous=self.pool.contiguous, device=self.device
        )

    def _gains_of(self, rows: Rows, tokens: int) -> torch.Tensor | None:
        """The page with DoRA's gains for each of the forward pass's rows; None if none has any."""
        if not any(row.slot.gain for row in rows):
            return None
        return self.pool.gain_page[[row.slot.number for row in rows for _ in range(tokens)]]

    def _use(self, index: Index | None, rows: Rows, tokens: int) -> None:
        """Tell the layers who uses what in the next forward pass, of `tokens` tokens for each of `rows`."""
        gains = self._gains_of(rows, tokens)
        self.apply(index, None if gains is None else gains.to(self.device))

    def apply(
        self, index: Index | StaticIndex | None, gain_page: torch.Tensor | None, recorded: bool = False
    ) -> None:
        """Hand the layers what they read; `recorded`: while a step is made that will be replayed."""
        self.step.index, self.step.gain_page = index, gain_page
        self.step.beside = self._beside if recorded else None

    def _forward(self, tokens, positions, seen: torch.Tensor, window: Window) -> torch.Tensor:
        """Logits (rows, vocabulary) of the last column. `seen` (rows, new, columns) says who may look where."""
        mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, torch.finfo(self.dtype).min)
        out = self.model(
            input_ids=tokens.to(self.device),
            position_ids=positions.to(self.device),
            attention_mask=mask[:, None].to(self.device),
            past_key_values=window,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float()

    def _sample(self, logits: torch.Tensor, rows: Rows) -> list[int]:
        return self.pick(logits.argmax(-1).tolist(), logits, rows)

    def pick(self, best: list[int], logits: torch.Tensor, rows: Rows) -> list[int]:
        """The next token of each row: the best one, or one that is drawn."""
        return [
            sample(logits[i], row.request.temperature, row.request.top_p, row.generator)
            if row.request.temperature > 0
            else best[i]
            for i, row in enumerate(rows)
        ]


def sample(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from softmax(logits / temperature), cut to the smallest set with probability `top_p` or more.

    On the CPU with the sequence's own generator, so that the result does not depend on who shares the batch.
    Source of top-p: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    chances = (logits.cpu().double() / temperature).softmax(-1)
    if not torch.isfinite(chances).all():
        # An adapter that overflows spoils its own tenant's text, not everybody's forward pass.
        return int(logits.nan_to_num().argmax())
    if top_p < 1:
        ordered, order = chances.sort(descending=True, stable=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the first is always kept
        chances = torch.zeros_like(chances).scatter_(0, order, ordered)
    return int(torch.multinomial(chances, 1, generator=generator))
