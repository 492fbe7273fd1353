"""Line charts as SVG text, the same bytes for the same numbers on every machine.

A plotting library would draw them too, but its output differs between versions, and a
test compares the committed pictures with what their data gives.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 560, 372
LEFT, RIGHT, TOP, BOTTOM = 56, 22, 62, 56
FONT = "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


class Theme(NamedTuple):
    """Colours on a transparent background."""

    text: str
    muted: str
    grid: str
    series: tuple[str, str, str]


# On white, and on the dark greys of code hosts and of documentation themes.
THEMES = {
    "light": Theme("#1f2328", "#57606a", "#d8dee4", ("#cf222e", "#9a6700", "#0969da")),
    "dark": Theme("#f0f6fc", "#a3abb4", "#444c56", ("#ff7b72", "#e3b341", "#58a6ff")),
}


class Line(NamedTuple):
    """A series of points.

    Attributes:
      label: in the legend.
      points: x and y.
      dashed: to show a line that lies under it.
      markers: whether each point is a measurement of its own.
    """

    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    markers: bool = False


class Axis(NamedTuple):
    """One axis: what it shows, its ends, and where it has labels.

    Attributes:
      title: with the unit.
      ends: the lowest and the highest number.
      ticks: numbers and their labels.
      logarithmic: whether equal distances are equal ratios.
    """

    title: str
    ends: tuple[float, float]
    ticks: Sequence[tuple[float, str]]
    logarithmic: bool = False

    def fraction(self, number: float) -> float:
        """Where a number lies, from 0 to 1; numbers beyond the ends lie at them."""
        low, high = self.ends
        number = min(max(number, low), high)
        if self.logarithmic:
            return math.log(number / low) / math.log(high / low)
        return (number - low) / (high - low)


def _x(axis: Axis, number: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * axis.fraction(number)


def _y(axis: Axis, number: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis.fraction(number)


def _text(x: float, y: float, words: str, colour: str, **attributes: str) -> str:
    named = "".join(f' {key}="{value}"' for key, value in attributes.items())
    place = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {place} fill="{colour}"{named}>{escape(words)}</text>'


def _axes(horizontal: Axis, vertical: Axis, theme: Theme) -> list[str]:
    parts = []
    for number, label in vertical.ticks:
        y = _y(vertical, number)
        parts += [
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{theme.grid}"/>',
            _text(LEFT - 8, y + 5, label, theme.muted, **{"text-anchor": "end"}),
        ]
    for number, label in horizontal.ticks:
        x, bottom = _x(horizontal, number), HEIGHT - BOTTOM
        parts += [
            f'<path d="M{x:.1f} {bottom}v5" stroke="{theme.muted}"/>',
            _text(x, bottom + 21, label, theme.muted, **{"text-anchor": "middle"}),
        ]
    base = HEIGHT - BOTTOM
    parts.append(f'<path d="M{LEFT} {base}H{WIDTH - RIGHT}" stroke="{theme.muted}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    centred = {"text-anchor": "middle"}
    parts.append(_text(middle, HEIGHT - 10, horizontal.title, theme.text, **centred))
    parts.append(_text(8, 18, vertical.title, theme.text))
    return parts


def _legend(lines: Sequence[Line], theme: Theme) -> list[str]:
    parts, x = [], 8.0
    for line, colour in zip(lines, theme.series, strict=True):
        dash = ' stroke-dasharray="7 4"' if line.dashed else ""
        stroke = f'stroke="{colour}" stroke-width="2.5"{dash}'
        parts.append(f'<path d="M{x:.1f} 39h24" {stroke}/>')
        parts.append(_text(x + 30, 44, line.label, theme.text))
        # Fonts differ; 8.3 px a letter is wide enough for all of those named.
        x += 30 + 8.3 * len(line.label) + 14
    return parts


def _line(line: Line, horizontal: Axis, vertical: Axis, colour: str) -> list[str]:
    places = [(_x(horizontal, a), _y(vertical, b)) for a, b in line.points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="7 4"' if line.dashed else ""
    joined = 'stroke-width="2.5" stroke-linejoin="round" fill="none"'
    parts = [f'<path d="M{path}" stroke="{colour}" {joined}{dash}/>']
    if line.markers:
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
            for x, y in places
        ]
    return parts


def line_chart(
    lines: Sequence[Line],
    horizontal: Axis,
    vertical: Axis,
    theme: Theme,
    title: str,
    note: tuple[float, float, str] | None = None,
) -> str:
    """Returns the text of an SVG picture.

    Args:
      lines: three of them, the last drawn on top.
      horizontal: axis.
      vertical: axis.
      theme: a value of `THEMES`.
      title: for those who do not see the picture.
      note: words in the picture, and where they end.
    """
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" font-family="{FONT}" '
        'font-size="15">',
        f"<title>{escape(title)}</title>",
        *_axes(horizontal, vertical, theme),
        *_legend(lines, theme),
    ]
    for line, colour in zip(lines, theme.series, strict=True):
        parts += _line(line, horizontal, vertical, colour)
    if note is not None:
        x, y = _x(horizontal, note[0]), _y(vertical, note[1])
        parts.append(_text(x, y, note[2], theme.muted, **{"text-anchor": "end"}))
    return "\n".join([*parts, "</svg>", ""])
