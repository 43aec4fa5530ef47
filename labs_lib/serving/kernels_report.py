"""What `labs bench kernels` prints and draws."""

from collections.abc import Sequence
from pathlib import Path

LABELS = {
    "base": "the layers alone",
    "sgmv": "SGMV",
    "sgmv beside": "SGMV, A x beside W x",
    "grouped": "F.grouped_mm",
    "gather": "gather, then bmm",
    "tiles": "tiles, then bmm",
    "segments": "segments",
    "blocks": "blocks",
    "peft": "loop as PEFT's",
    "loop": "loop",
}


def called(arm: str) -> str:
    name = arm.removeprefix("with ")
    return LABELS.get(name, name)


def of_layers(rows: Sequence[dict]) -> dict[tuple[str, int], list[dict]]:
    """Rows of the ops by (layers, rank)."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        if row["section"] == "ops":
            groups.setdefault((row["layers"], row["rank"]), []).append(row)
    return groups


def tables(rows: Sequence[dict]) -> str:
    """What was measured, to read in a terminal."""
    machine = next(row for row in rows if row["section"] == "machine")
    lines = [
        f"\nThis device reads {machine['read'] / 1e9:,.0f} GB/s, copies {machine['copy'] / 1e9:,.0f} GB/s, multiplies "
        f"{machine['flops'] / 1e12:,.2f} TFLOP/s"
    ]
    for (layers, rank), found in sorted(of_layers(rows).items(), key=lambda each: each[0]):
        counts = sorted({row["rows"] for row in found})
        lines += [f"\n{layers}, rank {rank}, an adapter for each row: microseconds (times the layers alone)"]
        lines += [f"  {'rows':<28}" + "".join(f"{count:>16}" for count in counts)]
        arms = [
            arm
            for arm in dict.fromkeys(row["arm"] for row in found)
            if arm == "base" or arm.startswith("with ")
        ]
        for arm in arms:
            by_rows = {row["rows"]: row for row in found if row["arm"] == arm}
            cells = [
                f"{by_rows[n]['us']:>9,.0f} ({by_rows[n]['of_base']:.2f})" if n in by_rows else ""
                for n in counts
            ]
            lines += [f"  {called(arm):<28}" + "".join(f"{cell:>16}" for cell in cells)]
        some = next((arm for arm in arms if arm != "base"), None)
        if some:
            least = {row["rows"]: row["least_us"] for row in found if row["arm"] == some}
            lines += [
                f"  {'at least (roofline)':<28}"
                + "".join(f"{least[n]:>16,.0f}" for n in counts if n in least)
            ]
    for row in rows:
        if row["section"] == "not reached":
            lines += [f"\nNot reached in {row['minutes']:g} minutes: {'; '.join(row['what'])}"]
    return "\n".join(lines)


def figure(rows: Sequence[dict], path: Path, layers: str = "seven linears") -> Path | None:
    """The roofline as time: what a pass takes at least, and what it took, by rows; None without rows of `layers`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {rank: found for (name, rank), found in sorted(of_layers(rows).items()) if name == layers}
    if not groups:
        return None
    with plt.style.context(Path(__file__).parent.parent / "lab" / "peftlabs.mplstyle"):
        fig, axes = plt.subplots(1, len(groups), figsize=(4.4 * len(groups), 4.2), squeeze=False, sharey=True)
        said = [roofline(ax, found, rank) for ax, (rank, found) in zip(axes[0], groups.items(), strict=True)]
        axes[0][0].set_ylabel("microseconds of a layer's seven linears")
        handles, labels = axes[0][0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
        fig.savefig(path, dpi=144, metadata={"Description": " ".join(said), "Software": None})
        plt.close(fig)
    return path


def roofline(ax, rows: Sequence[dict], rank: int) -> str:
    """One panel; returns its text for those who cannot see it."""
    counts = sorted({row["rows"] for row in rows})

    def line(arm: str, key: str) -> tuple[list[int], list[float]]:
        found = sorted((row["rows"], row[key]) for row in rows if row["arm"] == arm)
        return [n for n, _ in found], [value for _, value in found]

    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm.startswith("with ")]
    ax.plot(
        *line("base", "least_us"),
        color="#5F5F5F",
        linewidth=1,
        linestyle=(0, (4, 3)),
        label="least, layers alone",
    )
    if arms:
        ax.plot(*line(arms[0], "least_us"), color="#000000", linewidth=1.5, label="least, with adapters")
    ax.plot(*line("base", "us"), color="#5F5F5F", marker="o", markersize=4, label=called("base"))
    for number, (arm, marker) in enumerate(zip(arms, "sD^vPXd", strict=False)):
        ax.plot(
            *line(arm, "us"), color=f"C{number}", marker=marker, markersize=4, linewidth=1, label=called(arm)
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()
    ax.set_xlabel("rows, each with its own adapter")
    last = [row for row in rows if row["rows"] == counts[-1] and row["arm"] in arms]
    best = min(last, key=lambda row: row["us"])
    ax.set_title(f"Rank {rank}: {best['of_least']:.1f} times the least at {counts[-1]} rows", fontsize=10)
    told = ", ".join(f"{called(row['arm'])} {row['us']:,.0f}" for row in last)
    base = next(row for row in rows if row["arm"] == "base" and row["rows"] == counts[-1])
    return (
        f"Rank {rank}, {counts[-1]} rows, microseconds: {called('base')} {base['us']:,.0f}, at least "
        f"{best['least_us']:,.0f} with adapters; {told}."
    )
