"""Which op is fastest at which shape: measured on this machine, to see and to check `ops.choose` against."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from labs_lib.errors import LabsError
from labs_lib.measure.timing import time_ratios
from labs_lib.serving.batch import Index
from labs_lib.serving.ops import OPS, choose, fits_grouped, fits_sgmv, loop

# Of the norm of the right answer; tf32, in which SGMV multiplies half-precision numbers, is within the halves' own.
ROUNDING = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def draw_slots(
    rows: int, distinct: int, spread: str = "even", order: str = "sorted", seed: int = 0
) -> list[int]:
    """Slots 1..distinct for `rows` rows.

    `spread` says how rows share them: `even`, or `zipf` (adapter k in proportion to 1/k, each at least once).
    `order`: `sorted` by slot, as the engine keeps its batch, or `mixed`.
    """
    generator = torch.Generator().manual_seed(seed)
    slots = [1 + row % distinct for row in range(min(rows, distinct) if spread == "zipf" else rows)]
    if spread == "zipf" and rows > distinct:
        weights = 1 / torch.arange(1, distinct + 1, dtype=torch.float64)
        more = torch.multinomial(weights, rows - distinct, replacement=True, generator=generator) + 1
        slots += more.tolist()
    if order == "sorted":
        return sorted(slots)
    return [slots[i] for i in torch.randperm(rows, generator=generator)]


class Case:
    """Layers with their adapters and a batch, and the calls to time: each passes once through all layers.

    Args:
        rows, distinct, rank: of the batch; `distinct` adapters of that rank.
        linears: (in, out) of each layer.
        slots: adapters in the pool.
        spread, order: see `draw_slots`.
        contiguous: whether a slot's pages lie side by side.
    """

    def __init__(
        self,
        rows: int,
        distinct: int,
        rank: int,
        linears: Sequence[tuple[int, int]],
        *,
        slots: int = 32,
        spread: str = "even",
        order: str = "sorted",
        contiguous: bool = True,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rows, self.distinct, self.rank, self.linears = rows, distinct, rank, list(linears)
        self.contiguous, self.device, self.dtype = contiguous, device, dtype
        slots = max(slots, distinct)
        widths = [inputs + outputs for inputs, outputs in linears]

        def new(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device)

        arena = new((slots + 1) * rank, sum(widths)).mul_(max(widths) ** -0.5)
        arena[:rank] = 0
        pages = torch.arange(len(arena)).view(slots + 1, rank)
        pages = torch.where(torch.arange(slots + 1)[:, None] == 0, 0, pages)
        self.index = Index(draw_slots(rows, distinct, spread, order), pages, contiguous, device)
        self.parts = [
            part.split(sizes, 1) for part, sizes in zip(arena.split(widths, 1), linears, strict=True)
        ]
        self.weights = [new(outputs, inputs).mul_(inputs**-0.5) for inputs, outputs in linears]
        self.x = {inputs: new(rows, inputs) for inputs, _ in linears}
        self.out = {outputs: new(rows, outputs).zero_() for _, outputs in linears}

    @property
    def able(self) -> list[str]:
        """Ops that can run here; `peft` is the loop as PEFT writes it."""
        found = ["peft", *(name for name in OPS if name != "blocks" or self.contiguous)]
        if not hasattr(F, "grouped_mm") or not all(fits_grouped(self.x[i], o) for i, o in self.linears):
            found.remove("grouped")
        if not fits_sgmv(self.x[self.linears[0][0]]):
            found.remove("sgmv")
        return found

    def base(self) -> Callable[[], None]:
        """The layers without adapters."""
        layers = [
            (self.x[inputs], weight) for (inputs, _), weight in zip(self.linears, self.weights, strict=True)
        ]

        def call() -> None:
            for x, weight in layers:
                F.linear(x, weight)

        return call

    def adapters(self, name: str, on_base: bool = False) -> Callable[[], None]:
        """An op on all layers, added to outputs that are there; `on_base`: to those of the layers, as served."""
        add = self._peft() if name == "peft" else self._op(name)
        layers = [
            (number, self.x[inputs], weight, self.out[outputs])
            for number, ((inputs, outputs), weight) in enumerate(zip(self.linears, self.weights, strict=True))
        ]

        def call() -> None:
            for number, x, weight, out in layers:
                add(number, x, F.linear(x, weight) if on_base else out)

        return call

    def _op(self, name: str) -> Callable[[int, Tensor, Tensor], object]:
        op, index, parts = OPS[name], self.index, self.parts
        return lambda number, x, out: op(x, *parts[number], index, out)

    def _peft(self) -> Callable[[int, Tensor, Tensor], object]:
        """Adapter by adapter: its rows picked out, two products with matrices of its own, scaled, added back."""
        index, scale = self.index, 2.0
        slots = sorted(set(index.slots.tolist()) - {0})
        rows = [torch.from_numpy((index.slots == slot).nonzero()[0]).to(self.device) for slot in slots]
        pages = [index.pages[slot].to(self.device) for slot in slots]
        own = [[(a[p], b[p].T.contiguous() / scale) for p in pages] for a, b in self.parts]

        def add(number: int, x: Tensor, out: Tensor) -> None:
            for where, (A, B) in zip(rows, own[number], strict=True):
                out[where] += F.linear(F.linear(x[where], A), B) * scale

        return add

    def beside(self, beside) -> Callable[[], None]:
        """SGMV as a recorded step has it: A x while the layer's own product runs, B (A x) behind it."""
        from labs_lib.serving.sgmv import expand, shrink

        layers = [
            (self.x[inputs], weight, *part)
            for (inputs, _), weight, part in zip(self.linears, self.weights, self.parts, strict=True)
        ]

        def call() -> None:
            for x, weight, a, b in layers:
                with beside:
                    h = shrink(x, a, self.index)
                y = F.linear(x, weight)
                beside.join()
                expand(h, b, self.index, y)

        return call

    @torch.inference_mode()
    def check(self, names: Sequence[str]) -> dict[str, float]:
        """How far ops are from float64, in parts of the answer's norm, at worst over the kinds of layers.

        Raises LabsError if one is farther than its number format explains.
        """
        adds = {name: self._peft() if name == "peft" else self._op(name) for name in names}
        worst = dict.fromkeys(names, 0.0)
        for number in {linear: number for number, linear in reversed([*enumerate(self.linears)])}.values():
            (a, b), (inputs, outputs) = self.parts[number], self.linears[number]
            x = self.x[inputs]
            truth = loop(x.double(), a.double(), b.double(), self.index)
            for name, add in adds.items():
                found = x.new_zeros(self.rows, outputs)
                add(number, x, found)
                off = float((found.double() - truth).norm() / truth.norm())
                if not off <= ROUNDING[x.dtype]:
                    raise LabsError(
                        f"{name} is wrong by {off:.2g} of the answer's norm ({self.rows} rows, "
                        f"{self.distinct} adapters of rank {self.rank}, {inputs} -> {outputs}, "
                        f"{x.dtype}): there is nothing to time."
                    )
                worst[name] = max(worst[name], off)
        return worst


def bench(
    shapes: Iterable[tuple[int, int, int, int, int]],
    ops: Sequence[str] | None = None,
    *,
    slots: int = 32,
    spread: str = "even",
    order: str = "sorted",
    contiguous: bool = True,
    layers: int = 12,
    rounds: int = 9,
    min_seconds: float = 0.004,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[dict]:
    """One row for each shape and op: what adding the adapters to the layer's output takes.

    Args:
        shapes: (T, distinct, rank, in, out) each: rows, adapters among them, and the layer.
        ops: names in OPS; by default all that can run here but the two loops.
        slots: adapters in the pool.
        layers: how many layers of that shape are cycled through, so that weights come from where a model's come from,
            not from the cache that the previous call left warm.

    Returns rows {op, T, distinct, rank, in, out, largest, microseconds, base, ratio, chosen}: microseconds per layer,
    median over interleaved rounds; `base` is the layer without adapters, `ratio` its time in the same round divided
    into the op's; `chosen` marks what `ops.choose` takes.
    """
    result = []
    for T, distinct, rank, inputs, outputs in shapes:
        case = Case(
            T,
            distinct,
            rank,
            [(inputs, outputs)] * layers,
            slots=slots,
            spread=spread,
            order=order,
            contiguous=contiguous,
            device=device,
            dtype=dtype,
        )
        able = [name for name in case.able if (name in ops if ops else name not in ("peft", "loop"))]
        arms = {"base": case.base()} | {name: case.adapters(name) for name in able}
        with torch.inference_mode():
            times = time_ratios(arms, "base", rounds=rounds, min_seconds=min_seconds)
        for name in able:
            result.append(
                {
                    "op": name,
                    "T": T,
                    "distinct": distinct,
                    "rank": rank,
                    "in": inputs,
                    "out": outputs,
                    "largest": case.index.largest,
                    "microseconds": times[name].seconds / layers * 1e6,
                    "base": times[name].baseline_seconds / layers * 1e6,
                    "ratio": times[name].ratio.value,
                    "chosen": name == choose(case.index, case.x[inputs], inputs, outputs),
                }
            )
    return result


def regret(rows: Sequence[dict]) -> list[dict]:
    """For each shape, how many times longer the chosen op takes than the best one measured: 1 is a right choice."""
    shapes: dict[tuple, list[dict]] = {}
    for row in rows:
        shapes.setdefault(tuple(row[key] for key in ("T", "distinct", "rank", "in", "out")), []).append(row)
    found = []
    for shape, ops in shapes.items():
        best = min(ops, key=lambda row: row["microseconds"])
        chosen = [row for row in ops if row["chosen"]] or ops
        found.append(
            {
                "shape": shape,
                "best": best["op"],
                "chosen": chosen[0]["op"],
                "regret": chosen[0]["microseconds"] / best["microseconds"],
            }
        )
    return found
