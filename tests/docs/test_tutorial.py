"""The tutorial, step by step, with a tiny model: its prompts, its judge, its commands and its AUROC."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from hf_value_steer.cli import main
from tests.tiny_text import save_tiny_model, write_prompts


PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
SMALL = {"--model": "model", "--samples": "3", "--max-new-tokens": "8", "--batch-size": "16"}
LAYERS = "3 11 19 final", "0 1 final"
JUDGE = r"\b(I|me|my|mine|myself)\b"


def blocks(language):
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def commands():
    """The page's commands, each with the tiny model and its two layers, and fewer and shorter texts."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").replace(*LAYERS).splitlines()
    return [at_a_tiny_size(shlex.split(line)) for line in lines if line.startswith("hf-value-steer ")]


def at_a_tiny_size(words):
    small = [SMALL.get(before, word) for before, word in zip([None, *words], words, strict=False)]
    # What a head learns from so few texts of random words is luck.
    return small + ["--accept-chance", "--trainer", "report_to=none"] * (words[1] == "train")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("judges", None)  # of another folder
    yield tmp_path
    sys.modules.pop("judges", None)


def test_prompts_and_judge_are_as_the_page_says(folder):
    space, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks("python"):
            exec(block, space)
    said = [text.strip() for text in blocks("text")]
    first, second = printed.getvalue().strip().split("\n")
    assert [first, second] == [said[0], said[1]]
    prompts, unseen = ((folder / name).read_text().split("\n") for name in ("prompts.txt", "unseen.txt"))
    assert len(set(prompts)) == 100 and len(set(unseen)) == 36 and not {*prompts} & {*unseen}


@pytest.mark.filterwarnings("ignore")
def test_every_command_of_the_page_in_its_order(folder, capsys):
    save_tiny_model(folder / "model")
    write_prompts(folder / "prompts.txt", 96)
    (folder / "unseen.txt").write_text("goodak goodal goodam\ngoodbk goodbl\ngoodck goodcl\ngooddk gooddl\n")
    judge = next(block for block in blocks("python") if "def first_person" in block)
    assert JUDGE in judge
    (folder / "judges.py").write_text(judge.replace(JUDGE, r"\bbada\w"))
    done = commands()
    assert [words[1] for words in done] == ["collect", "train", "calibrate", "generate", "evaluate"]
    for words in done:
        assert not main(words[1:]), words
    assert "AUROC of a text's worst value, without steering" in capsys.readouterr().out
    assert (folder / "run/evaluation/report.html").is_file()
