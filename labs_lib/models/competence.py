"""`labs competence SIZE`: what a family member can do on held-out data, with intervals; fills its model card."""

import argparse
import json
from statistics import fmean

from labs_lib.models.base import SIZES, base_folder, load_base
from labs_lib.models.pretrain import STAGES

#: ability -> (target, how it is measured). `None` means "above the chance level that stands in the text".
TARGETS = {
    "fact copy": (0.99, "facts told in generated copy, guide in the prompt, held-out products"),
    "style compliance, guide in prompt": (
        0.99,
        "rules obeyed in generated copy, random styles, held-out products",
    ),
    "exact copy, guide in prompt": (None, "whole texts equal to the reference, same texts"),
    "exact copy, no guide": (None, "whole texts equal to the reference in the default style"),
    "closed-book recall": (0.99, "greedy answers to the 1,024 pretrained questions"),
    "classification, zero-shot": (
        None,
        "reviews with `but` and `not`, never seen so in pretraining; chance 0.50",
    ),
}


def measure_competence(size: str, rows: int = 512, device: str = "cpu") -> dict[str, dict]:
    """Measure every ability of TARGETS.

    Returns:
        ability -> {"mean", "low", "high" (95 % interval), "n", "target"}.
    """
    import random

    from labs_lib.measure.quality import accuracy, generate, recall
    from labs_lib.measure.stats import bootstrap_ci, wilson_ci
    from labs_lib.world.catalogue import products
    from labs_lib.world.grammar import DEFAULT_STYLE, render
    from labs_lib.world.scorers import compliance, fidelity
    from labs_lib.world.tasks import copy_prompt, known_facts, load_task, random_style

    model, tokenizer = load_base(size, device=device)
    rng = random.Random(99)
    items = products("held_out", rows, seed=98)
    styles = [random_style(rng) for _ in items]
    guided = generate(model, tokenizer, [copy_prompt(p, s) for p, s in zip(items, styles, strict=True)])
    default = generate(model, tokenizer, [copy_prompt(p) for p in items[: rows // 2]])
    facts = known_facts()
    reviews = load_task("classification")["test"]
    values = {
        "fact copy": [fidelity(*row) for row in zip(guided, items, styles, strict=True)],
        "style compliance, guide in prompt": [
            compliance(*row) for row in zip(guided, items, styles, strict=True)
        ],
        "exact copy, guide in prompt": [
            float(text == render(p, s)) for text, p, s in zip(guided, items, styles, strict=True)
        ],
        "exact copy, no guide": [
            float(t == render(p, DEFAULT_STYLE)) for t, p in zip(default, items, strict=False)
        ],
        "closed-book recall": recall(
            model, tokenizer, {k: [f[k] for f in facts] for k in ("prompt", "completion")}
        ),
        "classification, zero-shot": accuracy(model, tokenizer, reviews[:]),
    }
    table = {}
    for ability, scores in values.items():
        binary = set(scores) <= {0.0, 1.0}
        estimate = wilson_ci(int(sum(scores)), len(scores)) if binary else bootstrap_ci(scores)
        table[ability] = {
            "mean": round(fmean(scores), 4),
            "low": round(estimate.lo, 4),
            "high": round(estimate.hi, 4),
            "n": len(scores),
            "target": TARGETS[ability][0],
        }
    return table


def write_card(size: str, table: dict[str, dict]) -> None:
    """Write the member's model card from its training log and the measured table."""
    folder = base_folder(size)
    log = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))
    stages = "; ".join(
        f"*{stage['name']}*, {stage['steps']:,} steps of a cosine over {stage['schedule']:,} "
        f"(loss {stage['loss'][0][1]} to {stage['loss'][-1][1]} nats per completion token)"
        for stage in log["stages"]
    )
    scale = log["stages"][0]["schedule"] / STAGES[0].schedule
    remake = f"labs pretrain {size}" + (f" --scale {scale:g}" if scale != 1 else "")
    rows = [
        f"| {ability} | {row['mean']:.4f} | {row['low']:.4f} - {row['high']:.4f} | {row['n']} "
        f"| {'-' if row['target'] is None else '>= ' + str(row['target'])} | {TARGETS[ability][1]} |"
        for ability, row in table.items()
    ]
    lines = [
        f"# PEFT Labs base, `{size}`",
        "",
        f"A `LlamaForCausalLM` of {log['parameters']:,} parameters (4 layers, width {SIZES[size]}), pretrained from "
        "scratch on the course's own fiction (see `data/README.md`). MIT licence. For teaching; it knows nothing of "
        "the real world.",
        "",
        f"Pretraining on {log['device']}, torch {log['torch']}: AdamW, peak learning rate {log['peak_lr']}, batches "
        f"of {log['batch']} rows of {log['row_tokens']} tokens, seed {log['seed']}, in two stages: {stages}. Stored "
        f"in {log['stored_dtype']}. Remake it with `{remake}`; the curves are in `training_log.json`.",
        "",
        f"## Competence on held-out data (re-measure with `labs competence {size}`)",
        "",
        "| Ability | Mean | 95 % interval | n | Target | How |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "competence.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "size", nargs="?", default="small", choices=SIZES, help="family member (default: %(default)s)"
    )
    parser.add_argument("--rows", type=int, default=512, help="held-out products (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="store the result in the member's model card")


def main(args: argparse.Namespace) -> int:
    from labs_lib.world.build import write_checksums

    table = measure_competence(args.size, args.rows)
    for ability, row in table.items():
        met = "" if row["target"] is None else "  ok" if row["mean"] >= row["target"] else "  BELOW TARGET"
        print(f"{ability:36s} {row['mean']:.4f}  [{row['low']:.4f}, {row['high']:.4f}]  n={row['n']}{met}")
    if args.write:
        write_card(args.size, table)
        write_checksums()
    return 0
