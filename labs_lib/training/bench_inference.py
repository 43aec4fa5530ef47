"""`labs bench inference`: what a method's adapter adds to a token of greedy decoding, merged and not, and to a prefill.

All arms share one base in memory and take turns round by round; ratios are taken within a round. On a GPU every arm's
step is also replayed as a CUDA graph, which leaves out the time that Python and the launches take. Merging changes the
shared weights in place: a step takes the same time whatever numbers are in them.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from labs_lib import quiet
from labs_lib.errors import LabsError
from labs_lib.training import bench

if TYPE_CHECKING:
    import torch
    from torch import nn

BASE = "base"
MOST = 15  # rounds
WHAT = ("decode", "prefill", "graph")


@dataclass(frozen=True)
class Plan:
    """What is measured: `tokens` greedy tokens after a prompt, at each batch size, for some `seconds` each."""

    model: str = "small"
    device: str = "cpu"
    dtype: str = "float32"
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 128
    tokens: int = 4
    seconds: float = 40.0
    least: int = 5
    arms: tuple[str, ...] = ()
    graphs: bool = True
    seed: int = 0


@dataclass
class Decoder:
    """A model that answers: `whole` reads the prompt, `inner` each token after it (virtual tokens are read once)."""

    whole: "nn.Module"
    inner: "nn.Module"
    stack: ExitStack = field(default_factory=ExitStack, repr=False)

    def prefill(self, ids: "torch.Tensor"):
        """The first token and the filled cache."""
        out = self.whole(input_ids=ids, use_cache=True)
        return out.logits[:, -1:].argmax(-1), out.past_key_values

    def decode(self, token: "torch.Tensor", cache, tokens: int) -> "torch.Tensor":
        """The token after so many more; the cache grows by as many."""
        for _ in range(tokens):
            token = (
                self.inner(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            )
        return token


def methods(config, half: bool) -> dict[str, Callable]:
    """How each arm is made: from the bases to a model, and what is done to it before it answers."""
    from labs_lib.methods.dora import kept_gains
    from labs_lib.methods.ia3 import merge_ia3
    from labs_lib.methods.lora import merge_lora
    from labs_lib.training.bench_arms import adapted, arms_for, share

    known = {arm.name: arm for arm in arms_for(config, half)}

    def of(name: str, then: Callable = lambda model, stack: model) -> Callable:
        def make(bases: bench.Bases, stack: ExitStack):
            arm = known[name]
            return then(adapted(arm, bases.get(arm.packed)).eval(), stack)

        return make

    def kept(model, stack: ExitStack):
        stack.enter_context(kept_gains(model))
        return model

    return {
        BASE: lambda bases, stack: share(bases.get()).eval(),
        "LoRA": of("LoRA r16"),
        "LoRA, PEFT": of("LoRA r16, PEFT"),
        "DoRA": of("DoRA r16"),
        "DoRA, norms kept": of("DoRA r16", kept),
        "DoRA, PEFT": of("DoRA r16, PEFT"),
        "IA3": of("IA3"),
        "adapters": of("adapters, 1/16 of the width"),
        "LLaMA-Adapter 10": of("LLaMA-Adapter 10"),
        "prefix 30": of("prefix 30"),
        "prompt 10": of("prompt 10"),
        "prompt 200": of("prompt 200"),
        "LoRA, merged": of("LoRA r16", lambda model, stack: merge_lora(model)),
        "DoRA, merged": of("DoRA r16", lambda model, stack: merge_lora(model)),
        "IA3, merged": of("IA3", lambda model, stack: merge_ia3(model)),
        "4-bit base": lambda bases, stack: share(bases.get(packed=True)).eval(),
        "QLoRA": of("QLoRA r16"),
    }


class Arms:
    """The arms of a plan over one base, each made when first asked for; or the row that says why it cannot be."""

    def __init__(self, plan: Plan) -> None:
        config = bench.config_of(plan.model)
        self.makers = methods(config, plan.dtype in ("bfloat16", "float16"))
        if unknown := [name for name in plan.arms if name not in self.makers]:
            raise LabsError(f"There is no arm {unknown[0]!r}; there are: {'; '.join(self.makers)}.")
        self.plan, self.stack = plan, ExitStack()
        self.bases = bench.Bases(plan)
        self.made: dict[str, Decoder] = {}
        self.obstacles: dict[str, dict] = {}

    def ready(self) -> dict[str, Decoder]:
        """All arms that could be made, the base first."""
        for name in dict.fromkeys((BASE, *(self.plan.arms or self.makers))):
            if name in self.made or name in self.obstacles:
                continue
            with self.within(name):
                whole = self.makers[name](self.bases, self.stack)
                wrapped = type(whole).__name__ in ("PrefixTuning", "PromptTuning")
                self.made[name] = Decoder(whole, whole.base if wrapped else whole)
        if BASE not in self.made:
            raise LabsError(f"The base itself is not there: {bench.obstacle(self.obstacles[BASE])}.")
        return self.made

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """What goes wrong inside is this arm's row; the others go on."""
        try:
            yield
            return
        except ImportError as error:
            found = {"missing": error.name or str(error)}
        except Exception as error:  # one arm's bug is that arm's row
            found = bench.no_room(error, self.plan.device) or {"failed": bench.in_words(error)}
        self.obstacles[name] = found
        self.made.pop(name, None)
        bench.clean(self.plan.device)


def prompt(plan: Plan, arms: Arms, batch: int) -> "torch.Tensor":
    """Random tokens (batch, prompt), alike for every arm."""
    import torch

    vocabulary = arms.bases.get().get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(plan.seed)
    return torch.randint(3, vocabulary, (batch, plan.prompt), generator=generator).to(plan.device)


def decoding(plan: Plan, arms: Arms, batch: int) -> dict[str, tuple[Callable, int]]:
    """By arm: what decodes `plan.tokens` from the same place every time, and the FLOPs of one token."""
    from labs_lib.measure.count import count_flops

    ids, steps = prompt(plan, arms, batch), {}
    for name, decoder in list(arms.ready().items()):
        with arms.within(name):
            token, cache = decoder.prefill(ids)

            def step(decoder=decoder, token=token, cache=cache) -> None:
                decoder.decode(token, cache, plan.tokens)
                cache.crop(-plan.tokens)  # back to the prompt

            flops = count_flops(decoder.decode, token, cache, 1)
            cache.crop(-1)
            steps[name] = step, flops
    return steps


def prefilling(plan: Plan, arms: Arms, batch: int) -> dict[str, tuple[Callable, int]]:
    """By arm: what reads the prompt, and its FLOPs."""
    from labs_lib.measure.count import count_flops

    ids, steps = prompt(plan, arms, batch), {}
    for name, decoder in list(arms.ready().items()):
        with arms.within(name):
            steps[name] = (lambda decoder=decoder: decoder.prefill(ids)), count_flops(decoder.prefill, ids)
    return steps


def replaying(plan: Plan, arms: Arms, batch: int) -> dict[str, tuple[Callable, int]]:
    """By arm: one token's step captured as a CUDA graph, to be replayed; the numbers it reads stay the same."""
    ids, steps = prompt(plan, arms, batch), {}
    for name, decoder in list(arms.ready().items()):
        try:
            steps[name] = captured(decoder, ids), 0
        except RuntimeError as error:  # something in this arm's step cannot be captured: it has no such row
            arms.obstacles[f"{name}, graph {batch}"] = {"failed": bench.in_words(error)}
            bench.clean(plan.device)
    return steps


def captured(decoder: Decoder, ids: "torch.Tensor") -> Callable[[], None]:
    """A CUDA graph of the step after the prompt, and all that must stay alive for it."""
    import torch

    token, cache = decoder.prefill(ids)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries make their workspaces before the capture, not within it
        for _ in range(3):
            decoder.decode(token, cache, 1)
            cache.crop(-1)
    torch.cuda.current_stream().wait_stream(side)
    alive = [token, copy.copy(list(cache))]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        alive.append(decoder.decode(token, cache, 1))
    alive.append(cache)

    def replay(alive=alive) -> None:
        graph.replay()

    return replay


MEASURES: dict[str, Callable] = {"decode": decoding, "prefill": prefilling, "graph": replaying}


def measure(plan: Plan, arms: Arms, what: str, batch: int) -> list[dict]:
    """Rows of all arms at one batch size: milliseconds per token (or of the whole prefill) and ratios to base."""
    import numpy as np
    import torch

    from labs_lib.measure.stats import bootstrap_ci
    from labs_lib.measure.timing import time_ratios

    per = plan.tokens if what == "decode" else 1
    shared = {"what": what, "batch": batch, "model": plan.model, "prompt": plan.prompt}
    with torch.no_grad():
        steps = MEASURES[what](plan, arms, batch)
        if BASE not in steps:
            return []
        for name, (step, _) in list(steps.items()):
            with arms.within(name):
                step()
            if name in arms.obstacles:
                del steps[name]
        once = sum(bench.seconds_of(step, plan.device) for step, _ in steps.values())
        rounds = max(plan.least, min(MOST, int(plan.seconds / max(once, 1e-9))))
        calls = {name: step for name, (step, _) in steps.items()}
        found = time_ratios(calls, BASE, rounds=rounds, warmup=1, min_seconds=0.0)
    rows = []
    for name, each in found.items():
        ms = bootstrap_ci(1e3 / per * np.array(each.samples), np.median)
        row = {"arm": name} | shared | {"ms": ms.value, "ms_lo": ms.lo, "ms_hi": ms.hi, "rounds": rounds}
        row |= {"ratio": each.ratio.value, "ratio_lo": each.ratio.lo, "ratio_hi": each.ratio.hi}
        rows.append(row | ({"flops": steps[name][1]} if what != "graph" else {}))
    return rows


def run(plan: Plan, log: Path, minutes: float = math.inf) -> tuple[list[dict], bool]:
    """The rows of all batch sizes, decode first; and whether that is all of them. The log keeps what is done."""
    import json

    from labs_lib.training.resume import find, run_points

    whats = WHAT if plan.graphs and plan.device.startswith("cuda") else WHAT[:2]
    points = [{"what": what, "batch": batch} for what in whats for batch in plan.batches]
    arms, until = Arms(plan), time.monotonic() + 60 * minutes

    def one(point: dict) -> dict:
        left = (until - time.monotonic()) / (len(points) - points.index(point))
        rows = measure(replace(plan, seconds=min(plan.seconds, 0.7 * left)), arms, **point)
        bench.clean(plan.device)
        return point | {"rows": rows, "obstacles": arms.obstacles}

    with arms.stack:
        done = run_points(log, lambda rows: points, one, "inference", until=until)
    complete = done is not None
    if not complete:
        kept = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        done = [row for point in points if (row := find(kept, point))]
    rows = [row for each in done for row in each["rows"]]
    obstacles = {name: found for each in done for name, found in each["obstacles"].items()}
    rows += [{"arm": name, "what": "none", "model": plan.model} | found for name, found in obstacles.items()]
    return rows, complete


def table(rows: list[dict]) -> str:
    """Rows as lines to read: one per arm and what was measured."""
    lines = []
    for what, title in {
        "decode": "ms per token",
        "prefill": "ms of a prefill",
        "graph": "ms per token, CUDA graph",
    }.items():
        for batch in dict.fromkeys(row["batch"] for row in rows if row["what"] == what):
            lines.append(f"{title}, batch {batch}")
            for row in rows:
                if (row["what"], row.get("batch")) == (what, batch):
                    ratio = f"{row['ratio']:.2f} [{row['ratio_lo']:.2f}, {row['ratio_hi']:.2f}] x base"
                    lines.append(f"  {row['arm']:20} {row['ms']:9.3f}  {ratio}")
    return "\n".join(
        lines + [f"  {row['arm']}: {bench.obstacle(row)}" for row in rows if row["what"] == "none"]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    plan = Plan()
    parser.add_argument(
        "--model", help="small, llama-2-7b, random:HIDDENxLAYERS, ... (default: 7B on a GPU, else small)"
    )
    bench.add_device(parser)
    parser.add_argument(
        "--batch", default="1,8", help="rows that decode together, with commas (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt", type=int, default=plan.prompt, help="tokens read first (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=plan.tokens, help="per turn (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=plan.seconds, help="for each table (default: %(default)s)"
    )
    parser.add_argument("--arms", default="", help="names, with semicolons (default: all)")
    parser.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="for all: shorter tables, the last begun before that; the same call resumes",
    )
    parser.add_argument("--quick", action="store_true", help="three turns: a look, nothing to publish")


def main(args: argparse.Namespace) -> int:
    device, dtype = bench.device_and_dtype(args)
    try:
        batches = tuple(int(word) for word in args.batch.split(","))
    except ValueError:
        raise LabsError(f"--batch {args.batch}: write numbers with commas, as in 1,8.") from None
    if min(*batches, args.prompt, args.tokens, args.minutes) <= 0:
        raise LabsError("Batch sizes, prompt, tokens and minutes are above 0.")
    quiet.silence()
    plan = Plan(
        model=args.model or ("llama-2-7b" if device.startswith("cuda") else "small"),
        device=device,
        dtype=dtype,
        batches=batches,
        prompt=args.prompt,
        tokens=args.tokens,
        seconds=0.0 if args.quick else args.seconds,
        least=3 if args.quick else Plan.least,
        arms=tuple(name.strip() for name in args.arms.split(";") if name.strip()),
        graphs=not args.no_graphs,
    )
    log, before = bench.log_of("inference", plan), bench.load_average()
    rows, complete = run(plan, log, args.minutes)
    print(table(rows))
    if not rows:
        raise LabsError("Nothing was measured in that time: give it more --minutes.")
    note = "all arms in turns over one base of random numbers or the shipped one"
    note += ("" if complete else "; stopped early") + (", quick" if args.quick else "")
    bench.save("bench_inference", rows, plan, note, before)
    if complete:
        log.unlink()
    return 1 if any("failed" in row for row in rows) else 0
