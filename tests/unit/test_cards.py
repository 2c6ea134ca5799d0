"""Cards and their Markdown: every part says what the documents say, and nothing where they say nothing."""

import ast
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_value_steer import GuidanceModule, GuidanceModuleConfig, SteeringVectors, ValueHead, ValueHeadConfig
from hf_value_steer.calibration import Calibration
from hf_value_steer.cards.guidance import guidance_card
from hf_value_steer.cards.head import NO_LIMITS, lacks_limits, written_limits
from hf_value_steer.cards.parts import LIMITS_PLACEHOLDER
from hf_value_steer.cards.results import calibration_markdown, model_index, results_markdown
from hf_value_steer.files.upload import is_generated
from hf_value_steer.hub import head_card, renew_card, write_card
from tests import documents, hostile


def rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[text.strip() for text in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def make(**config: Any) -> ValueHead:
    return ValueHead(ValueHeadConfig(hidden_size=8, **{**documents.HEAD, **config}))


def headings(card: ModelCard) -> list[str]:
    return re.findall(r"^## (.*)$", card.text, flags=re.MULTILINE)


def test_every_run_has_a_row_and_the_main_one_stands_out() -> None:
    table = rows(results_markdown(documents.evaluation(coverage=None)))
    head, _, *body = table
    assert {len(row) for row in table} == {len(head)}
    assert head[1:5] == [
        "toxicity rate, lexicon",
        "toxicity rate, classifier of another kind",
        "toxicity rate, judge that labelled (gave the labels)",
        "perplexity",
    ]
    names = [run["name"] for run in documents.runs()]
    names[2] = "**filter K=8 c=0.1**"
    assert [row[0] for row in body] == [*names, "change by filter K=8 c=0.1"]
    assert body[2][1] == "3.5 % [2.0, 5.0]" and body[2][head.index("steps intervened")] == "6.7 %"
    assert body[-1][1] == "\N{MINUS SIGN}67.1 % [\N{MINUS SIGN}87.1, \N{MINUS SIGN}37.1]"
    assert body[-2][head.index("steps intervened")] == "\N{EN DASH}"
    assert "abstained" not in head


def test_results_say_what_they_were_measured_on() -> None:
    text = results_markdown(documents.evaluation())
    assert "340 generations of 68 prompts, up to 32 new tokens, seed 0; 95 % intervals by prompt." in text
    assert "`do_sample=True, temperature=1.0, top_k=0, top_p=0.95`" in text
    assert ["20.0 %", "71.2 % [62.6, 79.8]", "0.8000", "64.0 %"] in rows(text)
    assert "prompts answered" not in results_markdown(documents.evaluation(coverage=None))
    with pytest.raises(ValueError, match="`evaluation` has format None"):
        results_markdown({})


def test_a_name_cannot_break_a_table() -> None:
    document = documents.evaluation(coverage=None)
    document["runs"][3]["name"] = "a | b\nc"
    table = rows(results_markdown(document))
    assert {len(row) for row in table} == {len(table[0])} and table[5][0] == "a \\| b c"


def test_metrics_come_back_from_the_metadata(tmp_path: Path) -> None:
    document = documents.evaluation()
    head_card(make(), document).save(tmp_path / "README.md")
    found = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert found == model_index(document)
    values = {each.metric_name: each.metric_value for each in found}
    assert values["toxicity rate, lexicon"] == 0.0349 and values["perplexity ratio"] == 1.0629
    assert values["accuracy at 20 % coverage"] == 0.7124 and "abstained" not in values
    assert found[0].metric_args == {"run": "filter K=8 c=0.1", "interval": [0.02, 0.0498], "base": 0.106}
    assert [each.metric_type for each in model_index(documents.evaluation(runs=documents.runs()[:1]))] == [
        "selective_accuracy",
        "selective_accuracy",
    ]
    nothing = documents.evaluation(runs=documents.runs()[:1], coverage=None)
    assert model_index(nothing) == [] and "model-index" not in head_card(make(), nothing).content


def test_parts_of_a_card_are_there_when_there_is_something_to_say() -> None:
    assert headings(head_card(make())) == ["How to use", "Limits"]
    full = head_card(
        make(training={"recipe": "a", "metrics": {"auroc": 0.8}}), documents.evaluation(), documents.calibration()
    )
    assert headings(full) == ["How to use", "Results", "Threshold and guarantee", "Training", "Limits"]
    assert ["metrics auroc", "0.8"] in rows(full.text) and documents.calibration()["guarantee"] in full.text
    calibrated = make()
    calibrated.calibration = Calibration.from_scores(np.linspace(0.1, 0.9, 99, dtype=np.float32))
    assert headings(head_card(calibrated)) == ["How to use", "Threshold and guarantee", "Limits"]
    assert calibrated.calibration.guarantee in head_card(calibrated).text


def test_both_promises_stand_on_a_calibrated_card() -> None:
    scores = np.linspace(0.1, 0.9, 99, dtype=np.float32)
    for polarity, abstains in (("undesirable", False), ("desirable", True)):
        head = make(polarity=polarity)
        head.calibration = Calibration.from_scores(scores, polarity=polarity)
        head.config.threshold = head.calibration.threshold(0.05)
        text = head_card(head).text
        assert f"Default threshold: {head.config.threshold:.4g}, that of `alpha=0.05`." in text
        assert ('With `fallback="abstain"` no token is emitted that the head finds unacceptable' in text) != abstains
    head.config.threshold = 0.5
    assert "Default threshold: 0.5." in head_card(head).text


def test_metadata_of_a_card() -> None:
    card = head_card(make(), datasets=["org/a", "org/b"], license="mit", repo_id="org/mine")
    assert card.data.to_dict() == {
        "base_model": "org/base-model",
        "base_model_relation": "adapter",
        "datasets": ["org/a", "org/b"],
        "library_name": "hf-value-steer",
        "license": "mit",
        "tags": ["value-head", "value-steering", "toxicity"],
    }
    assert 'value_head="org/mine"' in card.text


def test_a_card_shows_the_configuration_that_the_head_is_for() -> None:
    assert "cfg = ValueFilterConfig(" in head_card(make()).text
    assert "cfg = AbstentionConfig(" in head_card(make(polarity="desirable")).text
    filtered = documents.evaluation(head={**documents.HEAD, "polarity": "desirable"})
    assert "cfg = ValueFilterConfig(" in head_card(make(polarity="desirable"), filtered).text


def test_a_calibration_says_where_it_promises_nothing() -> None:
    text = calibration_markdown(documents.calibration())
    assert ["0.02", "none keeps the promise"] in rows(text) and ["0.05", "0.62"] in rows(text)
    assert "A configuration with `alpha=0.05` takes its threshold from here." in text
    assert "n `59`; delta `0.05`" in text and "sampling `do_sample=True, temperature=1.0, top_p=0.95`" in text
    nothing = {**documents.calibration(), "curve": [{"alpha": 0.1, "threshold": None}]}
    assert "A configuration" not in calibration_markdown(nothing)


def test_other_calibrations() -> None:
    long = documents.calibration(alphas=tuple(step / 100 for step in range(1, 51)))
    assert [row[0] for row in rows(calibration_markdown(long))[2:]] == [
        "0.01", "0.02", "0.05", "0.1", "0.2", "0.3", "0.4", "0.5"
    ]  # fmt: skip
    assert rows(calibration_markdown(documents.calibration("martingale")))[0] == [
        "alpha",
        "least growth of the log odds",
    ]
    groups = {"short": {"n": 20, "curve": documents.calibration()["curve"][:4]}}
    grouped = rows(calibration_markdown({**documents.calibration(), "groups": groups}))
    assert grouped[0] == ["alpha", "threshold, all texts", "threshold, short"]
    assert grouped[5][2] == "0.4467" and grouped[6][2] == "none keeps the promise"


def test_limits_are_a_persons() -> None:
    blank = head_card(make()).content
    assert LIMITS_PLACEHOLDER in blank and is_generated(blank) and written_limits(blank) is None
    assert written_limits(head_card(make(), limits=NO_LIMITS).content) is None
    assert written_limits(head_card(make(), limits="- One.\n- Two.\n").content) == "- One.\n- Two."
    assert not is_generated("# Mine\n\n## Limits\n") and written_limits("# Mine") is None
    with pytest.raises(ValueError, match="`limits` has no text"):
        head_card(make(), limits=" \n")


def test_what_is_known_of_limits_follows_from_the_documents() -> None:
    bare, full = head_card(make()).text, head_card(make(), documents.evaluation(), documents.calibration()).text
    assert "Nothing was measured" in bare and "a choice, not a guarantee" in bare
    assert "Nothing was measured" not in full and "a choice, not a guarantee" not in full
    assert "No judge but" not in full
    fooled = documents.evaluation(judges=[{"name": documents.LABELS, "gave_labels": True}])
    assert "No judge but the one that gave the labels" in head_card(make(), fooled).text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "token (final layer, after the final norm, 8 wide) and"),
        ({"feature_layers": [3]}, "token (output of decoder layer 3, counted from 0, 8 wide) and"),
        (
            {"feature_layers": [-2, 0.5, "final"]},
            "(side by side: output of decoder layer -2, counted from the end; output of the decoder layer at 50 % of "
            "the depth; final layer, after the final norm, 8 wide)",
        ),
        ({"temporal": "mean"}, "It remembers the mean of what its first layer makes of a text, from the last token"),
        ({"temporal": "ema"}, "It remembers an exponential mean (decay 0.9) of what its first layer makes"),
    ],
)
def test_a_card_says_what_the_head_reads(config: dict[str, Any], said: str) -> None:
    text = " ".join(head_card(make(**config)).text.split())
    assert said in text and ("It remembers" in text) == ("temporal" in config)


@pytest.mark.parametrize(
    "config",
    [
        {"attribute": "sentiment"},
        {"polarity": "desirable"},
        {"backbone_fingerprint": "f" * 16},
        {"feature_layers": [3]},
        {"temporal": "mean"},
    ],
)
def test_an_evaluation_of_another_head_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`evaluation` is of a head with {next(iter(config))}"):
        head_card(make(**config), documents.evaluation())


def test_a_card_that_is_there_stays(tmp_path: Path) -> None:
    write_card(make(), tmp_path)
    assert is_generated((tmp_path / "README.md").read_text())
    (tmp_path / "README.md").write_text("mine")
    write_card(make(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_renewed_card_keeps_what_a_person_wrote() -> None:
    old = head_card(make(), limits="Slang.", datasets=["org/a"], license="mit").content
    new = renew_card(make(), old, documents.evaluation(), repo_id="org/mine")
    assert (
        new
        == head_card(
            make(), documents.evaluation(), limits="Slang.", datasets=["org/a"], license="mit", repo_id="org/mine"
        ).content
    )
    assert renew_card(make(), None) == head_card(make()).content
    assert written_limits(renew_card(make(), old, limits="Irony.")) == "Irony."
    assert renew_card(make(), "# Mine") == "# Mine"
    with pytest.raises(ValueError, match=r"have no place in a README\.md that was not generated"):
        renew_card(make(), "# Mine", limits="Irony.")


class Shown(HTMLParser):
    """What a reader of a card sees: its tags, its code blocks, and all its text without white space."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.blocks: list[str] = []
        self.text = ""
        self.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(card.text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))
        if tag == "pre":
            self.blocks.append("")

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", [(data, None)]))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == ("code", [("class", "language-python")]):
            self.blocks[-1] += data
        self.text += "".join(data.split())


def visible(text: str) -> str:
    return "".join(each for each in text if each.isprintable() and not each.isspace())


def hostile_head(text: str, several: bool = False) -> ModelCard:
    """A card in which every text of the config, the calibration and the evaluation is this one."""
    fields: dict[str, Any] = dict.fromkeys(("attribute", "backbone", "backbone_fingerprint", "chat_template"), text)
    fields |= {"feature_dtype": text, "training": {text: text, "more": {"list": [text, text]}}}
    if several:
        one = {"name": text, "polarity": "undesirable", "threshold": 0.5}
        fields["attributes"] = [one, {**one, "name": "another", "weight": 2.0}]
        fields["combine"] = "sum"
    identity = {name: fields[name] for name in ("attribute", "backbone", "backbone_fingerprint")}
    runs = documents.runs()[:3]
    for run in runs:
        run["name"], run["judges"] = text, {text: run["judges"]["lexicon"]}
    evaluation = documents.evaluation(
        head={**documents.HEAD, **identity},
        runs=runs,
        judges=[{"name": text, "gave_labels": True}],
        sampling={text: text},
    )
    calibration = documents.calibration()
    calibration |= dict.fromkeys(("guarantee", "mode", "kernel", "backend", "data"), text)
    calibration |= {"sampling": {text: text}, "groups": {text: {"curve": calibration["curve"]}}}
    config = ValueHeadConfig(hidden_size=8, **fields)
    return head_card(ValueHead(config), evaluation, calibration, datasets=[text], license=text, repo_id=text)


def hostile_module(text: str) -> ModelCard:
    fields = dict.fromkeys(("attribute", "backbone", "backbone_fingerprint", "chat_template"), text)
    sizes = {"hidden_size": 8, "layer": 0, "value_width": 8}
    config = GuidanceModuleConfig(**sizes, **fields, training={text: text})
    return guidance_card(GuidanceModule(config).facts(), repo_id=text)


def hostile_vectors(text: str) -> ModelCard:
    fields = dict.fromkeys(("attribute", "backbone", "backbone_fingerprint"), text)
    return SteeringVectors.from_tensors({0: torch.ones(8)}, **fields, provenance={text: text}).card()


CARDS = {
    "head": hostile_head,
    "several attributes": lambda text: hostile_head(text, several=True),
    "guidance": hostile_module,
    "vectors": hostile_vectors,
}


@pytest.mark.parametrize("kind", CARDS)
@pytest.mark.parametrize("text", hostile.TEXTS.values(), ids=hostile.TEXTS)
def test_what_a_config_says_is_text(kind: str, text: str) -> None:
    plain, card = CARDS[kind]("ordinary"), CARDS[kind](text)
    expected, shown = Shown(plain), Shown(card)
    assert shown.tags == expected.tags
    written_in_json = 2  # or as in Python: the provenance of vectors, and the sampling of a head
    outside = expected.text.count("ordinary") - expected.blocks[0].count("ordinary")
    assert shown.text.count(visible(text)) >= outside - written_in_json
    calls = [ast.dump(ast.parse(each.blocks[0])) for each in (expected, shown)]
    assert calls[1].replace(repr(text), "'ordinary'") == calls[0]
    assert shown.blocks[0].count("\n") == expected.blocks[0].count("\n")
    assert (
        card.data.base_model == text
        and [text if tag == "ordinary" else tag for tag in plain.data.tags] == card.data.tags
    )
    assert ModelCard(card.content).content == card.content
    assert list(card.data.to_dict()) == list(plain.data.to_dict())


@pytest.mark.parametrize("text", hostile.TEXTS.values(), ids=hostile.TEXTS)
def test_what_a_config_says_is_not_what_a_person_wrote_of_limits(text: str) -> None:
    card = hostile_head(text).content
    assert is_generated(card) and written_limits(card) is None and lacks_limits(card)
    head = ValueHead(ValueHeadConfig(hidden_size=8, attribute=text, backbone=text))
    renewed = renew_card(head, head_card(head, limits="Slang.").content)
    assert written_limits(renewed) == "Slang."


@pytest.mark.parametrize(
    "title", ["x\n<!-- limits -->\nNone.\n<!-- /limits -->\n", "x\n<!-- limits: a -->\nNone.", "<!-- limits --> x"]
)
def test_in_a_card_of_an_older_version_only_the_last_markers_count(title: str) -> None:
    old = head_card(make()).content.replace("# Value head: toxicity", f"# Value head: {title}")
    assert title in old and is_generated(old) and written_limits(old) is None


@pytest.mark.parametrize("line", ["<!-- limits -->", "<!-- /limits -->", "<!-- /limits: mine"])
def test_limits_that_hold_the_lines_around_them_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match='`limits` holds a line that begins with "<!-- limits"'):
        head_card(make(), limits=f"Slang.\n{line}\nIrony.")
