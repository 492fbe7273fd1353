"""The charts of README.md and of `docs/`, by matplotlib, for light and dark pages.

A picture says of itself what it shows: `svg` writes the numbers and the words that are
in a figure into the picture's metadata, beside the version of matplotlib that drew it.
One version draws the same bytes for the same numbers: its ids are fixed, it has no
date, and its words are text, measured by the font that comes with matplotlib. Another
version may place a label elsewhere and shows the same, which `shown` reads back.

Figures are made without pyplot, so that no display is needed.
"""

import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH, HEIGHT = 560, 372  # in CSS pixels
POINT = 72 / 96  # of a pixel, at 96 pixels an inch
GIBIBYTE = 2**30
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
STYLE = {
    "svg.hashsalt": "xent_jax",
    "svg.fonttype": "none",
    # Widths are those of the first, which is wider than what stands in for it.
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 14 * POINT,
    "path.simplify": False,
}


class Theme(NamedTuple):
    """Colours on a transparent background."""

    text: str
    muted: str
    grid: str
    series: tuple[str, ...]


# On white, and on the dark greys of code hosts and of documentation themes.
THEMES = {
    "light": Theme(
        "#1f2328",
        "#57606a",
        "#d8dee4",
        ("#cf222e", "#9a6700", "#0969da", "#1a7f37", "#8250df"),
    ),
    "dark": Theme(
        "#f0f6fc",
        "#a3abb4",
        "#444c56",
        ("#ff7b72", "#e3b341", "#58a6ff", "#56d364", "#d2a8ff"),
    ),
}


def figure_of(width: int, height: int) -> Figure:
    """Returns an empty figure of a size in CSS pixels."""
    return Figure(figsize=(width / 96, height / 96))


def svg(draw: Callable[[Theme], Figure], theme: Theme, title: str) -> str:
    """Returns the text of a picture.

    Args:
      draw: makes the figure.
      theme: a value of `THEMES`.
      title: for those who do not see the picture.
    """
    with matplotlib.rc_context(STYLE):
        figure, file = draw(theme), io.StringIO()
        metadata = {
            "Title": title,
            "Description": json.dumps(_shown_by(figure), ensure_ascii=False),
            "Creator": f"matplotlib {matplotlib.__version__}",
            "Date": None,
        }
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    lines = (line.rstrip() for line in file.getvalue().splitlines())
    return "".join(f"{line}\n" for line in lines)


def _shown_by(figure: Figure) -> dict[str, Any]:
    """Returns the labelled lines and arrows of a figure, and its words."""
    lines, patches, words = {}, [], [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        for line in axes.lines:
            if not line.get_label().startswith("_"):
                lines[line.get_label()] = [
                    (float(x), float(y)) for x, y in line.get_xydata()
                ]
        patches += [patch.get_label() for patch in axes.patches if patch.get_label()]
        words += [axes.get_xlabel(), *(text.get_text() for text in axes.texts)]
    return {"lines": lines, "arrows": patches, "words": list(filter(None, words))}


def shown(picture: str) -> tuple[str, dict[str, Any]]:
    """Returns who drew a picture, and what it shows, from its text."""
    root = ElementTree.fromstring(picture)
    creator = next(root.iter(f"{DUBLIN_CORE}creator"))
    description = next(root.iter(f"{DUBLIN_CORE}description"))
    return "".join(creator.itertext()).strip(), json.loads(description.text)


class Line(NamedTuple):
    """A series of points.

    Attributes:
      label: in the legend.
      points: x and y.
      style: of matplotlib's `plot`.
    """

    label: str
    points: Sequence[tuple[float, float]]
    style: dict[str, Any]


def line_chart(
    lines: Sequence[Line], vertical: str, horizontal: str, theme: Theme
) -> tuple[Figure, Axes]:
    """Returns a figure of lines, with their names above it, and its axes."""
    figure = figure_of(WIDTH, HEIGHT)
    # Left, bottom, width, height.
    axes = figure.add_axes((0.105, 0.15, 0.865, 0.68))
    for line, colour in zip(lines, theme.series, strict=False):
        axes.plot(
            *zip(*line.points, strict=True),
            label=line.label,
            color=colour,
            linewidth=2,
            clip_on=False,
            solid_joinstyle="round",
            **line.style,
        )
    # Above the axis instead of turned beside it.
    figure.text(0.012, 0.945, vertical, color=theme.text)
    axes.set_xlabel(horizontal, color=theme.text, fontsize=14 * POINT)
    legend = figure.legend(
        loc="upper left",
        bbox_to_anchor=(-0.005, 0.935),
        ncols=len(lines),
        frameon=False,
        labelcolor=theme.text,
        handlelength=1.7,
        handletextpad=0.5,
        columnspacing=1.2,
    )
    for handle in legend.legend_handles:
        handle.set_marker("")
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", color=theme.muted, labelcolor=theme.muted, length=4)
    axes.tick_params(axis="y", which="both", length=0, labelcolor=theme.muted)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.muted)
    return figure, axes


def error_chart(errors: dict, theme: Theme) -> Figure:
    """Relative error of the float32 loss by the margin of the label."""
    found = [entry for entry in errors["margins"] if entry["dtype"] == "float32"]
    lines = [
        Line(
            name,
            [
                (entry["margin"], entry["errors"][name]["loss"])
                for entry in found
                if entry["margin"] <= 40
            ],
            # To show a line that lies under it.
            {"dashes": (4, 2)} if name == "PyTorch" else {},
        )
        for name in ("optax", "PyTorch", "xent_jax")
    ]
    figure, axes = line_chart(
        lines,
        "largest relative error of the float32 loss",
        "margin of the label over its best rival (difference of logits)",
        theme,
    )
    axes.set_xlim(0, 40)
    axes.set_xticks(range(0, 41, 10))
    axes.set_yscale("log")
    axes.set_ylim(1e-8, 1)
    exponents = {-8: "10⁻⁸", -6: "10⁻⁶", -4: "10⁻⁴", -2: "10⁻²", 0: "1"}
    axes.set_yticks([10.0**power for power in exponents], exponents.values())
    axes.set_yticks([], minor=True)
    axes.text(39.5, 0.16, "1: no digit is right", color=theme.muted, ha="right")
    return figure


def memory_chart(programs: dict, theme: Theme) -> Figure:
    """Memory of a head by the size of its vocabulary."""
    labels = {
        "optax": "logits, optax",
        "mean": 'reduction="mean"',
        "rows": "reduction=None",
    }
    lines = [
        Line(
            label,
            [
                (entry["classes"] / 1000, entry["temp_bytes"] / GIBIBYTE)
                for entry in programs["vocabularies"]
                if entry["form"] == form
            ],
            # Each is a measurement of its own.
            {"marker": "o", "markersize": 5},
        )
        for form, label in labels.items()
    ]
    figure, axes = line_chart(
        lines,
        "temporary memory on a TPU v5e, GiB",
        "vocabulary, thousands of classes",
        theme,
    )
    axes.set_xlim(0, 264)
    axes.set_xticks(range(0, 251, 50))
    axes.set_ylim(0, 12)
    axes.set_yticks(range(0, 13, 2))
    return figure


def classes_chart(records: Sequence[dict], mode: str, theme: Theme) -> Figure:
    """Time a logit by the number of classes."""
    lines = [
        Line(
            contender,
            [
                (entry["shape"][1], 1e9 * entry["median_seconds"] / math.prod(shape))
                for entry in records
                for shape in [entry["shape"]]
                if (entry["contender"], entry["mode"]) == (contender, mode)
            ],
            # Each is a measurement of its own.
            {"marker": "o", "markersize": 4},
        )
        for contender in ("optax", "torch.compile", "xent_jax")
    ]
    figure, axes = line_chart(lines, "nanoseconds a logit", "number of classes", theme)
    axes.set_xscale("log")
    axes.set_xlim(2, 131072)
    powers = range(1, 6)
    axes.set_xticks([10.0**power for power in powers], [f"{10**n:,}" for n in powers])
    axes.set_xticks([], minor=True)
    axes.set_yscale("log")
    axes.set_ylim(0.1, 10)
    axes.set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    axes.set_yticks([], minor=True)
    return figure


def charts(errors: dict, programs: dict, sweep: Sequence[dict]) -> dict[str, str]:
    """Returns the text of every chart by the name of its file."""
    drawn = {
        "value-by-classes": (
            lambda theme: classes_chart(sweep, "value", theme),
            "Time a logit of the loss of class ids in float32, from 2 to 131072 "
            "classes, beside optax and torch.compile.",
        ),
        "gradient-by-classes": (
            lambda theme: classes_chart(sweep, "value_and_grad", theme),
            "Time a logit of the loss of class ids and its gradient in float32, from 2 "
            "to 131072 classes, beside optax and torch.compile.",
        ),
        "error-by-margin": (
            lambda theme: error_chart(errors, theme),
            "Error of the loss against the margin of the label: optax and PyTorch lose "
            "all digits by a margin of 17, xent_jax keeps seven.",
        ),
        "memory-by-vocabulary": (
            lambda theme: memory_chart(programs, theme),
            "Memory of a language model's head against its vocabulary, for 8192 tokens "
            "of 2048 features: 11.7 GiB with logits at 256000 classes, 2.0 GiB and "
            "0.06 GiB without.",
        ),
    }
    return {
        f"{name}-{shade}.svg": svg(draw, theme, title)
        for name, (draw, title) in drawn.items()
        for shade, theme in THEMES.items()
    }
