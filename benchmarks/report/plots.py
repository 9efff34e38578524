"""Plots of the page as SVG: bars with whiskers, traces, a roofline.

Only the horizontal axis is scaled: places along it are percentages, heights and text are in pixels. So a plot fits any
width and its text keeps its size. Classes of the page's style sheet style all shapes, because the page's content
security policy forbids inline styles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .figures import significant

ROW, BAR = 30, 14
"""Height of a row of bars, and of the bar in it, in pixels."""

SHAPES = ("circle", "square", "triangle", "diamond", "hexagon", "star")
"""Markers of the roofline."""

_RADIUS, _BEYOND = 9.0, 60


@dataclass(frozen=True)
class Bar:
    """A bar.

    Attributes:
        value: The bar's length.
        low: Lower end of the whisker.
        high: Upper end; no whisker where it equals the lower one.
        title: Text for screen readers, and for a pointer on the bar.
        kind: ``"ours"``, ``"peer"`` or ``"reference"``.
        hatched: Whether the value was extrapolated.
        inner: Length of a darker part of the bar; 0 for none.
    """

    value: float
    low: float
    high: float
    title: str
    kind: str
    hatched: bool = False
    inner: float = 0.0


@dataclass(frozen=True)
class Line:
    """A line with a band about it.

    Attributes:
        x: Places, ascending.
        y: Values.
        low: Lower edge of the band.
        high: Upper edge.
        kind: ``"ours"``, ``"peer"`` or ``"reference"``.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    kind: str


@dataclass(frozen=True)
class Dot:
    """A stage in the roofline.

    Attributes:
        x: Operations a byte.
        y: Operations a second.
        title: Text for a pointer on the dot.
        shape: One of :data:`SHAPES`.
        precision: Class of the dot's colour.
        letter: The letter in the dot.
    """

    x: float
    y: float
    title: str
    shape: str
    precision: str
    letter: str


def ticks(top: float, most: int = 5) -> list[float]:
    """Round places from 0 to at most ``top``, no more than ``most`` + 1 of them."""
    if not top > 0:
        return [0.0]
    rough = top / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * index for index in range(int(top / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from ``low`` to ``high``; with their doubles and quintuples where there are few of them."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors: tuple[int, ...] = (1,) if len(exponents) > 4 else (1, 2, 5)
    places = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return [place for place in places if low * (1 - 1e-9) <= place <= high * (1 + 1e-9)]


def bar(bar: Bar, top: float, mark: float | None = None) -> str:
    """A row with one bar.

    Args:
        bar: The bar.
        top: Value at the right end of all rows.
        mark: Value of a line through all rows; ``None`` for no line.
    """
    middle = ROW / 2
    # Rows are as high as their text; lines reach beyond the row so that they meet those of its neighbours.
    parts = [_upright("grid", place, top, -_BEYOND, ROW + _BEYOND) for place in ticks(top)]
    pattern = " hatched" if bar.hatched else ""
    box = f'y="{middle - BAR / 2:g}" height="{BAR}" rx="2"'
    parts.append(f'<rect class="bar {bar.kind}{pattern}" x="0" {box} width="{_percent(bar.value, top)}"/>')
    if bar.inner:
        parts.append(f'<rect class="bar inner {bar.kind}" x="0" {box} width="{_percent(bar.inner, top)}"/>')
    if mark is not None:
        parts.append(_upright("mark", mark, top, -_BEYOND, ROW + _BEYOND))
    if bar.high > bar.low:
        left, right = _percent(bar.low, top), _percent(bar.high, top)
        for kind in ("halo", "whisker"):
            parts.append(f'<line class="{kind}" x1="{left}" x2="{right}" y1="{middle:g}" y2="{middle:g}"/>')
            parts += [_upright(kind, end, top, middle - 5, middle + 5) for end in (bar.low, bar.high)]
    return _svg("".join(parts), ROW, bar.title)


def axis(top: float, text: Mapping[float, str]) -> str:
    """Labels of the ticks below rows of bars, hidden from screen readers, which have the values already."""
    places = ticks(top)
    labels = []
    for place in places:
        anchor = "start" if place == 0 else "end" if place > 0.97 * top else "middle"
        labels.append(
            f'<text class="tick" x="{_percent(place, top)}" y="13" text-anchor="{anchor}">{text[place]}</text>'
        )
    return f'<svg class="plot axis" width="100%" height="18" aria-hidden="true">{"".join(labels)}</svg>'


def trace(
    lines: Sequence[Line],
    shown: int,
    top: float,
    text: Mapping[float, str],
    below: Mapping[float, str],
    title: str,
    height: int = 116,
) -> str:
    """One line in front of all others, which are faint.

    Args:
        lines: All lines.
        shown: Index of the line in front.
        top: Value at the upper end.
        text: Label of each of ``ticks(top, 3)``.
        below: Labels of places, from the first to the last that any line has.
        title: Text for screen readers.
        height: Pixels.
    """
    left, right = min(below), max(below)

    def across(x: float) -> float:
        return 1000 * (x - left) / (right - left) if right > left else 500.0

    def down(y: float) -> float:
        return round(height - (height - 8) * y / top, 2)

    levels = ticks(top, 3)
    grid = [f'<line class="grid" x1="0" x2="100%" y1="{down(y):g}" y2="{down(y):g}"/>' for y in levels]
    labels = [f'<text class="tick" x="-6" y="{down(y) + 4:g}" text-anchor="end">{text[y]}</text>' for y in levels]
    for x, label in below.items():
        anchor = "start" if x == left else "end" if x == right else "middle"
        labels.append(
            f'<text class="tick" x="{across(x) / 10:.2f}%" y="{height + 15}" text-anchor="{anchor}">{label}</text>'
        )
    paths, line = [], lines[shown]
    for index, other in enumerate(lines):
        if index != shown and len(other.x) > 1:
            paths.append(f'<polyline class="faint" points="{_points(map(across, other.x), map(down, other.y))}"/>')
    dots = []
    if len(line.x) > 1:
        upper = _points(map(across, line.x), map(down, line.high))
        lower = _points(map(across, reversed(line.x)), map(down, reversed(line.low)))
        paths.append(f'<polygon class="band {line.kind}" points="{upper} {lower}"/>')
        paths.append(f'<polyline class="line {line.kind}" points="{_points(map(across, line.x), map(down, line.y))}"/>')
    if len(line.x) <= 8:
        dots = [
            f'<circle class="dot {line.kind}" cx="{across(x) / 10:.2f}%" cy="{down(y):g}" r="3"/>'
            for x, y in zip(line.x, line.y, strict=True)
        ]
    inner = f'<svg width="100%" height="{height}" viewBox="0 0 1000 {height}" preserveAspectRatio="none">'
    return _svg("".join([*grid, inner, *paths, "</svg>", *labels, *dots]), height, title, "trace")


def roofline(
    dots: Sequence[Dot], peaks: Mapping[str, float], copy: float, title: str, description: str, height: int = 360
) -> str:
    """Stages below the ceilings of arithmetic and memory (Williams, Waterman and Patterson 2009, "Roofline").

    Args:
        dots: The stages.
        peaks: Operations a second by precision, at least one.
        copy: Bytes a second.
        title: Name of the plot.
        description: Text for screen readers.
        height: Pixels.
    """
    ridges = [peak / copy for peak in peaks.values()]
    left = min([*(dot.x for dot in dots), *ridges]) / 2.5
    right = max([*(dot.x for dot in dots), *ridges]) * 2.5
    low = min([*(dot.y for dot in dots), *peaks.values()]) / 2
    high = max([*(dot.y for dot in dots), *peaks.values()]) * 1.6

    def across(x: float) -> float:
        return 100 * math.log(x / left) / math.log(right / left)

    def down(y: float) -> float:
        return height * (1 - math.log(y / low) / math.log(high / low))

    parts = []
    for x in decades(left, right):
        place = f'x1="{across(x):.2f}%" x2="{across(x):.2f}%"'
        parts.append(f'<line class="grid" {place} y1="0" y2="{height}"/>')
        parts.append(f'<text class="tick" x="{across(x):.2f}%" y="{height + 16}" text-anchor="middle">{x:g}</text>')
    for y in decades(low, high):
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        name = significant(y / 1e9, 1)
        parts.append(f'<text class="tick" x="-8" y="{down(y) + 4:.1f}" text-anchor="end">{name}</text>')
    best = max(ridges)
    start = max(left, low / copy)
    parts.append(
        f'<line class="ceiling memory" x1="{across(start):.2f}%" x2="{across(best):.2f}%" '
        f'y1="{down(start * copy):.1f}" y2="{down(best * copy):.1f}"/>'
    )
    for precision, peak in sorted(peaks.items(), key=lambda item: item[1]):
        level = f"{down(peak):.1f}"
        # The label stands right of the ridge, where few stages are, unless the ridge is too far right.
        ridge = across(peak / copy)
        beside = f'x="{ridge:.2f}%" dx="10"' if ridge < 55 else 'x="100%" text-anchor="end"'
        parts.append(
            f'<line class="ceiling {precision}" x1="{across(peak / copy):.2f}%" x2="100%" y1="{level}" y2="{level}"/>'
            f'<text class="label {precision}" {beside} y="{down(peak) + 16:.1f}">{precision}: '
            f"{significant(peak / 1e9)} GFLOP/s</text>"
        )
    for dot in sorted(dots, key=lambda dot: dot.y):
        parts.append(
            f'<svg class="place" x="{across(dot.x):.2f}%" y="{down(dot.y):.1f}"><g class="{dot.precision}">'
            f"<title>{escape(dot.title)}</title>{marker(dot.shape)}"
            f'<text class="letter" y="3.5" text-anchor="middle">{escape(dot.letter)}</text></g></svg>'
        )
    return _svg("".join(parts), height, title, "roofline", description)


def marker(shape: str) -> str:
    """A marker of one of :data:`SHAPES`, centred on the origin."""
    if shape == "circle":
        return f'<circle class="marker" r="{_RADIUS:g}"/>'
    if shape == "star":
        corners = [(12.0 if index % 2 == 0 else 7.0, 36.0 * index - 90) for index in range(10)]
    else:
        count, turn, radius = {
            "square": (4, 45, 12.0),
            "triangle": (3, -90, 13.0),
            "diamond": (4, 0, 12.5),
            "hexagon": (6, 0, 10.5),
        }[shape]
        corners = [(radius, turn + 360 * index / count) for index in range(count)]
    points = _points(
        (radius * math.cos(math.radians(angle)) for radius, angle in corners),
        (radius * math.sin(math.radians(angle)) for radius, angle in corners),
    )
    return f'<polygon class="marker" points="{points}"/>'


def _svg(body: str, height: int, title: str, kind: str = "", description: str = "") -> str:
    text = f"<title>{escape(title)}</title>" + (f"<desc>{escape(description)}</desc>" if description else "")
    return f'<svg class="plot {kind}" role="img" width="100%" height="{height}">{text}{body}</svg>'


def _upright(kind: str, value: float, top: float, begin: float, end: float) -> str:
    place = _percent(value, top)
    return f'<line class="{kind}" x1="{place}" x2="{place}" y1="{begin:g}" y2="{end:g}"/>'


def _percent(value: float, top: float) -> str:
    return f"{100 * min(1.0, max(0.0, value / top)):.3f}%" if top > 0 else "0%"


def _points(x: Iterable[float], y: Iterable[float]) -> str:
    return " ".join(f"{across:.2f},{down:.2f}" for across, down in zip(x, y, strict=True))
