"""Charts as inline SVG: axes, lines, bands, points with intervals; each chart drawn for several widths."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from hf_value_steer.evaluation.axes import Axis


Span = Sequence[float] | None
Box = tuple[float, float, float, float]
Spot = tuple[str, float, float]  # where a text is anchored, and there

# Name and size of the drawings of one chart; `report.html` shows the one that fits.
HALF = (("small", 340, 270), ("medium", 560, 350))
STRIP = (("small", 340, 165), ("medium", 640, 165), ("large", 1080, 175))

_TOP, _RIGHT, _LEFT = 30, 20, 44
_NAMED, _UNNAMED = 44, 26  # below an x axis with and without a label
_LETTER = 6.6  # width of a letter, about


@dataclass(frozen=True)
class Point:
    """One point: where it is, its intervals, a label beside it, and a text on hover, tap or focus."""

    x: float
    y: float
    tip: str = ""
    label: str = ""
    x_interval: Span = None
    y_interval: Span = None
    radius: float = 4.0
    ring: bool = False


@dataclass(frozen=True)
class Series:
    """Points that belong together. `style` is a CSS class; `line` is `""`, `"straight"` or `"step"`."""

    name: str
    points: Sequence[Point]
    style: str = "s0"
    line: str = "straight"
    marker: str = "circle"


@dataclass(frozen=True)
class Rule:
    """A reference: a horizontal line at `y`, or the diagonal."""

    label: str
    y: float | None = None


@dataclass(frozen=True)
class Chart:
    """What to draw, whatever the size.

    Args:
        name (`str`): unique in the page.
        title (`str`), note (`str`): what it shows, and how to read it.
        x, y ([`Axis`]): the axes.
        series: lines and points, in the order of drawing.
        bands: `(style, [(x, low, high), ...])`.
        rules: references.
        barred (`float`, *optional*): up to this x there can be no point, for the reason `barred_label`.
        sizes: name, width and height of each drawing.
        keyed (`bool`): with a legend.
    """

    name: str
    title: str
    note: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    bands: Sequence[tuple[str, Sequence[tuple[float, float, float]]]] = ()
    rules: Sequence[Rule] = ()
    barred: float | None = None
    barred_label: str = ""
    sizes: Sequence[tuple[str, int, int]] = HALF
    keyed: bool = False


def figure(chart: Chart) -> str:
    """The chart as a `<figure>`: one drawing for each width."""
    drawings = "".join(_Drawing(chart, *size).html() for size in chart.sizes)
    note = f"<small>{escape(chart.note)}</small>" if chart.note else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b>{note}</figcaption>'
        f'<div class="drawings">{drawings}</div>{legend(chart.series) if chart.keyed else ""}</figure>'
    )


def legend(series: Sequence[Series]) -> str:
    """Marker and name of each series."""
    items = ""
    for one in series:
        line = '<path class="line" d="M-8,0H8"/>' if one.line else ""
        items += (
            f'<li><svg viewBox="-8 -8 16 16" aria-hidden="true" class="{one.style}">{line}'
            f"{_marker(one.marker, 0, 0, 4.5)}</svg>{escape(one.name)}</li>"
        )
    return f'<ul class="series">{items}</ul>'


def _marker(kind: str, x: float, y: float, r: float) -> str:
    if kind == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "up": [(0, -1.3), (1.2, 0.9), (-1.2, 0.9)],
        "down": [(0, 1.3), (1.2, -0.9), (-1.2, -0.9)],
        "cross": [(-0.35, -1.2), (0.35, -1.2), (0.35, -0.35), (1.2, -0.35), (1.2, 0.35), (0.35, 0.35), (0.35, 1.2),
                  (-0.35, 1.2), (-0.35, 0.35), (-1.2, 0.35), (-1.2, -0.35), (-0.35, -0.35)],
    }[kind]  # fmt: skip
    return f'<path class="mark" d="M{"L".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners)}Z"/>'


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


class _Drawing:
    """One chart in one size: an SVG, and over it a focusable spot for each point that has a tip."""

    def __init__(self, chart: Chart, size: str, width: int, height: int):
        self.chart, self.size, self.width, self.height = chart, size, width, height
        self.left, self.right, self.top = _LEFT, width - _RIGHT, _TOP
        self.bottom = height - (_NAMED if chart.x.label else _UNNAMED)
        self.points = [(series, point) for series in chart.series for point in series.points]
        self.taken = [self._around(point) for _, point in self.points if point.radius]  # what text must not cover
        self.crossed = list(self._strokes())  # what it should not cover

    def html(self) -> str:
        name, chart = f"{self.chart.name}-{self.size}", self.chart
        series = ", ".join(dict.fromkeys(one.name for one in chart.series))
        axes = " against ".join(filter(None, (chart.y.label, chart.x.label)))
        said = f"{axes}: {series}. {chart.note}".strip()
        parts = [*self._barred(), *self._axes(), *self._bands(), *self._rules(), *self._lines(), *self._whiskers()]
        drawn = "".join([*parts, *self._marks(), *self._labels()])
        return (
            f'<div class="plot {self.size}"><svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-labelledby="{name}-t {name}-d"><title id="{name}-t">{escape(chart.title)}</title>'
            f'<desc id="{name}-d">{escape(said)}</desc>{drawn}</svg>{self._spots()}</div>'
        )

    def _x(self, value: float) -> float:
        return self.left + self.chart.x.place(value) * (self.right - self.left)

    def _y(self, value: float) -> float:
        return self.bottom - self.chart.y.place(value) * (self.bottom - self.top)

    def _axes(self) -> list[str]:
        parts, x, y = [], self.chart.x, self.chart.y
        for tick in y.ticks:
            at = self._y(tick)
            parts.append(f'<path class="grid" d="M{self.left},{at:.1f}H{self.right}"/>')
            parts.append(f'<text class="tick end" x="{self.left - 7}" y="{at + 4:.1f}">{y.text(tick)}</text>')
        free = float("-inf")
        for tick in x.ticks:
            at, half = self._x(tick), len(x.text(tick)) * _LETTER / 2
            parts.append(f'<path class="axis" d="M{at:.1f},{self.bottom}v4"/>')
            if at - half > free:
                parts.append(f'<text class="tick mid" x="{at:.1f}" y="{self.bottom + 18}">{x.text(tick)}</text>')
                free = at + half + 6
        parts.append(f'<path class="axis" d="M{self.left},{self.bottom}H{self.right}"/>')
        parts.append(f'<text class="name" x="0" y="14">{escape(y.label)}</text>')
        parts.append(f'<text class="name end" x="{self.right}" y="{self.height - 6}">{escape(x.label)}</text>')
        return parts

    def _barred(self) -> list[str]:
        if self.chart.barred is None:
            return []
        end, label = self._x(self.chart.barred), self.chart.barred_label
        self.taken.append((self.left, self.bottom - 20, self.left + len(label) * _LETTER, self.bottom))
        return [
            f'<rect class="barred" x="{self.left}" y="{self.top}" width="{end - self.left:.1f}" '
            f'height="{self.bottom - self.top}"/>',
            f'<text class="said" x="{self.left + 6}" y="{self.bottom - 8}">{escape(label)}</text>',
        ]

    def _bands(self) -> list[str]:
        parts = []
        for style, points in self.chart.bands:
            upper = [f"{self._x(x):.1f},{self._y(high):.1f}" for x, _, high in points]
            lower = [f"{self._x(x):.1f},{self._y(low):.1f}" for x, low, _ in reversed(points)]
            parts.append(f'<path class="band {style}" d="M{"L".join([*upper, *lower])}Z"/>')
        return parts

    def _rules(self) -> list[str]:
        parts = []
        for rule in self.chart.rules:
            start = self.bottom if rule.y is None else self._y(rule.y)
            end = self.top if rule.y is None else start
            parts.append(f'<path class="rule" d="M{self.left},{start:.1f}L{self.right},{end:.1f}"/>')
            spots = [("end", self.right - 2), ("", self.left + 8), ("mid", (self.left + self.right) / 2)]
            parts += self._text("said", rule.label, [(*spot, start + dy) for spot in spots for dy in (-10, 11)])
        return parts

    def _strokes(self) -> Iterator[Box]:
        """Small boxes along the lines and whiskers."""
        segments: list[Sequence[tuple[float, float]]] = []
        for series in self.chart.series:
            places = [(self._x(point.x), self._y(point.y)) for point in series.points]
            if series.line == "step":
                places = [place for one, two in pairwise(places) for place in (one, (two[0], one[1]))] + places[-1:]
            segments += list(pairwise(places)) if series.line else []
        for _, point in self.points:
            if point.y_interval:
                segments.append([(self._x(point.x), self._y(bound)) for bound in point.y_interval])
        for (x0, y0), (x1, y1) in segments:
            steps = max(int(math.hypot(x1 - x0, y1 - y0) / 5), 1)
            for step in range(steps + 1):
                x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
                yield (x - 1.5, y - 1.5, x + 1.5, y + 1.5)

    def _lines(self) -> list[str]:
        parts = []
        for series in self.chart.series:
            if series.line and len(series.points) > 1:
                places = [(f"{self._x(point.x):.1f}", f"{self._y(point.y):.1f}") for point in series.points]
                path = "".join(f"H{x}V{y}" if series.line == "step" else f"L{x},{y}" for x, y in places[1:])
                parts.append(f'<path class="line {series.style}" d="M{",".join(places[0])}{path}"/>')
        return parts

    def _whiskers(self) -> list[str]:
        parts = []
        for series, point in self.points:
            path = ""
            if point.x_interval:
                low, high = (self._x(bound) for bound in point.x_interval)
                path += f"M{low:.1f},{self._y(point.y):.1f}H{high:.1f}"
            if point.y_interval:
                low, high = (self._y(bound) for bound in point.y_interval)
                path += f"M{self._x(point.x):.1f},{low:.1f}V{high:.1f}"
            if path:
                parts.append(f'<path class="whisker {series.style}" d="{path}"/>')
        return parts

    def _marks(self) -> list[str]:
        parts = []
        for series, point in self.points:
            if point.radius:
                x, y = self._x(point.x), self._y(point.y)
                ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="{point.radius + 4:.1f}"/>'
                mark = _marker(series.marker, x, y, point.radius)
                parts.append(f'<g class="{series.style}">{ring if point.ring else ""}{mark}</g>')
        return parts

    def _labels(self) -> list[str]:
        """Labels beside their points; those that would cover a mark or another text are left to the tips."""
        parts = []
        for series, point in sorted(self.points, key=lambda pair: not pair[1].ring):
            left, top, right, bottom = self._around(point)
            x, y = (left + right) / 2, (top + bottom) / 2
            spots = [
                ("", right + 2, y), ("", right, top - 4), ("", right, bottom + 4), ("end", left - 2, y),
                ("end", left, top - 4), ("end", left, bottom + 4), ("mid", x, top - 8), ("mid", x, bottom + 8),
            ]  # fmt: skip
            parts += self._text(f"label {series.style}", point.label, spots, limit=12)
        return parts

    def _text(self, style: str, text: str, spots: Sequence[Spot], limit: float = math.inf) -> list[str]:
        """A text at the spot where it covers least; none if even there it covers more than `limit` of something."""
        wide, boxes = len(text) * _LETTER, []
        for anchor, x, y in spots if text else ():
            left = x - {"": 0.0, "mid": 0.5, "end": 1.0}[anchor] * wide
            box = (left, y - 7, left + wide, y + 7)
            if box[0] > self.left and box[2] < self.width and box[1] > self.top - 14:
                hidden = sum(_overlap(box, each) for each in self.taken)
                crossed = sum(_overlap(box, each) for each in self.crossed)
                boxes.append((hidden + 0.3 * crossed, hidden, box, anchor, x, y))
        best = min(boxes, key=lambda each: each[0], default=None)
        if best is None or best[1] > limit:
            return []
        _, _, box, anchor, x, y = best
        self.taken.append(box)
        return [f'<text class="{style} {anchor}" x="{x:.1f}" y="{y + 4:.1f}">{escape(text)}</text>']

    def _around(self, point: Point) -> Box:
        x, y, r = self._x(point.x), self._y(point.y), point.radius + (5 if point.ring else 2)
        return (x - r, y - r, x + r, y + r)

    def _spots(self) -> str:
        spots = ""
        for _, point in self.points:
            if point.tip:
                x, y = 100 * self._x(point.x) / self.width, 100 * self._y(point.y) / self.height
                spots += (
                    f'<span class="spot" tabindex="0" role="img" aria-label="{escape(point.tip)}" '
                    f'style="--x:{x:.2f}%;--y:{y:.2f}%"><i></i><span class="tip">{escape(point.tip)}</span></span>'
                )
        return spots
