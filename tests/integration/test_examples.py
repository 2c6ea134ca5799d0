"""The example scripts run, on the small model, and show a difference."""

import runpy
import sys

import pytest

from examples.smollm2 import backbone_folder
from examples.toxicity import mask_offensive


# Script, its arguments for a small run, and what it prints if it did what it is for.
SCRIPTS = {
    "filter_basics": (["--new-tokens", "8"], "tokens replaced: "),
    "chat_pipeline": (["--new-tokens", "14"], "steered: '"),
    "streaming": (["--new-tokens", "8"], "steered: I saw this film last night"),
    "word_list": (["--new-tokens", "12"], "ms a step for the list"),
    "abstention": (["--problems", "8"], "right   answered"),
    "beam_search": (["--new-tokens", "6"], "steered  beam 2: "),
    "steering_vectors": (["--new-tokens", "8"], "m +0.50: "),
    "train_own_head": (["--prompts", "40", "--new-tokens", "8", "--value-head", "OUTPUT/head"], "steered  'The storm"),
    "several_attributes": (["--prompts", "64", "--new-tokens", "8", "--output", "OUTPUT"], "steered  'The storm"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs_and_shows_something(name, tmp_path, monkeypatch, capsys):
    options, expected = SCRIPTS[name]
    options = [option.replace("OUTPUT", str(tmp_path)) for option in options]
    monkeypatch.setattr(sys, "argv", [name, "--model", str(backbone_folder()), *options])
    runpy.run_module(f"examples.{name}", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    shown = "\n".join(line for line in lines if not line.startswith("{'"))  # what a Trainer logs: numbers, and times
    assert expected in shown
    assert mask_offensive(shown) == shown
    texts = [line.partition("'" if "'" in line else " ")[2] for line in shown.splitlines()]
    assert len(set(texts)) > 1
