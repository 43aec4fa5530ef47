"""What `labs bench serving` prints and draws."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from labs_lib.serving.profiler import ADAPTER, KINDS

SHORT = {
    "base": "base alone",
    "peft_mixed": "PEFT mixed",
    "peft_switch": "PEFT switching",
    "merged": "merged copies",
}


def tables(rows: Sequence[dict]) -> str:
    """What was measured, to read in a terminal."""
    from labs_lib.serving.arms import FOREIGN

    def of(section: str) -> list[dict]:
        return [row for row in rows if row["section"] == section]

    def pm(row: dict, name: str) -> str:
        if row.get(name) is None:
            return ""
        lo, hi = row.get(f"{name}_lo"), row.get(f"{name}_hi")
        text = f"{row[name]:.2f}"
        return text if hi is None or not np.isfinite(hi) else f"{text} [{lo:.2f}, {hi:.2f}]"

    def number(row: dict, name: str) -> str:
        return "" if row.get(name) is None else f"{row[name]:,.0f}"

    lines = []
    for rank in sorted({row["rank"] for row in of("grid")}):
        found = [row for row in of("grid") if row["rank"] == rank]
        batches = sorted({row["batch"] for row in found})
        lines += [f"\nDecode step, rank {rank}, an adapter for each row: ms (times the base's speed)"]
        lines += [f"  {'batch':<34}" + "".join(f"{batch:>15}" for batch in batches)]
        for arm in dict.fromkeys(row["arm"] for row in found):
            mine = {row["batch"]: row for row in found if row["arm"] == arm}
            cells = [
                f"{row['ms']:.2f} ({row['of_base']:.2f})" if "ms" in row else "no room" if row else ""
                for row in (mine.get(batch, {}) for batch in batches)
            ]
            lines += [f"  {_label(arm):<34}" + "".join(f"{cell:>15}" for cell in cells)]
        ours = [
            row for row in found if row["arm"].startswith("engine") and "/" not in row["arm"] and "ms" in row
        ]
        added = {row["batch"]: f"{row['added_ms']:+.2f}" for row in ours}
        lines += [
            f"  {'ms that adapters add per token':<34}" + "".join(f"{added.get(b, ''):>15}" for b in batches)
        ]
    if found := [row for row in of("fleet") if row["arm"] != "base"]:
        lines += ["\nThroughput, registered adapters asked for alike"]
        lines += [f"  {'adapters':>8} {'rank':>5} {'slots':>6} {'tokens/s':>9}  of base alone"]
        lines += [
            f"  {row['adapters']:>8,} {row['rank']:>5} {row['slots']:>6} {row['tokens_per_s']:>9,.0f}  "
            f"{pm(row, 'of_base')}"
            for row in sorted(found, key=lambda row: (row["rank"], row["adapters"]))
        ]
    for row in of("not reached"):
        lines += [f"\nNot reached in {row['minutes']:g} minutes: {row['what']}"]
    if found := of("decode"):
        lines += [f"\nDecode step, batch {found[0]['batch']} of {found[0]['distinct']} distinct adapters"]
        lines += [f"  {'arm':<34}{'ms':>9}  {'speed of base':<20} {'speed of PEFT mixed':<22}"]
        for row in found:
            label = FOREIGN.get(row["arm"], row["arm"])
            lines += [f"  {label:<34}{row['ms']:>9.2f}  {pm(row, 'of_base'):<20} {pm(row, 'of_peft'):<22}"]
    if found := of("threads"):
        lines += ["\nThe same step by threads (ms)"]
        lines += [
            f"  {FOREIGN.get(row['arm'], row['arm']):<34}{row['threads']:>4}{row['ms']:>9.2f}"
            for row in found
        ]
    for pattern in ("uniform", "zipf"):
        found = [row for row in of("throughput") if row["pattern"] == pattern]
        if found:
            lines += [f"\nThroughput, {found[0]['adapters']} adapters, {pattern}"]
            lines += [
                f"  {'arm':<34}{'tokens/s':>9}  {'of base':<20} {'of PEFT mixed':<22} {'hits':>6} {'moved':>6}"
            ]
        for row in found:
            label = FOREIGN.get(row["arm"], row["arm"])
            lines += [
                f"  {label:<34}{row['tokens_per_s']:>9,.0f}  {pm(row, 'of_base'):<20} "
                f"{pm(row, 'of_peft_mixed'):<22} {number(row, 'hits'):>6} {number(row, 'moved'):>6}"
            ]
    if found := of("scale"):
        first = found[0]["arm"]
        lines += [f"\nRegistered adapters, {found[0]['slots']} slots, Zipf exponent {found[0]['exponent']:g}"]
        for row in found:
            lines += [
                f"  {row['adapters']:>6,} adapters {row['tokens_per_s']:>9,.0f} tokens/s  "
                f"{pm(row, f'of_{first}'):<20} hits {row['hits']:.0f}, moved {row['moved']:.0f}, "
                f"loads {row['loads']:.0f}, evictions {row['evictions']:.0f}"
            ]
    if found := of("latency"):
        lines += [
            f"\nOpen loop, {found[0]['rate']:.1f} requests/s; goodput: first token in {found[0]['slo_ttft']:g} s, "
            f"then {found[0]['slo_tpot']:g} s per token",
            f"  {'arm':<24}{'TTFT ms p50':>12}{'p99':>9}{'TPOT ms p50':>13}{'p99':>8}{'ITL ms p50':>12}{'p99':>8}"
            f"{'goodput/s':>11}",
        ]
        for row in found:
            numbers = "".join(
                f"{row[key]:>{width}.1f}"
                for key, width in zip(
                    ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "itl_p50", "itl_p99", "goodput"),
                    (12, 9, 13, 8, 12, 8, 11),
                    strict=True,
                )
            )
            lines += [f"  {FOREIGN.get(row['arm'], row['arm']):<24}{numbers}"]
    if found := of("profile"):
        lines += ["\nWhere a decode step's time goes (ms)"]
        lines += [f"  {'':<38}" + "".join(f"{row['arm']:>12}" for row in found)]
        for kind in KINDS:
            if f"ms: {kind}" in found[0]:
                lines += [f"  {kind:<38}" + "".join(f"{row[f'ms: {kind}']:>12.2f}" for row in found)]
        for label, key in (
            ("the step", "ms"),
            ("at least: linear layers alone", "linear_ms"),
            ("at least: adapter products alone", "adapter_ms"),
            ("at least: FLOPs at peak", "flops_ms"),
            ("at least: bytes at peak", "bytes_ms"),
        ):
            lines += [f"  {label:<38}" + "".join(f"{row[key]:>12.3f}" for row in found)]
        lines += [f"  {'tensor operations':<38}" + "".join(f"{row['operations']:>12,}" for row in found)]
    if found := of("twin"):
        lines += ["\nThe twin: measured, predicted, error"]
        for row in found:
            if "key" in row and row["measured"] is not None:
                error = "" if row["error_percent"] is None else f"{row['error_percent']:+.1f} %"
                lines += [
                    f"  {row['what']:<34}{row['key']:<14}{row['measured']:>10.1f}{row['predicted']:>10.1f} {error:>9}"
                ]
        for row in found:
            if row["what"] == "working set":
                lines += [
                    f"  {row['adapters']:>6,} adapters ({row['per_slot']:g} per slot): {row['tokens_per_s']:>8,.0f} "
                    f"tokens/s, TTFT p99 {row['ttft_p99']:,.0f} ms, {row['moved']:.0f} moved, {row['loads']:.0f} loads"
                ]
            elif row["what"] == "merge or multiplex":
                lines += [
                    f"  merging one adapter takes {row['merge_ms']} ms: it has paid after {row['merge_after_steps']} "
                    f"steps of a batch of its own; mixed batches win from {row['multiplex_from']} adapters"
                ]
    return "\n".join(lines)


def figure(rows: Sequence[dict], path: Path) -> Path | None:
    """The panels that the rows allow, as a PNG with alt text; None if there is none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (draw, found)
        for draw, found in (
            (_grid_panel, [row for row in rows if row["section"] == "grid" and "ms" in row]),
            (_fleet_panel, [row for row in rows if row["section"] == "fleet" and row["arm"] != "base"]),
            (_decode_panel, [row for row in rows if row["section"] == "decode"]),
            (_throughput_panel, [row for row in rows if row["section"] == "throughput"]),
            (_profile_panel, [r for r in rows if r["section"] == "profile" and f"ms: {KINDS[0]}" in r]),
            (_twin_panel, [r for r in rows if r["section"] == "twin" and r["what"] == "working set"]),
        )
        if found
    ]
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    with plt.style.context(Path(__file__).parent.parent / "lab" / "peftlabs.mplstyle"):
        fig, grid = plt.subplots(lines, columns, figsize=(5.6 * columns, 3.8 * lines), squeeze=False)
        for ax in grid.flat[len(panels) :]:
            ax.remove()
        said = [draw(ax, found) for ax, (draw, found) in zip(grid.flat, panels, strict=False)]
        fig.savefig(path, dpi=144, metadata={"Description": " ".join(said), "Software": None})
        plt.close(fig)
    return path


def _called(arm: str) -> str:
    name, _, how = arm.partition("/")
    said = SHORT.get(name, name.replace("engine:", "engine, "))
    return f"{said}, not recorded" if how == "eager" else said


def _label(arm: str) -> str:
    from labs_lib.serving.arms import FOREIGN

    name, _, how = arm.partition("/")
    return FOREIGN.get(name, name) + (", not recorded" if how == "eager" else "")


def _grid_panel(ax, rows: Sequence[dict]) -> str:
    """Milliseconds of a decode step by batch, at the rank that has most batches."""
    ranks = [row["rank"] for row in rows]
    rank = max(dict.fromkeys(ranks), key=ranks.count)
    rows = [row for row in rows if row["rank"] == rank]
    told = []
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        mine = sorted((row["batch"], row["ms"]) for row in rows if row["arm"] == arm)
        color = "#5F5F5F" if arm.startswith("base") else f"C{number}"
        line = "--" if arm.endswith("/eager") else "-"
        ax.plot(*zip(*mine, strict=True), marker="o", color=color, linestyle=line, label=_called(arm))
        told.append(f"{_called(arm)} " + ", ".join(f"{ms:.3g} at {batch}" for batch, ms in mine))
    batches = sorted({row["batch"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(batches, [str(batch) for batch in batches])
    ax.minorticks_off()
    _plain(ax.yaxis)
    ax.set_xlabel(f"rows, each with its own adapter of rank {rank}")
    ax.set_ylabel("milliseconds of a decode step")
    last = next(row for row in rows if row["batch"] == batches[-1] and row["arm"].startswith("engine"))
    ax.set_title(f"{batches[-1]} adapters at {last['of_base']:.2f} of the base's speed")
    ax.legend(fontsize=8)
    return f"Milliseconds of a decode step at rank {rank}: {'; '.join(told)}."


def _fleet_panel(ax, rows: Sequence[dict]) -> str:
    """Throughput against the base alone by registered adapters."""
    told = []
    for number, rank in enumerate(sorted({row["rank"] for row in rows})):
        mine = sorted((row["adapters"], row["of_base"]) for row in rows if row["rank"] == rank)
        ax.plot(*zip(*mine, strict=True), marker="o", color=f"C{number}", label=f"rank {rank}")
        told.append(f"rank {rank} " + ", ".join(f"{of:.2f} with {count}" for count, of in mine))
    counts = sorted({row["adapters"] for row in rows})
    ax.axhline(1, color="#5F5F5F", linewidth=1, linestyle=(0, (4, 3)))
    ax.set_xscale("log")
    ax.set_xticks(counts, [f"{count:,}" for count in counts])
    ax.minorticks_off()
    ax.set_ylim(0, 1.25)
    ax.set_xlabel("registered adapters")
    ax.set_ylabel("tokens per second, base alone = 1")
    most = [row for row in rows if row["adapters"] == counts[-1]]
    ax.set_title(
        f"{counts[-1]:,} adapters at {min(row['of_base'] for row in most):.2f} of the base's throughput"
    )
    ax.legend(fontsize=8)
    return f"Throughput over that of the base alone by registered adapters: {'; '.join(told)}."


def _decode_panel(ax, rows: Sequence[dict]) -> str:
    from matplotlib.ticker import LogLocator

    rows = sorted(rows, key=lambda row: -row["ms"])
    names = [_called(row["arm"]) for row in rows]
    colors = ["C0" if row["arm"].startswith("engine") else "#5F5F5F" for row in rows]
    ax.hlines(names, min(row["ms"] for row in rows) / 1.3, [row["ms"] for row in rows], colors, linewidth=1)
    ax.scatter([row["ms"] for row in rows], names, c=colors, zorder=3)
    for name, row in zip(names, rows, strict=True):
        ax.annotate(
            f"{row['ms']:.3g}",
            (row["ms"], name),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            size=9,
        )
    ax.set_xscale("log")
    ax.margins(x=0.12)
    ax.grid(visible=False)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.minorticks_off()
    _plain(ax.xaxis)
    ax.set_xlabel("milliseconds of a decode step (log scale)")
    ours = next(row for row in rows if row["arm"].startswith("engine"))
    ours = next((row for row in rows if row["arm"] == "engine"), ours)
    ax.set_title(
        f"{ours['batch']} rows, {ours['distinct']} adapters: {ours['of_peft']:.1f} times PEFT's speed"
    )
    told = ", ".join(f"{name} {row['ms']:.3g}" for name, row in zip(names, rows, strict=True))
    return f"Milliseconds of a decode step: {told}."


def _throughput_panel(ax, rows: Sequence[dict]) -> str:
    told = []
    for i, pattern in enumerate(("uniform", "zipf")):
        found = [row for row in rows if row["pattern"] == pattern]
        middle = [row["of_base"] for row in found]
        known = all(row["of_base_hi"] is not None and np.isfinite(row["of_base_hi"]) for row in found)
        ends = [
            (row["of_base"] - row["of_base_lo"], row["of_base_hi"] - row["of_base"]) for row in found if known
        ]
        places = np.arange(len(found)) + 0.4 * i - 0.2
        ax.bar(places, middle, 0.38, yerr=np.transpose(ends) if known else None, label=pattern)
        told += [f"{_called(row['arm'])} {pattern} {row['of_base']:.2f}" for row in found]
    names = [_called(row["arm"]) for row in rows if row["pattern"] == "uniform"]
    ax.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    ax.set_ylabel("tokens per second, base alone = 1")
    ax.set_ylim(0, 1.25)
    ours = [row["of_base"] for row in rows if row["arm"].startswith("engine")]
    ax.set_title(f"{rows[0]['adapters']} adapters at {min(ours):.2f} of the base's throughput")
    ax.legend(loc="upper right")
    return f"Throughput over that of the base alone: {', '.join(told)}."


def _profile_panel(ax, rows: Sequence[dict]) -> str:
    rows = list(reversed(rows))
    names, left = [_called(row["arm"]) for row in rows], np.zeros(len(rows))
    for kind in KINDS:
        width = np.array([row[f"ms: {kind}"] for row in rows])
        ax.barh(names, width, left=left, label=kind, height=0.55)
        left += width
    ax.set_xlabel("milliseconds of a decode step")
    ours = next((row for row in rows if row["arm"] != "base"), rows[0])
    ax.set_title(f"Adapter ops take {ours[f'ms: {ADAPTER}'] / ours['ms']:.0%} of a step")
    ax.grid(visible=False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize=8)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {row[f'ms: {kind}']:.2f}" for kind in KINDS)
        for name, row in zip(names, rows, strict=True)
    )
    return f"Milliseconds of a decode step by kind of work: {told}."


def _twin_panel(ax, rows: Sequence[dict]) -> str:
    per_slot = [row["per_slot"] for row in rows]
    ax.plot(per_slot, [row["ttft_p99"] for row in rows], marker="o")
    ax.axvline(1, color="#5F5F5F", linewidth=1, linestyle=(0, (4, 3)))
    ax.set_xscale("log")
    ax.set_xticks(per_slot, [f"{each:g}" for each in per_slot])
    ax.minorticks_off()
    ax.set_ylim(0, 1.1 * max(row["ttft_p99"] for row in rows))
    ax.set_xlabel("equally busy adapters per slot")
    ax.set_ylabel("p99 time to first token (ms)")
    ax.set_title("The twin: when slots and host memory run out")
    told = ", ".join(f"{row['per_slot']:g}: {row['ttft_p99']:.0f}" for row in rows)
    return f"The twin's p99 time to first token in milliseconds by busy adapters per slot: {told}."


def _plain(axis) -> None:
    """Powers of ten written out."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
