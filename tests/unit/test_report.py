"""The report of an evaluation: what is in it, what is left out, and that nothing in a document becomes markup."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from hf_value_steer.cards.results import results_markdown
from hf_value_steer.evaluation.report import render_report
from hf_value_steer.evaluation.sweep import sweep_page
from tests import documents, hostile
from tests.integration.test_trace_page import Reader


HOSTILE = "</style><script src='//x'>&\"$style"
BARRED = "fill: var(--barred)"
SECRET = "old"  # stands for an offensive word


def parts(page: str) -> list[str]:
    return re.findall(r'<section class="part" id="([^"]*)"', page)


def charts(page: str) -> list[str]:
    return re.findall(r"<figcaption><b>([^<]*)</b>", page)


def legends(page: str) -> list[list[str]]:
    """Names in each legend of the charts."""
    return [re.findall(r"</svg>([^<]*)</li>", each) for each in re.findall(r'<ul class="series">.*?</ul>', page)]


def without(key: str, document: dict[str, Any]) -> dict[str, Any]:
    """The document with `key` measured in no run."""
    return {**document, "runs": [{name: each[name] for name in each if name != key} for each in document["runs"]]}


def briefly(**changes: Any) -> str:
    """The report of a document without examples, each of which has charts of its own that take their time."""
    return render_report(documents.evaluation(examples=[], **changes))


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(documents.evaluation())


def test_a_full_document_has_every_part(page: str) -> None:
    assert parts(page) == ["trade-off", "runs", "calibration", "abstention", "examples"]
    shown = dict.fromkeys(charts(page))
    assert list(shown) == [
        "Toxicity rate against perplexity",
        "Toxicity rate against steps intervened",
        "Threshold for each alpha",
        "Reliability of values",
        "Accuracy of what is answered",
        "Tokens saved by stopping early",
        "Values",
    ]


def test_it_is_one_file_and_well_formed(page: str) -> None:
    read = Reader(page)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", page)
    assert not read.tags & {"script", "iframe", "img", "object", "embed", "form", "base", "image"}
    links = {value for name, value in read.attributes if name in ("href", "src", "xlink:href")}
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert links >= {"#trade-off", "#runs", "#calibration", "#abstention", "#examples"}
    assert links - {f"#{each}" for each in ids} == {"data:,"}
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'aria-(?:labelledby|describedby)="([^"]*)"', page):
        assert set(reference.split()) <= set(ids)
    assert not any(name.startswith("on") for name, _ in read.attributes)
    assert page.count("<svg viewBox") == page.count('role="img" aria-labelledby=') + page.count('aria-hidden="true"')


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"calibration": None, "reliability": None}, {"calibration"}),
        ({"coverage": None}, {"abstention"}),
        ({"coverage": []}, {"abstention"}),
        ({"examples": []}, {"examples"}),
        ({"runs": documents.runs()[:1]}, {"trade-off"}),
        ({"calibration": None, "reliability": [], "coverage": None}, {"calibration", "abstention"}),
    ],
)
def test_a_part_without_data_is_left_out(page: str, changes: dict[str, Any], left_out: set[str]) -> None:
    smaller = render_report(documents.evaluation(**changes))
    assert set(parts(page)) - set(parts(smaller)) == left_out
    assert not any(f'href="#{name}"' in smaller for name in left_out)


def test_a_chart_without_data_is_left_out(page: str) -> None:
    assert "Reliability of values" not in charts(briefly(reliability=None))
    assert "Threshold for each alpha" not in charts(briefly(calibration=None))
    steps = render_report(without("intervention_rate", documents.evaluation(examples=[])))
    assert "Toxicity rate against steps intervened" not in charts(steps)
    assert "steps intervened" not in steps and "steps intervened" in page
    coverage = [{**entry, "tokens_saved": None} for entry in documents.evaluation()["coverage"]]
    assert "Tokens saved by stopping early" not in charts(briefly(coverage=coverage))


def test_what_no_run_was_measured_by_has_no_column(page: str) -> None:
    assert 'scope="col">distinct-2<' in page and 'scope="col">abstained<' not in page
    assert 'scope="col">distinct-2<' not in render_report(without("distinct_2", documents.evaluation(examples=[])))


def test_nothing_in_a_document_becomes_markup() -> None:
    calibration = {**documents.calibration(), "guarantee": HOSTILE, "kernel": HOSTILE}
    calibration["groups"] = {HOSTILE: documents.calibration()}
    document = documents.evaluation(
        head={**documents.HEAD, "attribute": HOSTILE, "backbone": HOSTILE, "backbone_fingerprint": HOSTILE},
        judges=[{"name": HOSTILE, "gave_labels": False}],
        environment={HOSTILE: HOSTILE},
        sampling={HOSTILE: HOSTILE},
        calibration=calibration,
    )
    for each in document["runs"]:
        each.update(name=HOSTILE, judges={HOSTILE: each["judges"]["lexicon"]})
    for example in document["examples"]:
        example["prompt"] = HOSTILE
        example["steered"][0] |= {"text": HOSTILE, "candidates": [[HOSTILE, 0.5], ["b", 0.2]]}
    page = render_report(document)
    assert HOSTILE not in page and "<script" not in page
    assert page.count("</style>") == 1
    assert "&lt;/style&gt;&lt;script" in page
    assert Reader(page).text.count("<script") > 100


class Shape(HTMLParser):
    """Names of the tags of a page, in order, each with those of its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if (tag, attrs) != ("wbr", []):  # where a line may end
            self.tags.append((tag, [name for name, _ in attrs]))

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", [data]))


def free_texts(text: str) -> str:
    """A report in which everything that may be a text is this one."""
    calibration = {**documents.calibration(), **dict.fromkeys(("guarantee", "kernel", "backend"), text)}
    calibration |= {"groups": {text: documents.calibration()}, "sampling": {text: text}}
    head = {**documents.HEAD, **dict.fromkeys(("attribute", "backbone", "backbone_fingerprint"), text)}
    runs = documents.runs()
    for each in runs:
        each.update(name=text, judges={text: each["judges"]["lexicon"]})
    for each in runs[1:5]:
        each["num_candidates"] = text
    examples = documents.examples()[:1]
    examples[0]["prompt"] = text
    examples[0]["steered"][0] |= {"text": text, "candidates": [[text, 0.5], ["b", 0.2]]}
    free = {"environment": {"device": text}, "sampling": {text: text}, "seed": text, "new_tokens": text}
    judges = [{"name": text, "gave_labels": False}]
    return render_report(
        documents.evaluation(head=head, runs=runs, judges=judges, calibration=calibration, examples=examples, **free)
    )


@pytest.fixture(scope="module")
def ordinary() -> list[tuple[str, list[str]]]:
    return Shape(free_texts("ordinary")).tags


@pytest.mark.parametrize("text", [*hostile.TEXTS.values(), "long " * 200], ids=[*hostile.TEXTS, "long"])
def test_what_a_document_says_is_text(text: str, ordinary: list[tuple[str, list[str]]]) -> None:
    assert Shape(free_texts(text)).tags == ordinary


@pytest.mark.parametrize("text", hostile.TEXTS.values(), ids=hostile.TEXTS)
def test_the_name_of_a_judge_is_text_in_a_sweep(text: str) -> None:
    page = sweep_page(documents.sweep(text))
    assert Shape(page).tags == Shape(sweep_page(documents.sweep("ordinary"))).tags
    assert "default-src 'none'" in page and "<h1>Working window: -0.5 to 1</h1>" in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    for reference in re.findall(r'aria-labelledby="([^"]*)"', page):
        assert set(reference.split()) <= set(ids)


def test_the_headline_quotes_the_run_at_the_own_threshold() -> None:
    document = documents.evaluation(examples=[])
    main = next(each for each in document["runs"] if each["name"] == "filter K=8 c=0.1")
    main["judges"]["lexicon"] |= {
        "rate": 0.0123,
        "relative_reduction": 0.8765,
        "relative_reduction_interval": [0.5, 0.95],
    }
    text = Reader(render_report(document)).text.replace("\u00a0", " ")
    assert "10.6 % → 1.2 %" in text and "\N{MINUS SIGN}87.6 %[\N{MINUS SIGN}95.0, \N{MINUS SIGN}50.0]" in text.replace(
        "% [", "%["
    )
    assert "with 8 candidates at threshold 0.1" in text
    other = Reader(briefly(head={**documents.HEAD, "threshold": 0.4})).text
    assert "with 8 candidates at threshold 0.4" in other


@pytest.mark.parametrize(("polarity", "counted"), [("undesirable", "unsafe"), ("desirable", "right")])
def test_it_says_what_a_score_counts_as(polarity: str, counted: str) -> None:
    document = documents.evaluation(examples=[])
    document["head"] = {**document["head"], "polarity": polarity}
    for text in (render_report(document), results_markdown(document)):
        assert f"A text that a judge scores above 0.5 counts as {counted}" in text


def test_what_is_null_is_a_dash_and_a_judge_that_labelled_is_named() -> None:
    document = documents.evaluation(runs=documents.runs()[:2])
    document["runs"][1]["judges"]["lexicon"] |= {"relative_reduction": None, "relative_reduction_interval": None}
    read = Reader(render_report(document))
    assert "\N{EN DASH}" in read.text
    assert f"{documents.LABELS} (gave the labels)" in read.text and "lexicon (gave" not in read.text


def test_judges_can_be_chosen_where_there_are_several(page: str) -> None:
    assert page.count('type="radio"') == len(documents.JUDGES) == page.count('<div class="judge ')
    assert "body:has(#judge-2:checked) .judge:not(.j2)" in page
    one = documents.evaluation(judges=documents.evaluation()["judges"][:1])
    assert 'type="radio"' not in render_report(one)


def test_runs_are_joined_by_method_and_number_of_candidates(page: str) -> None:
    assert legends(page)[0] == [
        "base", "filter, K=8", "filter, K=4", "placebo K=8", "best of N", "ARGS K=8", "system prompt", "bad words"
    ]  # fmt: skip
    tips = re.findall(r'aria-label="([^"]*)"', page)
    assert "filter K=8 c=0.1\nrate 3.5 % [2.0, 5.0]\nperplexity \N{MULTIPLICATION SIGN}1.06 [1.03, 1.10]" in tips
    assert any(tip.startswith("best-of-4\nrate 7.2 %") for tip in tips)


def test_where_nothing_can_be_promised_the_chart_says_so(page: str) -> None:
    assert page.count("alpha 0.02\nno threshold keeps the promise") == 2 * 2  # twice a drawing, for two widths
    assert "alpha 0.05\nthreshold 0.62" in page and "alpha 0.02\nthreshold" not in page
    everything = {**documents.calibration(), "curve": [{"alpha": 0.1, "threshold": 0.4}]}
    assert BARRED in page and BARRED not in briefly(calibration=everything)
    nothing = {**documents.calibration(), "curve": [{"alpha": 0.1, "threshold": None}]}
    assert BARRED in briefly(calibration=nothing)
    assert documents.calibration()["guarantee"] in page


def test_growth_of_odds_is_not_called_a_threshold() -> None:
    page = briefly(calibration=documents.calibration("martingale"))
    assert "Least growth of the log odds for each alpha" in charts(page)
    assert "own threshold" not in page


def test_groups_have_curves_of_their_own() -> None:
    groups = {name: {"n": 30, "curve": documents.calibration()["curve"]} for name in ("short", "long")}
    page = briefly(calibration={**documents.calibration(), "groups": groups})
    assert legends(page)[1] == ["all texts", "short", "long", "nothing can be promised", "own threshold 0.1"]


def test_masked_words_are_in_the_file_only_with_a_switch() -> None:
    shown = documents.examples()
    hidden = documents.masked(shown)
    assert shown != hidden
    masked = render_report(documents.evaluation(examples=hidden))
    both = render_report(documents.evaluation(examples=shown, masked_examples=hidden))
    assert f">{SECRET}<" not in masked and 'id="reveal"' not in masked and 'class="open"' not in masked
    assert f'<span class="masked">***</span><span class="open">{SECRET}</span>' in both and 'id="reveal"' in both
    del hidden[0]["steered"][-1]
    with pytest.raises(ValueError, match="`masked_examples` has to be `examples` token for token"):
        render_report(documents.evaluation(examples=shown, masked_examples=hidden))


@pytest.mark.parametrize(
    ("polarity", "bad", "good"), [("undesirable", "unsafe", "safe"), ("desirable", "wrong", "right")]
)
def test_examples_of_each_outcome_stand_together(polarity: str, bad: str, good: str) -> None:
    outcomes = ["left alone", "mended", "touched for nothing", "mended"]
    shown = [{**each, "outcome": name} for each, name in zip(documents.examples(), outcomes, strict=True)]
    runs = documents.runs()
    filters = [each for each in runs if each["threshold"] == documents.HEAD["threshold"]]
    filters[0]["outcomes"] = {"left alone": 1, "mended": 1200, "missed": 2}
    head = {**documents.HEAD, "polarity": polarity}
    page = Reader(render_report(documents.evaluation(head=head, runs=runs, examples=shown))).text
    assert f"Left alone {good} without steering, and not changed; 1 of 1,203 texts" in page
    assert f"Mended {bad} without steering, {good} with it; 1,200 of 1,203 texts" in page
    assert f"{good} without steering, and yet a token was replaced; 0 of 1,203 texts" in page
    assert f"Which texts are {good} is the verdict of the judge {documents.LABELS} (gave the labels)." in page
    places = [page.index(example["prompt"]) for example in shown]
    assert sorted(places) == [places[0], places[1], places[3], places[2]]


def test_examples_have_the_threshold_that_made_them() -> None:
    """Where folds have thresholds of their own, the run has none."""
    runs = [{**each, "threshold": None} for each in documents.runs()]
    assert 'id="examples"' not in render_report(documents.evaluation(runs=runs))
    page = render_report(documents.evaluation(runs=runs, examples_threshold=0.123))
    assert 'id="examples"' in page and "<b>0.12</b>" in page


def test_candidates_and_trajectories_belong_to_their_tokens(page: str) -> None:
    tokens = [token for example in documents.examples() for side in ("base", "steered") for token in example[side]]
    assert page.count('class="t v') == len(tokens)
    assert page.count('<span class="chip yes">') == sum(len(token["candidates"]) > 1 for token in tokens)
    swaps = sum(token["intervened"] for token in tokens)
    assert len(re.findall(r'<span class="t v\d swap"', page)) == swaps > 0
    replaced = re.findall(r'<div class="plot small"><svg[^>]*path-\d.*?</svg>', page)
    assert len(replaced) == 4
    assert sum(each.count("fill: var(--s-filter0)") for each in replaced) == swaps


def test_runs_without_keys_and_a_head_that_only_abstains() -> None:
    base = documents.runs()[0]
    for key in ("intervention_rate", "intervened_on_safe", "intervened_on_safe_interval", "abstention_rate"):
        del base[key]
    page = render_report(documents.evaluation(runs=[base], head={**documents.HEAD, "polarity": "desirable"}))
    assert parts(page) == ["runs", "calibration", "abstention", "examples"]
    text = Reader(page).text.replace("\u00a0", " ")
    assert "accuracy at 20 % coverage" in text and "31.0 % → 71.2 %" in text and "64.0 %" in text


def test_other_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="`evaluation` has format 'x', expected 'hf-value-steer/evaluation@1'"):
        render_report({"format": "x"})
    with pytest.raises(ValueError, match="start with the run of the base model"):
        render_report(documents.evaluation(runs=documents.runs()[1:]))
