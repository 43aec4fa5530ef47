"""`labs bench kernels`: what adapters cost on top of a 7B model's linear layers, and what the machine allows at best.

One token for each of 1..64 rows, every row with an adapter of its own, on one linear layer and on the seven of a
transformer layer: the layers alone, then with each op. Every op is held against float64 before it is timed, arms run in
turns, ratios are taken within a turn. On CUDA each arm is a recorded graph, as in the engine: what is compared is the
kernels, not how long Python takes to launch them.

The roofline: weights and adapters must be read once, so a pass takes at least bytes / bandwidth seconds, both measured
here. How near an op comes to it is what is left to gain.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from labs_lib.errors import LabsError
from labs_lib.serving.bench import numbers

ROWS = (1, 2, 4, 8, 16, 32, 64)
COLD = 256 << 20  # bytes of weights that are cycled through: they come from memory then, not from the cache
MOST = 64  # copies of a layer


@dataclass(frozen=True)
class Plan:
    """What is measured. Layers have the shapes of `model`, a twin's name or HIDDENxINTERMEDIATE."""

    model: str = "llama-2-7b"
    rows: tuple[int, ...] = ROWS
    ranks: tuple[int, ...] = (16, 8, 64)
    ops: tuple[str, ...] = ("sgmv", "grouped", "gather", "tiles", "segments", "peft")
    rounds: int = 15
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    minutes: float = 4.0
    tune: bool = False


def linears_of(model: str) -> list[tuple[int, int]]:
    """(in, out) of a transformer layer's q, k, v, o, gate, up, down."""
    from labs_lib.models.twins import TWINS

    if model in TWINS:
        shape = TWINS[model]
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    else:
        try:
            hidden, inner = (int(word) for word in model.split("x"))
        except ValueError:
            raise LabsError(
                f"--model {model}: a twin ({', '.join(TWINS)}) or HIDDENxINTERMEDIATE, as in 4096x11008."
            ) from None
        keys = hidden
    attention = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


def work(
    linears: Sequence[tuple[int, int]], rows: int, adapters: int, rank: int, itemsize: int
) -> tuple[int, int]:
    """Bytes that one pass must move, and its FLOPs: weights and adapters once, inputs and outputs of every row."""
    base, both = sum(i * o for i, o in linears), sum(i + o for i, o in linears)
    return itemsize * (base + adapters * rank * both + rows * both), 2 * rows * (
        base + (rank * both if adapters else 0)
    )


def copies_of(linears: Sequence[tuple[int, int]], itemsize: int) -> int:
    """How often the layers are there, each time with weights of its own."""
    return min(MOST, max(2, -(-COLD // (itemsize * sum(i * o for i, o in linears)))))


def run(plan: Plan) -> list[dict]:
    """Rows for the record; what time did not reach is said in a row of its own."""
    import torch

    from labs_lib.serving.profiler import limits

    end = time.monotonic() + 60 * plan.minutes
    dtype = getattr(torch, plan.dtype)
    machine = limits(torch.empty(1, device=plan.device, dtype=dtype))
    _say(
        f"reads {machine.read / 1e9:,.0f} GB/s, copies {machine.copy / 1e9:,.0f} GB/s, "
        f"multiplies {machine.rate / 1e12:.2f} TFLOP/s"
    )
    rows = [{"section": "machine", "read": machine.read, "copy": machine.copy, "flops": machine.rate}]
    block = linears_of(plan.model)
    sets = {"seven linears": block, f"{block[0][0]} to {block[4][1]}": [block[4]]}
    missed = []
    for name, linears, rank, T in _order(sets, plan):
        if time.monotonic() > end:
            missed.append(f"{name}, rank {rank}, {T} rows")
            continue
        rows += _measure(plan, name, linears, rank, T, machine, dtype)
    if missed:
        rows.append({"section": "not reached", "what": missed, "minutes": plan.minutes})
    return rows


def _order(sets: dict, plan: Plan) -> Iterator[tuple]:
    """What tells most comes first: seven linears before one, each rank at the largest batches first."""
    for name, linears in sets.items():
        for rank in plan.ranks:
            for T in sorted(plan.rows, key=lambda T: (T != 32, -T)):
                yield name, linears, rank, T


def _measure(plan, name: str, linears, rank: int, T: int, machine, dtype) -> list[dict]:
    """All ops on one set of layers at one batch."""
    import torch

    from labs_lib.measure.timing import time_ratios
    from labs_lib.serving.graphs import Beside
    from labs_lib.serving.opbench import Case

    itemsize = dtype.itemsize
    copies = copies_of(linears, itemsize)
    case = Case(T, T, rank, linears * copies, slots=T, device=plan.device, dtype=dtype)
    device, off, found = torch.device(plan.device), {}, []
    for op in plan.ops:
        if op in case.able:
            try:
                off |= case.check([op])
            except LabsError:
                raise
            except (
                Exception
            ) as error:  # not on this card, or not in this number format: the others still count
                found.append(
                    {"section": "refused", "op": op, "rank": rank, "why": f"{type(error).__name__}: {error}"}
                )
                _say(f"{op} does not run here: {type(error).__name__}")
    able = list(off)
    calls = {"base": case.base()}
    calls |= {op: case.adapters(op) for op in able} | {f"with {op}": case.adapters(op, True) for op in able}
    if "sgmv" in able:
        calls["with sgmv beside"] = case.beside(Beside(device))
    with torch.inference_mode():
        arms, refused = {}, {}
        for arm, call in calls.items():
            try:
                arms[arm] = recorded(call, device)
            except (
                LabsError
            ) as error:  # an op that waits for the host cannot be recorded: it is timed as it is
                arms[arm], refused[arm] = call, str(error)
        times = time_ratios(arms, "base", rounds=plan.rounds, min_seconds=0.002)
    for arm in calls:
        op, alone = arm.removeprefix("with ").removesuffix(" beside"), not arm.startswith("with ")
        adapters = 0 if arm == "base" else T
        nbytes, flops = work(linears, T, adapters, rank, itemsize)
        if alone and adapters:  # the adapters' products alone
            base = work(linears, 0, 0, rank, itemsize)
            nbytes, flops = nbytes - base[0], flops - 2 * T * sum(i * o for i, o in linears)
        least, seconds = machine.seconds(nbytes, flops), times[arm].seconds / copies
        ratio = times[arm].ratio
        row = {"section": "ops", "layers": name, "arm": arm, "rows": T, "distinct": T, "rank": rank}
        row |= {
            "us": round(1e6 * seconds, 3),
            "of_base": ratio.value,
            "of_base_lo": ratio.lo,
            "of_base_hi": ratio.hi,
        }
        row |= {
            "bytes": nbytes,
            "flops": flops,
            "least_us": round(1e6 * least, 3),
            "of_least": seconds / least,
        }
        row["recorded"] = arm not in refused and device.type == "cuda"
        if op in off:
            row["off"] = off[op]
        found.append(row)
    timed = [row for row in found if row["section"] == "ops"]
    served = [row for row in timed if row["arm"].startswith("with ")]
    if served:
        best = min(served, key=lambda row: row["us"])
        _say(
            f"{name}, rank {rank}, {T:>2} rows: base {timed[0]['us']:,.0f} us, {best['arm']} {best['us']:,.0f} us "
            f"({best['of_base']:.2f} x; at least {best['least_us']:,.0f} us)"
        )
    return found


def recorded(call: Callable[[], object], device) -> Callable[[], object]:
    """On CUDA the call as a graph; elsewhere itself."""
    from labs_lib.serving.graphs import Recorder

    recorder = Recorder(device)
    if device.type != "cuda":
        return call

    def step() -> tuple:
        call()
        return ()

    recorder.run(0, step)
    return lambda: recorder.run(0, step)


# -- the pieces of SGMV ---------------------------------------------------------------------------------------------

TILES = (32, 1, 64, 8)
TUNED_RANKS = (16, 64)


def tune(plan: Plan) -> list[dict]:
    """The fastest pieces for each shape that matters, in the record's form; as many shapes as time allows."""
    import torch

    from labs_lib.serving import tuning

    end, rows = time.monotonic() + 60 * plan.minutes, []
    linears = dict.fromkeys(linears_of(plan.model))
    for T, rank, layer in product(TILES, TUNED_RANKS, linears):
        for shape, call, copies in _halves(plan, T, rank, layer):
            if any(shape == tuning.Shape(*(row[key] for key in shape._fields)) for row in rows):
                continue
            if time.monotonic() > end:
                return rows
            rows.append(_fastest(shape, call, torch.device(plan.device), copies))
            _say(
                f"{shape.half}, {T} tiles, rank {rank}, {shape.size}: {rows[-1]['us']} us, "
                f"{rows[-1]['default_us']} by default"
            )
    return rows


def _halves(plan: Plan, T: int, rank: int, layer: tuple[int, int]) -> Iterator[tuple]:
    """The two kernels on a layer: shape, the call given pieces, and how many layers one call goes through."""
    import torch

    from labs_lib.serving import tuning
    from labs_lib.serving.batch import TILE
    from labs_lib.serving.opbench import Case
    from labs_lib.serving.sgmv import expand, shrink

    dtype, (inputs, outputs) = getattr(torch, plan.dtype), layer
    copies = copies_of([layer], dtype.itemsize)
    case = Case(T, T, rank, [layer] * copies, slots=T, device=plan.device, dtype=dtype)
    x, out, index = case.x[inputs], case.out[outputs], case.index
    same = TILE, max(TILE, rank), dtype.itemsize, T
    with torch.inference_mode():
        halves = [shrink(x, a, index) for a, _ in case.parts]

    def first(how) -> None:
        for a, _ in case.parts:
            shrink(x, a, index, how)

    def second(how) -> None:
        for h, (_, b) in zip(halves, case.parts, strict=True):
            expand(h, b, index, out, how)

    yield tuning.Shape("shrink", *same, inputs), first, copies
    yield tuning.Shape("expand", *same, outputs), second, copies


def _fastest(shape, call: Callable, device, copies: int) -> dict:
    """Every candidate timed in turns with the default; the one with the lowest ratio to it."""
    import torch

    from labs_lib.measure.timing import time_ratios
    from labs_lib.serving import tuning

    arms = {}
    with torch.inference_mode():
        for how in tuning.candidates(shape):
            try:
                arms[how] = recorded(lambda how=how: call(how), device)
            except Exception as error:  # too much shared memory for this card, say: not a candidate here
                if not arms:
                    raise
                _say(f"{how} does not run here: {type(error).__name__}")
        first = next(iter(arms))
        times = time_ratios(arms, first, rounds=5, min_seconds=0.001)
    best = min(times, key=lambda how: times[how].ratio.value)
    return {
        **shape._asdict(),
        **best._asdict(),
        "us": round(1e6 * times[best].seconds / copies, 3),
        "default_us": round(1e6 * times[first].seconds / copies, 3),
        "of_default": times[best].ratio.value,
    }


# -- the command ----------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    plan = Plan()
    parser.add_argument(
        "--model", default=plan.model, help="a twin, or HIDDENxINTERMEDIATE (default: %(default)s)"
    )
    parser.add_argument(
        "--rows", type=numbers, default=plan.rows, help="of the batch (default: 1,2,4,...,64)"
    )
    parser.add_argument(
        "--ranks", type=numbers, default=plan.ranks, help="of the adapters (default: 16,8,64)"
    )
    parser.add_argument("--ops", default=",".join(plan.ops), help="with commas (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=plan.rounds, help="of all arms (default: %(default)s)")
    parser.add_argument("--device", default=plan.device, help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--threads", type=int, default=plan.threads, help="of torch (default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=plan.minutes,
        help="what is not reached is said (default: %(default)g)",
    )
    parser.add_argument(
        "--tune", action="store_true", help="measure SGMV's pieces first, and record the best ones"
    )
    parser.add_argument("--quick", action="store_true", help="small layers: a look, nothing to publish")


def main(args: argparse.Namespace) -> int:
    import torch

    from labs_lib.measure.records import Record, save_record
    from labs_lib.serving import tuning
    from labs_lib.serving.kernels_report import figure, tables
    from labs_lib.serving.ops import OPS

    ops = tuple(args.ops.split(","))
    if unknown := set(ops) - {*OPS, "peft"}:
        raise LabsError(f"There is no op {min(unknown)!r}; there are: peft, {', '.join(OPS)}.")
    if min(args.rounds, args.threads) < 1 or args.minutes <= 0:
        raise LabsError("--rounds and --threads must be at least 1, --minutes above 0.")
    on_gpu = torch.device(args.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise LabsError(
            "There is no CUDA device here: `labs doctor` tells what there is. Leave out --device."
        )
    plan = Plan(
        args.model, args.rows, args.ranks, ops, args.rounds, args.device,
        args.dtype or ("bfloat16" if on_gpu else "float32"), args.threads, args.minutes, args.tune,
    )  # fmt: skip
    if args.quick:
        quick = {"model": "256x688", "rows": (1, 8, 32), "ranks": (16,), "rounds": 5}
        plan = Plan(**{**vars(plan), **quick})
    torch.set_num_threads(plan.threads)
    if plan.tune:
        if not on_gpu:
            raise LabsError("--tune measures the Triton kernels, which need a GPU: add --device cuda.")
        rows = tune(plan)
        path = save_record(
            Record(tuning.RECORD, rows, note="fastest pieces of SGMV by shape"), device=plan.device
        )
        tuning.forget()
        print(f"  recorded in {path}")
    rows = run(plan)
    print(tables(rows))
    settings = {key: value for key, value in vars(plan).items() if key != "tune"}
    record = Record(
        "bench_kernels",
        rows,
        note="every op held against float64 before it was timed" + (", quick" if args.quick else ""),
        provenance={"settings": settings},
    )
    path = save_record(record, device=plan.device)
    print(f"\nrecorded in {path}")
    if drawn := figure(rows, path.with_suffix(".png")):
        print(f"drawn in {drawn}")
    return 0
