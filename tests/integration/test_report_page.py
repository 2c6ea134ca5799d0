"""The pages in a browser: they render, ask for nothing, fit a phone, and their switches work."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_value_steer.evaluation.report import render_report
from hf_value_steer.evaluation.sweep import sweep_page
from tests import documents
from tests.chromium import EXECUTABLE, Page, chromium
from tests.integration import test_trace_page as trace_page


pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium, which these tests look through, was found")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    shown = documents.examples()
    document = documents.evaluation(examples=shown, masked_examples=documents.masked(shown))
    path.write_text(render_report(document), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_it_renders_quietly_and_fits(browser: Page, report: Path, width: int, dark: bool) -> None:
    browser.open(report, width, dark=dark)
    assert browser.evaluate("document.title") == "Value head: toxicity"
    assert browser.visible("section.part") == 5
    assert browser.visible("section.part:not(#examples) .plot") == 6  # one drawing of each chart, of the first judge
    assert browser.visible(".card .plot") == 4
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 21, 28)" if dark else "rgb(244, 245, 247)")
    assert browser.complaints() == []
    assert browser.requests() == [report.as_uri()]


def test_the_browser_would_notice(browser: Page, tmp_path: Path) -> None:
    page = tmp_path / "noisy.html"
    page.write_text("<script src='missing.js'></script><script>console.error('no'); throw Error('x')</script>")
    browser.open(page)
    assert browser.requests() == [page.as_uri(), (tmp_path / "missing.js").as_uri()]
    assert len(browser.complaints()) == 3


@pytest.mark.parametrize("width", [360, 600, 768, 1000, 1280])
def test_texts_of_charts_can_be_read(browser: Page, report: Path, width: int) -> None:
    browser.open(report, width)
    sizes = browser.evaluate(
        "[...document.querySelectorAll('.plot')].filter(each => each.checkVisibility()).map(each => "
        "parseFloat(getComputedStyle(each.querySelector('text')).fontSize) * each.clientWidth "
        "/ each.firstChild.viewBox.baseVal.width)"
    )
    assert len(sizes) == 10
    assert 8.5 < min(sizes) and max(sizes) < 17


BROKEN = """
(() => {
  const broken = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    if (!node.parentElement.checkVisibility() || node.parentElement.closest('svg')) continue;
    for (const found of node.data.matchAll(/[\\p{L}\\p{N}]+/gu)) {
      const range = document.createRange();
      range.setStart(node, found.index);
      range.setEnd(node, found.index + found[0].length);
      if (new Set([...range.getClientRects()].map(each => Math.round(each.top))).size > 1) broken.push(found[0]);
    }
  }
  return broken;
})()
"""


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_no_word_is_broken(browser: Page, tmp_path: Path, width: int) -> None:
    names = {
        "lexicon": "python:examples.toxicity:other_word_list",
        "labels": "hf:organisation/classifier-of-harm#unsafe",
    }
    document = json.loads(
        json.dumps(documents.evaluation())
        .replace('"lexicon"', f'"{names["lexicon"]}"')
        .replace('"labels"', f'"{names["labels"]}"')
    )
    path = tmp_path / "report.html"
    path.write_text(render_report(document), encoding="utf-8")
    browser.open(path, width)
    assert browser.evaluate("document.body.innerText").count("other_word_list") > 2
    assert browser.evaluate(BROKEN) == []
    browser.evaluate("document.querySelector('.promise').style.width = '20px'")
    assert browser.evaluate("document.querySelector('.promise').style.overflowWrap = 'anywhere'") and browser.evaluate(
        BROKEN
    )


def test_tables_say_that_they_scroll(browser: Page, report: Path) -> None:
    shown = "(each => getComputedStyle(each, '::before').display)(document.querySelector('.scroll'))"
    for width in (360, 1280):
        browser.open(report, width)
        browser.wait(f"{shown} === 'table'")  # it follows the scrolling, a frame later
    page = report.with_name("narrow.html")
    few = ("name", "method", "num_candidates", "threshold", "judges", "perplexity_ratio", "perplexity_ratio_interval")
    runs = [{key: run[key] for key in few} for run in documents.runs()]
    document = documents.evaluation(judges=[{"name": "lexicon", "gave_labels": False}], runs=runs, examples=[])
    page.write_text(render_report(document), encoding="utf-8")
    for width, said in ((320, "table"), (1280, "none")):
        browser.open(page, width)
        fits = browser.evaluate("(box => box.scrollWidth <= box.clientWidth)(document.querySelector('.scroll'))")
        assert fits == (said == "none") and browser.evaluate(shown) == said


def test_only_tables_scroll_sideways(browser: Page, report: Path) -> None:
    browser.open(report, 360)
    wide = browser.evaluate(
        "[...document.querySelectorAll('body *')].filter(each => each.checkVisibility() && "
        "!each.closest('.scroll') && each.getBoundingClientRect().right > 360.5).length"
    )
    assert wide == 0
    assert browser.evaluate("(box => box.scrollWidth > box.clientWidth)(document.querySelector('.scroll'))")


def test_a_judge_is_chosen(browser: Page, report: Path) -> None:
    browser.open(report)
    assert [browser.visible(f".judge.j{index} .chart") for index in range(3)] == [2, 0, 0]
    browser.click("#judge-1")
    assert [browser.visible(f".judge.j{index} .chart") for index in range(3)] == [0, 2, 0]
    browser.click("label:has(#judge-2)")
    assert [browser.visible(f".judge.j{index} .chart") for index in range(3)] == [0, 0, 2]


def test_switches_of_the_examples(browser: Page, report: Path) -> None:
    browser.open(report)
    assert browser.visible(".card") == 4
    browser.click("#only")
    assert browser.visible(".card") == 3
    browser.click("#only")
    assert browser.visible(".card") == 4
    assert browser.visible(".masked") > 0 and browser.visible(".open") == 0
    masked = browser.visible(".masked")
    browser.click("#reveal")
    assert browser.visible(".masked") == 0 and browser.visible(".open") == masked


def test_a_token_shows_its_candidates(browser: Page, report: Path) -> None:
    browser.open(report)
    token = ".card .swap"
    assert browser.visible(".tip") == 0
    browser.hover(token)
    assert browser.visible(f"{token} > .tip") == 1 and browser.visible(f"{token} .chip") == 3
    browser.hover("h1")
    assert browser.visible(".tip") == 0
    browser.evaluate(f"document.querySelector('{token}').focus()")
    assert browser.visible(f"{token} > .tip") == 1
    browser.open(report, 390)
    browser.tap(token)
    assert browser.visible(f"{token} > .tip") == 1


@pytest.mark.parametrize("width", [360, 1280])
def test_tips_of_points_stay_on_the_page(browser: Page, report: Path, width: int) -> None:
    browser.open(report, width)
    tips = browser.evaluate(
        "[...document.querySelectorAll('.spot')].filter(each => each.checkVisibility()).map(each => { each.focus(); "
        "const [tip, plot] = [each.lastChild, each.parentNode].map(one => one.getBoundingClientRect()); "
        "return [tip.width, tip.left - plot.left, plot.right - tip.right, document.documentElement.scrollWidth] })"
    )
    assert len(tips) > 60
    for across, left, right, page in tips:
        assert across > 40 and left > -0.5 and right > -0.5 and page == width


CENTRES = """
[...document.querySelectorAll('.part:not(#examples) .plot')].filter(plot => plot.checkVisibility()).map(plot =>
  ['.spot > i', 'use[style*="stroke: var(--card)"]'].map(chosen => [...plot.querySelectorAll(chosen)].map(each => {
    const box = each.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  })))
"""


@pytest.mark.parametrize("width", [360, 1280])
def test_points_of_charts_lie_on_their_marks(browser: Page, report: Path, width: int) -> None:
    browser.open(report, width)
    charts = browser.evaluate(CENTRES)
    assert len(charts) == 6
    for spots, marks in charts:
        assert len(spots) > 5
        for spot, mark in zip(spots, marks, strict=True):
            assert spot == pytest.approx(mark, abs=1)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "sweep.html"
    path.write_text(sweep_page(documents.sweep()), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_sweep_renders_quietly_and_fits(browser: Page, swept: Path, width: int, dark: bool) -> None:
    browser.open(swept, width, dark=dark)
    assert (
        browser.evaluate("document.title")
        == "Working window: -0.5 to 1"
        == browser.evaluate("document.querySelector('h1').textContent")
    )
    assert browser.visible(".plot") == browser.visible(".chart") == 4
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    page, ink, text = (
        browser.evaluate(f"getComputedStyle(document.querySelector('{each}')).{what}")
        for each, what in (("body", "backgroundColor"), ("use[style*=ink]", "stroke"), (".plot text", "fill"))
    )
    assert (page, ink, text) == (
        ("rgb(18, 21, 28)", "rgb(221, 226, 236)", "rgb(151, 161, 179)")
        if dark
        else ("rgb(244, 245, 247)", "rgb(28, 34, 48)", "rgb(91, 100, 117)")
    )
    assert browser.complaints() == [] and browser.requests() == [swept.as_uri()]


def test_tips_are_reached_by_keyboard(browser: Page, swept: Path) -> None:
    browser.open(swept)
    key = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
    said = []
    for _ in range(5):
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, **key)
        assert browser.visible(".tip") == 1
        said.append(browser.evaluate("document.activeElement.querySelector('.tip').textContent"))
    assert said == ["m = -1: 0.02", "m = -0.5: 0.06", "m = 0: 0.1", "m = 1: 0.2", "m = 2: 0.3"]


@pytest.mark.parametrize("width", [360, 1280])
def test_the_trace_page_shares_all_that(browser: Page, tmp_path: Path, width: int) -> None:
    path = tmp_path / "trace.html"
    path.write_text(trace_page.render(*trace_page.example(), reveal=True), encoding="utf-8")
    browser.open(path, width)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.visible(".card") == 2
    browser.click("#only")
    assert browser.visible(".card") == 1
    browser.hover(".t.swap")
    assert browser.visible(".t.swap .chip") == 3
    browser.click("#reveal")
    assert browser.visible(".open") > 0 and browser.visible(".masked") == 0
    assert browser.complaints() == [] and browser.requests() == [path.as_uri()]
