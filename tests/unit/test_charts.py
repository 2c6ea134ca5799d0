"""Charts that matplotlib draws: in the colours of the page, always the same, and without a trace in its settings."""

import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import pytest

from hf_value_steer.arguments.evaluate import EvaluateArguments, SweepArguments
from hf_value_steer.evaluation import figures
from hf_value_steer.evaluation.charts import COLOURS, Chart, Point, Series, logarithmic, percents, reference
from hf_value_steer.evaluation.evaluate import Evaluator, check_sources
from hf_value_steer.evaluation.report import render_report
from hf_value_steer.evaluation.sweep import sweep, sweep_page
from hf_value_steer.evaluation.trace import PromptTrace, TokenTrace
from tests import documents


SHEETS = ("colours.css", "page.css", "chart.css", "report.html")
CSS = "".join((Path(figures.__file__).parent / name).read_text("utf-8") for name in SHEETS)


def chart(points: list[Point], finish: Callable[..., object] = lambda axes: None, **options: object) -> Chart:
    return Chart("name", "Title", "Note.", "x", "y", [Series("series", points)], finish, **options)


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.fixture(scope="module")
def pages() -> list[str]:
    groups = {name: {"n": 30, "curve": documents.calibration()["curve"]} for name in ("one", "two", "three")}
    calibration = {**documents.calibration(), "groups": groups}
    return [render_report(documents.evaluation(calibration=calibration)), sweep_page(documents.sweep())]


def test_every_colour_is_one_of_the_page(pages: list[str]) -> None:
    drawn = "".join(each for page in pages for each in re.findall(r"<svg.*?</svg>", page))
    used = set(re.findall(r"var\(--([^)]*)\)", drawn))
    assert used == set(COLOURS)
    for name in used:
        assert len(re.findall(rf"--{name}: #", CSS)) == 2  # light and dark
    assert not re.search(r"#[0-9a-f]{6}\b", drawn)
    styles = re.findall(r'<(text|path|use)[^>]*? style="([^"]*)"', drawn)
    assert len(styles) > 1000
    for tag, style in styles:  # where nothing is said, a browser fills with black
        filled = "fill: " in style or "fill-opacity: 0;" in style
        assert filled or (tag == "path" and "stroke: var" in style), style  # of a marker, which `use` fills


def test_a_page_is_well_below_the_limit() -> None:
    assert len(render_report(documents.evaluation(examples=documents.examples() * 3)).encode()) < 1_500_000


def test_settings_of_others_count_for_nothing_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it is an error now
    expected = sweep_page(documents.sweep())
    theirs = {
        "font.size": 40,
        "text.parse_math": True,
        "svg.fonttype": "path",
        "xtick.labelsize": 40,
        "axes.xmargin": 1,
    }
    with matplotlib.rc_context(theirs):
        before = matplotlib.rcParams.copy()
        assert sweep_page(documents.sweep()) == expected
        assert matplotlib.rcParams.copy() == before


def test_threads_do_not_disturb_each_other() -> None:
    before = matplotlib.rcParams.copy()
    names = [("alpha", "beta"), ("gamma",), ("delta",), ("epsilon", "zeta")]
    expected = [sweep_page(documents.sweep(*each)) for each in names]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda each: sweep_page(documents.sweep(*each)), names)) == expected
    assert matplotlib.rcParams.copy() == before


def test_tips_are_where_the_scale_puts_their_points() -> None:
    points = [Point(x, y, tip=f"{x}") for x, y in ((0.01, 0.0), (0.1, 0.5), (1.0, 1.0))]
    drawn = chart(points, lambda axes: (logarithmic(axes, "x", "{x:g}"), percents(axes.yaxis))).drawings
    assert [drawing.size for drawing in drawn] == ["small", "medium"]
    for drawing in drawn:
        (x0, y0, _), (x1, y1, _), (x2, y2, tip) = drawing.tips
        assert tip == "1.0"
        assert x1 - x0 == pytest.approx(x2 - x1) and y0 - y1 == pytest.approx(y1 - y2)
        assert 5 < x0 < x1 < x2 < 100 and 0 < y2 < y1 < y0 < 100
        assert {"0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "0 %", "100 %", "x", "y"} <= set(texts(drawing.svg))


def test_many_decades_have_fewer_numbers() -> None:
    points = [Point(10.0**power, 1.0) for power in range(-5, 3)]
    (drawing, _) = chart(points, lambda axes: logarithmic(axes, "x", "{x:g}")).drawings
    assert "0.0001" in texts(drawing.svg) and "0.02" not in texts(drawing.svg)


@pytest.mark.parametrize("ratios", [(0.55, 1.5), (1.01, 1.02), (0.9, 12.0), (1.0, 1.0)])
def test_an_axis_of_less_than_a_decade_has_numbers(ratios: tuple[float, float]) -> None:
    points = [Point(0.0, ratios[0]), Point(1.0, ratios[1])]
    for drawing in chart(points, lambda axes: logarithmic(axes, "y", "at {x:g}")).drawings:
        numbers = [float(text[3:]) for text in texts(drawing.svg) if text.startswith("at ")]
        assert len(set(numbers)) >= 3 and min(numbers) < ratios[1] and max(numbers) > ratios[0] * 0.99


def test_a_sweep_says_what_it_is_of() -> None:
    page = sweep_page(documents.sweep()).replace("<wbr>", "")
    for name, said in {"model": "org/model", "attribute": "calm", "texts for each multiplier": "48"}.items():
        assert f"<dt>{name}</dt><dd>{said}</dd>" in page
    assert "95 % intervals" in page and "<dt>vectors</dt>" not in page


def test_a_sweep_says_its_multipliers_and_its_budget() -> None:
    """0 and what lies far enough from it; 0.05 would stand on it."""
    document = documents.sweep()
    document["runs"].append({**document["runs"][1], "multiplier": 0.05})
    page = sweep_page(document)
    assert {"-1", "-0.5", "0", "1", "2"} <= set(texts(page)) and "0.05" not in texts(page)
    assert "1.5" not in texts(page) and "budget \u00d71.5</li>" in page


def test_a_label_is_drawn_where_there_is_room_and_as_it_is() -> None:
    labels = ["$e^2$", "<b>&amp;", "a" * 200]
    points = [Point(index, index, label=label) for index, label in enumerate(labels)]
    (drawing, _) = chart(points).drawings
    assert {"$e^2$", "&lt;b&gt;&amp;amp;"} <= set(texts(drawing.svg)) and "aaa" not in drawing.svg
    crowd = [Point(0.5, 0.5 + index / 1e6, label=f"label {index}") for index in range(20)]
    (drawing, _) = chart([Point(0, 0), *crowd, Point(1, 1)]).drawings
    assert 1 <= sum(text.startswith("label") for text in texts(drawing.svg)) <= 6


def test_a_legend_shows_line_and_marker() -> None:
    line, cross = reference("rule", 1.0).key("a"), Series("cross", line="", marker="P").key("b")
    assert "stroke-dasharray" in line and "var(--soft)" in line and "<use" not in line
    assert cross.count("<use") == 1 and "stroke-dasharray" not in cross
    assert not set(re.findall(r'id="([^"]*)"', cross)) & set(re.findall(r'id="([^"]*)"', Series("").key("c")))


@pytest.mark.parametrize("tokens", [0, 1, 2, 300])
@pytest.mark.parametrize("threshold", [1e-9, 0.1, 1 - 1e-9])
def test_values_of_any_length_and_size_are_drawn(tokens: int, threshold: float) -> None:
    values = [(0.0, 1.0, 0.5)[index % 3] for index in range(tokens)]
    trace = PromptTrace("prompt", [TokenTrace("a", value) for value in values], [])
    for drawing in figures.trajectory_chart("path", trace, threshold).drawings:
        assert "token 1" in texts(drawing.svg) and f"{threshold:.3g}" in texts(drawing.svg)
        assert "nan" not in drawing.svg and "inf" not in drawing.svg


def test_without_matplotlib_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    common = {"output": str(tmp_path / "out"), "model": "nowhere", "prompts": "nowhere", "judges": ["lexicon:nowhere"]}
    evaluated = EvaluateArguments(**common, value_head="nowhere")
    says = r'A page with charts needs matplotlib: pip install "hf-value-steer\[train\]"'
    for begin in (
        lambda: check_sources(evaluated, []),
        lambda: Evaluator(evaluated),
        lambda: sweep(SweepArguments(**common, vectors="nowhere")),
        lambda: render_report(documents.evaluation()),
    ):
        with pytest.raises(ImportError, match=says):
            begin()
    assert not list(tmp_path.iterdir())
