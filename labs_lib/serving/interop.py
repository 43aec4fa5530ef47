"""Which engine serves which PEFT adapter right, from its config alone: accepted, refused, or silently wrong.

Refusing is honest; the dangerous answer is the third: the adapter loads, tokens come, and they are not its tokens. What
is known of other engines, and from where, is in interop_rules.py.
"""

import html
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from labs_lib.serving import peft_config
from labs_lib.serving.interop_rules import (
    ACCEPTED,
    ENGINES,
    OURS,
    PLAIN,
    REFUSED,
    RULES,
    RUN,
    UNKNOWN,
    WRONG,
    Verdict,
)
from labs_lib.serving.types import Refused


@dataclass(frozen=True)
class Row:
    """One adapter, judged for every engine of ENGINES."""

    name: str
    config: Mapping[str, object] = field(repr=False)
    verdicts: Mapping[str, Verdict] = field(repr=False)

    def __getitem__(self, engine: str) -> Verdict:
        return self.verdicts[engine]


class Matrix(list[Row]):
    """Rows as a table: markdown as text, HTML in a notebook, with the reasons below or as tooltips."""

    def __repr__(self) -> str:
        lines = [["adapter", *ENGINES], *([row.name, *(row[e].outcome for e in ENGINES)] for row in self)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        lines.insert(1, ["-" * width for width in widths])
        return "\n".join(
            "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
            for line in lines
        )

    __str__ = __repr__

    def reasons(self, *outcomes: str) -> str:
        """Why, one paragraph per verdict with one of `outcomes` (default: all but accepted), with its source."""
        outcomes = outcomes or (REFUSED, WRONG, UNKNOWN)
        found = [(row.name, engine, row[engine]) for row in self for engine in ENGINES]
        return "\n".join(
            textwrap.fill(
                f"{name}, {engine}: {v.outcome}. {v.reason} [{v.known}: {v.source}]",
                110,
                subsequent_indent="  ",
            )
            for name, engine, v in found
            if v.outcome in outcomes
        )

    def _repr_html_(self) -> str:
        colours = {ACCEPTED: "#1b7f3b", REFUSED: "#555555", WRONG: "#b3261e", UNKNOWN: "#8a6d00"}
        head = "".join(f"<th style='text-align:left'>{title}</th>" for title in ("adapter", *ENGINES))
        body = []
        for row in self:
            cells = [f"<td style='text-align:left'><b>{html.escape(row.name)}</b></td>"]
            for verdict in (row[engine] for engine in ENGINES):
                why = html.escape(f"{verdict.reason} [{verdict.known}: {verdict.source}]", quote=True)
                weight = "bold" if verdict.outcome == WRONG else "normal"
                style = f"text-align:left;color:{colours[verdict.outcome]};font-weight:{weight}"
                cells.append(f'<td title="{why}" style="{style}">{verdict.outcome}</td>')
            body.append("<tr>" + "".join(cells) + "</tr>")
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def matrix(
    configs: Mapping[str, Mapping] | Iterable[tuple[str, Mapping]], names: Iterable[str] = ()
) -> Matrix:
    """Judge adapters by their configs (the content of adapter_config.json) for every engine.

    Args:
        configs: adapters by name.
        names: keys of the adapters' tensors, if known: an engine may refuse one that its config does not show.
    """
    names = tuple(names)
    pairs = configs.items() if isinstance(configs, Mapping) else configs
    return Matrix(
        Row(name, dict(config), {e: judge(config, e, names) for e in ENGINES}) for name, config in pairs
    )


def judge(config: Mapping, engine: str, names: Iterable[str] = ()) -> Verdict:
    """What one engine does with an adapter: refused if any setting is, else wrong, else unknown, else accepted."""
    names = tuple(names)
    if engine == OURS:
        return _ours(dict(config), names)
    found = [rule.verdict for rule in RULES[engine] if rule.applies(config, names)]
    for outcome in (REFUSED, WRONG, UNKNOWN):
        for verdict in found:
            if verdict.outcome == outcome:
                return verdict
    judged = BASIC | {key for rule in RULES[engine] for key in rule.keys}
    on = [key for key, value in config.items() if value and value != "none" and key not in judged]
    if on and config.get("peft_type") == "LORA":
        return Verdict(UNKNOWN, "-", "-", f"Not checked with {on[0]} on.")
    return found[0] if found else PLAIN[engine]


# Settings that every engine takes, or that matter to none.
BASIC = peft_config.HARMLESS | set(
    "r lora_alpha target_modules use_rslora fan_in_fan_out init_lora_weights".split()
)


def _ours(config: dict, names: tuple[str, ...]) -> Verdict:
    source = "labs_lib/serving/peft_config.py"
    try:
        peft_config.check(config)
        for name in names:
            peft_config.part_of(name)
    except Refused as refused:
        return Verdict(REFUSED, RUN, source, str(refused))
    return Verdict(ACCEPTED, RUN, source, "Served as PEFT computes it.")


def examples() -> dict[str, dict]:
    """Configs to fill the matrix with: one plain LoRA, one per setting that engines differ in, and other PEFT types."""
    lora = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
    }
    special = {
        "plain LoRA": {},
        "rsLoRA": {"use_rslora": True},
        "alpha_pattern": {"alpha_pattern": {"v_proj": 32}},
        "rank_pattern": {"rank_pattern": {"v_proj": 4}},
        "some layers only": {"layers_to_transform": [0, 1]},
        "DoRA": {"use_dora": True},
        "PiSSA, not converted": {"init_lora_weights": "pissa"},
        "trained biases": {"bias": "all"},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "new tokens": {"trainable_token_indices": [3, 5]},
        "aLoRA": {"alora_invocation_tokens": [3, 5]},
    }
    others = {
        "IA3": ("IA3", {}),
        "VeRA": ("VERA", {"r": 8}),
        "LoHa": ("LOHA", {"r": 8, "alpha": 16}),
        "LoKr": ("LOKR", {"r": 8, "alpha": 16}),
        "OFT": ("OFT", {"oft_block_size": 8}),
        "MiSS": ("MISS", {"r": 8}),
        "RandLoRA": ("RANDLORA", {"r": 8}),
        "SHiRA": ("SHIRA", {"r": 8}),
        "prompt tuning": ("PROMPT_TUNING", {"num_virtual_tokens": 8}),
    }
    return {
        **{name: lora | changes for name, changes in special.items()},
        **{
            name: {
                "peft_type": kind,
                "task_type": "CAUSAL_LM",
                "target_modules": ["q_proj", "v_proj"],
                **more,
            }
            for name, (kind, more) in others.items()
        },
    }
