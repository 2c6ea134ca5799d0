import codecs
import json
import sys

import pytest
from transformers import AutoTokenizer

from hf_value_steer.files.references import resolve
from hf_value_steer.judges import load_judge
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.prompts import Formatter, load_prompts, share, write_prompts
from tests.tiny_text import save_tiny_model


def some_prompts():
    return ["one", {"prompt": "two", "answer": "2"}]


def test_text_files_hold_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_text("one \n\ntwo\n", encoding="utf-8")
    assert load_prompts(str(tmp_path / "p.txt")) == [Prompt("one"), Prompt("two")]
    assert load_prompts(str(tmp_path / "p.txt"), limit=1) == [Prompt("one")]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
def test_text_files_of_other_systems(tmp_path, mark, end):
    """With a byte order mark, and with lines that end in any way: prompts, records, word lists."""
    (tmp_path / "p.txt").write_bytes(mark + end.join(["one", "zw\u00f6lf", ""]).encode())
    assert load_prompts(str(tmp_path / "p.txt")) == [Prompt("one"), Prompt("zw\u00f6lf")]
    (tmp_path / "p.jsonl").write_bytes(mark + end.join(['{"prompt": "one"}', '{"prompt": "two"}']).encode())
    assert [prompt.text for prompt in load_prompts(str(tmp_path / "p.jsonl"))] == ["one", "two"]
    judge = load_judge(f"lexicon:{tmp_path / 'p.txt'}")
    assert judge([Prompt("")] * 2, ["one of them", "none"]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_other_encodings_are_refused_by_name(tmp_path, encoding):
    path = tmp_path / "p.txt"
    path.write_bytes("one\nf\u00fcnf\n".encode(encoding))
    for read in (load_prompts, lambda source: load_judge(f"lexicon:{source}")):
        with pytest.raises(ValueError, match=r"p\.txt is not .*UTF-8.*: save it in UTF-8"):
            read(str(path))


def test_records_keep_their_columns(tmp_path):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    records = [{"question": "1 + 1", "answer": "2"}, {"question": messages, "answer": "d"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    first, second = load_prompts(str(tmp_path / "p.jsonl"), column="question")
    assert first == Prompt("1 + 1", {"answer": "2"})
    assert second == Prompt("c", {"answer": "d"}, messages)
    write_prompts([first, second], tmp_path / "q.jsonl")
    assert load_prompts(str(tmp_path / "q.jsonl")) == [first, second]


def test_functions_give_prompts():
    assert load_prompts("python:tests.unit.test_prompts:some_prompts") == [
        Prompt("one"),
        Prompt("two", {"answer": "2"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n", "holds no prompt"),
        ("p.jsonl", '{"text": "a"}', r"no column 'prompt', only \['text'\]"),
        ("missing.txt", None, "there is no file"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(tmp_path / name))


def test_a_data_set_says_what_reads_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'`prompts`: some/dataset needs datasets: pip install "hf-value-steer'):
        load_prompts("some/dataset")


@pytest.mark.parametrize(
    "reference", ["json:loads", "python:json", "python::x", "python:nowhere:x", "python:json:nothing"]
)
def test_wrong_references(reference):
    with pytest.raises(ValueError, match="no reference of the form|cannot be found"):
        resolve(reference)


def test_a_prompt_is_in_one_split_for_good():
    shares = [share(f"prompt {index}") for index in range(2000)]
    assert share(" prompt 0\n") == shares[0]
    assert abs(sum(each < 0.3 for each in shares) / 2000 - 0.3) < 0.04


def test_formatting(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path))
    plain = Formatter(tokenizer, chat=False)
    batch = plain([Prompt("goodak"), Prompt("goodak goodal")])
    assert batch["input_ids"].tolist()[0][0] == 0 and batch["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert plain.name == "none"
    with pytest.raises(ValueError, match="no chat template"):
        Formatter(tokenizer, chat=True)
    with pytest.raises(ValueError, match="`system_prompt` needs `chat`"):
        Formatter(tokenizer, chat=False, system_prompt="goodak")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    ids = Formatter(tokenizer, chat=True, system_prompt="goodal")([Prompt("goodak")])["input_ids"]
    assert tokenizer.decode(ids[0]).split() == ["goodal", "goodak"]
