"""Cards and their Markdown: every part says what the documents say, and nothing where they say nothing."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from hf_value_steer import ValueHead, ValueHeadConfig
from hf_value_steer.calibration import Calibration
from hf_value_steer.cards import (
    LIMITS_PLACEHOLDER,
    NO_LIMITS,
    head_card,
    is_generated,
    renew_card,
    write_card,
    written_limits,
)
from hf_value_steer.evaluation.markdown import calibration_markdown, model_index, results_markdown
from tests import documents


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
    "config", [{"attribute": "sentiment"}, {"polarity": "desirable"}, {"backbone_fingerprint": "f" * 16}]
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
