"""Charts: drawn by matplotlib for several widths, and made part of a page, whose colours and font they take."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

from hf_value_steer.checks import import_optional


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Span = Sequence[float] | None

# Name and size of the drawings of one chart; `chart.css` shows the one that fits.
HALF = (("small", 340, 270), ("medium", 560, 350))
STRIP = (("small", 340, 165), ("medium", 640, 165), ("large", 1080, 175))

# matplotlib knows no CSS. To it, each variable of the page's CSS is a colour of its own.
_VARIABLES = (
    "ink", "soft", "card", "grid", "barred", "s-filter0", "s-filter1", "s-filter2", "s-filter3", "s-placebo", "s-best",
    "s-args", "s-prompt", "s-words",
)  # fmt: skip
COLOURS = {name: f"#0000{index:02x}" for index, name in enumerate(_VARIABLES, start=1)}

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib: room is the same on every machine
    "font.size": 11.5,
    "text.color": COLOURS["soft"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.edgecolor": COLOURS["soft"],
    "axes.linewidth": 1,
    "axes.facecolor": "none",
    "xaxis.labellocation": "right",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 1,
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
    "ytick.left": False,
    "lines.linewidth": 1.75,
    "lines.dashed_pattern": (4, 4),
}
_LOCK = Lock()  # matplotlib's settings belong to the process
_SVG = "{http://www.w3.org/2000/svg}"
# Where a label may stand: so far from its point, with this side of it.
_BESIDE = (
    (6, 8, "left"), (-6, -8, "right"), (7, 0, "left"), (-7, 0, "right"), (-6, 8, "right"), (6, -8, "left"),
    (0, 12, "center"), (0, -12, "center"),
)  # fmt: skip


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
    """Points that belong together, and perhaps a horizontal line as a reference.

    Args:
        name (`str`): what the legend says.
        points: drawn in this order.
        colour (`str`): one of [`COLOURS`].
        line, marker (`str`): styles of matplotlib, `""` for none; `steps` joins the points by steps.
        rule (`float`, *optional*): height of the reference.
    """

    name: str
    points: Sequence[Point] = ()
    colour: str = "s-filter0"
    line: str = "-"
    marker: str = "o"
    steps: bool = False
    rule: float | None = None

    def key(self, name: str) -> str:
        """Line and marker for a legend as SVG; `name` is unique in the page."""
        with _figure(name, 24, 16) as figure:
            axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, 1), ylim=(-1, 1))
            axes.set_axis_off()
            axes.plot((-1, 1), (0, 0), linestyle=self.line, color=COLOURS[self.colour])
            _mark(axes, self, 0, 0, 4.5)
            return _svg(figure)


def reference(name: str, height: float) -> Series:
    """A dashed horizontal line."""
    return Series(name, colour="soft", line="--", marker="", rule=height)


@dataclass(frozen=True)
class Chart:
    """What to draw, whatever the size.

    Args:
        name (`str`): unique in the page.
        title (`str`), note (`str`): what it shows, and how to read it.
        x, y (`str`): names of the axes.
        series: lines and points, in the order of drawing.
        finish: gives matplotlib's axes their scales, and draws on them whatever else there is.
        sizes: name, width and height of each drawing.
        keyed (`bool`): with a legend.
    """

    name: str
    title: str
    note: str
    x: str
    y: str
    series: Sequence[Series]
    finish: Callable[["Axes"], object]
    sizes: Sequence[tuple[str, int, int]] = HALF
    keyed: bool = False

    @property
    def drawings(self) -> list["Drawing"]:
        """One for each width."""
        return [_draw(self, *size) for size in self.sizes]

    @property
    def said(self) -> str:
        """The chart in words."""
        series = ", ".join(dict.fromkeys(one.name for one in self.series))
        axes = " against ".join(filter(None, (self.y, self.x)))
        return f"{axes}: {series}. {self.note}".strip()


@dataclass(frozen=True)
class Drawing:
    """One chart of one size: its SVG, and where its tips are, in percent of its width and height."""

    size: str
    width: int
    height: int
    svg: str
    tips: Sequence[tuple[float, float, str]]


def check_drawing() -> None:
    """Look for matplotlib, long before there is something to draw; an `ImportError` if it is not there."""
    import_optional("matplotlib", "A page with charts")


def percents(*axes: Any) -> None:
    """Let axes say percentages."""
    for axis in axes:
        axis.set_major_formatter(lambda value, _: f"{100 * value:.6g} %")


def logarithmic(axes: "Axes", which: str, text: str) -> None:
    """Make axis `"x"` or `"y"` logarithmic, `text` the format of its numbers.

    Below three decades it says 1, 2, 5, and where fewer than three of these are seen, what a linear axis would.
    """
    from matplotlib.ticker import AutoLocator, LogLocator

    axes.set(**{f"{which}scale": "log"})
    axis: Any = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    if sum(low <= place <= high for place in axis.get_majorticklocs()) < 3:
        axis.set_major_locator(AutoLocator())
    axis.set_major_formatter(text)
    axes.minorticks_off()


@contextmanager
def _figure(name: str, width: float, height: float) -> Iterator["Figure"]:
    """An empty figure whose ids are made of `name`, and our settings for as long as it is drawn."""
    check_drawing()
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _LOCK, style.context({**_STYLE, "svg.hashsalt": name}, after_reset=True):
        figure = Figure((width / 72, height / 72), dpi=72, frameon=False)
        FigureCanvasAgg(figure)  # measures texts, and is faster than to make an SVG for each
        yield figure


def _draw(chart: Chart, size: str, width: int, height: int) -> Drawing:
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    points = [point for one in chart.series for point in one.points]
    with _figure(f"{chart.name}-{size}", width, height) as figure:
        figure.suptitle(chart.y, x=0, ha="left", size=_STYLE["font.size"])
        axes = figure.add_subplot(xlabel=chart.x)
        axes.locator_params(axis="y", nbins=6)
        for one in chart.series:
            _plot(axes, one)
        chart.finish(axes)
        ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02).execute(figure)  # from here on nothing moves
        _label(axes, points)
        places = axes.transData.transform([(point.x, point.y) for point in points])
        tips = [
            (100 * x / width, 100 - 100 * y / height, point.tip)
            for (x, y), point in zip(places, points, strict=True)
            if point.tip
        ]
        return Drawing(size, width, height, _svg(figure), tips)


def _plot(axes: "Axes", series: Series) -> None:
    """A series on axes: reference, line, whiskers (`errorbar` refuses an interval beside its point), marks."""
    colour, points = COLOURS[series.colour], series.points
    if series.rule is not None:
        axes.axhline(series.rule, color=COLOURS["soft"], linestyle="--", linewidth=1)
    if series.line and len(points) > 1:
        joined = "steps-post" if series.steps else "default"
        axes.plot([p.x for p in points], [p.y for p in points], series.line, color=colour, drawstyle=joined)
    for point in points:
        if point.x_interval:
            axes.plot(point.x_interval, [point.y] * 2, color=colour, linewidth=1.25, alpha=0.4)
        if point.y_interval:
            axes.plot([point.x] * 2, point.y_interval, color=colour, linewidth=1.25, alpha=0.4)
        if point.ring:
            axes.plot(point.x, point.y, "o", ms=2 * point.radius + 8, mfc="none", mec=COLOURS["ink"], mew=1.5)
        if point.radius:
            _mark(axes, series, point.x, point.y, point.radius)


def _mark(axes: "Axes", series: Series, x: float, y: float, radius: float) -> None:
    size = (2.6 if series.marker in ("P", "^", "v") else 2) * radius  # these fill less of their squares
    (mark,) = axes.plot(x, y, linestyle="none", marker=series.marker, markersize=size, zorder=3)
    mark.set(markerfacecolor=COLOURS[series.colour], markeredgecolor=COLOURS["card"], markeredgewidth=1)


def _label(axes: "Axes", points: Sequence[Point]) -> None:
    """Labels beside points; one for which there is no room is left to the tip.

    Not by adjustText: it imports pyplot, and moves labels that have no room instead of leaving them out.
    """
    from matplotlib.transforms import Bbox

    places = axes.transData.transform([(point.x, point.y) for point in points])
    marks = [Bbox([place, place]) for place in places]
    taken = [mark.padded(9 if point.ring else 5) for mark, point in zip(marks, points, strict=True)]
    for point in sorted(points, key=lambda point: not point.ring):
        far = 1.6 if point.ring else 1
        for x, y, side in _BESIDE if point.label else ():
            text = axes.annotate(point.label, (point.x, point.y), (far * x, far * y), textcoords="offset points")
            text.set(ha=side, va="center_baseline", color=COLOURS["ink"])
            box, frame = text.get_window_extent(), axes.bbox
            if frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def _svg(figure: "Figure") -> str:
    """A figure as the content of an `<svg>` element, in the colours of the page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file, canvas = io.StringIO(), cast(Any, FigureCanvasSVG(figure))
    canvas.print_svg(file)
    drawn = ElementTree.fromstring(file.getvalue()).find(f"{_SVG}g")
    assert drawn is not None
    for each in drawn.iter():
        each.tag = each.tag.removeprefix(_SVG)
        names = {name.rpartition("}")[2]: value for name, value in each.attrib.items()}
        unused = ("clip-path", "id") if each.tag == "g" else ("clip-path",)  # only markers are referred to
        each.attrib = {name: value for name, value in names.items() if name not in unused}
        each.text, each.tail = each.text if each.tag == "text" else None, None
    svg = ElementTree.tostring(drawn, encoding="unicode")
    return re.sub("#0000([0-9a-f]{2})", lambda match: f"var(--{_VARIABLES[int(match[1], 16) - 1]})", svg)
