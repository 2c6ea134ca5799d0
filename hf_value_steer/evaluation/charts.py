"""Charts: axes, lines, bands, points with intervals; laid out for several widths, and drawn by `chart.html`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hf_value_steer.evaluation.axes import Axis


Span = Sequence[float] | None
Box = tuple[float, float, float, float]
Spot = tuple[str, float, float]  # where a text is anchored, and there
Label = tuple[str, str, float, float]  # a text, its CSS classes, and where it is

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

    @property
    def drawings(self) -> list["Drawing"]:
        """One for each width."""
        return [Drawing(self, *size) for size in self.sizes]


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


class Drawing:
    """Where everything in one chart of one size lies."""

    def __init__(self, chart: Chart, size: str, width: int, height: int):
        self.chart, self.size, self.width, self.height = chart, size, width, height
        self.left, self.right, self.top = _LEFT, width - _RIGHT, _TOP
        self.bottom = height - (_NAMED if chart.x.label else _UNNAMED)
        self.points = [(series, point) for series in chart.series for point in series.points]
        self.taken = [self._around(point) for _, point in self.points if point.radius]  # what text must not cover
        self.crossed = list(self._strokes())  # what it should not cover
        if chart.barred is not None:
            end = self.left + len(chart.barred_label) * _LETTER
            self.taken.append((self.left, self.bottom - 20, end, self.bottom))
        self.rules = [self._rule(rule) for rule in chart.rules]
        self.labels = [self._label(*pair) for pair in sorted(self.points, key=lambda pair: not pair[1].ring)]

    @property
    def said(self) -> str:
        """The chart in words."""
        series = ", ".join(dict.fromkeys(one.name for one in self.chart.series))
        axes = " against ".join(filter(None, (self.chart.y.label, self.chart.x.label)))
        return f"{axes}: {series}. {self.chart.note}".strip()

    def x(self, value: float) -> float:
        return self.left + self.chart.x.place(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.chart.y.place(value) * (self.bottom - self.top)

    def at(self, x: float, y: float) -> str:
        """A place as it is written in a path."""
        return f"{self.x(x):.1f},{self.y(y):.1f}"

    def x_ticks(self) -> Iterator[tuple[float, str]]:
        """Places of the ticks below, and their texts as far as there is room for them."""
        free = float("-inf")
        for tick in self.chart.x.ticks:
            at, text = self.x(tick), self.chart.x.text(tick)
            half = len(text) * _LETTER / 2
            shown = at - half > free
            yield at, text if shown else ""
            free = at + half + 6 if shown else free

    def _rule(self, rule: Rule) -> tuple[float, float, Label | None]:
        """Heights of a rule's ends, and its label."""
        start = self.bottom if rule.y is None else self.y(rule.y)
        spots = [("end", self.right - 2), ("", self.left + 8), ("mid", (self.left + self.right) / 2)]
        label = self._text("said", rule.label, [(*spot, start + dy) for spot in spots for dy in (-10, 11)])
        return start, self.top if rule.y is None else start, label

    def _strokes(self) -> Iterator[Box]:
        """Small boxes along the lines and whiskers."""
        segments: list[Sequence[tuple[float, float]]] = []
        for series in self.chart.series:
            places = [(self.x(point.x), self.y(point.y)) for point in series.points]
            if series.line == "step":
                places = [place for one, two in pairwise(places) for place in (one, (two[0], one[1]))] + places[-1:]
            segments += list(pairwise(places)) if series.line else []
        for _, point in self.points:
            if point.y_interval:
                segments.append([(self.x(point.x), self.y(bound)) for bound in point.y_interval])
        for (x0, y0), (x1, y1) in segments:
            steps = max(int(math.hypot(x1 - x0, y1 - y0) / 5), 1)
            for step in range(steps + 1):
                x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
                yield (x - 1.5, y - 1.5, x + 1.5, y + 1.5)

    def _label(self, series: Series, point: Point) -> Label | None:
        """The label beside a point; one that would cover a mark or another text is left to the tip."""
        left, top, right, bottom = self._around(point)
        x, y = (left + right) / 2, (top + bottom) / 2
        spots = [
            ("", right + 2, y), ("", right, top - 4), ("", right, bottom + 4), ("end", left - 2, y),
            ("end", left, top - 4), ("end", left, bottom + 4), ("mid", x, top - 8), ("mid", x, bottom + 8),
        ]  # fmt: skip
        return self._text(f"label {series.style}", point.label, spots, limit=12)

    def _text(self, style: str, text: str, spots: Sequence[Spot], limit: float = math.inf) -> Label | None:
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
            return None
        _, _, box, anchor, x, y = best
        self.taken.append(box)
        return text, f"{style} {anchor}", x, y + 4

    def _around(self, point: Point) -> Box:
        x, y, r = self.x(point.x), self.y(point.y), point.radius + (5 if point.ring else 2)
        return (x - r, y - r, x + r, y + r)
