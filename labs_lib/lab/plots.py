"""One plotting voice: a colour, marker and line per method everywhere; figures with alt text.

Colours are Okabe & Ito's colour-blind safe ones plus a brown; related methods share one, and marker and line
tell them apart, so a figure survives a grey printer too.
"""

import base64
import html
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from labs_lib.errors import LabsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE_FILE = Path(__file__).with_name("peftlabs.mplstyle")

BLACK, GREY, BLUE, SKY = "#000000", "#5F5F5F", "#0072B2", "#56B4E9"
GREEN, ORANGE, VERMILLION, PURPLE, BROWN = "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#7F4F24"


class Look(NamedTuple):
    """How a method is drawn and called."""

    label: str
    color: str
    marker: str
    linestyle: str = "-"


LOOKS: dict[str, Look] = {
    # what methods are compared with
    "base": Look("base model", GREY, "x", ":"),
    "guide": Look("guide in the prompt", GREY, "P", "-."),
    "full": Look("full fine-tuning", BLACK, "o"),
    # low-rank adapters
    "lora": Look("LoRA", BLUE, "o"),
    "qlora": Look("QLoRA", BLUE, "s", "--"),
    "dora": Look("DoRA", VERMILLION, "^"),
    "qdora": Look("QDoRA", VERMILLION, "s", "--"),
    "lora_plus": Look("LoRA+", SKY, ">"),
    "rslora": Look("rsLoRA", SKY, "D", "--"),
    "adalora": Look("AdaLoRA", SKY, "v", "-."),
    "pissa": Look("PiSSA", SKY, "s", ":"),
    "vera": Look("VeRA", BLUE, "<", "-."),
    "tied_lora": Look("Tied-LoRA", BLUE, "d", ":"),
    "loha": Look("LoHa", VERMILLION, "p", "-."),
    "lokr": Look("LoKr", VERMILLION, "h", ":"),
    # soft prompts
    "prompt": Look("prompt tuning", ORANGE, "P", "--"),
    "prefix": Look("prefix tuning", ORANGE, "s"),
    "p_tuning": Look("P-tuning", ORANGE, "d", ":"),
    "llama_adapter": Look("LLaMA-Adapter", ORANGE, "v", "-."),
    # modules put in between, and rescaling
    "adapter": Look("bottleneck adapter", PURPLE, "h"),
    "parallel_adapter": Look("parallel adapter", PURPLE, "H", "--"),
    "ia3": Look("IA3", GREEN, "X"),
    "bitfit": Look("BitFit", GREEN, "+", ":"),
    "ln_tuning": Look("LN tuning", GREEN, "|", "-."),
    # full-rank training with less memory
    "galore": Look("GaLore", BROWN, "*"),
    "galore_8bit": Look("GaLore 8-bit", BROWN, "s", "--"),
    # rotations, sparse and spectral updates
    "oft": Look("OFT", PURPLE, "D", "-."),
    "boft": Look("BOFT", PURPLE, "d", ":"),
    "shira": Look("SHiRA", GREEN, "D", "--"),
    "miss": Look("MiSS", BROWN, "v", "-."),
    "fourierft": Look("FourierFT", BROWN, "p", ":"),
    "vblora": Look("VB-LoRA", BLUE, "*", ":"),
    "lily": Look("Lily", GREEN, "h", ":"),
    "randlora": Look("RandLoRA", SKY, "p", ":"),
    # mixtures
    "xlora": Look("X-LoRA", BLACK, "X", "--"),
    "mixlora": Look("MixLoRA", BLACK, "D", "-."),
    "mole": Look("MoLE", BLACK, "^", ":"),
}


def look(method: str) -> Look:
    """The look of a method, for instance `look("lora").color`."""
    try:
        return LOOKS[method]
    except KeyError:
        raise LabsError(f"No colour is set for method {method!r}; there are: {', '.join(LOOKS)}.") from None


def style(method: str, **changes: Any) -> dict[str, Any]:
    """Keyword arguments for `ax.plot`: colour, marker, line and label of a method; `changes` overrides them.

    >>> ax.plot(steps, loss, **style("dora", marker=""))  # doctest: +SKIP
    """
    chosen = look(method)
    solid = chosen.marker in "osDdv^<>phH"  # a white edge sets these apart from the line, but eats thin ones
    return {
        "color": chosen.color,
        "marker": chosen.marker,
        "linestyle": chosen.linestyle,
        "label": chosen.label,
        "markersize": 9 if chosen.marker == "*" else 6.5,
        "markeredgecolor": "white" if solid else chosen.color,
        **changes,
    }


def use_style() -> None:
    """Switch matplotlib to the course's style; `setup()` does it once per notebook."""
    import matplotlib.pyplot as plt

    plt.style.use(STYLE_FILE)


def show(fig: "Figure", alt: str) -> None:
    """Display a figure with its alt text, and close it. Every figure of the course is shown with this.

    `alt` says what is seen, for someone who does not see it: the axes and the finding, in a sentence or two.
    It goes into the output's metadata (from which `labs course` writes its report), its plain-text form and the
    PNG itself. JupyterLab reads none of these yet, so the text also follows the image, hidden from sight but
    not from a screen reader.
    Outside a notebook nothing is displayed; with LABS_FIGURES set to a folder, a script's figures are kept there.
    """
    import matplotlib.pyplot as plt

    if len(alt.split()) < 4:
        raise LabsError("A figure needs alt text: say in a sentence what is on the axes and what is found.")
    png = _png(fig, alt)
    width = round(fig.get_figwidth() * 96)  # drawn finer than shown, so that it is sharp on a dense screen
    plt.close(fig)
    if _in_notebook():
        from IPython.display import publish_display_data

        bundle = {"image/png": base64.b64encode(png).decode("ascii"), "text/plain": alt}
        publish_display_data(bundle, metadata={"image/png": {"alt": alt, "width": width}})
        spoken = f'<div style="{_UNSEEN}">Figure: {html.escape(alt)}</div>'
        publish_display_data({"text/html": spoken, "text/plain": ""})
    elif folder := os.environ.get("LABS_FIGURES"):
        directory = Path(folder)
        directory.mkdir(parents=True, exist_ok=True)
        script = Path(sys.argv[0]).stem or "figure"
        number = len(list(directory.glob(f"{script}-*.png"))) + 1
        (directory / f"{script}-{number:02d}.png").write_bytes(png)


_UNSEEN = "position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap"


def _png(fig: "Figure", alt: str) -> bytes:
    """256 colours are enough for a chart and take a third of the bytes; no version or date is written."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    buffer, small, description = io.BytesIO(), io.BytesIO(), PngInfo()
    fig.savefig(buffer, format="png")
    description.add_text("Description", alt)
    Image.open(buffer).convert("RGB").quantize(256).save(small, "PNG", optimize=True, pnginfo=description)
    return small.getvalue()


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return get_ipython() is not None


def finding(ax: "Axes", title: str, x: str = "", y: str = "") -> None:
    """Title that states the finding, and labels with units: `finding(ax, "Rank 8 is enough", "rank", "recall (%)")`."""
    ax.set_title(title)
    if x:
        ax.set_xlabel(x)
    if y:
        ax.set_ylabel(y)


def log_axis(ax: "Axes", values: Any, axis: str = "x") -> None:
    """Logarithmic axis with these values as ticks, written out: ranks, sizes, learning rates."""
    scale, ticks = (ax.set_xscale, ax.set_xticks) if axis == "x" else (ax.set_yscale, ax.set_yticks)
    scale("log")
    ticks(list(values), [f"{value:,g}" if value >= 1e-3 else f"{value:.0e}" for value in values])
    ticks([], minor=True)


def band(ax: "Axes", x: Any, middle: Any, lo: Any, hi: Any, method: str, **changes: Any) -> None:
    """A method's line with its interval as a band of the same colour."""
    ax.plot(x, middle, **style(method, **changes))
    ax.fill_between(x, lo, hi, color=look(method).color, alpha=0.15, linewidth=0)


def bars(ax: "Axes", values: dict[str, Any], unit: str = "") -> None:
    """Horizontal bars, one per method, highest on top; an Estimate is drawn with its interval."""
    middle = {method: getattr(value, "value", value) for method, value in values.items()}
    order = sorted(values, key=lambda method: middle[method])
    for row, method in enumerate(order):
        ax.barh(row, middle[method], color=look(method).color, height=0.65)
        end = middle[method]
        if hasattr(values[method], "ci"):
            lo, hi = values[method].ci
            for color, linewidth in (("white", 4), ("#333333", 1.5)):  # dark on white, to show on any bar
                ax.plot([lo, hi], [row, row], color=color, linewidth=linewidth, solid_capstyle="butt")
            end = max(end, hi)
        ax.annotate(
            f"{middle[method]:.3g}",
            (end, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            size=9,
        )
    ax.set_yticks(range(len(order)), [look(method).label for method in order])
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.1)
    if unit:
        ax.set_xlabel(unit)


def reference(ax: "Axes", y: float, text: str) -> None:
    """A thin dashed line at a value to compare with (chance, the base model, the chapter's number)."""
    ax.axhline(y, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    ax.annotate(
        text,
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        size=8.5,
        color="#555555",
    )
