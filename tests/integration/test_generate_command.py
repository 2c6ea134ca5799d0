"""`hf-value-steer generate`: both texts as `generate` gives them; in a pipe, in terminals wide and narrow; stopped."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_value_steer import AbstentionConfig, SteeringVectors, ValueFilterConfig, ValueHead
from hf_value_steer.cli import main
from hf_value_steer.cli.generate import Screen
from hf_value_steer.evaluation import TokenTrace
from hf_value_steer.evaluation.trace import Colours
from hf_value_steer.evaluation.watching import Side, Watch
from tests.families import random_head
from tests.tiny_text import continued, save_tiny_model


ROOT = Path(__file__).parents[2]
PROMPT = "goodak goodbl"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:[34]\d|48;2)[0-9;]*m")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model, and two heads for it: for the filter and for abstention."""
    folder = tmp_path_factory.mktemp("world")
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder / "model"))
    for name, polarity in (("filter", "undesirable"), ("abstain", "desirable")):
        random_head(model, polarity).save_pretrained(folder / name)
    return folder


def words(world, *more, method="filter"):
    how = ["--value-head", str(world / method), "--method", method, "--threshold", "0.5", "--max-new-tokens", "12"]
    return ["generate", PROMPT, "--model", str(world / "model"), *how, *more]


def expected(world, value_steer=None, tokens=12, seed=0):
    """The text that `generate` itself continues the prompt with."""
    return continued(world / "model", PROMPT, value_steer, tokens, seed)


def sides(out):
    """The two texts, and the lines below them."""
    found = re.fullmatch(r"base: (.*?)\n\nsteered: (.*?)\n\n(.*)", out, re.DOTALL)
    return found[1], found[2], found[3].splitlines()


def in_terminal(columns, words, stop_after=None):
    """What a command writes into a terminal of so many columns, and its status; Ctrl-C is typed after some text."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    for name in ("NO_COLOR", "COLUMNS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "hf_value_steer.cli", *words]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=ROOT, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    written, typed = b"", False
    while True:
        try:
            written += os.read(master, 65536)
        except OSError:  # nobody writes any more
            break
        if stop_after is not None and not typed and stop_after in written:
            time.sleep(0.5)
            os.write(master, b"\x03")
            typed = True
    os.close(master)
    return written.decode(), process.wait()


def test_a_pipe_gets_both_texts_and_nothing_else(world, capsys):
    assert main(words(world, "--seed", "3")) == 0
    out = capsys.readouterr().out
    base, steered, summary = sides(out)
    head = ValueHead.from_pretrained(world / "filter")
    assert base == expected(world, seed=3)
    assert steered != base and "[" in steered
    assert re.sub(r"[\[\]]", "", steered) == expected(world, ValueFilterConfig(value_head=head, threshold=0.5), seed=3)
    assert "\x1b" not in out and [line.split()[0] for line in summary[:2]] == ["base", "steered"]
    replaced = steered.count("[")
    assert f"{replaced} of 12 tokens replaced" in summary[1]
    assert summary[2].startswith("A high value is undesirable; a token is acceptable below 0.5000. Tokens in brackets")


def test_tokens_that_had_to_be_kept_are_counted(world, monkeypatch):
    values = [0.2, 0.6, 0.5, 0.4, 0.9]
    steered = Side("steered", [TokenTrace("a", value, value == 0.2) for value in values])
    watch = Watch(None, AutoTokenizer.from_pretrained(world / "model"))
    monkeypatch.setattr(Watch, "colours", Colours(0.5, "undesirable"))
    summary = Screen([Side("base"), steered], watch, colour=False, replaces=True).summary()
    assert "1 of 5 tokens replaced, 3 kept though not acceptable" in summary[0]


BACK = ["--rollback", "4", "--num-candidates", "3", "--threshold", "0.4"]


def went_back(world):
    """The text that is kept, and how many tokens were taken back."""
    head = ValueHead.from_pretrained(world / "filter")
    config = ValueFilterConfig(value_head=head, threshold=0.4, num_candidates=3, rollback=4)
    return expected(world, config)


def test_a_pipe_gets_the_text_that_is_kept(world, capsys):
    assert main(words(world, *BACK)) == 0
    base, steered, summary = sides(capsys.readouterr().out)
    assert base == expected(world) and re.sub(r"[\[\]]", "", steered) == went_back(world)
    assert re.search(r"[1-9]\d* taken back", summary[1]) and "taken back" not in summary[0]


@pytest.mark.parametrize("columns", [60, 200])
def test_a_terminal_gets_the_text_that_is_kept(world, columns):
    written, status = in_terminal(columns, words(world, *BACK))
    shown = " ".join(CONTROL.sub("", written.split("\x1b[2K")[-1]).split())
    assert status == 0 and went_back(world).strip() in shown and "taken back" in shown


def test_a_token_is_written_once_it_can_no_longer_be_taken_back(world, capsys):
    watch, side = Watch(None, AutoTokenizer.from_pretrained(world / "model")), Side("steered", unsettled=2)
    screen, written = Screen([side], watch, colour=False, replaces=True), []
    for token in "abcd":
        side.tokens.append(TokenTrace(token, 0.5))
        screen.show(side)
        written.append(capsys.readouterr().out)
    side.tokens = [*side.tokens[:2], TokenTrace("e", 0.5)]  # it has ended
    screen.show(side)
    screen.finish(side)
    assert written == ["", "", "steered: a", "b"] and capsys.readouterr().out == "e\n\n"


def test_abstention_says_where_a_text_was_ended(world, capsys):
    assert main(words(world, method="abstain")) == 0
    base, steered, summary = sides(capsys.readouterr().out)
    config = AbstentionConfig(value_head=ValueHead.from_pretrained(world / "abstain"), threshold=0.5)
    assert base == expected(world) and steered == expected(world, config) and len(steered) < len(base)
    assert "ended because it would not end well" in summary[1] and "acceptable above 0.5000" in summary[2]


def test_methods_without_a_head_have_no_values(world, capsys, tmp_path):
    width = AutoModelForCausalLM.from_pretrained(world / "model").config.hidden_size
    SteeringVectors((1,), torch.eye(width)[:1], torch.ones(1)).save_pretrained(tmp_path)
    spelled = json.dumps({"method": "activate", "vectors": str(tmp_path), "multiplier": 20.0})
    command = ["generate", PROMPT, "--model", str(world / "model"), "--value-steer", spelled, "--max-new-tokens", "12"]
    assert main(command) == 0
    base, steered, summary = sides(capsys.readouterr().out)
    assert base == expected(world) and steered != base and "[" not in steered
    assert summary == []


def test_a_wide_terminal_shows_the_texts_side_by_side_and_a_narrow_one_below_each_other(world):
    written, status = in_terminal(100, words(world))
    last = CONTROL.sub("", written.split("\x1b[2K")[-1])
    assert status == 0 and COLOUR.search(written) and re.search(r"^base +steered", last, re.MULTILINE)
    assert re.search("\x1b\\[1;4[0-9;]*m (?:good|bad)", written)  # what was replaced is underlined
    written, status = in_terminal(60, words(world))
    assert status == 0 and COLOUR.search(written) and "base +steered" not in written
    assert re.search(r"steered: ", CONTROL.sub("", written))


@pytest.mark.parametrize("columns", [60, 100])
def test_without_colour_there_is_none(world, columns):
    written, status = in_terminal(columns, words(world, "--no-color"))
    assert status == 0 and not COLOUR.search(written) and re.search(r"\[(?:good|bad)", CONTROL.sub("", written))


def test_ctrl_c_leaves_no_traceback(world):
    written, status = in_terminal(100, words(world, "--max-new-tokens", "4000"), stop_after=b"steered")
    assert status == 130 and "Traceback" not in written and written.rstrip().endswith("generate: stopped.")


def test_a_text_cannot_control_the_terminal(world):
    watch = Watch(None, AutoTokenizer.from_pretrained(world / "model"))
    screen = Screen([Side("base"), Side("steered")], watch, colour=False, replaces=True)
    shown = screen.text(TokenTrace(" \x1b[2J\x07[bold]\u202eé\u3000\xa0\u200d\n\t", 0.5)).plain
    assert shown == " \ufffd[2J\ufffd[bold]\ufffdé\u3000\xa0\u200d\n\t"


def test_the_values_are_those_of_the_method_that_replaces(world, capsys):
    heads = {name: {"value_head": str(world / name), "threshold": 0.5} for name in ("abstain", "filter")}
    methods = [{"method": name, **options} for name, options in heads.items()]
    said = []
    for order in (methods, methods[::-1]):
        command = ["generate", PROMPT, "--model", str(world / "model"), "--value-steer", json.dumps(order)]
        assert main([*command, "--max-new-tokens", "6"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "A high value is undesirable" in said[0]


def test_a_terminal_without_columns_gets_everything(world, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    assert main(words(world)) == 0
    assert sides(capsys.readouterr().out)[0] == expected(world)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "Pass --value-head, or --value-steer."),
        (["--value-head", "HEAD"], "Pass --model: the head names no backbone."),
        (["--value-head", "HEAD", "--value-steer", "{}"], "--value-steer says it all: leave out --value-head."),
        (["--value-steer", "null"], "--value-steer has to be an object or a list, got 'null'."),
        (["--value-steer", "{'a'}"], "--value-steer has to be JSON, got \"{'a'}\""),
        (
            ["--value-steer", '{"method": "filter", "treshold": 1}'],
            "`treshold` is not a field of ValueFilterConfig",
        ),
    ],
)
def test_what_is_missing_is_said(world, capsys, more, message):
    words = ["generate", PROMPT, *(str(world / "filter") if word == "HEAD" else word for word in more)]
    try:
        assert main(words) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert message in capsys.readouterr().err
