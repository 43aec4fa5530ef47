"""What a PEFT LoRA config means for each layer, and what in it this engine cannot serve right.

The rules are those of peft 0.21 (tuners/tuners_utils.py and tuners/lora), key by key. A config is a stranger's input:
its types are checked before use, and its regular expressions run in a process that can be stopped.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from labs_lib.serving.types import Refused

# Settings that do not change what a saved adapter computes. The *_config of an initialisation only matter together
# with init_lora_weights, qalora_group_size with use_qalora, megatron_core with megatron_config.
HARMLESS = set(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout "
    "megatron_core loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config "
    "ensure_weight_tying".split()
)
# Settings whose meaning is worked out below, with the types that PEFT writes.
NUMBER = (int, float)
UNDERSTOOD = {
    "r": int,
    "lora_alpha": NUMBER,
    "use_rslora": bool,
    "use_dora": bool,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "target_modules": (str, list),
    "exclude_modules": (str, list),
    "layers_to_transform": (int, list),
    "layers_pattern": (str, list),
    "init_lora_weights": (bool, str),
    "bias": str,
}
# Settings that, switched on, change what the layers or the base compute: (what they do, the way out).
PLAIN = "train with it off"
MERGE = "merge the adapter into a copy of the base and serve that as a model of its own"
REFUSED = {
    "modules_to_save": ("replaces whole modules of the base", MERGE),
    "trainable_token_indices": ("changes embeddings of the base", MERGE),
    "target_parameters": ("adapts bare parameters, not linear layers", MERGE),
    "layer_replication": ("builds another stack of layers", MERGE),
    "lora_bias": ("adds a bias to B", PLAIN),
    "fan_in_fan_out": (
        "is for layers that store their weight transposed, which this model has none of",
        PLAIN,
    ),
    "megatron_config": ("is for Megatron's parallel layers", PLAIN),
    "alora_invocation_tokens": ("switches the adapter on in mid-prompt (aLoRA)", "serve it with vLLM"),
    "use_qalora": ("pools the inputs of A (QALoRA)", PLAIN),
    "use_bdlora": ("makes the factors block-diagonal (BD-LoRA)", PLAIN),
    "arrow_config": ("routes between several adapters (Arrow)", PLAIN),
    "kasa_config": ("truncates the base weights (KaSA)", MERGE),
    "monteclora_config": ("samples the weights (MonteCLoRA)", PLAIN),
    "velora_config": ("adds tensors of its own (VeLoRA)", PLAIN),
}
# Initialisations that leave the base weights alone; the others (pissa, olora, corda, loftq, lora_ga) change them.
INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
_KEY = re.compile(
    r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)
_PART = {"lora_A.weight": "A", "lora_B.weight": "B"}  # the magnitude vector is "m"
REGEX_SECONDS = 2  # of processor time, for all regular expressions of one adapter
_SIMPLE = re.compile(r"(?:[\w^$.-]|\\\.)*")  # patterns that cannot be slow: names, dots, anchors


@dataclass(frozen=True)
class Scale:
    """What a layer's factors are: A is (rank, in), B is (out, rank), and the update is scale * B @ A."""

    rank: int
    scale: float


def parse(data: bytes) -> dict:
    """The JSON object in `data`; anything else, or a key that is there twice, is refused."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key is there twice, and readers differ in which one they take")
        return dict(pairs)

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        config = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(
            f"adapter_config.json is not valid JSON ({error}): save or copy the adapter again."
        ) from error
    if not isinstance(config, dict):
        raise Refused(
            "adapter_config.json must hold one JSON object: save the adapter again with save_pretrained."
        )
    return config


def check(config: dict) -> None:
    """Raises Refused if the engine cannot serve an adapter with this config right, whatever its tensors are."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Refused(
            f"This adapter's peft_type is {show(kind)}; only LORA adapters share a base model in one batch here: "
            f"{MERGE if isinstance(kind, str) else 'save it again with save_pretrained'}."
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise Refused(
            f"This adapter was trained for the task {show(config['task_type'])}, and this engine generates text: "
            "train it with task_type CAUSAL_LM."
        )
    for key, types in UNDERSTOOD.items():
        value = config.get(key)
        wrong = not isinstance(value, types) or isinstance(value, bool) and types in (int, NUMBER)
        if value is not None and wrong:
            raise Refused(
                f"adapter_config.json: {key} is {show(value)}, of a type that PEFT does not write there."
            )
    for key, value in config.items():
        if not _on(value) or key in HARMLESS or key in UNDERSTOOD:
            continue
        what, out = REFUSED.get(
            key, ("is a setting that this engine does not know", f"{PLAIN}, or serve it with PEFT")
        )
        raise Refused(f"This adapter sets {show(key)} to {show(value)}, which {what}: {out}.")
    if config.get("bias", "none") not in ("none", None):
        raise Refused(
            f"This adapter has bias={show(config['bias'])}, so it changes biases of the base: {MERGE}."
        )
    init = config.get("init_lora_weights", True)
    if init is not None and init not in INITS:
        raise Refused(
            f"This adapter was started from {show(init)}, which may change the base weights: convert it to a plain "
            "LoRA with save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    _check_numbers(config)
    _check_targets(config)


def _check_numbers(config: dict) -> None:
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        if config.get(key) is None:
            raise Refused(f"adapter_config.json gives no {key}: save the adapter again with save_pretrained.")
        for value in (config[key], *(config.get(pattern) or {}).values()):
            number = isinstance(value, NUMBER) and not isinstance(value, bool)
            if not number or abs(value) > 1e9 or math.isnan(value) or key == "r" and not _rank(value):
                raise Refused(
                    f"adapter_config.json gives {show(value)} for {key}; it has to be a "
                    f"{'whole number of at least 1' if key == 'r' else 'finite number'}."
                )


def _check_targets(config: dict) -> None:
    if config.get("target_modules") is None:
        raise Refused(
            "adapter_config.json names no target_modules: save the adapter again with save_pretrained."
        )
    for key, kind in (
        ("target_modules", str),
        ("exclude_modules", str),
        ("layers_pattern", str),
        ("layers_to_transform", int),
    ):
        value = config.get(key)
        if isinstance(value, list) and not all(type(each) is kind for each in value):
            raise Refused(
                f"adapter_config.json: {key} has to be a list of {kind.__name__}, not {show(value)}."
            )
    if isinstance(config["target_modules"], str) and config.get("layers_to_transform") is not None:
        raise Refused(
            "layers_to_transform needs target_modules as a list of names, as PEFT does: name the layers."
        )
    if not all(_SIMPLE.fullmatch(pattern) for pattern in _layers_patterns(config)):
        raise Refused("layers_pattern has to be a name such as 'layers', not a regular expression.")


def scales(config: dict, names: Sequence[str]) -> dict[str, Scale]:
    """Rank and scale of each layer in `names` that the (checked) config adapts, in the order of `names`.

    `names` are the full names of linear layers, without PEFT's `base_model.model.` in front. A layer's scale is
    alpha / rank, with rsLoRA alpha / sqrt(rank); the first pattern that matches a layer gives its rank or alpha.
    """
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    every = isinstance(targets, str) and targets.lower() == "all-linear"
    whole = [
        each for each in (targets, excluded) if isinstance(each, str) and not (each is targets and every)
    ]
    ends = list(dict.fromkeys([*ranks, *alphas]))
    patterns = [("fullmatch", each) for each in whole] + [("match", rf"(.*\.)?({each})$") for each in ends]
    found = _match(tuple(patterns), tuple(names))
    by_regex = dict(zip(whole, found, strict=False))
    by_end = dict(zip(ends, found[len(whole) :], strict=True))
    out = by_regex[excluded] if isinstance(excluded, str) else _ending(names, set(excluded))
    if isinstance(targets, str):
        meant = set(names) if every else by_regex[targets]
    else:
        full = set(targets)
        meant = {name for name in _ending(names, full) if name in full or _in_layers(name, config)}

    def value(patterns: dict, name: str, default: float) -> float:
        return next((patterns[each] for each in patterns if name in by_end[each]), default)

    plan = {}
    for name in names:
        if name in meant and name not in out:
            rank, alpha = value(ranks, name, config["r"]), value(alphas, name, config["lora_alpha"])
            plan[name] = Scale(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return plan


def part_of(key: str) -> tuple[str, str]:
    """The layer that a tensor's name means, and the part: A, B or, for DoRA's magnitudes, m."""
    match = _KEY.fullmatch(key)
    if match is None or match[1].rpartition(".")[2] in ("lm_head", "embed_tokens"):
        raise Refused(
            f"This adapter holds {show(key)}, which is no LoRA factor of a linear layer inside the model; embeddings, "
            f"the output head and whole modules are not served: {MERGE}."
        )
    return match[1], _PART.get(match[2], "m")


def show(value: object) -> str:
    """A value of a stranger's file for a message: quoted, on one line, short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _on(value: object) -> bool:
    return bool(value) and value != "none"


def _rank(value: float) -> bool:
    return isinstance(value, int) and value >= 1


def _layers_patterns(config: dict) -> list[str]:
    patterns = config.get("layers_pattern") or []
    return [patterns] if isinstance(patterns, str) else patterns


def _ending(names: Sequence[str], targets: set[str]) -> set[str]:
    """The names that are one of `targets`, or end in a dot and one of them."""
    return {
        name
        for name in names
        if any(end in targets for end in (name, *(name[dot.end() :] for dot in re.finditer(r"\.", name))))
    }


def _in_layers(name: str, config: dict) -> bool:
    """True unless layers_to_transform leaves this layer out; its index is the first number after a module list."""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = [rf"(?:^|.*?\.){each}\.(\d+)\." for each in _layers_patterns(config)] or [
        r".*?\.[^.]*\.(\d+)\."
    ]
    index = next((int(found[1]) for each in patterns if (found := re.match(each, name))), None)
    return index in ([wanted] if isinstance(wanted, int) else wanted)


_CHILD = """
import contextlib, json, re, resource, sys
for limit, most in (("RLIMIT_CPU", int(sys.argv[1])), ("RLIMIT_AS", 1 << 30)):
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(getattr(resource, limit), (most, most))
patterns, names = json.load(sys.stdin)
try:
    print(json.dumps([[bool(getattr(re, how)(each, name)) for name in names] for how, each in patterns]))
except Exception as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def _match(patterns: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> list[set[str]]:
    """Which names each (function of `re`, pattern) matches.

    A regular expression can take years (`(a|aa)+$`), and nothing stops `re` from inside the process; so what is more
    than a name runs in a process of its own, under a limit.
    """
    if not patterns:
        return []
    if len(patterns) * len(names) <= 50_000 and all(_SIMPLE.fullmatch(_inner(each)) for _, each in patterns):
        found = [[bool(getattr(re, how)(each, name)) for name in names] for how, each in patterns]
    else:
        found = _match_outside(patterns, names)
    if isinstance(found, str):
        raise Refused(
            f"The regular expressions in adapter_config.json cannot be used ({show(found)}): write target_modules, "
            "rank_pattern and alpha_pattern with plain names."
        )
    return [{name for name, yes in zip(names, row, strict=True) if yes} for row in found]


@lru_cache(maxsize=64)
def _match_outside(patterns: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> list[list[bool]] | str:
    """A row of yes and no for each pattern, or why there is none."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD, str(REGEX_SECONDS)],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=30 * REGEX_SECONDS,  # of the clock, on a machine however busy
        )
    except (OSError, subprocess.SubprocessError) as error:  # the machine's fault, so not remembered
        raise Refused(
            "This machine is too busy to check the adapter's regular expressions: try again."
        ) from error
    return json.loads(done.stdout or "null") or f"they take more than {REGEX_SECONDS} s"


def _inner(pattern: str) -> str:
    return pattern.removeprefix(r"(.*\.)?(").removesuffix(")$")
