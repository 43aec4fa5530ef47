"""What other engines do with each setting of a PEFT adapter: the facts behind the interop matrix, with their sources.

How a fact is known: `run` by a test of this course, `read` in the engine's source (stored copies of 2024 to 2026),
`reported` in an issue or a pull request. Nothing here is a guess; what is not here is unknown.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from labs_lib.serving.peft_config import INITS

ACCEPTED, REFUSED, WRONG, UNKNOWN = "accepted", "refused", "silently wrong", "unknown"
RUN, READ, REPORTED = "run", "read", "reported"
OURS, PEFT, VLLM, SGLANG, LORAX = ENGINES = (
    "this engine",
    "PEFT adapter_names",
    "vLLM",
    "SGLang",
    "LoRAX",
)


@dataclass(frozen=True)
class Verdict:
    """What an engine does with an adapter, how that is known (run, read, reported), where it comes from, and why."""

    outcome: str
    known: str
    source: str
    reason: str


Test = Callable[[Mapping, Sequence[str]], bool]


@dataclass(frozen=True)
class Rule:
    """A verdict on some settings of a config; it applies if `test` says so, or by default if any of them is on.

    `test(config, names)` gets the config and the names of the tensors, which are none if they are not known.
    """

    keys: tuple[str, ...]
    verdict: Verdict
    test: Test | None = None

    def applies(self, config: Mapping, names: Sequence[str]) -> bool:
        if self.test is not None:
            return self.test(config, names)
        return any(config.get(key) and config.get(key) != "none" for key in self.keys)


def _rule(keys: str, outcome: str, known: str, source: str, reason: str, test=None) -> Rule:
    return Rule(tuple(keys.split()), Verdict(outcome, known, source, reason), test)


def _is(*kinds: str) -> Test:
    return lambda config, names: config.get("peft_type") in kinds


def _not(*kinds: str) -> Test:
    return lambda config, names: config.get("peft_type") not in kinds


def _uneven(config: Mapping, names: Sequence[str]) -> bool:
    """Some layer's rank or alpha is not the config's one for all."""
    ranks = (config.get("rank_pattern") or {}).values()
    alphas = (config.get("alpha_pattern") or {}).values()
    return any(each != config.get("r") for each in ranks) or any(
        each != config.get("lora_alpha") for each in alphas
    )


def _changed_base(config: Mapping, names: Sequence[str]) -> bool:
    init = config.get("init_lora_weights", True)
    return init is not None and init not in INITS


def _regex(config: Mapping, names: Sequence[str]) -> bool:
    return isinstance(config.get("target_modules"), str)


def _some_layers(config: Mapping, names: Sequence[str]) -> bool:
    """A kind of layer (q_proj ...) is adapted in some decoder layers only, as far as config and names show."""
    found: dict[str, set[str]] = {}
    for name in names:
        if match := re.search(r"\.(\d+)\.(.+)\.lora_A\.weight$", name):
            found.setdefault(match[2], set()).add(match[1])
    every = set().union(*found.values())
    return config.get("layers_to_transform") not in (None, []) or any(
        each != every for each in found.values()
    )


# PEFT's batches of several adapters, by peft_type: what tests/serving/test_interop.py finds when it runs them.
MIXED_RIGHT = tuple("LORA GLORA ROAD".split())
MIXED_RAISES = ("ADALORA",)
MIXED_WRONG = tuple(
    (
        "BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GRALORA HIRA HRA IA3 LILY LN_TUNING LOHA LOKR MISS OFT OSF "
        "PEANUT POLY PSOFT PVERA RANDLORA SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT"
    ).split()
)
PROMPTS = tuple("CARTRIDGE CPT MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING PROMPT_TUNING".split())

_TEST = "tests/serving/test_interop.py with peft 0.21.2"
_GITHUB = "https://github.com"
_VLLM = f"{_GITHUB}/vllm-project/vllm"
_VLLM_CONFIG, _VLLM_MODEL = (
    f"{_VLLM}/blob/main/vllm/lora/{name}.py" for name in ("peft_helper", "lora_model")
)
_SGLANG = f"{_GITHUB}/sgl-project/sglang"
_SGLANG_CONFIG, _SGLANG_LORA = (
    f"{_SGLANG}/blob/main/python/sglang/srt/lora/{name}.py" for name in ("lora_config", "lora")
)
_LORAX = f"{_GITHUB}/predibase/lorax/blob/main/server/lorax_server/adapters/lora.py"

_ACTIVE = "adapter_names is not looked at: every row gets the active adapter, base rows too."
_GLOBAL = "Every layer is scaled by lora_alpha / r, whatever the patterns say."
_CHANGED = (
    "Its initialisation had changed the base weights it was trained on; the setting is not read, and it runs on the "
    "unchanged ones."
)
_ALL_TOKENS = "The setting is not read: the adapter acts on every token."
_SHARED = "Loading it changes the base model, which all adapters and base rows share."

# What a plain LoRA gets, and one with only accepted settings on.
PLAIN = {
    PEFT: Verdict(ACCEPTED, RUN, _TEST, "Each row gets its adapter."),
    VLLM: Verdict(ACCEPTED, READ, _VLLM_CONFIG, "A plain LoRA; ranks above 16 need --max-lora-rank."),
    SGLANG: Verdict(ACCEPTED, READ, _SGLANG_LORA, "A plain LoRA."),
    LORAX: Verdict(ACCEPTED, READ, _LORAX, "A plain LoRA."),
}

RULES = {
    PEFT: [
        _rule("peft_type", WRONG, RUN, _TEST, _ACTIVE, _is(*MIXED_WRONG)),
        _rule("peft_type", WRONG, RUN, _TEST, f"{_ACTIVE} In generate() it raises.", _is(*PROMPTS)),
        _rule("peft_type", REFUSED, RUN, _TEST, "Its layers raise on adapter_names.", _is(*MIXED_RAISES)),
        _rule(
            "peft_type",
            UNKNOWN,
            "-",
            "-",
            "This type was not tried.",
            _not(*MIXED_RIGHT, *MIXED_WRONG, *PROMPTS, *MIXED_RAISES),
        ),
        _rule("use_dora", REFUSED, RUN, _TEST, "Raises: cannot pass adapter_names when DoRA is enabled."),
        _rule("bias", REFUSED, RUN, _TEST, "Raises: several adapters on one model need bias='none'."),
        _rule("target_parameters", REFUSED, RUN, _TEST, "Raises: no mixed batches for bare parameters."),
        _rule("init_lora_weights", WRONG, RUN, f"{_TEST}: pissa, olora", _SHARED, _changed_base),
        _rule("kasa_config layer_replication", WRONG, RUN, _TEST, _SHARED),
        _rule(
            "rank_pattern alpha_pattern exclude_modules layers_to_transform layers_pattern modules_to_save lora_bias "
            "trainable_token_indices alora_invocation_tokens velora_config use_bdlora monteclora_config",
            ACCEPTED,
            RUN,
            _TEST,
            "Each row gets its adapter.",
        ),
    ],
    VLLM: [
        _rule(
            "peft_type",
            REFUSED,
            READ,
            _VLLM_MODEL,
            "Its config lacks r or lora_alpha, or its tensors have names that are not known.",
            _not("LORA"),
        ),
        _rule(
            "use_dora",
            REFUSED,
            READ,
            _VLLM_CONFIG,
            f"Raises: vLLM does not yet support DoRA (open: {_VLLM}/pull/47395).",
        ),
        _rule("modules_to_save", REFUSED, REPORTED, f"{_VLLM}/issues/9280", "Raises: must be None."),
        _rule("bias", REFUSED, READ, _VLLM_CONFIG, "Raises: adapter bias is not supported."),
        _rule(
            "trainable_token_indices",
            REFUSED,
            READ,
            _VLLM_CONFIG,
            "Raises without --max-lora-trainable-tokens; older versions do not read the setting.",
        ),
        _rule("rank_pattern alpha_pattern", WRONG, READ, _VLLM_CONFIG, _GLOBAL, _uneven),
        _rule("init_lora_weights", WRONG, READ, _VLLM_CONFIG, _CHANGED, _changed_base),
        _rule("alora_invocation_tokens", WRONG, READ, _VLLM_CONFIG, _ALL_TOKENS),
        _rule("use_rslora", ACCEPTED, REPORTED, f"{_VLLM}/pull/6909", "Scaled by lora_alpha / sqrt(r)."),
        _rule(
            "exclude_modules layers_to_transform layers_pattern",
            ACCEPTED,
            READ,
            _VLLM_MODEL,
            "The names of the tensors say which layers are adapted.",
        ),
    ],
    SGLANG: [
        _rule("target_modules", UNKNOWN, "-", "-", "A regular expression was not tried.", _regex),
        _rule("peft_type", REFUSED, READ, _SGLANG_LORA, "Asserts that peft_type is lora.", _not("LORA")),
        _rule("use_dora", REFUSED, REPORTED, f"{_SGLANG}/pull/22125", "Raises since April 2026."),
        _rule(
            "use_rslora",
            WRONG,
            REPORTED,
            f"{_SGLANG}/issues/40835",
            "Scaled by lora_alpha / r: too weak by a factor of sqrt(r).",
        ),
        _rule(
            "rank_pattern alpha_pattern",
            WRONG,
            READ,
            _SGLANG_LORA,
            f"{_GLOBAL} (A later lora_config.py collects the patterns; what is then done with them was not seen.)",
            _uneven,
        ),
        _rule("init_lora_weights", WRONG, READ, _SGLANG_CONFIG, _CHANGED, _changed_base),
        _rule("alora_invocation_tokens", WRONG, REPORTED, f"{_SGLANG}/issues/16942", _ALL_TOKENS),
    ],
    LORAX: [
        _rule(
            "peft_type",
            REFUSED,
            READ,
            _LORAX,
            "Its config has no r, lora_alpha or fan_in_fan_out, which are read from it.",
            _not("LORA", "ADALORA"),
        ),
        _rule("peft_type", UNKNOWN, READ, _LORAX, "The config loads; the rest was not seen.", _is("ADALORA")),
        _rule(
            "use_dora", WRONG, READ, _LORAX, "The magnitudes are not looked up: it is served as plain LoRA."
        ),
        _rule(
            "rank_pattern alpha_pattern",
            WRONG,
            READ,
            _LORAX,
            f"{_GLOBAL} (Different ranks in one kind of layer raise.)",
            _uneven,
        ),
        _rule(
            "layers_to_transform layers_pattern",
            WRONG,
            READ,
            _LORAX,
            "A kind of layer that is not adapted in every decoder layer is left out, with a warning in the log.",
            _some_layers,
        ),
        _rule(
            "bias modules_to_save lora_bias trainable_token_indices",
            WRONG,
            READ,
            _LORAX,
            "Only lora_A and lora_B of linear layers are looked up.",
        ),
        _rule("init_lora_weights", WRONG, READ, _LORAX, _CHANGED, _changed_base),
        _rule("alora_invocation_tokens", WRONG, READ, _LORAX, _ALL_TOKENS),
        _rule(
            "use_rslora",
            ACCEPTED,
            REPORTED,
            f"{_GITHUB}/predibase/lorax/pull/299",
            "Scaled by lora_alpha / sqrt(r).",
        ),
    ],
}
