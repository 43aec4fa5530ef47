"""Which op is fastest at which shape: measured on this machine, to see and to check `ops.choose` against."""

from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional as F

from labs_lib.measure.timing import time_ratios
from labs_lib.serving.batch import Index
from labs_lib.serving.ops import OPS, choose, fits_grouped


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
        ops: names in OPS; by default all but the reference and, on the CPU, the Triton kernels.
        slots: adapters in the pool.
        layers: how many layers of that shape are cycled through, so that weights come from where a model's come from,
            not from the cache that the previous call left warm.

    Returns rows {op, T, distinct, rank, in, out, largest, microseconds, base, ratio, chosen}: microseconds per layer,
    median over interleaved rounds; `base` is the layer without adapters, `ratio` its time in the same round divided
    into the op's; `chosen` marks what `ops.choose` takes.
    """
    if ops is None:
        ops = [name for name in OPS if name not in (("loop", "sgmv") if device == "cpu" else ("loop",))]
    result = []
    for T, distinct, rank, inputs, outputs in shapes:
        width = inputs + outputs
        arena = torch.randn((slots + 1) * rank, layers * width, dtype=dtype, device=device) / width**0.5
        arena[:rank] = 0
        pages = torch.arange(len(arena)).view(slots + 1, rank)
        pages = torch.where(torch.arange(slots + 1)[:, None] == 0, 0, pages)
        index = Index(draw_slots(T, distinct, spread, order), pages, contiguous, device)
        x = torch.randn(T, inputs, dtype=dtype, device=device)
        base = [torch.randn(outputs, inputs, dtype=dtype, device=device) for _ in range(layers)]
        parts = [part.split([inputs, outputs], 1) for part in arena.split(width, 1)]
        out = torch.zeros(T, outputs, dtype=dtype, device=device)

        def layer(weights=base, x=x):
            for weight in weights:
                F.linear(x, weight)

        def adapters(op, x=x, parts=parts, index=index, out=out):
            def call():
                for a, b in parts:
                    op(x, a, b, index, out)
                out.zero_()

            return call

        able = [
            name
            for name in ops
            if not (name == "blocks" and not contiguous or name == "grouped" and not fits_grouped(x, outputs))
        ]
        arms = {"base": layer} | {name: adapters(OPS[name]) for name in able}
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
                    "largest": index.largest,
                    "microseconds": times[name].seconds / layers * 1e6,
                    "base": times[name].baseline_seconds / layers * 1e6,
                    "ratio": times[name].ratio.value,
                    "chosen": name == choose(index, x, inputs, outputs),
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
