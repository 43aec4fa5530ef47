"""Looks are distinct, also to the colour-blind and in grey; figures carry their alt text."""

import base64
import itertools

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")
import matplotlib.pyplot as plt

from labs_lib.errors import LabsError
from labs_lib.lab import plots
from labs_lib.measure import Estimate

# Machado, Oliveira & Fernandes (2009), severity 1, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def lab(colour, matrix):
    """CIE L*a*b* of a colour as someone with that vision sees it."""
    rgb = np.array(mpl.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(matrix @ linear, 0, 1)
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ linear
        / np.array([0.9505, 1.0, 1.089])
    )
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_every_look_is_one_of_a_kind():
    looks = plots.LOOKS.values()
    assert len({look.label for look in looks}) == len(plots.LOOKS) >= 20
    assert len({(look.color, look.marker) for look in looks}) == len(plots.LOOKS)
    assert len({(look.color, look.linestyle) for look in looks if look.linestyle == "-"}) == sum(
        look.linestyle == "-" for look in looks
    )


@pytest.mark.parametrize("vision", VISION)
def test_colours_differ_for_everyone(vision):
    colours = {look.color for look in plots.LOOKS.values()}
    for a, b in itertools.combinations(sorted(colours), 2):
        distance = np.linalg.norm(lab(a, VISION[vision]) - lab(b, VISION[vision]))
        assert distance > 15, f"{a} and {b} look alike ({distance:.0f}) to {vision} eyes"


def test_colours_are_seen_on_white():
    for name, look in plots.LOOKS.items():
        assert lab(look.color, VISION["normal"])[0] < 75, f"{name} is too light"


def test_the_course_s_methods_have_a_look():
    chapter = {
        "full",
        "lora",
        "qlora",
        "dora",
        "lora_plus",
        "rslora",
        "adalora",
        "prompt",
        "prefix",
        "adapter",
        "ia3",
    }
    assert chapter | {"galore", "llama_adapter", "base", "guide"} <= set(plots.LOOKS)
    with pytest.raises(LabsError, match="'lorra'; there are: base"):
        plots.look("lorra")


def test_style_is_what_plot_takes():
    _, ax = plt.subplots()
    (line,) = ax.plot([1, 2], [1, 2], **plots.style("dora", linewidth=3))
    assert line.get_label() == "DoRA" and line.get_color() == plots.VERMILLION and line.get_linewidth() == 3
    for name in plots.LOOKS:
        ax.plot([1], [1], **plots.style(name))
    plt.close("all")


def test_style_file_loads():
    with plt.rc_context():
        plots.use_style()
        assert mpl.rcParams["axes.titlelocation"] == "left"
        assert not mpl.rcParams["axes.spines.top"]
        assert mpl.rcParams["axes.titleweight"] == "bold"


@pytest.fixture
def figure():
    fig, ax = plt.subplots(figsize=(5, 3))
    ax.plot([1, 2, 3], [1, 2, 3], **plots.style("lora"))
    plots.finding(ax, "It rises", "rank", "recall (%)")
    yield fig
    plt.close("all")


ALT = "Recall against rank: it rises from 1 to 3 %."


@pytest.fixture
def shown(figure):
    """What a notebook receives when it shows the figure, from a real IPython shell in this process."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    InteractiveShell.instance()
    try:
        with capture_output() as captured:
            plots.show(figure, alt=ALT)
    finally:
        InteractiveShell.clear_instance()
    return captured.outputs


def test_show_publishes_image_and_alt_text(shown):
    image, spoken = shown
    assert image.data["text/plain"] == image.metadata["image/png"]["alt"] == ALT
    assert image.metadata["image/png"]["width"] == 480
    png = base64.b64decode(image.data["image/png"])
    assert png.startswith(b"\x89PNG") and ALT.encode() in png
    assert ALT in spoken.data["text/html"]
    assert not plt.get_fignums(), "closed, so that it is not shown twice"


@pytest.mark.parametrize("alt", ["", "   ", "a plot", "Figure 1"])
def test_a_figure_without_alt_text_is_refused(figure, alt):
    with pytest.raises(LabsError, match="alt text"):
        plots.show(figure, alt=alt)


def test_a_script_keeps_its_figures_only_when_asked(figure, monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "_in_notebook", lambda: False)
    monkeypatch.delenv("LABS_FIGURES", raising=False)
    plots.show(figure, alt=ALT)
    monkeypatch.setenv("LABS_FIGURES", str(tmp_path / "figures"))
    for _ in range(2):
        plots.show(figure, alt=ALT)
    first, second = sorted((tmp_path / "figures").iterdir())
    assert first.name.endswith("-01.png") and second.name.endswith("-02.png")
    assert first.read_bytes() == second.read_bytes(), "the same figure is the same bytes"


def test_band_bars_and_axes_draw_what_they_are_given():
    _, (ax, bars, log) = plt.subplots(1, 3)
    plots.band(ax, [1, 2, 4], [1, 2, 3], [0, 1, 2], [2, 3, 4], "prefix")
    assert ax.lines[0].get_color() == plots.ORANGE and len(ax.collections) == 1
    plots.reference(ax, 1.5, "chance")
    assert ax.texts[0].get_text() == "chance"

    plots.bars(bars, {"lora": Estimate(95, 92, 97, 5), "ia3": 22.0, "full": 98.0}, "compliance (%)")
    assert [label.get_text() for label in bars.get_yticklabels()] == ["IA3", "LoRA", "full fine-tuning"]
    assert [bar.get_width() for bar in bars.patches] == [22, 95, 98]
    assert bars.get_xlabel() == "compliance (%)"
    assert list(bars.lines[-1].get_xdata()) == [92, 97]

    plots.log_axis(log, [1, 8, 64])
    assert [label.get_text() for label in log.get_xticklabels()] == ["1", "8", "64"]
    plots.log_axis(log, [1e-4, 1e-2], axis="y")
    assert [label.get_text() for label in log.get_yticklabels()] == ["1e-04", "0.01"]
    plt.close("all")
