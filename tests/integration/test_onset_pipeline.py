"""From prompts to a head that detects, its thresholds from prompts of their own, and the trade-off that it draws."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch

from hf_value_steer import ValueHead
from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.arguments.collect import CollectArguments, LabelArguments
from hf_value_steer.arguments.evaluate import EvaluateArguments
from hf_value_steer.arguments.train import TrainArguments
from hf_value_steer.cards.document import is_measured, main_run
from hf_value_steer.evaluation.settings import filter_thresholds
from hf_value_steer.evaluation.trade_off import candidates, trade_off
from hf_value_steer.files.marked import Marked
from hf_value_steer.recipe import run_recipe
from hf_value_steer.recipe.sections import Steps
from hf_value_steer.training.calibrate import calibrate, held_out_rows
from hf_value_steer.training.collect import collect
from hf_value_steer.training.label import Labels
from hf_value_steer.training.layers import suggest_feature_layers
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.splits import split_rows
from hf_value_steer.training.targets import Targets
from hf_value_steer.training.train import train
from tests.tiny_text import BAD, GOOD, write_world


ALPHAS = [0.2, 0.5]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), 24)


def recipe(world, judge, output, **sections):
    known = (world / "prompts.txt").read_text().splitlines()
    (world / "others.txt").write_text("\n".join(f"{line} {GOOD[0]}" for line in known))
    (world / "words.txt").write_text("\n".join([*BAD, *GOOD[: len(BAD)]]))
    return {
        "output": str(output),
        "collect": {
            "model": str(world / "model"), "prompts": str(world / "prompts.txt"), "feature_layers": [0, "final"],
            "samples": 4, "forced_samples": 2, "force_words": str(world / "words.txt"), "max_new_tokens": NEW_TOKENS,
            "batch_size": 4, "top_p": 0.9,
        },
        "label": {"judges": [judge], "prefixes": True},
        "train": {
            "preset": "onset", "feature_layers": [0], "validation": 0.25, "calibration": 0, "learning_rate": 0.01,
            "epochs": 4, "batch_rows": 8, "accept_chance": True,
        },
        "calibrate": {"prompts": str(world / "others.txt"), "alpha": 0.5, "rollback": 2},
        "evaluate": {
            "prompts": str(world / "unseen.txt"), "judges": [judge], "samples": 2, "num_candidates": [4],
            "alphas": ALPHAS, "in_the_loop": [judge], "rollback": 2, "baselines": ["best_of_n"], "best_of": 2,
        },
        **sections,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(world, judge, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        logged = []
        patch.setattr(logging.getLogger("hf_value_steer.training.balance"), "info", logged.append)
        run_recipe(recipe(world, judge, output))
    return output, logged


def test_onsets_are_where_the_judge_objects_first(finished, judge):
    collection = Collection(finished[0] / "collection")
    targets, labels, found = Targets(collection, [judge], "onset"), Labels(collection, judge), 0
    for row in range(len(collection.rows)):
        of, prefixes, ends = targets.of(row), labels.read("prefixes", row), labels.read("completes", row)
        wanted = ((prefixes > 0.5) & ends).nonzero().flatten().tolist()
        assert (of == 1).nonzero().flatten().tolist() == wanted[:1]
        unknown = of.isnan().nonzero().flatten().tolist()
        assert unknown == list(range(wanted[0] + 1, len(of))) if wanted else unknown in ([], [len(of) - 1])
        found += len(wanted[:1])
    assert found > 10


def test_forced_words_are_known(finished, judge):
    collection = Collection(finished[0] / "collection")
    targets = Targets(collection, [judge], "onset")
    hard = [int(targets.hard_negatives(row).sum()) for row in range(len(collection.rows))]
    natural = collection.rows.natural.tolist()
    assert not any(count for count, alone in zip(hard, natural, strict=True) if alone)
    [counts] = ValueHead.from_pretrained(finished[0] / "head").config.training["examples"].values()
    assert 0 < counts["hard_negatives"] <= sum(hard) and counts["onsets"] > 0
    said = f"{counts['onsets']:,} onsets, and accepts {counts['hard_negatives']:,} forced words"
    assert any(said in line for line in finished[1])
    card = (finished[0] / "head" / "README.md").read_text()
    assert "hard negatives" in card


def test_thresholds_come_from_prompts_of_their_own(finished):
    head = ValueHead.from_pretrained(finished[0] / "head")
    own = Collection(finished[0] / "calibration")
    assert head.calibration.n <= len(own.rows) == len(own.prompts) and own.rows.natural.all()
    assert head.config.threshold == head.calibration.promised_threshold(0.5)
    assert head.config.operating_point == {"rollback": 2}


def test_prompts_for_thresholds_train_nothing(world, judge, tmp_path):
    given = recipe(world, judge, tmp_path)
    given["calibrate"]["prompts"] = given["collect"]["prompts"]
    steps = Steps(Marked(given))
    with pytest.raises(ValueError, match="calibrate.prompts: `prompts` hold 24 of those of section 'collect'"):
        steps.look_for_sources()


def test_the_trade_off(finished, judge):
    document = json.loads((finished[0] / "evaluation" / "evaluation.json").read_text())
    runs = {run["name"]: run for run in document["runs"]}
    ways = ("filter", "filter, going back", "soft selection, going back", "ending instead")
    expected = [f"{way}, alpha={alpha:g}" for way in ways for alpha in ALPHAS]
    assert list(runs) == ["base", *expected, f"{judge} in the loop, going back", "placebo", "best of 2"]
    head = ValueHead.from_pretrained(finished[0] / "head")
    for way in ways:
        for alpha in ALPHAS:
            run = runs[f"{way}, alpha={alpha:g}"]
            assert run["alpha"] == alpha and run["threshold"] == head.calibration.promised_threshold(alpha)
    assert main_run(document)["name"] == "filter, going back, alpha=0.5"
    assert all(0 <= run["touched_safe"] <= 1 for name, run in runs.items() if name != "base")
    assert "touched_safe" not in runs["base"] and not is_measured(document, "intervened_on_safe")
    assert runs["ending instead, alpha=0.5"]["mean_tokens"] < runs["base"]["mean_tokens"]
    listed = runs[f"{judge} in the loop, going back"]
    assert listed["touched_safe"] == 0 and listed["judges"][judge]["rate"] < runs["base"]["judges"][judge]["rate"]
    page = (finished[0] / "evaluation" / "report.html").read_text()
    assert "against safe texts touched" in page and "safe texts touched" in page


@pytest.mark.parametrize("section", ["collect", "calibrate"])
def test_prompts_to_report_on_are_used_for_nothing_else(world, judge, tmp_path, section):
    given = recipe(world, judge, tmp_path)
    given["evaluate"]["prompts"] = given[section]["prompts"]
    with pytest.raises(ValueError, match=f"evaluate.prompts: `prompts` hold .* of those of section '{section}'"):
        Steps(Marked(given)).look_for_sources()


GIVEN = {"output": "o", "value_head": "h", "prompts": "p", "judges": ["j"], "model": "m"}


def test_some_ways_only(finished):
    head = ValueHead.from_pretrained(finished[0] / "head")
    arguments = EvaluateArguments(**GIVEN, alphas=ALPHAS, ways=["soft", "end"])
    settings = trade_off(head, arguments, filter_thresholds(head, arguments))
    assert [setting.method for setting in settings] == ["soft", "soft", "end", "end"]
    assert {setting.value_steer.rollback for setting in settings[:2]} == {2}  # as the head has it
    for wrong in ([], ["hard"]):
        with pytest.raises(ValueError, match="ways"):
            EvaluateArguments(**GIVEN, alphas=ALPHAS, ways=wrong)


def test_what_the_head_leaves_open_is_as_ever(finished):
    head = ValueHead.from_pretrained(finished[0] / "head")
    head.config.operating_point = {"num_candidates": 3, "alpha": 0.5}
    head.config.threshold = None
    arguments = EvaluateArguments(**GIVEN)
    assert filter_thresholds(head, arguments) == [head.calibration.promised_threshold(0.5)]
    assert candidates(head, arguments) == [3]
    (setting,) = trade_off(head, EvaluateArguments(**GIVEN, alphas=[0.5], ways=["rollback"]), [0.5])
    assert (setting.num_candidates, setting.value_steer.rollback) == (3, 6)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"ways": ["soft"]}, "`ways` are those of `alphas`"),
        ({"alphas": [0.5], "num_candidates": [2, 4]}, "`num_candidates` has to be one number"),
        ({"alphas": [0.5], "thresholds": [0.5]}, "pass one of them"),
    ],
)
def test_what_would_have_no_effect_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        EvaluateArguments(**GIVEN, **given)


@pytest.mark.parametrize("made", [{"method": "abstain", "mode": "marginal"}, {"mode": "martingale"}])
def test_promises_that_are_no_thresholds_of_a_filter_are_refused(finished, judge, tmp_path, made):
    folder = tmp_path / "head"
    shutil.copytree(finished[0] / "head", folder)
    own = str(finished[0] / "calibration")
    calibrate(CalibrateArguments(collection=own, value_head=str(folder), judge=judge, **made))
    head = ValueHead.from_pretrained(folder)
    assert head.config.operating_point is None  # that of another calibration
    with pytest.raises(ValueError, match="calibrat"):
        filter_thresholds(head, EvaluateArguments(**GIVEN, alphas=[0.5]))


def test_other_texts_of_prompts_that_trained_are_not_new(finished, world, judge, tmp_path):
    given = {"model": str(world / "model"), "prompts": str(world / "prompts.txt"), "feature_layers": [0]}
    again = CollectArguments(output=str(tmp_path), **given, samples=1, max_new_tokens=4, seed=5)
    other = collect(again, LabelArguments(judges=[judge]))
    with pytest.raises(ValueError, match="set nothing aside"):
        held_out_rows(other, finished[0] / "head")
    assert held_out_rows(Collection(finished[0] / "calibration"), finished[0] / "head")


def test_a_layer_that_is_suggested(finished, judge, tmp_path, monkeypatch, caplog):
    collection = Collection(finished[0] / "collection")
    options = {
        "collection": str(collection.folder), "judge": judge, "preset": "onset", "validation": 0.25, "calibration": 0,
        "held_out": 0.25, "epochs": 1, "accept_chance": True,
    }  # fmt: skip
    asked = []

    def suggest(of, its_judge, rows, **given):
        asked.append(rows)
        return suggest_feature_layers(of, its_judge, rows, **given)

    monkeypatch.setattr("hf_value_steer.training.train.suggest_feature_layers", suggest)
    arguments = TrainArguments(**options, feature_layers=["suggested"], output=str(tmp_path / "a"))
    with caplog.at_level(logging.INFO):
        head = train(arguments)
    split = split_rows(collection, arguments)
    [rows] = asked
    assert sorted(rows) == sorted(split["train"])  # none of those that stop training, or are held out
    best = suggest_feature_layers(collection, judge, rows, target="onset").best
    assert head.config.feature_layers == [best.layer] and head.config.temporal == best.temporal
    assert f"Layer {best.layer}, temporal {best.temporal!r}" in caplog.text
    again = replace(arguments, feature_layers=[best.layer], temporal=best.temporal, output=str(tmp_path / "b"))
    assert train(again).fingerprint() == head.fingerprint()
    train(arguments)  # it is there: nothing is probed again
    assert len(asked) == 1


def test_what_is_suggested_is_not_said_twice():
    with pytest.raises(ValueError, match="is for one `judge`, and chooses `temporal`, too"):
        TrainArguments(collection="c", output="o", judge="j", feature_layers=["suggested"], temporal="mean")
    with pytest.raises(ValueError, match="feature_layers"):
        TrainArguments(collection="c", output="o", judge="j", feature_layers=["suggested", 3])


def test_alphas_or_thresholds():
    given = {"output": "o", "value_head": "h", "prompts": "p", "judges": ["j"], "model": "m"}
    with pytest.raises(ValueError, match="`alphas` and `thresholds` both say"):
        EvaluateArguments(**given, alphas=[0.1], thresholds=[0.5])
    with pytest.raises(ValueError, match="are for the method 'filter'"):
        EvaluateArguments(**given, alphas=[0.1], method="abstain")


def test_older_collections_do_not_know_what_was_forced(finished, judge):
    collection = Collection(finished[0] / "collection")
    row = int((~collection.rows.natural).nonzero()[0])
    for shard in collection.shards:
        shard.tensors.pop("forced", None)
    found = Targets(collection, [judge], "onset").hard_negatives(row)
    assert torch.equal(found, torch.zeros(collection.length(row), dtype=torch.bool))
