"""Workloads: who asks when, for which adapter, with how long a prompt and answer; and adapters to ask for.

A trace is JSON lines: a first line about the whole, then one line per request, in order of arrival. Arrivals, lengths
and adapters are drawn from streams of their own, so that two traces of one seed that differ in how many adapters
there are, or how popular, have the same arrivals and lengths. Answers are greedy and always of full length.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from labs_lib.errors import LabsError
from labs_lib.serving.types import Request

Lengths = int | tuple[int, int]  # tokens: always as many, or uniformly from..to, both included
FIRST_TOKEN = 3  # ids below it are padding, start and end in the course's tokenizer


@dataclass(frozen=True)
class Arrival:
    """One request. `adapter` is its number in the trace (the most popular is 0), None the base model's."""

    at: float  # seconds from the start
    tenant: str
    adapter: int | None
    prompt: int | tuple[int, ...]  # tokens, or only how many
    output: int  # tokens

    @property
    def prompt_tokens(self) -> int:
        return self.prompt if isinstance(self.prompt, int) else len(self.prompt)


@dataclass(frozen=True)
class Trace:
    """A workload. `settings` says how it was drawn, `adapters` how many there are to be registered."""

    kind: str
    seed: int
    adapters: int
    arrivals: tuple[Arrival, ...]
    settings: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.arrivals)

    def __iter__(self) -> Iterator[Arrival]:
        return iter(self.arrivals)

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        head = {
            "kind": self.kind,
            "seed": self.seed,
            "adapters": self.adapters,
            "greedy": True,
            "ignore_eos": True,
            "settings": self.settings,
        }
        lines = [head, *(asdict(arrival) for arrival in self.arrivals)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Raises LabsError if the file is no trace."""
        try:
            head, *lines = [
                json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line
            ]
            arrivals = [
                Arrival(**(line | {"prompt": p if isinstance(p := line["prompt"], int) else tuple(p)}))
                for line in lines
            ]
            return cls(
                head["kind"], head["seed"], head["adapters"], tuple(arrivals), head.get("settings", {})
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise LabsError(
                f"{path} is not a trace that Trace.save wrote ({error}): make it again."
            ) from error

    def summary(self) -> dict:
        """Numbers that describe it. `effective` adapters: exp of the entropy of their shares, N if all are alike."""
        named = Counter(arrival.adapter for arrival in self.arrivals if arrival.adapter is not None)
        counts = np.array(sorted(named.values(), reverse=True), dtype=float)
        shares = counts / counts.sum() if len(counts) else counts
        seconds = max((arrival.at for arrival in self.arrivals), default=0.0)
        return {
            "kind": self.kind,
            "requests": len(self),
            "adapters": self.adapters,
            "distinct": len(named),
            "effective": round(math.exp(-(shares * np.log(shares)).sum()), 1) if len(shares) else 0.0,
            "top_share": round(float(shares[0]), 4) if len(shares) else 0.0,
            "seconds": round(seconds, 3),
            "rate": round(len(self) / seconds, 3) if seconds else None,
            "prompt_tokens": sum(arrival.prompt_tokens for arrival in self.arrivals),
            "output_tokens": sum(arrival.output for arrival in self.arrivals),
        }

    def requests(self, adapters: Sequence[str], vocabulary: int) -> list[Request]:
        """What the engine gets: adapter k of the trace is `adapters[k]`; prompts given by length are drawn by seed."""
        needed = max((a.adapter + 1 for a in self.arrivals if a.adapter is not None), default=0)
        if needed > len(adapters):
            raise LabsError(f"The trace names {needed} adapters, only {len(adapters)} are there.")
        requests = []
        for i, arrival in enumerate(self.arrivals):
            prompt = arrival.prompt
            if isinstance(prompt, int):
                rng = np.random.default_rng((self.seed, i))
                prompt = rng.integers(FIRST_TOKEN, vocabulary, prompt).tolist()
            adapter = None if arrival.adapter is None else adapters[arrival.adapter]
            requests.append(
                Request(list(prompt), arrival.tenant, adapter, max_tokens=arrival.output, ignore_eos=True)
            )
        return requests

    def base_only(self) -> "Trace":
        """The same requests, all for the base model."""
        return replace(self, arrivals=tuple(replace(arrival, adapter=None) for arrival in self.arrivals))


# -- how popular each adapter is -----------------------------------------------------------------------------------


def uniform(adapters: int) -> np.ndarray:
    """Every adapter alike."""
    return np.full(adapters, 1 / adapters)


def zipf(adapters: int, exponent: float = 1.0) -> np.ndarray:
    """Adapter k of 1..N is asked for in proportion to k ** -exponent: 0 is uniform, larger is more skewed.

    With exponent 1 the first of 50 gets 22 % of the requests, the first of 1,000 gets 13 %. This is Zipf's law over N
    adapters; `numpy.random.zipf` has no N and needs an exponent above 1.
    """
    weights = np.arange(1, adapters + 1, dtype=float) ** -exponent
    return weights / weights.sum()


def power(adapters: int, alpha: float) -> np.ndarray:
    """What drawing `int(N * numpy.random.power(alpha))` gives: ((k + 1) / N) ** alpha - (k / N) ** alpha.

    S-LoRA's published traces are drawn this way and called "power law with alpha". Mind the direction: alpha = 1 is
    *uniform*, small alpha is skewed to the first adapters, alpha above 1 to the last.
    """
    edges = (np.arange(adapters + 1) / adapters) ** alpha
    return np.diff(edges)


# -- when requests come --------------------------------------------------------------------------------------------


def closed(count: int, popularity: np.ndarray, **more) -> Trace:
    """All at once: how fast is a batch job done? See `_trace` for the rest of the settings."""
    return _trace("closed", np.zeros(count), popularity, {}, **more)


def poisson(rate: float, count: int, popularity: np.ndarray, *, seed: int = 0, **more) -> Trace:
    """Open loop: on average `rate` requests a second come, whether or not the earlier ones are done."""
    gaps = _stream(seed, "arrivals").exponential(1 / rate, count)
    return _trace("poisson", np.cumsum(gaps), popularity, {"rate": rate}, seed=seed, **more)


def noisy(
    rate: float,
    seconds: float,
    popularity: np.ndarray,
    *,
    burst: float,
    start: float,
    length: float,
    tenant: int = 0,
    seed: int = 0,
    **more,
) -> Trace:
    """Poisson traffic of all, and for `length` seconds from `start` one tenant's own `burst` requests a second more."""
    rng = _stream(seed, "arrivals")
    calm = _poisson(rng, lambda at: rate, rate, seconds)
    loud = start + _poisson(rng, lambda at: burst, burst, length)
    order = np.argsort(np.concatenate([calm, loud]), kind="stable")
    at = np.concatenate([calm, loud])[order]
    forced = np.concatenate([np.full(len(calm), -1), np.full(len(loud), tenant)])[order]
    settings = {"rate": rate, "burst": burst, "start": start, "length": length, "tenant": tenant}
    return _trace("noisy", at, popularity, settings, seed=seed, forced=forced, **more)


def day(
    rate: float, seconds: float, popularity: np.ndarray, *, depth: float = 0.8, seed: int = 0, **more
) -> Trace:
    """A day squeezed into `seconds`: on average `rate` a second, quietest at 4 h, busiest at 16 h.

    The rate is rate * (1 + depth * sin), so depth 0.8 makes the peak nine times the trough.
    """
    if not 0 <= depth <= 1:
        raise LabsError(f"depth is {depth}: from 0 (flat) to 1 (silent at night).")

    def rate_at(at: float) -> float:
        return rate * (1 + depth * math.sin(2 * math.pi * (at / seconds - 10 / 24)))

    at = _poisson(_stream(seed, "arrivals"), rate_at, rate * (1 + depth), seconds)
    return _trace("day", at, popularity, {"rate": rate, "depth": depth}, seed=seed, **more)


def _poisson(
    rng: np.random.Generator, rate_at: Callable[[float], float], most: float, seconds: float
) -> np.ndarray:
    """Arrivals of a Poisson process with a changing rate, by thinning one of rate `most` (Lewis, Shedler 1979)."""
    if min(most, seconds) <= 0:
        raise LabsError("Rates and durations of a trace must be above 0.")
    at, found = 0.0, []
    while True:
        at += rng.exponential(1 / most)
        if at >= seconds:
            return np.array(found)
        if rng.random() * most < rate_at(at):
            found.append(at)


def _trace(
    kind: str,
    at: np.ndarray,
    popularity: np.ndarray,
    settings: dict,
    *,
    prompt: Lengths = (16, 48),
    output: Lengths = (8, 32),
    base_share: float = 0.0,
    seed: int = 0,
    forced: np.ndarray | None = None,
) -> Trace:
    """Put lengths and adapters to the arrival times `at`.

    Args:
        popularity: of each adapter, summing to 1; adapter k belongs to tenant k.
        prompt, output: tokens, fixed or (from, to).
        base_share: of the requests that ask for the base model.
        forced: an adapter for each request that is not drawn, -1 where it is.
    """
    lengths, who = _stream(seed, "lengths"), _stream(seed, "adapters")
    prompts, outputs = _lengths(lengths, prompt, len(at)), _lengths(lengths, output, len(at))
    # One uniform number per request, looked up in the cumulated shares: another popularity moves each a little.
    adapters = np.searchsorted(np.cumsum(popularity), who.random(len(at)), side="right")
    adapters = np.minimum(adapters, len(popularity) - 1)
    base = who.random(len(at)) < base_share
    if forced is not None:
        adapters, base = np.where(forced < 0, adapters, forced), base & (forced < 0)
    arrivals = [
        Arrival(
            float(when),
            "base" if is_base else f"tenant-{adapter}",
            None if is_base else int(adapter),
            int(long),
            int(out),
        )
        for when, adapter, is_base, long, out in zip(at, adapters, base, prompts, outputs, strict=True)
    ]
    settings = settings | {"prompt": prompt, "output": output, "base_share": base_share}
    return Trace(kind, seed, len(popularity), tuple(arrivals), settings)


def _lengths(rng: np.random.Generator, lengths: Lengths, count: int) -> np.ndarray:
    low, high = (lengths, lengths) if isinstance(lengths, int) else lengths
    if not 1 <= low <= high:
        raise LabsError(f"A length from {low} to {high} tokens makes no sense: at least 1.")
    return rng.integers(low, high + 1, count)


def _stream(seed: int, what: str) -> np.random.Generator:
    return np.random.default_rng((seed, ("arrivals", "lengths", "adapters", "prompts").index(what)))


def world_prompts(trace: Trace, tokenizer) -> Trace:
    """The same trace with real prompts: held-out products of the shipped world, as the style task asks for them."""
    from labs_lib.world.tasks import load_task
    from labs_lib.world.tenants import load_tenants

    slugs = [tenant.slug for tenant in load_tenants()]
    rng = _stream(trace.seed, "prompts")
    texts: dict[int, list[str]] = {}
    arrivals = []
    for arrival in trace:
        tenant = (arrival.adapter or 0) % len(slugs)
        if tenant not in texts:
            texts[tenant] = list(load_task("style", tenant=slugs[tenant])["test"]["prompt"])
        text = texts[tenant][rng.integers(len(texts[tenant]))]
        arrivals.append(replace(arrival, prompt=tuple(tokenizer(text)["input_ids"])))
    return replace(trace, arrivals=tuple(arrivals))


# -- adapters ------------------------------------------------------------------------------------------------------


def random_adapters(
    model,
    count: int,
    folder: str | Path,
    *,
    rank: int = 8,
    targets: str | Sequence[str] = "all-linear",
    strength: float = 0.5,
    seed: int = 0,
) -> dict[str, Path]:
    """Write `count` PEFT adapter folders with random weights, B not zero; returns sha256: folder, in order.

    Good for timing and for telling adapters apart, not for quality. `strength` is the size of scale * B A against
    the base weight's, as standard deviations: at 0.5 the answers of any two adapters soon differ.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from labs_lib.serving.adapter import CONFIG, WEIGHTS, digest_of
    from labs_lib.serving.layout import Layout

    wanted = None if targets == "all-linear" else set(targets)
    layers = [
        spec for spec in Layout.of(model).linears if wanted is None or spec.name.rpartition(".")[2] in wanted
    ]
    if not layers:
        raise LabsError(f"The model has no linear layer named {targets!r}.")
    sizes = {spec.name: float(model.get_submodule(spec.name).weight.detach().std()) for spec in layers}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted({spec.name.rpartition(".")[2] for spec in layers}),
        inference_mode=True,
    )
    folder = Path(folder)
    generator = torch.Generator().manual_seed(seed)
    config.save_pretrained(folder / "0000")
    text = (folder / "0000" / CONFIG).read_bytes()
    found: dict[str, Path] = {}
    for number in range(count):
        one = folder / f"{number:04d}"
        one.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for spec in layers:
            A = torch.randn(rank, spec.in_features, generator=generator) / spec.in_features**0.5
            B = torch.randn(spec.out_features, rank, generator=generator)
            # std of scale * B A is 2 * sqrt(rank) * std(A) * std(B)
            B *= strength * sizes[spec.name] * spec.in_features**0.5 / (2 * rank**0.5)
            tensors[f"base_model.model.{spec.name}.lora_A.weight"] = A
            tensors[f"base_model.model.{spec.name}.lora_B.weight"] = B
        (one / CONFIG).write_bytes(text)
        save_file(tensors, one / WEIGHTS, metadata={"format": "pt"})
        found[digest_of(one)] = one
    return found
