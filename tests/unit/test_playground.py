"""The playground without its page: texts as `generate` gives them, one pair at a time, stopped when nobody reads."""

import sys
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_value_steer import (
    SteeringVectors,
    ValueFilterConfig,
    ValueHead,
    ValueHeadConfig,
    score_text,
    value_steer_generate,
)
from hf_value_steer.cli import main
from hf_value_steer.cli import play as command
from hf_value_steer.errors import MismatchError, ScoringError
from hf_value_steer.evaluation import TokenTrace
from hf_value_steer.evaluation.trace import Colours, trace_tokens
from hf_value_steer.evaluation.watching import Side
from hf_value_steer.playground import markup
from hf_value_steer.playground.settings import Settings
from hf_value_steer.playground.writing import Turn, Writer
from tests.families import layered_head, random_head
from tests.tiny_text import continued, save_tiny_model


PROMPT, OTHER = "goodak goodbl", "goodbk goodcl goodak"
SHORT = Settings(max_new_tokens=12)
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("world") / "model")


@pytest.fixture
def writer(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    vectors = SteeringVectors((0, 1), torch.eye(model.config.hidden_size)[:2], torch.ones(2))
    return Writer(model, tokenizer, random_head(model), vectors)


def texts(turn):
    return ["".join(token.text for token in side.tokens) for side in (turn.base, turn.steered)]


def last(turns):
    *_, turn = turns
    return turn


def test_texts_grow_and_are_those_of_generate(folder, writer):
    counts = [len(turn.base.tokens) + len(turn.steered.tokens) for turn in writer.write(PROMPT, SHORT)]
    assert counts == sorted(counts) and counts[-1] == 24 and len(set(counts)) > 2
    turn = last(writer.write(PROMPT, SHORT))
    steering = ValueFilterConfig(value_head=writer.head, threshold=0.5)
    assert texts(turn) == [continued(folder, PROMPT), continued(folder, PROMPT, steering)]
    replaced = [token for token in turn.steered.tokens if token.intervened]
    assert turn.steered.replaced == len(replaced) > 0 and not turn.base.replaced
    assert all(token.candidates[token.committed][0] == token.text and len(token.candidates) > 1 for token in replaced)
    assert (turn.colours.threshold, turn.colours.polarity) == (0.5, "undesirable")


@pytest.mark.parametrize("temporal", ["none", "mean", "ema"])
@pytest.mark.parametrize("method", ["filter", "abstain"])
def test_values_of_heads_on_layers_and_over_time_are_those_of_scoring(writer, method, temporal):
    writer.head = layered_head(writer.model, [0, "final"], temporal)
    turn = last(writer.write(PROMPT, Settings(max_new_tokens=12, method=method)))
    for side, text in zip((turn.base, turn.steered), texts(turn), strict=True):
        (scored,) = score_text(writer.model, writer.head, [text], [PROMPT], tokenizer=writer.tokenizer)
        values = [token.value for token in side.tokens][: len(scored.values)]
        assert values == pytest.approx(scored.values[: len(values)], abs=1e-4) and len(set(values)) > 2


@pytest.mark.parametrize("temporal", ["none", "mean"])
def test_what_was_taken_back_is_in_the_text_that_is_kept(writer, temporal):
    """At each moment only the last tokens change; at the end the tokens are those of a trace of the output."""
    writer.head = layered_head(writer.model, ["final"], temporal)
    settings, seen = Settings(max_new_tokens=24, threshold=0.35, num_candidates=3, rollback=4, seed=1), []
    for turn in writer.write(PROMPT, settings):
        seen.append([token.text for token in turn.steered.tokens])
    inputs = writer.tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(1)
    options = {**settings.options(), "return_dict_in_generate": True}
    output = writer.model.generate(
        **inputs, **options, custom_generate=value_steer_generate, value_steer=settings.valued(writer.head)
    )
    expected = trace_tokens(output, writer.tokenizer, 0, inputs["input_ids"].shape[1])
    assert turn.steered.taken_back == int((output.taken_back_steps >= 0).sum()) > 3
    for mine, other in zip(turn.steered.tokens, expected, strict=True):
        assert (mine.text, mine.intervened) == (other.text, other.intervened)
        assert mine.value == pytest.approx(other.value, abs=1e-4)
        assert [(text, before) for text, _, before in mine.taken_back] == [
            (text, b) for text, _, b in other.taken_back
        ]
    final = [token.text for token in expected]
    assert seen[-1] == final and all(tokens[:-5] == final[: max(len(tokens) - 5, 0)] for tokens in seen)
    assert not turn.base.taken_back


def test_settings_change_the_text(writer):
    changes = [{"threshold": 0.6}, {"num_candidates": 2}, {"seed": 1}, {"temperature": 0.0}, {"top_p": 0.3}]
    changes += [{"multiplier": 9.0}, {"multiplier": 9.0, "layers": (0.0, 1.0)}, {"method": "abstain"}]
    found = [texts(last(writer.write(PROMPT, Settings(max_new_tokens=12, **change))))[1] for change in changes]
    plain = texts(last(writer.write(PROMPT, SHORT)))[1]
    assert len({plain, *found}) == len(changes) + 1
    for alike in ({"layers": (1.0, 1.0)}, {"multiplier": 9.0, "layers": (0.0, 0.0)}):
        assert texts(last(writer.write(PROMPT, Settings(max_new_tokens=12, **alike))))[1] == plain


def test_abstention_ends_the_steered_text(writer):
    turn = last(writer.write(PROMPT, Settings(max_new_tokens=12, method="abstain")))
    assert turn.steered.ended and len(turn.steered.tokens) < 12 and not turn.base.ended


def test_each_side_of_a_chat_goes_on_with_its_own_answers(writer, monkeypatch):
    assert not writer.chats
    with pytest.raises(ValueError, match="no chat template"):
        last(writer.write(PROMPT, Settings(chat=True)))
    writer.tokenizer.chat_template = TEMPLATE
    asked = []
    read = writer.tokenizer.__class__.__call__
    monkeypatch.setattr(
        writer.tokenizer.__class__,
        "__call__",
        lambda self, given, **more: asked.extend(given) or read(self, given, **more),
    )
    past = [
        Turn(
            "one",
            *(Side(name, [TokenTrace(f"{name} says", 0.1), TokenTrace("</s>", 0.2)]) for name in ("base", "steered")),
        )
    ]
    last(writer.write("two", Settings(chat=True, max_new_tokens=1), past))
    assert asked == [f"user one assistant {name} says user two " for name in ("base", "steered")]
    last(writer.write("two", Settings(max_new_tokens=1), past))
    assert asked[2:] == ["two", "two"]


def test_who_comes_second_gets_what_it_would_get_alone(writer):
    jobs = {(PROMPT, 1): None, (OTHER, 2): None, (PROMPT, 3): None}

    def write(prompt, seed):
        jobs[prompt, seed] = texts(last(writer.write(prompt, Settings(max_new_tokens=12, seed=seed))))

    threads = [threading.Thread(target=write, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (prompt, seed), found in jobs.items():
        assert found == texts(last(writer.write(prompt, Settings(max_new_tokens=12, seed=seed))))


@pytest.mark.parametrize("how", ["reader", "writer"])
def test_a_text_that_nobody_wants_is_not_written(writer, how):
    generator = writer.write(PROMPT, Settings(max_new_tokens=10_000, threshold=0.9999))
    turn = next(generator)
    if how == "reader":
        generator.close()
    else:
        writer.close()
        last(generator)
    assert len(turn.base.tokens) < 10_000 and not turn.steered.tokens and not writer.alone.locked()


@pytest.mark.parametrize(
    ("prompt", "change", "message"),
    [
        (" \n", {}, "There is no prompt"),
        (PROMPT, {"threshold": 1.5}, "`threshold` has to be a number"),
        (PROMPT, {"num_candidates": 0}, "`num_candidates` has to be an integer from 1 to 1024, got 0"),
        (PROMPT, {"promised": True}, "needs a calibrated head"),
    ],
)
def test_what_cannot_be_is_an_error(writer, prompt, change, message):
    with pytest.raises(ValueError, match=message):
        last(writer.write(prompt, Settings(**change)))
    assert last(writer.write(PROMPT, SHORT)).steered.tokens


def test_a_value_that_is_none_is_an_error(writer):
    writer.head.forward = lambda features: type(
        "Output", (), {"value": features.new_full(features.shape[:-1], torch.nan)}
    )
    with pytest.raises(ScoringError, match="not finite"):
        last(writer.write(PROMPT, SHORT))


def test_a_head_that_does_not_fit_is_refused_at_once(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda _: True)
    ValueHead(ValueHeadConfig(hidden_size=7, threshold=0.5)).save_pretrained(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(MismatchError, match="hidden_size=7"):
        Writer(model, tokenizer, ValueHead.from_pretrained(tmp_path))
    for more, message in (
        ([], "hidden_size=7"),
        (["--alpha", "0.1"], "needs a calibrated head"),
        (["--alpha", "0.1", "--threshold", "0.5"], "both say where to act"),
    ):
        assert main(["play", str(folder), "--value-head", str(tmp_path), *more]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("hf-value-steer play: ") and message in said


def test_without_gradio_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    assert main(["play", "model", "--value-head", "head"]) == 2
    assert capsys.readouterr().err == 'hf-value-steer play: The playground needs gradio: pip install ".[play]".\n'
    assert "gradio" not in sys.modules


def test_what_is_written_stays_text():
    hostile = "<img src=x onerror=alert(1)>&{{1+1}}"
    token = TokenTrace(hostile, 0.6, True, ((hostile, 0.6), ("b", 0.7)), ((hostile, 0.4, ""),))
    turn = Turn(hostile, Side("base", [token]), Side("steered", [token], ended=True), Colours(0.5, "undesirable"))
    page = markup.texts([turn, Turn(hostile)])
    assert "<img" not in page and page.count("&lt;img src=x onerror=alert(1)&gt;&amp;{{1+1}}") == 8
    assert page.count("ended because it would not end well") == 1 and "The model reads the prompt." in page
    assert "<b>bold</b>" not in markup.top("<b>bold</b>", ValueHead(ValueHeadConfig(hidden_size=7)))


@pytest.mark.parametrize(
    ("polarity", "said"), [("undesirable", "a high value is bad"), ("desirable", "a low one is bad")]
)
def test_the_page_says_what_is_bad(polarity, said):
    assert said in markup.top("model", ValueHead(ValueHeadConfig(hidden_size=7, polarity=polarity, attribute="rain")))
