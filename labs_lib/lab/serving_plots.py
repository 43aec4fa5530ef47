"""Figures of the serving engine: where adapters were over time, and what each tenant's requests waited for.

Each function draws and returns (figure, alt text), for `show(*tier_timeline(ledger))`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from labs_lib.errors import LabsError
from labs_lib.lab.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from labs_lib.serving.ledger import Ledger
    from labs_lib.serving.timeline import Interval

HOST = "#B9B9B9"
#: what: (legend, colour, lower edge and height of its bar in a lane of height 1)
BARS = {
    "loading": ("loading from disk", ORANGE, -0.16, 0.46),
    "host": ("host memory", HOST, -0.36, 0.14),
    "device": ("device slot, idle", SKY, -0.16, 0.46),
    "running": ("device slot, serving", BLUE, -0.16, 0.46),
}
PHASES = {
    "queue": ("queue", GREY),
    "load": ("load adapter", ORANGE),
    "prefill": ("prefill", GREEN),
    "decode": ("decode", PURPLE),
}


def tier_timeline(
    ledger: "Ledger",
    names: Mapping[str, str] | None = None,
    *,
    lanes: int = 12,
    start: float = 0.0,
    end: float | None = None,
    title: str = "",
) -> "tuple[Figure, str]":
    """Swim lanes: one per adapter, in the order of their first use; evictions are marked with who needed the room.

    Args:
        ledger: of an engine.
        names: what to call an adapter version; default: its tenant, with the start of the sha256 if it has several.
        lanes: adapters drawn, those with most requests; the rest is counted in the alt text.
        start, end: the seconds to show, from the ledger's first event.
        title: the finding; default: how many evictions there were.
    """
    import matplotlib.pyplot as plt

    from labs_lib.serving.timeline import intervals

    rows = [each for each in intervals(ledger) if each.adapter is not None]
    if not any(each.what == "device" for each in rows):
        raise LabsError("The ledger knows of no adapter on the device yet: serve some requests first.")
    labels = {**_names(rows), **(names or {})}
    end = max(each.end for each in rows) if end is None else end
    rows = [_clipped(each, start, end) for each in rows if each.start < end and each.end >= start]
    used: dict[str, int] = {}
    for each in rows:
        used[each.adapter] = used.get(each.adapter, 0) + (each.what == "running")
    chosen = sorted(used, key=lambda adapter: -used[adapter])[:lanes]
    order = [adapter for adapter in used if adapter in chosen]  # by first appearance
    lane = {adapter: len(order) - 1 - i for i, adapter in enumerate(order)}
    rows = [each for each in rows if each.adapter in lane]
    gone = [each for each in rows if each.ended == "evict"]

    fig, ax = plt.subplots(figsize=(7.6, 1.2 + 0.42 * len(order)))
    for zorder, (what, (_, color, low, height)) in enumerate(BARS.items(), start=3):
        how = (
            {"facecolor": "white", "edgecolor": color, "hatch": "////"}
            if what == "loading"
            else {"facecolor": color}
        )
        for each in rows:
            if each.what == what:
                span = [(each.start, each.seconds)]
                ax.broken_barh(span, (lane[each.adapter] + low, height), linewidth=0.6, zorder=zorder, **how)
    for each in gone:
        _mark(ax, each, lane[each.adapter] + 0.07, rows, end, end - start)
    ax.set_yticks(list(lane.values()), [labels[adapter] for adapter in lane])
    ax.set(xlim=(start, end), ylim=(-0.6, len(order) - 0.4), xlabel="time (s)")
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    ax.set_title(title or f"{len(gone)} evictions among {len(order)} adapters")
    _legend(fig)
    return fig, _timeline_alt(rows, gone, labels, order, len(used) - len(order), end - start)


def _clipped(each: "Interval", start: float, end: float) -> "Interval":
    """What of it lies in the window; an end outside of it is no end."""
    ended = each.ended if each.end <= end else ""
    return replace(each, start=max(each.start, start), end=min(each.end, end), ended=ended)


def _names(rows: "Sequence[Interval]") -> dict[str, str]:
    versions: dict[str, list[str]] = {}
    for each in rows:
        mine = versions.setdefault(each.tenant, [])
        if each.adapter not in mine:
            mine.append(each.adapter)
    return {
        adapter: tenant if tenant and len(mine) == 1 else f"{tenant} {adapter[:6]}".strip()
        for tenant, mine in versions.items()
        for adapter in mine
    }


def _mark(ax, each: "Interval", y: float, rows: "Sequence[Interval]", end: float, span: float) -> None:
    """A triangle where a tenure ends; who needed the room, where there is room to write it."""
    ax.plot(each.end, y, marker="<", markersize=6, color=VERMILLION, markeredgecolor="white", zorder=8)
    text = f"for {each.by}" if each.by else "unloaded"
    after = [
        other.start
        for other in rows
        if other.adapter == each.adapter and other.what in ("device", "loading") and other.start > each.end
    ]
    if min([end, *after]) - each.end > span * 0.012 * (len(text) + 1.5):
        place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(text, (each.end, y), size=7.5, color=VERMILLION, zorder=8, **place)


def _legend(fig) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor="white", edgecolor=color, hatch="////", label=label)
        if what == "loading"
        else Patch(facecolor=color, label=label)
        for what, (label, color, *_) in BARS.items()
    ]
    handles.append(Line2D([], [], marker="<", color=VERMILLION, linestyle="", label="evicted"))
    fig.legend(
        handles=handles,
        loc="outside lower center",
        ncols=5,
        fontsize=8.5,
        handlelength=1.4,
        columnspacing=1.4,
    )


def _timeline_alt(rows, gone, labels, order, hidden: int, span: float) -> str:
    seconds = dict.fromkeys(order, 0.0)
    for each in rows:
        if each.what == "device":
            seconds[each.adapter] += each.seconds
    longest = max(seconds, key=seconds.get)
    by: dict[str, int] = {}
    for each in gone:
        by[each.by or "an unload"] = by.get(each.by or "an unload", 0) + 1
    most = max(by, key=by.get, default="")
    return (
        f"Timeline of {span:.3g} seconds with a lane for each of {len(order)} adapters"
        + (f" ({hidden} more are not drawn)" if hidden else "")
        + f": when it was loading, in host memory, in a device slot, and serving. {labels[longest]} was on the device "
        f"longest, {seconds[longest] / span:.0%} of the time. There were {len(gone)} evictions"
        + (f", {by[most]} of them for {most}." if by else ".")
    )


def latency_breakdown(
    ledger: "Ledger",
    *,
    how: str = "mean",
    phases: Sequence[str] = tuple(PHASES),
    tenants: int = 15,
    title: str = "",
) -> "tuple[Figure, str]":
    """Stacked bars: what a request of each tenant spent its time on, the slowest tenant on top.

    `how`: `mean`, or `median` (the tenant's request in the middle by total time). `phases`: leave `decode` out to see
    the time to first token, which does not depend on how long an answer is.
    """
    import matplotlib.pyplot as plt

    from labs_lib.serving.timeline import breakdown

    if unknown := set(phases) - PHASES.keys():
        raise LabsError(f"phases: {', '.join(sorted(unknown))} is none of {', '.join(PHASES)}.")
    rows = [(row, [getattr(row, phase) for phase in phases]) for row in breakdown(ledger, how)]
    if not rows:
        raise LabsError("The ledger knows of no finished request yet: serve some first.")
    rows.sort(key=lambda row: -sum(row[1]))
    drawn, hidden = rows[:tenants], max(0, len(rows) - tenants)
    unit, factor = ("ms", 1e3) if sum(drawn[0][1]) < 2 else ("s", 1.0)
    fig, ax = plt.subplots(figsize=(7.2, 1.3 + 0.34 * len(drawn)))
    for place, (row, parts) in enumerate(reversed(drawn)):
        left = 0.0
        for phase, seconds in zip(phases, parts, strict=True):
            ax.barh(
                place,
                seconds * factor,
                left=left,
                color=PHASES[phase][1],
                height=0.7,
                edgecolor="white",
                linewidth=0.5,
                label=PHASES[phase][0] if place == 0 else None,
            )
            left += seconds * factor
        note = f"{left:.3g}  (n={row.requests})"
        ax.annotate(note, (left, place), xytext=(4, 0), textcoords="offset points", va="center", size=8.5)
    ax.set_yticks(range(len(drawn)), [row.tenant for row, _ in reversed(drawn)])
    first = "decode" not in phases
    ax.set_xlabel(f"{how} time {'to first token' if first else 'of a request'} ({unit})")
    ax.margins(x=0.14)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    worst, parts = drawn[0]
    share, biggest = max(zip(parts, phases, strict=True))
    share /= sum(parts) or 1.0
    verb = "waits longest for its first token" if first else "takes longest"
    ax.set_title(title or f"{worst.tenant} {verb}: {share:.0%} of it is {PHASES[biggest][0]}")
    fig.legend(loc="outside lower center", ncols=4, fontsize=8.5, handlelength=1.2)
    best, best_parts = drawn[-1]
    alt = (
        f"Stacked bars of the {how} time {'to first token' if first else 'per request'} for {len(drawn)} tenants"
        + (f" ({hidden} faster ones are not drawn)" if hidden else "")
        + f", split into {', '.join(phases)}. {worst.tenant} is slowest with {sum(parts) * factor:.3g} {unit}, "
        f"{share:.0%} of it {PHASES[biggest][0]}; the fastest drawn, {best.tenant}, takes "
        f"{sum(best_parts) * factor:.3g} {unit}."
    )
    return fig, alt
