"""The recorded sweeps of the course: which arms, tasks, learning rates and seeds. `sweep` runs them."""

from dataclasses import asdict, dataclass, field, replace
from itertools import product

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TENANT = "fathom-eleven"  # all 16 rules differ from the default style


@dataclass(frozen=True)
class Arm:
    """One configuration that gets its own learning rate.

    Attributes:
        method: a name in `adapt.METHODS`.
        rates: instead of the sweep's learning rates.
        options: anything else that the method takes; and for every method `examples` (train on so many rows, drawn
            by the seed), `watch` (steps after which a style is scored on held-out rows, in the second stage) and
            `fresh` (start from random weights instead of the base's).
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
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()}
        object.__setattr__(self, "options", options)


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
    """Arms by tasks.

    Attributes:
        widen: so many rates more may be tried, one by one, where an arm's best is at its grid's edge.
        refine: where even the best of a grid scores less than this, the rates halfway to its neighbours are tried too.
        gentle: of rates that score the same, above zero, take the lowest, which forgets least; else that of the lowest
            loss.
        more: (arm, task) -> fresh seeds there instead of `seeds`; either name may be "*". Where five could not tell.
    """

    name: str
    note: str
    arms: tuple[Arm, ...]
    tasks: tuple[Task, ...]
    rates: tuple[float, ...]
    seeds: int
    size: str = "small"
    widen: int = 0
    refine: float = 0.0
    gentle: bool = False
    more: dict[tuple[str, str], int] = field(default_factory=dict)

    def fresh_seeds(self, arm: str, task: str) -> range:
        """The seeds of the second stage: 1, 2, ... (the first stage has seed 0)."""
        named = [self.more[key] for key in product((arm, "*"), (task, "*")) if key in self.more]
        return range(1, 1 + (named[0] if named else self.seeds))

    def to_dict(self) -> dict:
        """The definition, by which its log is named: `more` seeds leave what has run valid; what is off is left out."""
        settings = {k: v for k, v in asdict(replace(self, more={})).items() if k != "more"}
        return {k: v for k, v in settings.items() if k not in ("widen", "refine", "gentle") or v}


def _lora(rank: int, targets: str | tuple[str, ...] = "all-linear", label: str = "all") -> Arm:
    return Arm(f"LoRA r{rank}, {label}", rank=rank, alpha=2 * rank, targets=targets)


_RATES = (1e-3, 3e-3, 5e-3, 1e-2, 2e-2)
_MANY = 20  # fresh seeds where the first few could not tell; set once for all, whatever the first ones said
_UNTUNED = (2e-4,)  # the rate that most LoRA and DoRA recipes for 7B models print
# Of 20,000 parameters, q and v buy rank 9, attention 4, the MLP 3, all linear layers 2.
_QV_R9 = Arm("LoRA r9, q and v", rank=9, alpha=18, targets=("q_proj", "v_proj"))
_QV_R8 = Arm("LoRA r8, q and v", rank=8, alpha=16, targets=("q_proj", "v_proj"))
_R2, _R8, _R64 = (Arm(f"LoRA r{r}, all linear", rank=r, alpha=2 * r) for r in (2, 8, 64))
_FULL = Arm("full fine-tuning", method="full", rates=(3e-4, 1e-3))
_QLORA_R8 = Arm("QLoRA r8, all linear", method="qlora", quantise="nf4")
_FACTS_512 = Task("knowledge, 512 facts", "knowledge", steps=150, batch=64, facts=512)
_STYLE = Task("style", "style", steps=60, batch=16, tenant=TENANT)
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


# The rate of A with which each ratio came first to a loss of 1 nat in the grid (ties: the lower final loss).
_PLUS_BEST = {1: 5e-3, 2: 5e-3, 4: 2.5e-3, 8: 1.25e-3, 16: 6.25e-4, 32: 6.25e-4}

_SCALING_RATES = {  # each scaling has its best rates elsewhere; both try five
    "lora": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "rslora": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
}
_SCALING_NEAR = {  # the best of the grid and its neighbours, by rank
    "lora": dict.fromkeys((4, 16, 64), (2e-3, 4e-3, 8e-3, 1.6e-2)),
    "rslora": {4: (2e-3, 4e-3, 8e-3), 16: (1e-3, 2e-3, 4e-3, 8e-3), 64: (1e-3, 2e-3, 4e-3)},
}


def _scaling(method: str, rank: int, rate: float, **more) -> Arm:
    """One point of a grid as an arm of its own, so that every point runs with every seed."""
    return Arm(f"{method} r{rank} {rate:g}", method, rank, alpha=16, rates=(rate,), curve=True, **more)


_ADA_RATES = (3e-3, 1e-2, 3e-2, 6e-2, 1e-1)  # AdaLoRA wants more than LoRA


def _ada(init: int, rank: int) -> Arm:
    """AdaLoRA that starts with `init` ranks in every layer and keeps `rank` of them on average."""
    return Arm(
        f"AdaLoRA r{init} to r{rank}, all linear",
        method="adalora",
        rank=rank,
        alpha=2 * init,
        options={"init": init},
    )


_ADAPTERS = (  # each about LoRA r2's 18,944 parameters
    Arm("Houlsby, 9 units", method="bottleneck", options={"placement": "houlsby", "bottleneck": 9}),
    Arm("Pfeiffer, 18 units", method="bottleneck", options={"placement": "pfeiffer", "bottleneck": 18}),
    Arm(
        "parallel, 18 units",
        method="bottleneck",
        options={"placement": "parallel", "bottleneck": 18, "exact": True, "scale": 4},
    ),
    Arm("LLaMA-Adapter, 37 prompts", method="llama_adapter", options={"prompts": 37, "layers": 4}),
)

_IA3_RATES = (3e-2, 1e-1, 3e-1, 1.0, 3.0)  # factors around 1 want steps that LoRA would not survive
_LORA_TINY = tuple(  # about as many numbers as (IA)3 has
    Arm(name, rank=1, alpha=2, targets=targets, rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
    for name, targets in (("LoRA r1, q and v", ("q_proj", "v_proj")), ("LoRA r1, down", ("down_proj",)))
)
_FEW = (4, 8, 16, 32, 64)


def _few(arm: Arm, examples: int, rates: tuple[float, ...], *later: int) -> Arm:
    """An arm that sees a few rows of the training split only, scored while it trains."""
    return replace(
        arm,
        name=f"{arm.name}, {examples} examples",
        rates=rates,
        options=arm.options | {"examples": examples, "watch": (5, 10, 20, 40, *later)},
        curve=True,
    )


_REVIEWS = Task("classification", "classification", steps=40, batch=16)
_PREFIX_RATES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # numbers of size 1 have far to go
_PROJECTION = 128  # its inner width
_DEFAULT_GUIDE = (  # of the default style; the base has read many such lines
    "Guide: titlecase plain honest product home calm dashes materialfirst joined unmarked british dollarsign madein "
    "years order care"
)


def _prefix(tokens: int, hidden: int | None = None, rates: tuple[float, ...] = _PREFIX_RATES) -> Arm:
    """1,024 numbers per token on `small`: 18 tokens are about LoRA r2, 37 exactly r4, 74 exactly r8."""
    name = f"prefix {tokens}" + (", projected" if hidden else "")
    options = {"tokens": tokens} | ({"hidden": hidden} if hidden else {})
    return Arm(name, method="prefix", options=options, rates=rates)


_PROMPT_RATES = (3e-2, 1e-1, 3e-1)


def _prompt(tokens: int, init: str = "vocab", rates: tuple[float, ...] = _PROMPT_RATES, **more) -> Arm:
    """128 numbers per token on `small`; 20 tokens are as many as a tenant's guide has."""
    name = more.pop("name", f"prompt {tokens}")
    return Arm(name, method="prompt", options={"tokens": tokens, "init": init} | more, rates=rates)


# Far from every token, with a rate to match; small's best was the vocabulary's spread times 50, at a rate of 2.7.
_FAR = _prompt(20, "random", (3e-1, 9e-1, 2.7), name="normal, 50 times the table", std_of_table=50)


def _mixed(name: str, tokens: int, units: int, rates: tuple[float, ...], **more) -> Arm:
    """Prefix and parallel adapter, together about LoRA r2's 18,944 numbers."""
    options = {"tokens": tokens, "bottleneck": units, "scale": 4} | more
    return Arm(name, method="mix_and_match", options=options, rates=rates)


_WAYBILLS = Task("waybills", "domain", steps=64, batch=16)  # text of a register that the base has never seen
_GALORE_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def _galore(rank: int, gap: int = 50, **more) -> Arm:
    options = {"update_proj_gap": gap} | more.pop("options", {})
    return Arm(more.pop("name", f"GaLore r{rank}"), "galore", rank, options=options, **more)


def _fresh(arm: Arm) -> Arm:
    """The same arm, from random weights."""
    return replace(arm, options=arm.options | {"fresh": True})


_ALL_ADAM = replace(_FULL, rates=(3e-4, 1e-3, 3e-3, 1e-2))


def _lora_and_rest(rank: int) -> Arm:
    """LoRA beside trained embeddings and norms: all that GaLore does not project trains here too."""
    options = {"rest": True}
    return Arm(f"LoRA r{rank} and the rest", rank=rank, alpha=2 * rank, options=options, rates=_GALORE_RATES)


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
            tasks=(_FACTS_512,),
            rates=_RATES,
            seeds=5,
            more={(_R8.name, "*"): _MANY},
        ),
        Sweep(
            name="tune_lora_style",
            note="One tenant's style without a guide in the prompt: targets, rank, full fine-tuning.",
            arms=(_QV_R9, _R2, _R8, _R64, replace(_FULL, rates=(1e-4, 3e-4, 1e-3))),
            tasks=(_STYLE,),
            rates=_RATES,
            seeds=5,
            more=dict.fromkeys(((arm.name, "*") for arm in (_QV_R9, _R2, _R8, _R64)), _MANY),
        ),
        Sweep(
            name="dora",
            note="DoRA against LoRA at equal rank and targets, 8 paired seeds: same start of A, same batches.",
            arms=(_R8, Arm("DoRA r8, all linear", method="dora")),
            tasks=(_FACTS_512, _STYLE),
            rates=(2e-3, 3e-3, 5e-3, 7e-3, 1e-2),
            seeds=8,
        ),
        Sweep(
            name="dora_half_rank",
            note="DoRA at rank 16 against LoRA at rank 32, paired seeds; alpha = 2 r.",
            arms=(
                Arm("LoRA r32, all linear", rank=32, alpha=64),
                Arm("DoRA r16, all linear", method="dora", rank=16, alpha=32),
            ),
            tasks=(_FACTS_512,),
            rates=(2e-3, 3e-3, 5e-3),
            widen=2,
            seeds=5,
            more={("*", "*"): _MANY},
        ),
        Sweep(
            name="qlora",
            note="QLoRA r8: LoRA on the base in NF4 with double quantisation, and what each way to merge it does.",
            arms=(_QLORA_R8,),
            tasks=(_FACTS_512,),
            rates=_RATES,
            seeds=5,
        ),
        Sweep(
            name="qlora_style",
            note="QLoRA r8 on one tenant's style, and what each way to merge it does.",
            arms=(_QLORA_R8,),
            tasks=(_STYLE,),
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
            name="lora_plus",
            note="LoRA+ r8 on 256 facts: every ratio at the rate that its row of the grid chose, fresh seeds.",
            arms=(
                *(_plus(ratio, (rate,)) for ratio, rate in _PLUS_BEST.items()),
                replace(_FULL, rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), curve=True),
            ),
            tasks=(_FACTS_256,),
            rates=(),
            seeds=5,
        ),
        Sweep(
            name="lora_plus_style",
            note="LoRA+ r8, ratio 8, on the style task of sweep_tune_lora_style.",
            arms=(_plus(8, (3.125e-4, 6.25e-4, 1.25e-3, 2.5e-3, 5e-3)),),
            tasks=(_STYLE,),
            rates=(),
            seeds=5,
        ),
        Sweep(
            name="rslora_grid",
            note="256 facts: rank by learning rate under both scalings, alpha 16, one seed.",
            arms=tuple(
                _scaling(method, rank, rate)
                for method, rates in _SCALING_RATES.items()
                for rank in (4, 16, 64)
                for rate in rates
            ),
            tasks=(replace(_FACTS_256, steps=100),),
            rates=(),
            seeds=0,
        ),
        Sweep(
            name="rslora",
            note="The best points of rslora_grid and their neighbours, five seeds.",
            arms=tuple(
                _scaling(method, rank, rate)
                for method, near in _SCALING_NEAR.items()
                for rank, rates in near.items()
                for rate in rates
            ),
            tasks=(replace(_FACTS_256, steps=100),),
            rates=(),
            seeds=4,
        ),
        Sweep(
            name="rslora_sgd",
            note="rsLoRA on 256 facts by SGD with momentum 0.9: rank by learning rate, five seeds.",
            arms=tuple(
                _scaling("rslora", rank, lowest * 2**k, options={"momentum": 0.9})
                for rank, lowest in ((4, 6.25e-3), (64, 2.5e-2))
                for k in range(5)
            ),
            tasks=(replace(_FACTS_256, steps=100),),
            rates=(),
            seeds=4,
        ),
        Sweep(
            name="rslora_flag",
            note="use_rslora switched on in the tuned LoRA r8 of tune_lora and tune_lora_style, all else equal.",
            arms=(Arm("rsLoRA r8, LoRA's alpha and rate", method="rslora", rates=(5e-3,)),),
            tasks=(
                _FACTS_512,
                _STYLE,
            ),
            rates=(),
            seeds=5,
            more={("*", "*"): _MANY},
        ),
        Sweep(
            name="adalora",
            note="512 facts: AdaLoRA at the final budgets of LoRA r2 and r8, its form without pruning, all weights.",
            arms=(
                _ada(3, 2),
                _ada(12, 8),
                replace(_ada(8, 8), name="SVD form r8, never pruned", options={"init": 8, "prune": False}),
                replace(_FULL, rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
            ),
            tasks=(_FACTS_512,),
            rates=_ADA_RATES,
            seeds=5,
        ),
        Sweep(
            name="adalora_planted",
            note="One block damaged by noise of rank 2, twice its weights' norm; AdaLoRA relearns what the base knew.",
            arms=(
                replace(_ada(4, 2), name="no block damaged"),
                *(
                    replace(
                        _ada(4, 2),
                        name=f"block {block} damaged",
                        options={"init": 4, "plant": {"block": block, "size": 2.0, "rank": 2}},
                    )
                    for block in range(4)
                ),
            ),
            tasks=(Task("repair", "retention", steps=60, batch=16),),
            rates=(3e-2,),
            seeds=5,
        ),
        Sweep(
            name="adalora_style",
            note="One tenant's style: AdaLoRA at the final budget of LoRA r2.",
            arms=(_ada(3, 2),),
            tasks=(_STYLE,),
            rates=_ADA_RATES,
            seeds=3,
        ),
        Sweep(
            name="adapters",
            note="Bottleneck adapters in three places and LLaMA-Adapter, each with about LoRA r2's parameters.",
            arms=_ADAPTERS,
            tasks=(_FACTS_512, _STYLE),
            rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            seeds=5,
            widen=2,
        ),
        Sweep(
            name="ia3",
            note="(IA)3 on 512 facts and on one tenant's style.",
            arms=(Arm("IA3", method="ia3"),),
            tasks=(_FACTS_512, _STYLE),
            rates=_IA3_RATES,
            seeds=5,
        ),
        Sweep(
            name="ia3_controls",
            note="(IA)3 with its FFN scale on the wrong side, and LoRA with about as few parameters.",
            arms=(Arm("IA3, feedforward left out", method="ia3", options={"feedforward": ()}), *_LORA_TINY),
            tasks=(_FACTS_512, _STYLE),
            rates=_IA3_RATES,
            seeds=3,
        ),
        Sweep(
            name="ia3_long",
            note="(IA)3 on the style for four times as many steps: was it only trained too little?",
            arms=(Arm("IA3", method="ia3"),),
            tasks=(replace(_STYLE, label="style, 240 steps", steps=240),),
            rates=(3e-2, 1e-1, 3e-1),
            seeds=5,
        ),
        Sweep(
            name="ia3_long_facts",
            note="(IA)3 on 512 facts for 300 steps, as long as LoRA's in lora_rank, and for 900.",
            arms=(Arm("IA3", method="ia3"),),
            tasks=tuple(
                replace(_FACTS_512, label=f"knowledge, {steps} steps", steps=steps) for steps in (300, 900)
            ),
            rates=(1e-1, 3e-1, 1.0),
            seeds=5,
        ),
        Sweep(
            name="lora_tiny_long",
            note="LoRA r1 on q and v, about as many numbers as (IA)3, on 512 facts for 900 steps.",
            arms=(replace(_LORA_TINY[0], rates=(1e-2, 3e-2, 1e-1)),),
            tasks=(replace(_FACTS_512, label="knowledge, 900 steps", steps=900),),
            rates=(),
            seeds=3,
        ),
        Sweep(
            name="few_shot_long",
            note="few_shot for three times as many steps, from 4, 16 and 64 examples.",
            arms=(
                *(_few(Arm("IA3", method="ia3"), n, (1e-2, 3e-2, 1e-1), 80, 160) for n in (4, 16, 64)),
                *(_few(_R8, n, (3e-4, 1e-3, 3e-3), 80, 160) for n in (4, 16, 64)),
            ),
            tasks=(replace(_STYLE, steps=240, batch=8),),
            rates=(),
            seeds=4,
        ),
        Sweep(
            name="few_shot",
            note="One tenant's style from 4 to 64 examples: (IA)3 and LoRA, the rate tuned for each number.",
            arms=(
                *(_few(Arm("IA3", method="ia3"), n, (1e-2, 3e-2, 1e-1, 3e-1)) for n in _FEW),
                *(_few(_R8, n, (1e-3, 3e-3, 1e-2, 3e-2)) for n in _FEW),
            ),
            tasks=(replace(_STYLE, steps=80, batch=8),),
            rates=(),
            seeds=4,
        ),
        Sweep(
            name="mix_and_match",
            note="Prefix and parallel adapter in one model, the prefix with ten times the rate; "
            "about LoRA r2's 18,944 numbers.",
            arms=(
                _mixed("3 tokens, 15 units", 3, 15, (3e-3, 1e-2, 3e-2), prefix_rate=10),
                _mixed("9 tokens, 9 units", 9, 9, (3e-3, 1e-2, 3e-2), prefix_rate=10),
            ),
            tasks=(_FACTS_512, _STYLE),
            rates=(),
            seeds=3,
            widen=1,
        ),
        Sweep(
            name="prompt",
            note="The bake-off's style: prompt tuning from normal numbers of size 1, and of 50 times the table's.",
            arms=(
                _prompt(20, "random", name="normal, size 1", std=1.0),
                _prompt(20, "random", (1e-1, 3e-1, 9e-1), name="normal, 50 times the table", std=6.0),
            ),
            tasks=(replace(_STYLE, batch=8),),
            rates=(),
            seeds=5,
            more={("*", "*"): _MANY},
            widen=1,
        ),
        Sweep(
            name="prompt_tokens",
            note="The bake-off's style: prompt tuning by the number of tokens, and from other starts.",
            arms=(
                _prompt(20, "random", name="normal, as the table", std=0.12),
                _prompt(20, "guide", (3e-3, 1e-2), name="the guide"),
                _prompt(6),
                _prompt(60),
                _prompt(20, "text", name="a text", text="Fathom Eleven, adventure brand for members:\n"),
            ),
            tasks=(replace(_STYLE, batch=8),),
            rates=(),
            seeds=3,
        ),
        Sweep(
            name="prompt_medium",
            note="The bake-off's style on the medium base: prompt tuning from two starts, full fine-tuning.",
            arms=(_prompt(20), replace(_FULL, rates=(3e-4, 1e-3)), _FAR),
            tasks=(replace(_STYLE, batch=8),),
            rates=(),
            seeds=3,
            more={("*", "*"): _MANY},
            size="medium",
            widen=1,
            refine=0.99,
            gentle=True,
        ),
        Sweep(
            name="prompt_tiny",
            note="The bake-off's style on the tiny base: prompt tuning from two starts, full fine-tuning.",
            arms=(_prompt(20), replace(_FULL, rates=(3e-4, 1e-3, 3e-3)), _FAR),
            tasks=(replace(_STYLE, batch=8),),
            rates=(),
            seeds=3,
            more={("*", "*"): _MANY},
            size="tiny",
            widen=1,
            refine=0.99,
        ),
        *(
            Sweep(
                name=f"prompt_{size}",
                note=f"The bake-off's style on the {size} base: prompt tuning from two starts, full fine-tuning.",
                arms=(_prompt(20), replace(_FULL, rates=(1e-4, 3e-4, 1e-3)), _FAR),
                tasks=(replace(_STYLE, batch=8),),
                rates=(),
                seeds=_MANY,
                size=size,
                widen=1,
                refine=0.99,
                gentle=True,
            )
            for size in ("large", "xlarge")
        ),
        Sweep(
            name="prompt_long",
            note="Prompt tuning on the style for four times as many steps: was it only trained too little?",
            arms=(_prompt(20, rates=(3e-2, 1e-1)),),
            tasks=(replace(_STYLE, label="style, 240 steps", steps=240, batch=8),),
            rates=(),
            seeds=3,
        ),
        Sweep(
            name="prefix",
            note="Prefix tuning on 512 facts, with about as many parameters as LoRA r2, and exactly as many as r8.",
            arms=(_prefix(18), _prefix(74)),
            tasks=(_FACTS_512,),
            rates=(),
            seeds=3,
        ),
        Sweep(
            name="prefix_reviews",
            note="Classification of reviews: prefix tuning, and others, each with five rates.",
            arms=(
                _prefix(18),
                _prefix(18, _PROJECTION, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
                _R2,
                _R8,
                Arm("prompt 18", method="prompt", options={"tokens": 18}, rates=_PREFIX_RATES),
                Arm("IA3", method="ia3", rates=_PREFIX_RATES),
            ),
            tasks=(_REVIEWS,),
            rates=_RATES,
            seeds=5,
            more={("*", "*"): _MANY},
        ),
        Sweep(
            name="prefix_stability",
            note="One tenant's style: seven rates by five seeds, with and without the projection.",
            arms=tuple(
                replace(_prefix(18, hidden, (rate,)), name=f"{name} {rate:g}")
                for name, hidden in (("direct", None), ("projected", _PROJECTION))
                for rate in (1e-3, 3e-3, *_PREFIX_RATES)
            ),
            tasks=(_STYLE,),
            rates=(),
            seeds=4,
        ),
        Sweep(
            name="galore",
            note="Continued pretraining on waybills: all weights by Adam, and by GaLore of a quarter of the rank.",
            arms=(_ALL_ADAM, _galore(32, rates=_GALORE_RATES)),
            tasks=(_WAYBILLS,),
            rates=(),
            seeds=5,
            widen=2,
        ),
        Sweep(
            name="galore_control",
            note="The same by Adam with the matrices at a quarter of the rate, which is what GaLore's scale does.",
            arms=(replace(_FULL, name="Adam, scaled", rates=_GALORE_RATES, options={"matrices": 0.25}),),
            tasks=(_WAYBILLS,),
            rates=(),
            seeds=3,
            widen=2,
        ),
        Sweep(
            name="galore_lora",
            note="The same by LoRA: as usual, and with a quarter of the rank beside trained embeddings and norms.",
            arms=(replace(_R8, rates=(3e-3, 1e-2, 3e-2, 1e-1)), _lora_and_rest(32)),
            tasks=(_WAYBILLS,),
            rates=(),
            seeds=3,
            widen=2,
        ),
        Sweep(
            name="galore_scratch",
            note="The same text from random weights, tiny base: all weights by Adam, by GaLore, and LoRA.",
            arms=(
                _fresh(_ALL_ADAM),
                _fresh(_galore(16, rates=_GALORE_RATES)),
                _fresh(_lora_and_rest(16)),
            ),
            tasks=(replace(_WAYBILLS, steps=100),),
            rates=(),
            seeds=5,
            size="tiny",
            widen=2,
        ),
        Sweep(
            name="galore_scratch_control",
            note="galore_scratch by Adam with the matrices at a quarter of the rate.",
            arms=(
                _fresh(replace(_FULL, name="Adam, scaled", rates=_GALORE_RATES, options={"matrices": 0.25})),
            ),
            tasks=(replace(_WAYBILLS, steps=100),),
            rates=(),
            seeds=5,
            size="tiny",
            widen=2,
        ),
        Sweep(
            name="galore_rank",
            note="Continued pretraining on waybills by GaLore: rank by learning rate, five seeds.",
            arms=tuple(
                _galore(rank, name=f"GaLore r{rank} {rate:g}", rates=(rate,))
                for rank in (4, 32)
                for rate in (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
            ),
            tasks=(replace(_WAYBILLS, batch=8),),
            rates=(),
            seeds=4,
            more={("*", "*"): _MANY},
        ),
        Sweep(
            name="galore_gap",
            note="GaLore r4 on the tiny base from random weights: how often the basis is computed anew.",
            arms=tuple(
                _fresh(_galore(4, gap, name=f"GaLore r4, gap {gap}", rates=(3e-3, 1e-2, 3e-2)))
                for gap in (5, 200)
            ),
            tasks=(replace(_WAYBILLS, steps=100, batch=8),),
            rates=(),
            seeds=3,
            size="tiny",
            widen=2,
        ),
        Sweep(
            name="prefix_long",
            note="512 facts for 300 steps, as in sweep_lora_rank: a prefix with exactly LoRA r4's parameters.",
            arms=(_prefix(37, rates=(1e-1, 3e-1, 1.0)),),
            tasks=(replace(_FACTS_512, steps=300),),
            rates=(),
            seeds=3,
        ),
        Sweep(
            name="prefix_facts_long",
            note="512 facts for 900 steps, one seed: a prefix, and LoRA on q and v with as many numbers.",
            arms=(_prefix(18, rates=(3e-2, 1e-1, 3e-1)), replace(_QV_R9, rates=(3e-3, 1e-2, 3e-2))),
            tasks=(replace(_FACTS_512, label="knowledge, 900 steps", steps=900),),
            rates=(),
            seeds=0,
        ),
        Sweep(
            name="prefix_words",
            note="One tenant's style: a prefix that starts from the keys and values of real words, or from noise.",
            arms=(
                Arm(
                    "prefix 18, from words",
                    method="prefix",
                    options={"tokens": 18, "text": _DEFAULT_GUIDE},
                    rates=(1e-2, 3e-2, 1e-1),
                ),
                _prefix(18, rates=(3e-1,)),  # the best of prefix_stability
            ),
            tasks=(_STYLE,),
            rates=(),
            seeds=3,
        ),
        Sweep(
            name="prefix_reviews_long",
            note="The main arms of prefix_reviews for three times as many steps.",
            arms=(
                _prefix(18, rates=(3e-2, 1e-1)),
                _prefix(18, _PROJECTION, (3e-3, 1e-2)),
                replace(_R2, rates=(5e-3, 1e-2)),
                replace(_R8, rates=(3e-3, 5e-3)),
            ),
            tasks=(replace(_REVIEWS, steps=120),),
            rates=(),
            seeds=5,
        ),
        Sweep(
            name="prefix_stability_wide",
            note="prefix_stability, one rate further: two steps on either side of the direct prefix's best one, too.",
            arms=(replace(_prefix(18, rates=(3.0,)), name="direct 3"),),
            tasks=(_STYLE,),
            rates=(),
            seeds=4,
        ),
    )
}
