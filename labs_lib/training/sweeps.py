"""The recorded sweeps of the course: which arms, tasks, learning rates and seeds. `sweep` runs them."""

from dataclasses import asdict, dataclass, field, replace

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TENANT = "fathom-eleven"  # all 16 rules differ from the default style


@dataclass(frozen=True)
class Arm:
    """One configuration that gets its own learning rate.

    Attributes:
        method: a name in `adapt.METHODS`.
        rates: instead of the sweep's learning rates.
        options: anything else that the method takes.
        quantise: of the frozen base, as `load_base` takes it.
        curve: keep the loss of every step.
    """

    name: str
    method: str = "lora"
    rank: int = 8
    alpha: float = 16
    targets: str | tuple[str, ...] = "all-linear"
    rates: tuple[float, ...] = ()
    options: dict = field(default_factory=dict)
    quantise: str | None = None
    curve: bool = False

    def to_dict(self) -> dict:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def __post_init__(self):
        for name in ("targets", "rates"):  # JSON gives lists back
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class Task:
    """What is trained on and for how long."""

    label: str
    task: str
    steps: int
    batch: int
    facts: int | None = None
    tenant: str | None = None

    def settings(self) -> dict:
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Sweep:
    name: str
    note: str
    arms: tuple[Arm, ...]
    tasks: tuple[Task, ...]
    rates: tuple[float, ...]
    seeds: int
    size: str = "small"

    def to_dict(self) -> dict:
        return asdict(self)


def _lora(rank: int, targets: str | tuple[str, ...] = "all-linear", label: str = "all") -> Arm:
    return Arm(f"LoRA r{rank}, {label}", rank=rank, alpha=2 * rank, targets=targets)


_RATES = (1e-3, 3e-3, 5e-3, 1e-2, 2e-2)
_UNTUNED = (2e-4,)  # the rate that most LoRA and DoRA recipes for 7B models print
# Of 20,000 parameters, q and v buy rank 9, attention 4, the MLP 3, all linear layers 2.
_QV_R9 = Arm("LoRA r9, q and v", rank=9, alpha=18, targets=("q_proj", "v_proj"))
_QV_R8 = Arm("LoRA r8, q and v", rank=8, alpha=16, targets=("q_proj", "v_proj"))
_R2, _R8, _R64 = (Arm(f"LoRA r{r}, all linear", rank=r, alpha=2 * r) for r in (2, 8, 64))
_FULL = Arm("full fine-tuning", method="full", rates=(3e-4, 1e-3))
_FACTS_256 = Task("knowledge, 256 facts", "knowledge", steps=150, batch=32, facts=256)
# Rates for A around 5e-3 / sqrt(ratio), so that the product of both rates is centred alike for every ratio.
_PLUS_RATES = {
    1: (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2),
    2: (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2),
    4: (6.25e-4, 1.25e-3, 2.5e-3, 5e-3, 1e-2),
    8: (6.25e-4, 1.25e-3, 2.5e-3, 5e-3, 1e-2),
    16: (3.125e-4, 6.25e-4, 1.25e-3, 2.5e-3, 5e-3),
    32: (3.125e-4, 6.25e-4, 1.25e-3, 2.5e-3, 5e-3),
}


def _plus(ratio: int, rates: tuple[float, ...]) -> Arm:
    return Arm(f"ratio {ratio}", method="lora_plus", rates=rates, options={"ratio": ratio}, curve=True)


_SCALING_RATES = {  # each scaling has its best rates elsewhere; both try five
    "lora": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "rslora": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
}
# One arm per point, so that every point of the grid runs with every seed.
_SCALING_GRID = tuple(
    Arm(f"{method} r{rank} {rate:g}", method=method, rank=rank, alpha=16, rates=(rate,), curve=True)
    for method, rates in _SCALING_RATES.items()
    for rank in (4, 16, 64)
    for rate in rates
)

SWEEPS = {
    sweep.name: sweep
    for sweep in (
        Sweep(
            name="lora_rank",
            note="Recall of 512 new facts (3.1 kbit) against the number of LoRA's parameters; alpha = 2 r.",
            arms=(
                _lora(1, ("q_proj",), "q"),
                _lora(1, ("q_proj", "v_proj"), "q, v"),
                _lora(1),
                _lora(4),
                _lora(16),
                _FULL,
            ),
            tasks=(Task("knowledge, 512 facts", "knowledge", steps=300, batch=64, facts=512),),
            rates=(2e-3, 5e-3, 1e-2),
            seeds=3,
        ),
        Sweep(
            name="tune_lora",
            note="Closed-book facts: targets at equal parameters and at equal rank, rank, alpha, and other methods.",
            arms=(
                _QV_R9,
                _QV_R8,
                Arm("LoRA r4, attention", rank=4, alpha=8, targets=ATTENTION),
                Arm("LoRA r3, MLP", rank=3, alpha=6, targets=MLP),
                _R2,
                _R8,
                _R64,
                Arm("DoRA r8, all linear", method="dora"),
                Arm("IA3", method="ia3", rates=(1e-2, 3e-2, 1e-1, 3e-1)),
                Arm("LoRA r8, untuned", rates=_UNTUNED),
                Arm("DoRA r8, untuned", method="dora", rates=_UNTUNED),
            ),
            tasks=(Task("knowledge, 512 facts", "knowledge", steps=150, batch=64, facts=512),),
            rates=_RATES,
            seeds=5,
        ),
        Sweep(
            name="tune_lora_style",
            note="One tenant's style without a guide in the prompt: targets, rank, full fine-tuning.",
            arms=(_QV_R9, _R2, _R8, _R64, replace(_FULL, rates=(1e-4, 3e-4, 1e-3))),
            tasks=(Task("style", "style", steps=60, batch=16, tenant=TENANT),),
            rates=_RATES,
            seeds=5,
        ),
        Sweep(
            name="lora_plus_grid",
            note="LoRA+ r8 on 256 facts: the rate of A by the ratio of B's rate to it, one seed, to choose rates by.",
            arms=tuple(_plus(ratio, rates) for ratio, rates in _PLUS_RATES.items()),
            tasks=(_FACTS_256,),
            rates=(),
            seeds=0,
        ),
        Sweep(
            name="rslora",
            note="256 facts: rank by learning rate under both scalings, alpha 16, three seeds at every point.",
            arms=_SCALING_GRID,
            tasks=(replace(_FACTS_256, steps=100),),
            rates=(),
            seeds=2,
        ),
    )
}
