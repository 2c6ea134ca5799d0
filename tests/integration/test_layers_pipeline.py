"""Heads on any layers and over time, from a collection to files: they read there what they read in a call."""

import ast
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_value_steer
from hf_value_steer import MismatchError, ValueFilterConfig, ValueHead, ValueHeadConfig, value_steer_generate
from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.arguments.collect import CollectArguments, LabelArguments
from hf_value_steer.arguments.train import SplitArguments, TrainArguments
from hf_value_steer.cli import main
from hf_value_steer.training.calibrate import _set_attribute_thresholds, calibrate, row_values
from hf_value_steer.training.collect import collect
from hf_value_steer.training.layers import suggest_feature_layers
from hf_value_steer.training.prompts import Formatter
from hf_value_steer.training.shards import Collection, TensorFile, shard_path
from hf_value_steer.training.splits import split_rows
from hf_value_steer.training.targets import Targets
from hf_value_steer.training.train import train
from hf_value_steer.training.trainer import HeadInTraining, TokenRows, join_rows
from tests.families import layered_head
from tests.tiny_text import write_world


NEW_TOKENS = 9
LAYERS = [[0], [1, "final"], ["final"], ["final", 0]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model of two layers, prompts of several lengths, and a word list."""
    return write_world(tmp_path_factory.mktemp("world"), 40)


@pytest.fixture(scope="module")
def model(world):
    return AutoModelForCausalLM.from_pretrained(world / "model").eval()


def collected(world, judge, name, **arguments):
    shared = {"model": str(world / "model"), "prompts": str(world / "prompts.txt"), "batch_size": 4, "next_tokens": 2}
    given = CollectArguments(output=str(world / name), max_new_tokens=NEW_TOKENS, **shared, **arguments)
    return collect(given, LabelArguments(judges=[judge], prefixes=True, prefix_words=1))


@pytest.fixture(scope="module")
def greedy(world, judge):
    """All layers of what the model itself says."""
    return collected(world, judge, "greedy", feature_layers=["all"], samples=1, do_sample=False, limit=8)


@pytest.fixture(scope="module")
def sampled(world, judge):
    return collected(world, judge, "sampled", feature_layers=[-1, 0, "final"], samples=4)


def steered(model, world, collection, head):
    """Values of prompts and tokens of the texts of a greedy collection, by the engine, `(1 + tokens,)` each."""
    formatter = Formatter(AutoTokenizer.from_pretrained(world / "model"), chat=False)
    config = ValueFilterConfig(value_head=head, threshold=1 - 1e-6)
    for first in range(0, len(collection.prompts), 4):  # in the batches of the collection: padding is the same
        inputs = formatter(collection.prompts[first : first + 4])
        out = model.generate(
            **inputs, custom_generate=value_steer_generate, value_steer=config, do_sample=False,
            max_new_tokens=NEW_TOKENS, return_dict_in_generate=True,
        )  # fmt: skip
        for row in range(len(inputs["input_ids"])):
            tokens, length = collection.read("tokens", first + row), collection.length(first + row)
            assert torch.equal(out.sequences[row, inputs["input_ids"].shape[1] :][:length].int(), tokens)
            yield torch.cat([out.prompt_values[row, None], out.token_values[row, :length]])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("temporal", ["none", "mean", "ema"])
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_values_of_a_collection_are_those_of_the_engine(model, world, judge, greedy, layers, temporal):
    """Whoever reads them: calibration, training on each target, thresholds of attributes."""
    head = layered_head(model, layers, temporal)
    expected = list(steered(model, world, greedy, head))
    rows = list(range(len(greedy.rows)))
    for method, watched in (("filter", slice(1, None)), ("abstain", slice(0, -1))):
        values = row_values(greedy, head, rows, method)
        close(values.prompts, torch.stack([each[0] for each in expected]))
        close(values.worst, torch.stack([each[watched].max() for each in expected]))
    read = greedy.resolve(head.config.feature_layers)
    for target, first in (("response", 0), ("prefix", 1), ("hazard", 1), ("risk", 1)):
        dataset = TokenRows(Targets(greedy, [judge], target), rows, read, temporal != "none")
        width = torch.zeros(head.config.hidden_size)
        training = HeadInTraining(head, width, width + 1, "bce", 1.0, 0.0)
        with torch.no_grad():
            logits = training(**join_rows([dataset[row] for row in rows]))["logits"]
        close(logits.sigmoid(), torch.cat([each[first:] for each in expected]))
    several = of_attributes(head)
    _set_attribute_thresholds(greedy, several, rows, 0.25)
    worst = torch.stack([each[1:].max() for each in expected])
    for threshold in (each["threshold"] for each in several.config.attributes):
        assert (worst >= threshold).float().mean().item() == pytest.approx(0.25, abs=1.5 / len(rows))


def of_attributes(head):
    """A head with the same attribute twice."""
    names = [{"name": name, "polarity": "undesirable", "threshold": 0.5} for name in "ab"]
    kept = ("hidden_size", "projection_size", "feature_layers", "temporal", "temporal_decay")
    several = ValueHead(ValueHeadConfig(attributes=names, **{name: getattr(head.config, name) for name in kept}))
    weights = head.net.state_dict()
    for name in ("4.weight", "4.bias"):
        weights[name] = weights[name].repeat(2, *[1] * (weights[name].ndim - 1))
    several.net.load_state_dict(weights)
    return several


def test_states_are_read_in_one_place():
    """Nobody names the tensors of a shard but those who write them: a head would get other layers than its own."""
    for path in Path(hf_value_steer.__file__).parent.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and node.args)
        named = [call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)]
        assert path.name in ("shards.py", "continuation.py") or not {"features", "prompt_features"} & set(named), path


def test_all_layers_of_one_pass(model, world, greedy):
    assert greedy.layers == (0, 1, "final") and greedy.manifest["num_layers"] == 2
    assert greedy.manifest["arguments"]["feature_layers"] == ["all"]
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    prompt = tokenizer(greedy.prompts[3].text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        text = torch.cat([prompt, greedy.read("tokens", 3).long()[None]], dim=1)
        found = model(text, output_hidden_states=True).hidden_states
        expected = [found[1], model.model.layers[1](found[1], **_rotary(model, text)), found[2]]
    for layer, states in zip(greedy.layers, expected, strict=True):
        torch.testing.assert_close(greedy.features(3, [layer]), states[0, prompt.shape[1] - 1 :], rtol=1e-4, atol=1e-4)


def _rotary(model, text):
    places = torch.arange(text.shape[1])[None]
    return {"position_embeddings": model.model.rotary_emb(model.get_input_embeddings()(text), places)}


def test_only_the_layers_that_are_asked_for_are_read(sampled, monkeypatch):
    read, names = TensorFile.read, set()
    monkeypatch.setattr(TensorFile, "read", lambda self, name, *place: names.add(name) or read(self, name, *place))
    sampled.features(3, [0])
    assert {name for name in names if "features" in name} == {"features.0", "prompt_features.0"}


def test_a_collection_of_layers_that_was_stopped_becomes_the_same(world, judge, sampled):
    again = collected(world, judge, "again", feature_layers=[-1, 0, "final"], samples=4)
    damaged = shard_path(again.folder, 1)
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-1])
    shard_path(again.folder, 0).unlink()
    again = collected(world, judge, "again", feature_layers=[-1, 0, "final"], samples=4)
    assert again.digest() == sampled.digest() and damaged.read_bytes() == before
    for index in range(len(sampled.shards)):
        assert shard_path(again.folder, index).read_bytes() == shard_path(sampled.folder, index).read_bytes()
    with pytest.raises(ValueError, match=r"with arguments.feature_layers = \[-1, 0, 'final'\], now it is \[0"):
        collected(world, judge, "again", feature_layers=[0], samples=4)


def test_layers_that_are_not_kept_are_refused(sampled):
    assert sampled.layers == (1, 0, "final")
    assert sampled.resolve([0.0, 1.0]) == (0, 1) and sampled.resolve(None) == sampled.layers
    with pytest.raises(MismatchError, match="name layer 2, but this model has 2 layers"):
        sampled.resolve([2])
    with pytest.raises(MismatchError, match="name a layer of these 2 twice"):
        sampled.resolve([0, -2])


def test_a_collection_of_the_final_state_has_no_others(world, judge):
    final = collected(world, judge, "final", samples=1, limit=2)
    assert "feature_layers" not in final.manifest and "feature_layers" not in final.manifest["arguments"]
    assert final.layers == ("final",) and final.resolve(["final"]) == ("final",)
    with pytest.raises(MismatchError, match=r"keeps the states of \['final'\], not of \[0.5\]"):
        final.resolve([0.5])


@pytest.mark.parametrize(
    ("how", "layers", "width"),
    [
        ({"feature_layers": [0], "temporal": "mean", "projection_size": 8}, [0], 8),
        ({"feature_layers": ["final", -1], "temporal": "ema", "temporal_decay": 0.5}, ["final", 1], 64),
        ({"architecture": "linear", "temporal": "mean"}, [1, 0, "final"], 1),
    ],
)
def test_a_head_is_trained_on_its_layers(world, judge, model, sampled, how, layers, width, tmp_path):
    arguments = TrainArguments(
        collection=str(sampled.folder), output=str(tmp_path), judge=judge, preset="hazard", epochs=2, seed=1,
        accept_chance=True, batch_rows=8, learning_rate=0.01, **how,
    )  # fmt: skip
    train(arguments)
    assert train(arguments).fingerprint() == ValueHead.from_pretrained(tmp_path).fingerprint()
    head = ValueHead.from_pretrained(tmp_path)
    assert head.config.feature_layers == layers and head.net[0].out_features == width
    assert head.config.temporal == how["temporal"] and len(head.config.feature_norms) == len(layers)
    assert head.config.temporal_decay == how.get("temporal_decay")
    recorded = json.loads((tmp_path / "training.json").read_text())["arguments"]
    assert {name: recorded[name] for name in how} == how and set(recorded) & {"feature_layers"} <= set(how)
    calibration = calibrate(
        CalibrateArguments(collection=str(sampled.folder), value_head=str(tmp_path), judge=judge, alpha=0.5)
    )
    assert calibration.head_fingerprint == head.fingerprint()
    config = ValueFilterConfig(value_head=str(tmp_path), num_candidates=3)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()}
    out = model.generate(
        **inputs, custom_generate=value_steer_generate, value_steer=config, max_new_tokens=4,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert out.token_values.isfinite().all()


def test_nobody_means_a_head_on_all_layers(judge, greedy, tmp_path):
    given = {"collection": str(greedy.folder), "output": str(tmp_path / "head"), "judge": judge, "accept_chance": True}
    with pytest.raises(ValueError, match="keeps all 3 layers: say with `feature_layers` which of them"):
        train(TrainArguments(**given, validation=0.5, calibration=0.0))


def test_memory_starts_at_the_prompts_last_token(judge, sampled):
    """Also where its target has no place for it."""
    targets = Targets(sampled, [judge], "hazard")
    whole, alone = (TokenRows(targets, [0], [0], each)[0] for each in (True, False))
    assert len(whole["features"]) == len(whole["labels"]) + 1 == len(alone["features"]) + 1
    assert torch.equal(whole["features"][0], sampled.prompt_feature(0, 0))
    assert torch.equal(whole["features"][1:], alone["features"])


def test_a_manifest_with_other_layers_is_named(sampled, tmp_path):
    (tmp_path / "shards").symlink_to(sampled.folder / "shards")
    for changes in ({"feature_layers": 3}, {"feature_layers": [5]}, {"num_layers": "two"}, {"feature_layers": ["a"]}):
        (tmp_path / "collection.json").write_text(json.dumps({**sampled.manifest, **changes}))
        with pytest.raises(ValueError, match=r"collection\.json is no record of a collection"):
            Collection(tmp_path)


def test_the_cheapest_layer_that_may_be_the_best(sampled, judge, capsys):
    found = suggest_feature_layers(sampled, judge, target="prefix", folds=3)
    assert {(each.layer, each.temporal) for each in found.probes} == {
        (layer, temporal) for layer in (0, 1, "final") for temporal in ("none", "mean")
    }
    assert {each.layer: each.price for each in found.probes} == {0: 0.5, 1: 1.0, "final": 1.0}
    best = max(each.auroc for each in found.probes)
    assert found.best.upper >= best > 0.5 and all(each.lower <= each.auroc <= each.upper for each in found.probes)
    cheaper = [each for each in found.probes if each.price < found.best.price]
    assert all(each.upper < best for each in cheaper)
    lines = str(found).splitlines()
    said = f"{found.positive} of {found.tokens} tokens are positive. The first {found.reaching} rows may be"
    assert len(lines) == 10 and lines[-1].startswith(said) and 0 < found.positive < found.tokens
    assert [each.upper >= best for each in found.probes] == [place < found.reaching for place in range(6)]
    assert lines[2].startswith(f"| {found.best.layer} | {found.best.temporal} | ")
    assert found == suggest_feature_layers(sampled, judge, target="prefix", folds=3)
    words = ["layers", "--collection", str(sampled.folder), "--judge", judge, "--target", "prefix", "--folds", "3"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith(str(found))


def test_a_layer_is_not_chosen_on_prompts_that_calibrate(sampled, judge, monkeypatch):
    read = []
    of = Targets.of
    monkeypatch.setattr(Targets, "of", lambda self, row: read.append(row) or of(self, row))
    suggest_feature_layers(sampled, judge, target="prefix")
    assert not set(read) & set(split_rows(sampled, SplitArguments())["calibration"]) and len(set(read)) > 50
    with pytest.raises(ValueError, match="are all of one class, or of one prompt"):
        suggest_feature_layers(sampled, judge, [0, 1])
    with pytest.raises(ValueError, match="`folds` has to be at least 2, got 1"):
        suggest_feature_layers(sampled, judge, folds=1)
    with pytest.raises(ValueError, match="`limit` has to be at least 1, got 0"):
        suggest_feature_layers(sampled, judge, limit=0)
    with pytest.raises(ValueError, match="`rows` has to name at least one row"):
        suggest_feature_layers(sampled, judge, [])
    with pytest.raises(ValueError, match="`target` has to be one of"):
        suggest_feature_layers(sampled, judge, target="x")
