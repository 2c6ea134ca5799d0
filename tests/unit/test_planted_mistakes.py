"""Mistakes in recipes, records and arguments: one error each, which says where it is and what was expected."""

import codecs
import datetime
import importlib
import json
import pickle
import pkgutil
import random
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import numpy as np
import pytest

from hf_value_steer import arguments
from hf_value_steer.arguments.base import Arguments, renamed
from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.arguments.collect import CollectArguments, LabelArguments, LabelCommandArguments
from hf_value_steer.arguments.doctor import DoctorArguments
from hf_value_steer.arguments.evaluate import EvaluateArguments, SweepArguments
from hf_value_steer.arguments.guidance import GuidanceTrainArguments, LossWeights
from hf_value_steer.arguments.hub import ExportArguments, PushArguments, RecipePushArguments, RunArguments
from hf_value_steer.arguments.layers import LayersArguments
from hf_value_steer.arguments.score import ScoreArguments
from hf_value_steer.arguments.steer import GenerateArguments, PlayArguments, ServeArguments
from hf_value_steer.arguments.train import JudgedAttribute, Preset, TrainArguments
from hf_value_steer.arguments.vectors import ApplyArguments, BakeArguments, ExtractArguments, ScaleArguments
from hf_value_steer.cli.options import parser_of, read
from hf_value_steer.errors import FieldError
from hf_value_steer.files.marked import Marked, read_marked
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.recipe import run_recipe
from hf_value_steer.recipe.sections import Steps
from hf_value_steer.training.collect import collect
from hf_value_steer.training.prompts import load_prompts, prompts_digest, write_prompts
from tests.tiny_text import write_world


EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"
GOOD = """\
output: runs/x
collect:
  model: org/backbone
  prompts: prompts.txt
  samples: 4
  max_new_tokens: 16
  top_p: 0.95
label:
  judges: ["lexicon:words.txt"]
  prefixes: true
train:
  attribute: rude
  preset: hazard
  learning_rate: 1.0e-3
  trainer: [bf16=false]
calibrate:
  alpha: 0.1
evaluate:
  folds: 4
  judges: ["lexicon:other.txt"]
  num_candidates: [8, 16]
card:
  limits: English only.
push:
  repo_id: org/head
  dry_run: true
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(8)
)

# What is written instead of what, and what follows the name of the file in the error.
RECIPES = {
    "a number as a text": (
        "1.0e-3",
        "'0.001'",
        ", line 14, train.learning_rate: has to be a number, got '0.001' (in YAML 1.0e-3, not 1e-3).",
    ),
    "a text that looks like a number": (
        "1.0e-3",
        "1e-3",
        ", line 14, train.learning_rate: has to be a number, got '1e-3'",
    ),
    "a number in words": (
        "1.0e-3",
        "small",
        ", line 14, train.learning_rate: has to be a number, got 'small'.",
    ),
    "a whole number as a text": (
        "samples: 4",
        "samples: '4'",
        ", line 5, collect.samples: has to be a whole number, got '4' (write it without quotes).",
    ),
    "nothing as a text": ("model: org/backbone", "model:", ", line 3, collect.model: has to be a text, got None."),
    "a list as a number": (
        "samples: 4",
        "samples: [4]",
        ", line 5, collect.samples: has to be a whole number, got [4]",
    ),
    "half a sample": ("samples: 4", "samples: 4.5", ", line 5, collect.samples: has to be a whole number, got 4.5"),
    "nothing as a number": ("samples: 4", "samples:", ", line 5, collect.samples: has to be a whole number, got None"),
    "not a number": ("top_p: 0.95", "top_p: .nan", ", line 7, collect.top_p: has to be a finite number, got nan"),
    "infinite": ("1.0e-3", ".inf", ", line 14, train.learning_rate: has to be a finite number, got inf"),
    "more samples than can be drawn": (
        "samples: 4",
        "samples: 1000000000000000",
        ", line 5, collect.samples: has to be at most 1,000,000, got 1000000000000000.",
    ),
    "no samples": ("samples: 4", "samples: 0", ", line 5, collect.samples: has to be at least 1, got 0."),
    "endless texts": (
        "_tokens: 16",
        "_tokens: 1000000000000",
        ", line 6, collect.max_new_tokens: has to be at most 1,000,000",
    ),
    "a number of thousands of digits": (
        "samples: 4",
        f"samples: {'9' * 5000}",
        ", line 5: '999",
    ),
    "too many candidates": (
        "[8, 16]",
        "[8, 100000]",
        ", line 21, evaluate.num_candidates: `num_candidates[1]` has to be at most 1,024, got 100000.",
    ),
    "one text in a list of numbers": (
        "[8, 16]",
        "[8, many]",
        ", line 21, evaluate.num_candidates: `num_candidates[1]` has to be a whole number, got 'many'",
    ),
    "one fold": ("folds: 4", "folds: 1", ", line 19, evaluate.folds: has to be at least 2, got 1."),
    "folds in words": ("folds: 4", "folds: four", ", line 19, evaluate.folds: has to be a whole number, got 'four'."),
    "a share above one": (
        "alpha: 0.1",
        "alpha: 10",
        ", line 17, calibrate.alpha: has to be below 1, got 10.",
    ),
    "a date": (
        "attribute: rude",
        "attribute: 2024-01-01",
        ", line 12, train.attribute: has to be a text, got datetime.date(2024, 1, 1) "
        "(in YAML a text like this needs quotes)",
    ),
    "a date that there is not": (
        "attribute: rude",
        "attribute: 2024-02-31",
        ", line 12: '2024-02-31' cannot be read as timestamp.",
    ),
    "no as a text": ("attribute: rude", "attribute: no", ", line 12, train.attribute: has to be a text, got False"),
    "a text as a truth value": (
        "prefixes: true",
        "prefixes: 'yes'",
        ", line 10, label.prefixes: has to be true or false, got 'yes'.",
    ),
    "a number as a truth value": (
        "dry_run: true",
        "dry_run: 1",
        ", line 26, push.dry_run: has to be true or false, got 1.",
    ),
    "a judge that is no list": (
        '["lexicon:words.txt"]',
        "lexicon:words.txt",
        ", line 9, label.judges: has to be a list, got 'lexicon:words.txt'.",
    ),
    "no judge": ('["lexicon:words.txt"]', "[]", ", line 9, label.judges: has to be a list of 1 or more, got []."),
    "no candidates": (
        "[8, 16]",
        "[]",
        ", line 21, evaluate.num_candidates: has to be a list of 1 or more, got [].",
    ),
    "arguments of vLLM that are no JSON": (
        "  samples: 4\n",
        "  engine: vllm\n  engine_args: max_model_len=4096\n",
        ", line 6, collect.engine_args: has to be a JSON object in a text, got 'max_model_len=4096'.",
    ),
    "a word that is no option": (
        "preset: hazard",
        "preset: hazzard",
        ", line 13, train.preset: has to be one of value-steer, hazard, onset, got 'hazzard'.",
    ),
    "an unknown field": (
        "learning_rate:",
        "lerning_rate:",
        ", line 14, train.lerning_rate: `lerning_rate` is not a field of section 'train': "
        "did you mean `learning_rate`?",
    ),
    "an unknown section": (
        "calibrate:",
        "calibrat:",
        ", line 16, calibrat: `calibrat` is not a field of a recipe: did you mean `calibrate`?",
    ),
    "a key that is no text": (
        "calibrate:",
        "5:",
        ", line 16, 5: `5` is not a field of a recipe: known keys: calibrate,",
    ),
    "a key that is a list": ("calibrate:", "? [a]\n:", ", line 16: a key has to be a text."),
    "an unknown option of push": (
        "dry_run: true",
        "dryrun: true",
        ", line 26, push.dryrun: `dryrun` is not a field of section 'push': did you mean `dry_run`?",
    ),
    "no repository": ("  repo_id: org/head\n", "", ", line 24, push: it lacks repo_id."),
    "an unknown argument of the trainer": (
        "[bf16=false]",
        "[bf61=false]",
        ", line 15, train.trainer: 'bf61' is no argument of TrainingArguments: did you mean bf16?",
    ),
    "an argument of the trainer without a value": (
        "[bf16=false]",
        "[bf16]",
        ", line 15, train.trainer: `trainer` takes entries name=value, got 'bf16'.",
    ),
    "a field twice": (
        "  samples: 4\n",
        "  samples: 4\n  samples: 5\n",
        ", line 6: samples is there already, at line 5.",
    ),
    "a section twice": ("card:", "train: {}\ncard:", ", line 22: train is there already, at line 11."),
    "a section that is a text": (
        "  alpha: 0.1\n",
        "  alpha\n",
        ", line 16, calibrate: has to be a mapping of its fields, got 'alpha'.",
    ),
    "a section that is a list": (
        "  alpha: 0.1\n",
        "  - alpha\n",
        ", line 16, calibrate: has to be a mapping of its fields, got ['alpha'].",
    ),
    "what does not go together": (
        "  folds: 4\n",
        "  folds: 4\n  prompts: p.txt\n",
        ", line 19, evaluate.folds: `folds` evaluates on the prompts of `collect`",
    ),
    "an empty file": (GOOD, "", ": a recipe has to be a mapping of sections (output, collect,"),
    "a list": (GOOD, "- collect\n", ": a recipe has to be a mapping of sections"),
    "a cut file": (GOOD, GOOD[: GOOD.index("train:")], ": it lacks train."),
    "a file that was cut in a list": (
        GOOD,
        GOOD[: GOOD.index("words.txt")],
        ", line 9: while scanning a quoted scalar, found unexpected end of stream.",
    ),
    "a tab": (
        "  top_p",
        "\ttop_p",
        ", line 7: while scanning for the next token, found character '\\t' that cannot start any token.",
    ),
    "a character that is none": ("rude", "ru\x07de", ", line 12: the character '\\x07' is not allowed."),
    "lists in lists in lists": (
        "0.95",
        "[" * 50_000,
        " is nested too deeply: a recipe has sections, and they have keys.",
    ),
    "aliases that grow": (GOOD, BOMB, ", line 1, a: `a` is not a field of a recipe: known keys"),
    "a list in itself": ("[8, 16]", "&a [*a]", ", line 21: found unconstructable recursive node."),
    "an alias of nothing": ("[8, 16]", "*a", ", line 21: found undefined alias 'a'."),
    "a layer that is none": (
        "  samples: 4\n",
        "  feature_layers: [11, last]\n",
        ", line 5, collect.feature_layers: `feature_layers[1]` has to be a layer's number, a fraction of the depth in "
        "[0, 1] or \"final\", got 'last'.",
    ),
    "a layer that is not kept": (
        "  preset: hazard\n",
        "  preset: hazard\n  feature_layers: [11]\n",
        ", line 14, train.feature_layers: `feature_layers` names [11], but section 'collect' keeps "
        "['final']: say them there, too",
    ),
    "a head on all layers": (
        "  samples: 4\n",
        "  feature_layers: [all]\n",
        ", line 11, train: it lacks feature_layers: section 'collect' keeps all, of which a head reads a few.",
    ),
    "layers under vLLM": (
        "  samples: 4\n",
        "  engine: vllm\n  feature_layers: [11]\n",
        ', line 2, collect: `feature_layers` [11] need `engine="generate"`: under vLLM only the final state is seen.',
    ),
    "a decay of nothing": (
        "  preset: hazard\n",
        "  preset: hazard\n  temporal: mean\n  temporal_decay: 0.5\n",
        ", line 15, train.temporal_decay: `temporal_decay` is for `temporal`=\"ema\", this head has 'mean'.",
    ),
    "an object of Python": (
        "rude",
        "!!python/object/apply:os.getcwd []",
        ", line 12: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd'",
    ),
    "a name of Python": (
        "rude",
        "!!python/name:os.getcwd ''",
        ", line 12: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.getcwd'.",
    ),
    "two recipes": (
        "train:",
        "---\ntrain:",
        ", line 11: expected a single document in the stream, but found another document.",
    ),
}


def written(folder, text):
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def one_line(caught, kind=ValueError):
    """What the error says, which is of this kind and no other, in one line."""
    assert type(caught.value) in (kind, FieldError)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 700
    return said


def test_the_recipe_without_mistakes(tmp_path):
    steps = Steps(read_marked(written(tmp_path, GOOD)))
    assert (steps.collect.samples, steps.train.preset, steps.folds) == (4, "hazard", 4)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.iterdir() if path.suffix == ".yaml"))
def test_the_examples_are_without_mistakes(name):
    steps = Steps(read_marked(EXAMPLES / name))
    assert steps.train is not None or steps.guide is not None


@pytest.mark.parametrize("mistake", RECIPES)
def test_mistakes_in_a_recipe(tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    old, new, expected = RECIPES[mistake]
    assert GOOD.count(old) == 1
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ValueError) as caught:
        run_recipe(path)
    assert one_line(caught).startswith(f"{path}{expected}")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_recipe_in_another_encoding(tmp_path, encoding):
    path = written(tmp_path, GOOD.replace("English", "Fran\u00e7ais").encode(encoding))
    with pytest.raises(ValueError, match=r"recipe\.yaml is not .*UTF-8.*: save it in UTF-8") as caught:
        run_recipe(path)
    assert "line 23" in one_line(caught) or encoding != "latin-1"


def test_what_is_fine_in_yaml_stays_fine(tmp_path):
    text = GOOD.replace('["lexicon:words.txt"]', '&words ["lexicon:words.txt"]').replace("\n", "\r\n")
    text = text.replace('["lexicon:other.txt"]', "*words").replace(
        "  alpha: 0.1", "  <<: &same {alpha: 0.2}\r\n  alpha: 0.1"
    )
    steps = Steps(read_marked(written(tmp_path, codecs.BOM_UTF8 + text.encode())))
    assert (steps.evaluate.judges, steps.calibrate.alpha) == (["lexicon:words.txt"], 0.1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"samples": "4"}, "The recipe, collect.samples: has to be a whole number, got '4'"),
        ({"samples": 10**6000}, "The recipe, collect.samples: has to be at most 1,000,000, got a number of thousands"),
        ({"model": ["deep"]}, "The recipe, collect.model: has to be a text, got ['deep']"),
        ({5: 5}, "The recipe, collect: `5` is not a field of section 'collect'"),
        ({"sample\ns": 5}, "The recipe, collect.sample s: `sample s` is not a field of section 'collect'"),
    ],
)
def test_a_recipe_in_python_has_no_lines(change, expected):
    content = {"output": "x", "collect": {"model": "m", "prompts": "p.txt", **change}, "label": {"judges": ["j"]}}
    with pytest.raises(ValueError) as caught:
        run_recipe({**content, "train": {}})
    assert one_line(caught).startswith(expected)
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match=r"collect\.model: has to be a text"):
        Steps(Marked({**content, "collect": {"model": deep, "prompts": "p"}, "train": {}}))


def test_the_first_error_names_an_own_key(tmp_path):
    """Not one that is only filled in, and not a field of another section of the same name."""
    path = written(tmp_path, GOOD.replace("  prefixes: true\n", ""))
    with pytest.raises(ValueError) as caught:
        run_recipe(path)
    assert one_line(caught).startswith(f"{path}, line 10, train: `target` 'hazard' needs `prefixes: true`")


# A line of a `.jsonl` file, and what follows place and line in the error.
RECORDS = {
    "a cut record": ('{"prompt": "a', "this is no JSON: EOF while parsing a string at column 13."),
    "quotes of Python": ("{'prompt': 'a'}", "this is no JSON: key must be a string at column 2."),
    "a comma too much": ('{"prompt": "a",}', "this is no JSON: trailing comma at column 16."),
    "two records": ('{"prompt": "a"} {"prompt": "b"}', "this is no JSON: trailing characters at column 17."),
    "NaN": ('{"prompt": "a", "score": NaN}', "this is no JSON: expected value at column 26."),
    "lists in lists in lists": ('{"prompt": ' + "[" * 9999, "this is no JSON: recursion limit exceeded at column 2"),
    "a number of thousands of digits": ("9" * 5000, "this is no JSON: number out of range at column 4302."),
    "half a character": ('{"prompt": "\\ud800"}', "this is no JSON: unexpected end of hex escape at column 19."),
    "a number": ("5", "a record has to be a text, or an object with `prompt`, got 5."),
    "a list": ('["a"]', "a record has to be a text, or an object with `prompt`, got ['a']."),
    "nothing": ("null", "a record has to be a text, or an object with `prompt`, got None."),
    "another column": ('{"text": "a"}', "the record has no column 'prompt', only ['text']."),
    "a number as a prompt": ('{"prompt": 5}', "`prompt` has to be a text, or a list of chat messages, got 5."),
    "an object as a prompt": ('{"prompt": {}}', "`prompt` has to be a text, or a list of chat messages, got {}."),
    "no messages": ('{"prompt": []}', "`prompt` has to hold chat messages, but is an empty list."),
    "a text as a message": ('{"prompt": ["a"]}', "`prompt[0]` has to be a mapping, got 'a'."),
    "a message without content": ('{"prompt": [{"role": "user"}]}', "`prompt[0]` has no 'content', only ['role']."),
    "a message without a role": ('{"prompt": [{"content": "a"}]}', "`prompt[0]` has no 'role', only ['content']."),
    "a content that is no text": (
        '{"prompt": [{"role": "user", "content": 5}]}',
        "`prompt[0].content` has to be a text, got 5.",
    ),
    "a role that is no text": (
        '{"prompt": [{"role": 1, "content": "a"}]}',
        "`prompt[0].role` has to be a text, got 1.",
    ),
    "an answer at the end": (
        '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "`prompt` has to end with a message of the role user, got 'assistant'.",
    ),
}
FINE = '{"prompt": "a", "answer": "1"}'


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mistake", RECORDS)
def test_mistakes_in_records(tmp_path, mistake, end):
    """On the line that an editor shows: blank ones count, a byte order mark does not."""
    line, expected = RECORDS[mistake]
    path = tmp_path / "p.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + end.join([FINE, "", line, FINE]).encode())
    with pytest.raises(ValueError) as caught:
        load_prompts(str(path), argument="prompts")
    assert one_line(caught).startswith(f"`prompts`: {path}, line 3: {expected}")


def texts():
    return "one text"


def nothing():
    return None


def a_number():
    return ["fine", 5]


def half_a_character():
    return ["fine", "\ud800"]


def keys_of_numbers():
    return [{"prompt": "fine"}, {5: 5, "a": 1}]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("texts", " has to give a list of texts or records, got 'one text'."),
        ("nothing", " has to give a list of texts or records, got None."),
        ("a_number", ", record 2: a record has to be a text, or an object with `prompt`, got 5."),
        ("half_a_character", ", record 2: `prompt` holds half a character (a lone surrogate), at 0: mend it."),
        ("keys_of_numbers", ", record 2: the record has no column 'prompt', only ['5', 'a']."),
    ],
)
def test_mistakes_in_what_a_function_gives(name, expected):
    source = f"python:tests.unit.test_planted_mistakes:{name}"
    with pytest.raises(ValueError) as caught:
        load_prompts(source)
    assert one_line(caught) == f"`prompts`: {source}{expected}"


@pytest.mark.parametrize("entry", [datetime.date(2024, 1, 1), {1, 2}, "\ud800"])
def test_columns_that_cannot_be_kept(entry):
    with pytest.raises(ValueError, match="record 2 of the prompts cannot be kept as JSON") as caught:
        prompts_digest([Prompt("a"), Prompt("b", {"column": entry})])
    one_line(caught)


def test_what_a_collection_keeps_is_read_as_ever(tmp_path):
    """It was looked at when it was collected, by the rules of that day."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    old = [Prompt("b", {"score": float("inf")}, turns)]
    write_prompts(old, tmp_path / "prompts.jsonl")
    with pytest.raises(ValueError, match="this is no JSON"):
        load_prompts(str(tmp_path / "prompts.jsonl"))
    (tmp_path / "collection.json").write_text("{}")
    assert load_prompts(str(tmp_path / "prompts.jsonl")) == old


def test_messages_that_call_tools_need_no_content(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{}], "content": None}]
    turns += [{"role": "tool", "content": "5", "id": 1}, {"role": "user", "content": "b"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": turns}))
    assert load_prompts(str(tmp_path / "p.jsonl")) == [Prompt("b", {}, turns)]


NEEDED = {
    CollectArguments: {"output": "o", "model": "m", "prompts": "p"},
    LabelArguments: {"judges": ["j"]},
    TrainArguments: {"collection": "c", "output": "o", "judge": "j"},
    CalibrateArguments: {"collection": "c", "value_head": "h", "judge": "j"},
    EvaluateArguments: {"output": "o", "value_head": "h", "prompts": "p", "model": "m", "judges": ["j"]},
    SweepArguments: {"output": "o", "vectors": "v", "prompts": "p", "model": "m", "judges": ["j"]},
    GuidanceTrainArguments: {"collection": "c", "output": "o", "judge": "j", "model": "m"},
    LossWeights: {},
    PushArguments: {"folder": "f", "repo_id": "a/b"},
    RecipePushArguments: {"repo_id": "a/b"},
    ExportArguments: {"folder": "f"},
    RunArguments: {"recipe": "r.yaml"},
    DoctorArguments: {"model": "m"},
    LayersArguments: {"collection": "c", "judge": "j"},
    LabelCommandArguments: {"collection": "c", "judges": ["j"]},
    GenerateArguments: {"prompt": "p"},
    PlayArguments: {"model": "m", "value_head": "h"},
    ServeArguments: {"model": "m"},
    ScoreArguments: {"model": "m", "value_head": "h", "texts": "t"},
    ExtractArguments: {"model": "m", "output": "o"},
    ScaleArguments: {"model": "m", "vectors": "v", "texts": "t"},
    ApplyArguments: {"model": "m", "vectors": "v", "prompts": "p"},
    BakeArguments: {"model": "m", "vectors": "v", "output": "o", "multiplier": 1.0},
}
FIELDS = [(kind, each) for kind in NEEDED for each in fields(kind)]


def test_all_arguments_are_checked_in_one_way():
    modules = [
        importlib.import_module(f"{arguments.__name__}.{each.name}")
        for each in pkgutil.iter_modules(arguments.__path__)
    ]
    found = {
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and is_dataclass(kind) and kind.__module__.startswith(arguments.__name__)
    }
    assert {kind for kind in found if not issubclass(kind, Arguments)} == {JudgedAttribute, Preset}
    for kind in found - {JudgedAttribute, Preset}:
        assert "__post_init__" not in vars(kind) or kind is Arguments
        assert any(issubclass(tried, kind) for tried in NEEDED)


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=[f"{kind.__name__}-{each.name}" for kind, each in FIELDS])
def test_no_field_takes_what_is_of_another_kind(kind, field):
    wrong = [object(), {"a": 1}, [[1]], float("nan"), b"x"]
    if NoneType not in get_args(get_type_hints(kind)[field.name]):
        wrong.append(None)
    for each in wrong:
        with pytest.raises(ValueError) as caught:
            kind(**{**NEEDED[kind], field.name: each})
        assert re.match(rf"`{field.name}(\[0\])?` has to be (a|one of|true or) .*, got .*\.$", one_line(caught))
    if "Le(" in str(field.type):
        huge = [10**400] if "list[" in str(field.type) else 10**400
        with pytest.raises(
            ValueError, match=rf"`{field.name}(\[0\])?` has to be (at most [\d,]+|a number), got 1000"
        ) as caught:
            kind(**{**NEEDED[kind], field.name: huge})
        one_line(caught)


@pytest.mark.parametrize(
    ("kind", "field", "value", "expected"),
    [
        (GenerateArguments, "temperature", 0.0, "`temperature` has to be above 0, got 0.0."),
        (GenerateArguments, "top_p", 0.0, "`top_p` has to be above 0, got 0.0."),
        (GenerateArguments, "top_p", 1.5, "`top_p` has to be at most 1, got 1.5."),
        (GenerateArguments, "threshold", 1.0, "`threshold` has to be below 1, got 1.0."),
        (GenerateArguments, "seed", 2**63, f"`seed` has to be at most {2**63 - 1:,}, got {2**63}."),
        (TrainArguments, "rotation", 1.0, "`rotation` has to be below 1, got 1.0."),
        (TrainArguments, "validation", 0.0, "`validation` has to be above 0, got 0.0."),
        (CalibrateArguments, "alpha", -0.1, "`alpha` has to be above 0, got -0.1."),
        (EvaluateArguments, "thresholds", [0.5, 1], "`thresholds[1]` has to be below 1, got 1."),
        (SweepArguments, "multipliers", [], "`multipliers` has to be a list of 1 or more, got []."),
        (ExtractArguments, "layers", [0.5], "`layers` has to be a list of 2 or more, got [0.5]."),
        (ExtractArguments, "layers", [0, 0.5, 1], "`layers` has to be a list of 2 or fewer, got [0, 0.5, 1]."),
        (ExtractArguments, "layers", [0.5, 2], "`layers[1]` has to be at most 1, got 2."),
        (ExtractArguments, "layers", [0.9, 0.4], "`layers` has to be the lower before the higher, got [0.9, 0.4]."),
    ],
)
def test_numbers_out_of_range(kind, field, value, expected):
    with pytest.raises(ValueError) as caught:
        kind(**{**NEEDED[kind], field: value})
    assert one_line(caught) == expected


def test_what_python_has_for_numbers_lists_and_paths():
    made = EvaluateArguments(
        **{**NEEDED[EvaluateArguments], "output": Path("o")},
        samples=np.int64(2), thresholds=(np.float32(0.5), 0.25), num_candidates=np.array([2, 3]),
    )  # fmt: skip
    assert (made.output, made.samples, made.thresholds, made.num_candidates) == ("o", 2, [0.5, 0.25], [2, 3])
    assert json.dumps(vars(made))


def test_the_old_word_of_a_field():
    assert renamed(TrainArguments, {"recipe": "hazard", "seed": 1}) == {"preset": "hazard", "seed": 1}
    with pytest.raises(ValueError, match="`recipe` is the old name of `preset`"):
        renamed(TrainArguments, {"recipe": "hazard", "preset": "hazard"})


def test_the_old_word_on_the_command_line(capsys):
    words = ["--collection", "c", "--output", "o", "--judge", "j", "--recipe", "hazard"]
    parser = parser_of("train", "train a head", "train", [TrainArguments])
    assert read(parser, [TrainArguments], words) == ([TrainArguments(**NEEDED[TrainArguments], preset="hazard")], [])
    assert capsys.readouterr().err == "--recipe is --preset now.\n"


def test_the_old_word_in_a_recipe(tmp_path):
    path = written(tmp_path, GOOD.replace("preset: hazard", "recipe: hazard"))
    place = re.escape(f"{path}, line 13, train.recipe: ")
    with pytest.warns(FutureWarning, match=f"{place}`recipe` is `preset` now") as warned:
        assert Steps(read_marked(path)).train.preset == "hazard"
    assert len(warned) == 1
    path = written(tmp_path, GOOD.replace("preset: hazard", "recipe: hazzard"))
    with (
        pytest.warns(FutureWarning),
        pytest.raises(ValueError, match=f"{place}has to be one of value-steer, hazard, onset"),
    ):
        Steps(read_marked(path))
    path = written(tmp_path, GOOD.replace("preset: hazard", "preset: hazard\n  recipe: hazard"))
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 14, train.recipe: `recipe` is the old name of")):
        Steps(read_marked(path))


def test_what_is_wrong_about_several_fields_is_said_of_their_section(tmp_path):
    """Not of the first that is named: `calibration` is fine where `validation` is too much."""
    path = written(tmp_path, GOOD.replace("  attribute: rude\n", "  calibration: 0.1\n  validation: 0.95\n"))
    with pytest.raises(ValueError) as caught:
        Steps(read_marked(path))
    assert one_line(caught).startswith(f"{path}, line 11, train: `validation`, `calibration` and `held_out` have to")


def test_an_error_of_a_field_can_be_sent_to_another_process():
    error = pickle.loads(pickle.dumps(FieldError("field", "`field` is wrong.")))
    assert (error.field, str(error)) == ("field", "`field` is wrong.")


def test_nothing_is_lost_to_a_mistake_further_down(tmp_path):
    """The collection stays as it is, and the run goes on when the mistake is mended."""
    world = write_world(tmp_path / "world", 12)
    shared = {"model": str(world / "model"), "prompts": str(world / "prompts.txt"), "samples": 1, "max_new_tokens": 4}
    judge = f"lexicon:{world / 'bad.txt'}"
    run = tmp_path / "run"
    collect(CollectArguments(output=str(run / "collection"), **shared), LabelArguments(judges=[judge]))

    def state():
        return {
            path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns) for path in run.rglob("*")
        }

    before = state()
    plan = {
        "output": str(run),
        "collect": shared,
        "label": {"judges": [judge]},
        "train": {"epochs": 1, "accept_chance": True},
    }
    for mistake in (
        {"train": {**plan["train"], "epochs": "1"}},
        {"calibrate": {"alpha": "0.5"}},
        {"evaluate": {"judges": [judge], "prompts": str(tmp_path / "missing.txt")}},
        {"card": {"datasets": "org/set"}},
        {"push": {"repo_id": "a/b", "privat": True}},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(mistake))}[.:]"):
            run_recipe(written(tmp_path, json.dumps({**plan, **mistake})))
        assert state() == before
    assert run_recipe(
        written(tmp_path, json.dumps({**plan, "train": {**plan["train"], "validation": 0.4, "calibration": 0.0}}))
    )
    assert {path: state()[path] for path in before if "shards" in str(path) and path.is_file()} == {
        path: entry for path, entry in before.items() if "shards" in str(path) and path.is_file()
    }


PIECES = [*"[]{}:\n'\"#|\t\ud7ff", "  ", "- ", "&a ", "*a", "!!int ", "null", "1e9", ".nan", "<<: ", "? "]


def mutated(draw, text):
    """A text with one to three random changes."""
    for _ in range(draw.randint(1, 3)):
        first, last = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        last = min(last, first + 8)
        text = draw.choice(
            [
                text[:first] + text[last:],
                text[:first] + draw.choice(PIECES) + text[last:],
                text[:first] + text[first:last] * 3 + text[last:],
                text[: max(first, 1)],
            ]
        )
    return text


def test_any_recipe_is_read_or_refused_in_one_line(tmp_path):
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        path = written(tmp_path, mutated(draw, GOOD))
        try:
            Steps(read_marked(path))
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 700
    assert 150 < refused < 300


def test_any_records_are_read_or_refused_in_one_line(tmp_path):
    draw = random.Random(0)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    good = "\n".join(map(json.dumps, ["a", {"prompt": "b", "answer": [1.5, None]}, {"prompt": turns}]))
    path, refused = tmp_path / "p.jsonl", 0
    for _ in range(400):
        path.write_text(mutated(draw, good), encoding="utf-8")
        try:
            load_prompts(str(path))
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"`prompts`: {path}") and "\n" not in str(error) and len(str(error)) < 700
    assert 200 < refused < 400
