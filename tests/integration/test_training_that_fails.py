"""A recipe that cannot become a head: it stops early, says what to do, and goes on if it is told to."""

import hashlib
import json
import logging
import shutil

import pytest

from hf_value_steer import ValueHead
from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.arguments.collect import CollectArguments, LabelArguments
from hf_value_steer.arguments.evaluate import EvaluateArguments
from hf_value_steer.arguments.train import TrainArguments
from hf_value_steer.cli import main
from hf_value_steer.evaluation.evaluate import evaluate
from hf_value_steer.recipe import run_recipe
from hf_value_steer.training.calibrate import calibrate
from hf_value_steer.training.chance import chance_report
from hf_value_steer.training.collect import collect
from hf_value_steer.training.label import labels_folder
from hf_value_steer.training.prompts import share
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.train import train
from tests.tiny_text import write_world


HERE = "python:tests.integration.test_training_that_fails"
NOISE, OTHER_NOISE, NOTHING, RARE = (f"{HERE}:{name}" for name in ("noise", "other_noise", "nothing", "rare"))


def _coin(text, salt):
    return hashlib.sha256(f"{salt}{text}".encode()).digest()[0] / 255


def noise(prompts, responses):
    return [_coin(text, "a") for text in responses]


def other_noise(prompts, responses):
    return [_coin(text, "b") for text in responses]


def nothing(prompts, responses):
    return [0.0] * len(responses)


def rare(prompts, responses):
    """A few texts of the prompts that train, and none of the others."""
    pairs = zip(prompts, responses, strict=True)
    return [float(share(prompt.text) >= 0.6 and _coin(text, "c") > 0.93) for prompt, text in pairs]


def a_word_and_a_number():
    return ["word", 5]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, prompts, a word list, and a collection with labels that mean nothing."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    judges = [NOISE, OTHER_NOISE, NOTHING, RARE, f"lexicon:{folder / 'bad.txt'}"]
    collect(asked(folder, folder / "collection"), LabelArguments(judges=judges, prefixes=True, prefix_words=1))
    return folder


def asked(world, output, **changes):
    given = {"model": str(world / "model"), "prompts": str(world / "prompts.txt")}
    sizes = {"samples": 4, "max_new_tokens": 6, "next_tokens": 2, "batch_size": 20}
    return CollectArguments(output=str(output), **{**given, **sizes, **changes})


def training(world, output, **changes):
    options = {"epochs": 3, "learning_rate": 0.01, "validation": 0.3, "calibration": 0.3, "batch_rows": 16}
    judge = {} if "attributes" in changes else {"judge": NOISE}
    where = {"collection": str(world / "collection"), "output": str(output)}
    return TrainArguments(**{**where, **judge, **options, **changes})


def finite(path):
    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "hazard"},
        {"preset": "hazard", "target": "prefix"},
        {"preset": "hazard", "target": "risk"},
        {"attributes": [f"one={NOISE}", f"two={OTHER_NOISE}@desirable"]},
    ],
)
def test_labels_that_are_noise_stop_it_and_a_word_goes_on(world, tmp_path, monkeypatch, caplog, options):
    output = tmp_path / "head"
    said = r"not shown to be better than chance: .*AUROC .* \[.*, 1\]\) of \d+ .* say `accept_chance`"
    with pytest.raises(ValueError, match=said):
        train(training(world, output, **options))
    assert not (output / "model.safetensors").exists() and not (output / "training.json").exists()
    claimed = output / "checkpoints" / "arguments.json"
    claimed.write_text(claimed.read_text().replace('"preset": ', '"recipe": '))  # the word of older folders
    with monkeypatch.context() as patch:
        patch.setattr("hf_value_steer.training.train.fit", None)  # nothing is trained again
        head = train(training(world, output, **options, accept_chance=True))
        with pytest.raises(ValueError, match="not shown to be better than chance"):
            train(training(world, output, **options))  # the word is not remembered
    assert not (output / "checkpoints").exists() and chance_report(head.config.training)
    metrics = finite(output / "config.json")["training"]["metrics"]
    for suffix in ("_one", "_two") if "attributes" in options else ("",):
        assert metrics[f"text_auroc{suffix}"] is not None and len(metrics[f"text_interval{suffix}"]) == 2
        assert metrics[f"positive_texts{suffix}"] + metrics[f"negative_texts{suffix}"] > 20
    finite(output / "training.json")
    if "attributes" not in options:
        calibrate(CalibrateArguments(collection=str(world / "collection"), value_head=str(output), judge=NOISE))
        assert "was not shown to be better than chance: AUROC" in caplog.text


def test_a_refused_head_is_not_mixed_into_another(world, tmp_path):
    for rate in (0.01, 0.02):
        with pytest.raises(ValueError, match="better than chance"):
            train(training(world, tmp_path, learning_rate=rate))
    assert finite(tmp_path / "checkpoints" / "arguments.json")["learning_rate"] == 0.02
    (tmp_path / "checkpoints" / "history.json").unlink()  # as if it had been killed
    with pytest.raises(ValueError, match=r"was made with learning_rate = 0\.02, now it is 0\.03: delete the folder"):
        train(training(world, tmp_path, learning_rate=0.03))


def test_labels_of_a_mended_judge_are_learned_anew(world, tmp_path):
    shutil.copytree(world / "collection", tmp_path / "c")
    given = training(world, tmp_path / "h", collection=str(tmp_path / "c"))
    old, new = (labels_folder(Collection(tmp_path / "c"), judge) for judge in (NOISE, OTHER_NOISE))
    histories = []
    for _ in range(2):
        with pytest.raises(ValueError, match="better than chance"):
            train(given)
        histories.append(finite(tmp_path / "h" / "checkpoints" / "history.json"))
        shutil.copytree(new, old, dirs_exist_ok=True)
    assert histories[0] != histories[1]


def test_a_head_that_learned_is_not_stopped(world, tmp_path):
    judge = f"lexicon:{world / 'bad.txt'}"
    collect(asked(world, tmp_path / "c", samples=16), LabelArguments(judges=[judge], prefixes=True, prefix_words=1))
    options = {"collection": str(tmp_path / "c"), "judge": judge, "preset": "hazard", "target": "prefix", "epochs": 8}
    head = train(TrainArguments(**{**vars(training(world, tmp_path / "h")), **options}))
    assert head.config.training["metrics"]["text_interval"][0] > 0.5 and not chance_report(head.config.training)


@pytest.mark.parametrize(("judge", "message"), [(NOTHING, "scores 0 of the .* training split"), (RARE, "validation")])
def test_classes_that_are_empty_or_too_small_stop_it_before_it_trains(world, tmp_path, monkeypatch, judge, message):
    monkeypatch.setattr("hf_value_steer.training.train.train_on", None)
    with pytest.raises(ValueError, match=message):
        train(training(world, tmp_path, judge=judge))


def test_it_says_how_much_is_positive_and_warns_where_that_is_little(world, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_value_steer")
    head = train(training(world, tmp_path, judge=RARE, accept_chance=True))
    assert "AUROC unknown of 0 validation texts" in chance_report(head.config.training)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_value_steer")]
    assert any(f"training: {RARE} scores" in line and "tokens" in line and "%" in line for line in said)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum(f"{RARE} scores only" in line and "fewer than 10" in line for line in warned) == 2
    history = finite(tmp_path / "training.json")["history"]
    assert {entry[name] for entry in history for name in ("auroc", "text_auroc", "text_interval")} == {None}


@pytest.mark.parametrize(
    ("changes", "labels", "message"),
    [
        ({}, ["python:nowhere:judge"], "cannot be found"),
        ({}, ["python:module_that_fails:judge"], "importing it raised NameError"),
        ({}, ["lexicon:missing.txt"], "there is no file"),
        ({}, ["math:answer"], "has no column 'answer'"),
        ({}, ["something"], "names no judge"),
        ({"forced_samples": 1, "force_words": "missing.txt"}, [NOISE], "`force_words`: there is no file missing.txt"),
        ({"forced_samples": 1, "force_words": f"{HERE}:missing"}, [NOISE], "cannot be found"),
        (
            {"forced_samples": 1, "force_words": f"{HERE}:a_word_and_a_number"},
            [NOISE],
            "record 2: a word has to be a text",
        ),
    ],
)
def test_what_is_not_there_stops_it_before_the_backbone_is_loaded(
    world, tmp_path, monkeypatch, changes, labels, message
):
    (tmp_path / "module_that_fails.py").write_text("judge = undefined\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delattr("hf_value_steer.training.collect.load_backbone")
    with pytest.raises(ValueError, match=message):
        collect(asked(world, tmp_path / "c", **changes), LabelArguments(judges=labels))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("evaluate", {"judges": ["python:nowhere:judge"]}, "cannot be found"),
        ("evaluate", {"mask": "python:nowhere:mask"}, "cannot be found"),
        (
            "evaluate",
            {"baselines": ["bad_words"], "bad_words": "missing.txt"},
            "The recipe, evaluate.bad_words: there is no file",
        ),
        ("evaluate", {"prompts": "missing.txt"}, "there is no file missing.txt"),
        ("evaluate", {"judges": ["math:answer"]}, "has no column 'answer'"),
        ("calibrate", {"group_column": "topic"}, "has no column 'topic'"),
        ("train", {"preset": "hazard"}, "train: `target` 'hazard' needs `prefixes: true`"),
        ("train", {"accept_chance": "no"}, "train.accept_chance: has to be true or false"),
        ("label", {"judges": NOISE}, "label.judges: has to be a list"),
    ],
)
def test_a_recipe_looks_for_everything_before_it_generates(world, tmp_path, monkeypatch, section, changes, message):
    monkeypatch.delattr("hf_value_steer.training.collect.load_backbone")
    prompts = str(world / "prompts.txt")
    content = {
        "output": str(tmp_path / "run"),
        "collect": {"model": str(world / "model"), "prompts": prompts},
        "label": {"judges": [NOISE]},
        "train": {},
        "calibrate": {},
        "evaluate": {"prompts": str(world / "unseen.txt"), "judges": [OTHER_NOISE]},
    }
    with pytest.raises(ValueError, match=message):
        run_recipe({**content, section: {**content[section], **changes}})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("forced", [0, 2])
def test_one_token_is_enough(world, tmp_path, forced):
    words = {"forced_samples": forced, "force_words": str(world / "bad.txt")} if forced else {}
    collection = collect(asked(world, tmp_path, max_new_tokens=1, **words), LabelArguments(judges=[NOISE]))
    assert {collection.length(row) for row in range(len(collection.rows))} == {1}


@pytest.mark.parametrize(
    "changes", [{"limit": -1}, {"next_tokens": -1}, {"temperature": float("nan")}, {"samples": 0}]
)
def test_numbers_that_cannot_be(world, tmp_path, changes):
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}` has to be"):
        asked(world, tmp_path, **changes)


def test_the_command_says_it_and_takes_the_word(world, tmp_path, capsys):
    command = ["train", "--collection", str(world / "collection"), "--judge", NOISE, "--output", str(tmp_path)]
    command += ["--epochs", "1", "--validation", "0.3", "--calibration", "0.3", "--trainer", "disable_tqdm=true"]
    assert main(command) == 2
    assert "better than chance" in capsys.readouterr().err
    assert main([*command, "--accept_chance"]) == 0
    assert '"text_interval"' in capsys.readouterr().out
    assert ValueHead.from_pretrained(tmp_path).config.training["metrics"]["text_auroc"] is not None


def test_evaluate_says_what_counts_and_warns_of_a_head_at_chance(world, tmp_path, caplog):
    train(training(world, tmp_path / "head", accept_chance=True))
    given = {"value_head": str(tmp_path / "head"), "judges": [OTHER_NOISE], "prompts": str(world / "prompts.txt")}
    sizes = {"limit": 4, "samples": 1, "max_new_tokens": 4, "num_candidates": [2], "placebo": False}
    arguments = EvaluateArguments(output=str(tmp_path / "e"), model=str(world / "model"), **given, **sizes)
    with pytest.raises(ValueError, match="no default threshold"):
        evaluate(arguments)
    assert not list((tmp_path / "e").rglob("base.json"))  # nothing was generated for it
    arguments.thresholds = [0.6]
    evaluate(arguments)
    assert "was not shown to be better than chance when it was trained: AUROC" in caplog.text
    assert "scores above 0.5 counts as unsafe" in (tmp_path / "e" / "evaluation.md").read_text()
    finite(tmp_path / "e" / "evaluation.json")
