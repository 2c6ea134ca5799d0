"""From prompts to a head with a tiny model: the artefacts, what stops it, and what a kill leaves."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_value_steer import ValueFilterConfig, ValueHead, value_steer_generate
from hf_value_steer.arguments.collect import CollectArguments, LabelArguments
from hf_value_steer.arguments.train import TrainArguments
from hf_value_steer.cli import main
from hf_value_steer.evaluation.measures import outcome
from hf_value_steer.files.marked import Marked
from hf_value_steer.recipe import run_recipe
from hf_value_steer.recipe.sections import Steps
from hf_value_steer.training.collect import collect
from hf_value_steer.training.label import Labels, label, labels_folder, vocabulary_pieces
from hf_value_steer.training.shards import Collection, shard_path
from hf_value_steer.training.splits import split_rows
from hf_value_steer.training.train import train
from hf_value_steer.training.trainer import ValueHeadTrainer
from tests.families import random_head
from tests.tiny_text import BAD, save_tiny_model, write_lexicon, write_world


NEW_TOKENS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, prompts and a word list."""
    return write_world(tmp_path_factory.mktemp("world"), 24)


def recipe(world, output, **evaluate):
    judge = f"lexicon:{world / 'bad.txt'}"
    return {
        "output": str(output),
        "collect": {
            "model": str(world / "model"),
            "prompts": str(world / "prompts.txt"),
            "samples": 4,
            "forced_samples": 2,
            "force_words": str(world / "bad.txt"),
            "next_tokens": 4,
            "max_new_tokens": NEW_TOKENS,
            "batch_size": 4,
        },
        "label": {"judges": [judge], "prefixes": True, "prefix_words": 1},
        "train": {
            "preset": "hazard",
            "validation": 0.25,
            "calibration": 0.25,
            "learning_rate": 0.01,
            "epochs": 12,
            "patience": 12,
            "batch_rows": 8,
            "accept_chance": True,  # a dozen texts to validate on show little
        },
        "calibrate": {"alpha": 0.8},
        "evaluate": {
            "prompts": str(world / "unseen.txt"),
            "judges": [judge],
            "samples": 2,
            "num_candidates": [2, 6],
            "baselines": ["best_of_n", "args", "bad_words"],
            "bad_words": str(world / "bad.txt"),
            **evaluate,
        },
    }


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A recipe that was run to its end."""
    output = tmp_path_factory.mktemp("run")
    run_recipe(recipe(world, output))
    return output


def files(folder):
    """Content of every file below a folder, without the times that an evaluation measures."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: content for name, content in found.items() if not name.startswith("evaluation")}


def test_features_are_those_that_the_engine_scores(world, finished):
    collection = Collection(finished / "collection")
    model = AutoModelForCausalLM.from_pretrained(world / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    head = random_head(model)
    for row in (0, 5, len(collection.rows) - 1):
        prompt = tokenizer(collection.prompts[collection.rows.prompt[row]].text, return_tensors="pt")
        tokens = collection.read("tokens", row).long()
        with torch.no_grad():
            text = torch.cat([prompt["input_ids"], tokens[None]], dim=1)
            features = model.model(text).last_hidden_state[0, prompt["input_ids"].shape[1] - 1 :]
        assert torch.allclose(collection.read("features", row), features[1:], atol=1e-5)
        assert torch.allclose(collection.prompt_feature(row), features[0], atol=1e-5)
    # One prompt without padding, continued greedily: the very values of the engine, to the bit.
    alone = world / "alone.txt"
    alone.write_text(collection.prompts[0].text)
    greedy = collect(
        CollectArguments(
            output=str(world / "greedy"), model=str(world / "model"), prompts=str(alone), samples=1, do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )
    )  # fmt: skip
    config = ValueFilterConfig(value_head=head, threshold=1 - 1e-6)
    out = model.generate(
        **tokenizer(collection.prompts[0].text, return_tensors="pt"), custom_generate=value_steer_generate,
        value_steer=config, do_sample=False, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True,
    )  # fmt: skip
    values = torch.cat([head(feature[None]).value for feature in greedy.read("features", 0)])
    assert torch.equal(out.token_values[0, : len(values)], values)


def test_labels_are_what_the_judge_says_of_each_prefix(world, finished):
    collection = Collection(finished / "collection")
    labels = Labels(collection, f"lexicon:{world / 'bad.txt'}")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    pieces = vocabulary_pieces(tokenizer)
    bad = {index for index, piece in enumerate(pieces) if piece.strip() in BAD}
    assert len(bad) == len(BAD)
    for row in range(0, len(collection.rows), 7):
        tokens = collection.read("tokens", row).tolist()
        special = [token in tokenizer.all_special_ids for token in tokens]
        expected = [float(token in bad) for token, skip in zip(tokens, special, strict=True) if not skip]
        found = labels.read("prefixes", row).tolist()
        assert [each for each, skip in zip(found, special, strict=True) if not skip] == expected
        assert labels.responses()[row] == max(expected, default=0.0)


def test_splits_are_by_prompt_and_forced_words_only_train(finished):
    collection = Collection(finished / "collection")
    arguments = TrainArguments(collection="", output="", judge="", validation=0.25, calibration=0.25)
    rows = split_rows(collection, arguments)
    owners = {name: set(collection.rows.prompt[members].tolist()) for name, members in rows.items()}
    assert not owners["train"] & owners["validation"] and not owners["train"] & owners["calibration"]
    assert not owners["validation"] & owners["calibration"]
    assert all(owners[name] for name in ("train", "validation", "calibration")) and not owners["held_out"]
    natural = collection.rows.natural
    assert natural[rows["calibration"]].all() and natural[rows["validation"]].all()
    assert not natural[rows["train"]].all() and not natural.all()


def test_what_a_recipe_leaves(finished):
    head = ValueHead.from_pretrained(finished / "head")
    record = json.loads((finished / "head" / "training.json").read_text())
    assert record["history"][-1]["auroc"] > 0.8
    assert head.calibration is not None and head.calibration.n > 0 and 0 < head.config.threshold < 1
    assert not (finished / "head" / "checkpoints").exists()
    document = json.loads((finished / "evaluation" / "evaluation.json").read_text())
    methods = [run["method"] for run in document["runs"]]
    assert methods == ["base", "filter", "filter", "placebo", "best_of_n", "args", "bad_words"]
    rates = {run["name"]: next(iter(run["judges"].values()))["rate"] for run in document["runs"]}
    assert rates["bad words"] == 0 and rates["base"] > 0.3
    filtered = [run for run in document["runs"] if run["method"] == "filter"]
    assert all(next(iter(run["judges"].values()))["rate"] < 0.85 * rates["base"] for run in filtered)
    assert (finished / "evaluation" / "report.html").stat().st_size > 5000
    assert document["examples"] and not any(word in json.dumps(document["examples"]) for word in BAD)
    for example in document["examples"]:  # the judge's words are what is masked
        before, after = ("*" in "".join(token["text"] for token in example[side]) for side in ("base", "steered"))
        assert example["outcome"] == outcome(before, after, any(token["intervened"] for token in example["steered"]))
    assert all(sum(run["outcomes"].values()) == document["generations"] for run in filtered)
    main = next(run for run in filtered if run["threshold"] == head.config.threshold)
    shown = Counter(example["outcome"] for example in document["examples"])
    assert shown == {name: min(3, count) for name, count in main["outcomes"].items()} and len(shown) > 1
    assert all(each["auroc"] > each["lower"] > 0.5 for each in document["discrimination"].values())
    assert (
        f"Default threshold: {head.config.threshold:.4g}, that of `alpha="
        in (finished / "head" / "README.md").read_text()
    )


def test_a_finished_recipe_is_not_done_again(world, finished, monkeypatch, caplog):
    def never(*_, **__):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr("hf_value_steer.training.collect._Generate.tensors", never)
    monkeypatch.setattr("hf_value_steer.training.label._Reader.tensors", never)
    monkeypatch.setattr("hf_value_steer.training.train.fit", never)
    monkeypatch.setattr("hf_value_steer.evaluation.runs.Runner._batch", never)
    before = files(finished)
    with caplog.at_level("INFO"):
        run_recipe(recipe(world, finished))
    assert files(finished) == before
    said = [line.partition(":")[0] for line in caplog.messages if " min " in line]
    assert said == ["collect", "train", "calibrate", "evaluate"]


def say_the_old_word(record):
    """As if it had been written when `preset` was `recipe`."""
    text = record.read_text()
    assert text.count('"preset": ') == 1
    record.write_text(text.replace('"preset": ', '"recipe": '))


def test_a_head_that_was_trained_under_the_old_word_goes_on(world, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    record = tmp_path / "run" / "head" / "training.json"
    say_the_old_word(record)
    before = record.read_bytes()
    monkeypatch.setattr("hf_value_steer.training.train.fit", None)
    content = {name: part for name, part in recipe(world, tmp_path / "run").items() if name != "evaluate"}
    run_recipe(content)
    assert record.read_bytes() == before
    with pytest.raises(ValueError, match="trained otherwise"):
        run_recipe({**content, "train": {**content["train"], "preset": "value-steer"}})


@pytest.mark.parametrize("damage", ["", "[", '{"arguments": 5}', "5", "[" * 100_000, "\ufeff{}"])
def test_records_that_were_cut_or_edited_are_named(world, finished, damage):
    """Those that a finished recipe reads again; nothing is done over them."""
    records = ["head/training.json", "collection/labels/*/labels.json"]
    records += [f"evaluation/runs/{name}.json" for name in ("base-*", "runs", "placebo-threshold-*")]
    for pattern in records[:-1] if damage == "5" else records:
        (record,) = finished.glob(pattern)
        content = record.read_bytes()
        record.write_text(damage, encoding="utf-8")
        before = files(finished)
        try:
            with pytest.raises(ValueError) as caught:
                run_recipe(recipe(world, finished))
            assert str(record.parent) in str(caught.value) and "\n" not in str(caught.value)
            assert files(finished) == before
        finally:
            record.write_bytes(content)


def test_cross_fitting_steers_every_prompt_with_a_head_that_never_saw_it(world, finished, tmp_path):
    content = recipe(world, tmp_path / "run", folds=3, baselines=[], num_candidates=[4])
    del content["evaluate"]["prompts"]
    shutil.copytree(finished / "collection", tmp_path / "run" / "collection")
    run_recipe(content)
    collection, judged = Collection(tmp_path / "run" / "collection"), []
    for fold in range(3):
        folder = tmp_path / "run" / "evaluation" / f"fold-{fold}"
        arguments = json.loads((folder / "head" / "training.json").read_text())["arguments"]
        arguments.pop("collection_sha256")
        rows = split_rows(collection, TrainArguments(collection="", output="", **arguments))
        owners = {name: set(collection.rows.prompt[members].tolist()) for name, members in rows.items()}
        assert not owners["held_out"] & (owners["train"] | owners["validation"] | owners["calibration"])
        (base,) = (folder / "runs").glob("base-*.json")
        runs = json.loads(base.read_text())
        assert len(runs["ids"]) == 2 * len(owners["held_out"])
        judged += owners["held_out"]
    assert sorted(judged) == list(range(len(collection.prompts)))
    document = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert document["folds"] == 3 and document["generations"] == 2 * len(collection.prompts)


KILLED = """
import sys, torch, yaml
from hf_value_steer.recipe import run_recipe
torch.set_num_threads(1)
run_recipe(yaml.safe_load(open(sys.argv[1])))
"""


def test_killed_and_resumed_is_byte_identical(world, tmp_path):
    output, plan = tmp_path / "run", tmp_path / "recipe.yaml"
    content = recipe(world, output)
    del content["evaluate"]  # it measures times
    run_recipe({**content, "output": str(tmp_path / "undisturbed")})
    plan.write_text(yaml.safe_dump(content))
    command, draw = [sys.executable, "-c", KILLED, str(plan)], random.Random(0)

    def start():
        return subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)

    # In the middle of collecting, of labelling or training, and once more wherever it then is.
    for reached in ("collection/shards/*.safetensors", "head/checkpoints/*", "head/checkpoints/*"):
        process, wait = start(), draw.uniform(0, 0.3)
        seen = len(list(output.glob(reached)))
        while process.poll() is None and len(list(output.glob(reached))) <= seen:
            time.sleep(0.01)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
    assert start().wait() == 0
    ours, theirs = files(output), files(tmp_path / "undisturbed")
    ours = {name: content for name, content in ours.items() if not name.endswith(".tmp")}
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_a_kill_in_the_middle_of_a_checkpoint(world, finished, tmp_path, monkeypatch):
    """Of the checkpoint that was being written, and of one that was being deleted, nothing is resumed from."""

    class Killed(BaseException):
        pass

    saved, save = [], ValueHeadTrainer._save_optimizer_and_scheduler

    def killed(trainer, folder):
        saved.append(Path(folder))
        if len(saved) == 3:
            (saved[0] / "model.safetensors").unlink(missing_ok=True)
            raise Killed
        save(trainer, folder)

    shutil.copytree(finished / "collection", tmp_path / "run" / "collection")
    content = {name: part for name, part in recipe(world, tmp_path / "run").items() if name != "evaluate"}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ValueHeadTrainer, "_save_optimizer_and_scheduler", killed)
        run_recipe(content)
    assert saved[2].exists()
    say_the_old_word(saved[2].parent / "arguments.json")
    run_recipe(content)
    ours, theirs = files(tmp_path / "run" / "head"), files(finished / "head")
    assert [name for name in theirs if name != "README.md" and ours[name] != theirs[name]] == []


def test_a_kill_in_the_middle_of_calibration(world, finished, tmp_path, monkeypatch):
    """The head can be loaded whichever of its files was being written."""
    shutil.copytree(finished, tmp_path / "run")
    content = {name: part for name, part in recipe(world, tmp_path / "run").items() if name != "evaluate"}
    before = files(tmp_path / "run" / "head")
    for file in ("calibration.json", "config.json"):
        replace = os.replace

        def killed(source, target, file=file, replace=replace):
            if Path(target).name == file:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            run_recipe(content)
        assert ValueHead.from_pretrained(tmp_path / "run" / "head").calibration is not None
    run_recipe(content)
    after = files(tmp_path / "run" / "head")
    assert {name: after[name] for name in before if name != "README.md"} == {
        name: before[name] for name in before if name != "README.md"
    }


def short(world, output, **changes):
    chosen = {"model": str(world / "model"), "samples": 1, "max_new_tokens": 4, "batch_size": 12}
    return CollectArguments(output=str(output), prompts=str(world / "prompts.txt"), **chosen | changes)


def broken(prompts, responses):
    raise KeyError("no such thing")


def too_much(prompts, responses):
    return np.full(len(responses), 2.0)


def nothing_bad(prompts, responses):
    return np.zeros(len(responses))


def ends_well(prompts, responses):
    return [float(len(response) % 2) for response in responses]


@pytest.mark.parametrize(
    ("judge", "error", "message"),
    [
        ("python:tests.integration.test_pipeline:broken", RuntimeError, "failed: KeyError"),
        ("python:tests.integration.test_pipeline:too_much", ValueError, r"answered 2\.0"),
    ],
)
def test_a_wrong_judge_loses_nothing(world, tmp_path, judge, error, message):
    with pytest.raises(error, match=message):
        collect(short(world, tmp_path), LabelArguments(judges=[judge]))
    before = files(tmp_path / "shards")
    good = "python:tests.integration.test_pipeline:ends_well"
    collection = collect(short(world, tmp_path), LabelArguments(judges=[good]))
    assert files(tmp_path / "shards") == before and len(Labels(collection, good).responses()) == 24


def test_one_class_only(world, tmp_path):
    judge = "python:tests.integration.test_pipeline:nothing_bad"
    collect(short(world, tmp_path / "c"), LabelArguments(judges=[judge]))
    with pytest.raises(ValueError, match="scores 0 of the .* responses .* above 0.5"):
        train(TrainArguments(collection=str(tmp_path / "c"), output=str(tmp_path / "h"), judge=judge))


def test_another_collection_is_not_mixed_in(world, tmp_path, monkeypatch):
    collect(short(world, tmp_path))
    with monkeypatch.context() as patch:
        patch.delattr("hf_value_steer.training.collect.load_backbone")  # it is seen before anything is loaded
        with pytest.raises(ValueError, match=r"was made with arguments\.seed = 0, now it is 1"):
            collect(short(world, tmp_path, seed=1))
    save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="was made with"):
        collect(short(world, tmp_path, model=str(tmp_path / "other")))


def test_damaged_and_missing_shards(world, tmp_path, caplog):
    collect(short(world, tmp_path))
    before, path = files(tmp_path), shard_path(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    collect(short(world, tmp_path))
    assert "is damaged" in caplog.text and files(tmp_path) == before
    path.unlink()
    with pytest.raises(ValueError, match="1 of 2 shards .* are missing"):
        Collection(tmp_path)
    path.write_bytes(content[:50])
    with pytest.raises(ValueError, match="damaged: delete it"):
        Collection(tmp_path)


def test_labels_of_a_changed_word_list_are_refused(world, tmp_path):
    words = write_lexicon(tmp_path / "words.txt")
    judge = f"lexicon:{words}"
    collection = collect(short(world, tmp_path / "c"), LabelArguments(judges=[judge]))
    words.write_text("goodak\n")
    with pytest.raises(ValueError, match="was made with digest"):
        label(collection, AutoTokenizer.from_pretrained(world / "model"), LabelArguments(judges=[judge]))
    assert labels_folder(collection, judge).exists()


def test_a_head_of_another_backbone_is_not_calibrated(world, finished, tmp_path, capsys):
    other = save_tiny_model(tmp_path / "other", seed=1)
    judge = f"lexicon:{world / 'bad.txt'}"
    collect(short(world, tmp_path / "c", model=str(other)), LabelArguments(judges=[judge]))
    command = ["calibrate", "--collection", str(tmp_path / "c"), "--value-head", str(finished / "head")]
    assert main([*command, "--judge", judge]) == 2
    assert "its values would mean nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colect": {}}, "The recipe, colect: `colect` is not a field of a recipe: did you mean `collect`"),
        ({"train": {"preset": "hazzard"}}, "train.preset: has to be one of value-steer, hazard, onset, got 'hazzard'"),
        ({"train": {"lerning_rate": 1}}, "The recipe, train.lerning_rate: .* did you mean `learning_rate`"),
        ({"collect": None}, "lacks collect"),
        ({"card": {"limit": "none"}}, "card.limit: .* not a field of section 'card': did you mean `limits`"),
        ({"push": {"private": True}}, "push: it lacks repo_id"),
        (
            {"push": {"repo_id": "me/head"}},
            "The backbone of section 'collect' is '.*model', which is not on the Hub.*--backbone org/name",
        ),
        ({"evaluate": {"prompts": "p.txt", "judges": ["lexicon:x"], "baselines": ["best"]}}, "`baselines` holds best"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_done(world, tmp_path, change, message):
    content = {**recipe(world, tmp_path / "run"), **change}
    content = {name: section for name, section in content.items() if section is not None}
    with pytest.raises(ValueError, match=message):
        run_recipe(content)
    assert not (tmp_path / "run").exists()


def test_the_commands(world, finished, tmp_path, capsys):
    judge = f"lexicon:{world / 'bad.txt'}"
    where = ["--collection", str(tmp_path / "c"), "--judge", judge]
    collecting = ["--model", str(world / "model"), "--prompts", str(world / "prompts.txt"), "--max_new_tokens", "6"]
    assert main(["collect", "--output", str(tmp_path / "c"), "--judges", judge, *collecting]) == 0
    assert "96 generations of 24 prompts" in capsys.readouterr().out
    training = ["--architecture", "linear", "--epochs", "2", "--trainer", "logging_steps=5", "--accept_chance"]
    assert main(["train", *where, "--output", str(tmp_path / "h"), *training]) == 0
    further = f"lexicon:{world / 'prompts.txt'}"
    assert main(["label", "--collection", str(tmp_path / "c"), "--judges", further, judge, "--show", "5"]) == 0
    assert capsys.readouterr().out.count(" … ") == 5
    report = json.loads((tmp_path / "c" / "labels" / "report.json").read_text())
    assert set(report["judges"]) == {judge, further} and set(report["agreement"][judge]) == {further}
    assert main(["calibrate", *where, "--value_head", str(tmp_path / "h"), "--mode", "pac"]) == 0
    card = tmp_path / "h" / "README.md"
    assert "with confidence 95 %" in card.read_text()
    measured = (finished / "head" / "README.md").read_text()
    card.write_text(measured)
    assert main(["calibrate", *where, "--value_head", str(tmp_path / "h"), "--mode", "pac"]) == 0
    assert card.read_text() == measured and "evaluate again" in capsys.readouterr().out
    assert main(["calibrate", *where, "--value_head", str(tmp_path / "h"), "--mode", "pac"]) == 0
    assert "with confidence" in capsys.readouterr().out
    assert main(["train", *where, "--output", str(tmp_path / "h"), "--preset", "hazard"]) == 2
    assert "trained otherwise" in capsys.readouterr().err


def test_processes_share_the_shards(world, tmp_path):
    judge = f"lexicon:{world / 'bad.txt'}"
    alone = collect(short(world, tmp_path / "alone"), LabelArguments(judges=[judge]))
    shape = ["--samples", "1", "--max_new_tokens", "4", "--batch_size", "12", "--judges", judge]
    where = [
        "--model",
        str(world / "model"),
        "--prompts",
        str(world / "prompts.txt"),
        "--output",
        str(tmp_path / "two"),
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "hf_value_steer.cli", "collect", *shape, *where]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert files(tmp_path / "two") == files(alone.folder)


def test_evaluate_reads_prompts_as_collect_does():
    steps = Steps(
        Marked(
            {
                "output": "run",
                "collect": {"model": "org/backbone", "prompts": "org/questions", "prompt_column": "question"},
                "label": {"judges": ["lexicon:words.txt"]},
                "train": {"attribute": "rude"},
                "evaluate": {"prompts": "org/others", "judges": ["lexicon:other.txt"]},
            }
        )
    )
    assert steps.evaluate.prompt_column == steps.collect.prompt_column == "question"
