"""`hf-value-steer score`: a line for each text, with the values that the library gives."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_value_steer import score_text
from hf_value_steer.cli import main
from tests.families import random_head
from tests.tiny_text import save_tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    random_head(AutoModelForCausalLM.from_pretrained(save_tiny_model(folder / "model"))).save_pretrained(
        folder / "head"
    )
    (folder / "texts.txt").write_text("goodak goodbl\nbadak goodal goodam\n")
    records = [{"text": "goodal goodam", "before": "goodak"}, {"text": "badak", "before": "goodbl goodcl"}]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def scored(world, capsys, *words):
    command = ["score", "--model", f"{world}/model", "--value-head", f"{world}/head", "--threshold", "0.5", *words]
    assert main(command) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("prompted", [False, True])
def test_lines_are_what_the_library_says(world, capsys, prompted):
    model, tokenizer = (kind.from_pretrained(world / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    texts, prompts = ["goodak goodbl", "badak goodal goodam"], None
    words = ["--texts", f"{world}/texts.txt"]
    if prompted:
        texts, prompts = ["goodal goodam", "badak"], ["goodak", "goodbl goodcl"]
        words = ["--texts", f"{world}/texts.jsonl", "--prompt-column", "before"]
    known = list(score_text(model, str(world / "head"), texts, prompts, tokenizer=tokenizer, threshold=0.5))
    lines = scored(world, capsys, *words, "--values")
    assert len(lines) == len(known) == 2
    for number, (line, each) in enumerate(zip(lines, known, strict=True)):
        assert (line["text"], line["first_unacceptable"]) == (number, each.first_unacceptable)
        values = [value for _, value in line["values"]]
        assert prompted or values.pop(0) is None  # the very first token has none, which JSON has no NaN for
        assert values == pytest.approx(each.values[-len(values) :]) and line["worst_value"] == max(values)
        assert "".join(piece for piece, _ in line["values"]).split() == texts[number].split()
        assert line["acceptable"] == (each.first_unacceptable is None) == ("token" not in line)
    assert "values" not in scored(world, capsys, *words)[0]


def test_texts_are_read_as_they_are_and_prompts_as_in_training(world, capsys, tmp_path):
    record = {"text": "  goodal  goodam ", "before": [{"role": "user", "content": "goodak"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(record))
    folder = tmp_path / "chat-model"
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} goodcl{% endfor %}"
    AutoModelForCausalLM.from_pretrained(world / "model").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    words = ["--texts", f"{tmp_path}/chats.jsonl", "--prompt-column", "before", "--model", str(folder), "--values"]
    for chat, before in (("--chat", "goodak goodcl"), ("--no-chat", "goodak")):
        options = {"tokenizer": tokenizer, "threshold": 0.5}
        (known,) = score_text(model, str(world / "head"), [record["text"]], [before], **options)
        (line,) = scored(world, capsys, *words, chat)
        assert [value for _, value in line["values"]] == pytest.approx(known.values)


def test_a_missing_column_is_named(world, capsys, tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"text": [{"role": "user", "content": "goodak"}]}))
    said = ["--model", f"{world}/model", "--value-head", f"{world}/head", "--texts", f"{tmp_path}/chats.jsonl"]
    assert main(["score", *said]) == 2
    assert "chats.jsonl, line 1: expected a text in `text`, got list" in capsys.readouterr().err
    command = [
        "score",
        "--model",
        f"{world}/model",
        "--value-head",
        f"{world}/head",
        "--texts",
        f"{world}/texts.jsonl",
    ]
    (tmp_path / "texts.txt").write_text("goodak goodbl\n")
    assert main(["score", *said[:-1], f"{tmp_path}/texts.txt", "--prompt-column", "before"]) == 2
    assert "texts.txt, line 1 is a text without the column 'before'" in capsys.readouterr().err
    assert main([*command, "--prompt-column", "befor"]) == 2
    assert "the record has no column 'befor', only ['before', 'text']" in capsys.readouterr().err
