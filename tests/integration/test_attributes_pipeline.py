"""A head of two attributes from a recipe: two word lists, one to avoid and one to keep to."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_value_steer import ValueFilterConfig, ValueHead, value_steer_generate
from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.cli import main
from hf_value_steer.recipe import run_recipe
from hf_value_steer.training.calibrate import _set_attribute_thresholds, calibrate, held_out_rows
from hf_value_steer.training.label import Labels
from hf_value_steer.training.shards import Collection
from tests.tiny_text import BAD, GOOD, write_world


NEW_TOKENS, ALPHA = 8, 0.6
NICE = GOOD[:20]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, prompts and two word lists."""
    folder = write_world(tmp_path_factory.mktemp("world"), 48)
    (folder / "nice.txt").write_text("\n".join(NICE) + "\n")
    return folder


def attributes(world):
    return [f"bad=lexicon:{world / 'bad.txt'}", f"nice=lexicon:{world / 'nice.txt'}@desirable"]


def recipe(world, output, **changes):
    judges = [f"lexicon:{world / name}" for name in ("nice.txt", "bad.txt")]
    content = {
        "output": str(output),
        "collect": {
            "model": str(world / "model"),
            "prompts": str(world / "prompts.txt"),
            "samples": 10,
            "max_new_tokens": NEW_TOKENS,
            "batch_size": 16,
        },
        "label": {"judges": judges, "prefixes": True, "prefix_words": 1},
        "train": {
            "attributes": attributes(world),
            "preset": "hazard",
            "target": "prefix",
            "validation": 0.25,
            "calibration": 0.3,
            "learning_rate": 0.01,
            "epochs": 8,
            "patience": 8,
            "batch_rows": 8,
            "accept_chance": True,  # what a token adds shows in few texts as a whole
        },
        "calibrate": {"alpha": ALPHA},
    }
    return {**content, **changes}


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    run_recipe(recipe(world, output))
    return output


def held_out(finished):
    collection = Collection(finished / "collection")
    return collection, held_out_rows(collection, finished / "head")


def test_what_it_leaves(world, finished):
    head = ValueHead.from_pretrained(finished / "head")
    config = head.config
    assert [(each["name"], each["polarity"]) for each in config.attributes] == [
        ("bad", "undesirable"),
        ("nice", "desirable"),
    ]
    assert (config.attribute, config.combine) == ("bad + nice", "worst")
    assert config.threshold == head.calibration.threshold(ALPHA)
    assert config.training["attributes"] == attributes(world)
    best = json.loads((finished / "head" / "training.json").read_text())["history"][-1]
    assert best["auroc_bad"] > 0.7 and best["auroc_nice"] > 0.65
    for metric in ("auroc", "calibration_error"):
        assert best[metric] == pytest.approx((best[f"{metric}_bad"] + best[f"{metric}_nice"]) / 2)
    assert (
        f"| nice | desirable | {config.attributes[1]['threshold']:.4g} |"
        in (finished / "head" / "README.md").read_text()
    )


def test_a_record_of_other_arguments_still_says_what_was_held_out(finished, tmp_path):
    record = json.loads((finished / "head" / "training.json").read_text())
    record["arguments"] |= {"preset": "one that is gone", "no longer there": 1}
    (tmp_path / "training.json").write_text(json.dumps(record))
    assert held_out_rows(Collection(finished / "collection"), tmp_path) == held_out(finished)[1]


@torch.no_grad()
def test_thresholds_that_equally_many_texts_reach(finished):
    """A share `alpha` of the texts reaches at least one; thresholds in the middle of the value say the same."""
    head, collection = ValueHead.from_pretrained(finished / "head"), Collection(finished / "collection")
    rows = list(range(len(collection.rows)))
    for alpha in (0.1, 0.3):
        _set_attribute_thresholds(collection, head, rows, alpha)
        texts = [collection.read("features", row) for row in rows]
        reached = torch.stack([_beyond(head, text).any(dim=0) for text in texts])
        assert reached.any(dim=1).float().mean() == pytest.approx(alpha, abs=0.03)
        shares = reached.float().mean(dim=0)
        assert shares[0] == pytest.approx(float(shares[1]), abs=0.03) and alpha / 2 <= shares[0] + 0.03 < alpha + 0.03
        for text in texts:
            assert torch.equal(_beyond(head, text).any(dim=1), head(text).value >= 0.5)


def _beyond(head, features):
    """Which attributes fail their thresholds, `(tokens, 2)`."""
    bad, nice = head.attribute_values(features).T
    first, second = (each["threshold"] for each in head.config.attributes)
    return torch.stack([bad >= first, nice <= second], dim=1)


def test_calibrated_on_what_both_judges_find_safe(world, finished):
    head, (collection, rows) = ValueHead.from_pretrained(finished / "head"), held_out(finished)
    scores = {name: Labels(collection, f"lexicon:{world / name}.txt").responses() for name in ("bad", "nice")}
    safe = (scores["bad"] <= 0.5) & (scores["nice"] > 0.5)
    prompts = set(collection.rows.prompt[rows].tolist())
    assert 0 < head.calibration.n <= len(prompts) / 2  # the others gave the attributes' thresholds
    worst = {row: head(collection.read("features", row)).value.max().item() for row in rows}
    of_safe, of_others = ({worst[row] for row in rows if safe[row] == wanted} for wanted in (True, False))
    assert set(head.calibration.scores) <= of_safe and not set(head.calibration.scores) & of_others


def test_without_alpha_the_attributes_are_left(world, finished, tmp_path):
    head = ValueHead.from_pretrained(finished / "head")
    before = head.config.attributes
    head.save_pretrained(tmp_path)
    (tmp_path / "training.json").write_bytes((finished / "head" / "training.json").read_bytes())
    where = {"collection": str(finished / "collection"), "value_head": str(tmp_path)}
    calibration = calibrate(CalibrateArguments(**where, attributes=attributes(world)))
    again = ValueHead.from_pretrained(tmp_path)
    assert again.config.attributes == before and again.config.threshold == 0.5
    assert set(calibration.scores) > set(head.calibration.scores)  # nothing was needed for the attributes
    with pytest.raises(ValueError, match="`attributes` are .* but those of `value_head` are"):
        calibrate(
            CalibrateArguments(**where, attributes=[each.removesuffix("@desirable") for each in attributes(world)])
        )
    command = ["calibrate", "--collection", where["collection"], "--value_head", where["value_head"]]
    assert main([*command, "--attributes", *attributes(world), "--alpha", "0.9"]) == 0
    stricter = ValueHead.from_pretrained(tmp_path).config.attributes
    assert stricter[0]["threshold"] < before[0]["threshold"] and stricter[1]["threshold"] > before[1]["threshold"]


def test_steering_follows_both(world, finished):
    model = AutoModelForCausalLM.from_pretrained(world / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    # One threshold moves the limits of both.
    config = ValueFilterConfig(value_head=str(finished / "head"), num_candidates=8, threshold=0.3)
    inputs = tokenizer((world / "prompts.txt").read_text().splitlines(), return_tensors="pt", padding=True)

    def rates(**options):
        set_seed(0)
        sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": 4, "max_new_tokens": NEW_TOKENS}
        tokens = model.generate(**inputs, **sampling, **options)
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        words = " ".join(texts).split()
        return [sum(word in listed for word in words) / len(words) for listed in (BAD, NICE)]

    base, steered = rates(), rates(custom_generate=value_steer_generate, value_steer=config)
    assert steered[0] < 0.7 * base[0] and steered[1] > 1.1 * base[1]


def test_a_finished_recipe_is_not_done_again(world, finished, monkeypatch):
    def never(*_, **__):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr("hf_value_steer.training.train.fit", never)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    run_recipe(recipe(world, finished))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="trained otherwise"):
        run_recipe(recipe(world, finished, train={**recipe(world, finished)["train"], "combine": "sum"}))


def test_a_weighted_sum_is_calibrated_as_one_value(world, finished, tmp_path):
    train = {**recipe(world, tmp_path)["train"], "combine": "sum", "architecture": "linear", "epochs": 2}
    (tmp_path / "collection").symlink_to(finished / "collection")
    run_recipe(recipe(world, tmp_path, train=train))
    head = ValueHead.from_pretrained(tmp_path / "head")
    assert head.config.combine == "sum" and {each["threshold"] for each in head.config.attributes} == {0.5}
    assert head.config.threshold == head.calibration.threshold(ALPHA)


def test_wrong_recipes(world, tmp_path):
    good = recipe(world, tmp_path / "run")
    bad, nice = f"lexicon:{world / 'bad.txt'}", f"lexicon:{world / 'nice.txt'}"
    evaluate = {"prompts": "p.txt", "judges": [bad, nice]}
    for change, message in (
        ({"label": {"judges": [bad]}}, "section 'label' lack .*nice.txt, which 'nice' is from"),
        ({"train": {"attributes": attributes(world), "judge": bad}}, "pass one of them"),
        ({"train": {"attributes": attributes(world)[:1]}}, "at least two"),
        ({"evaluate": evaluate}, "section 'evaluate' hold .*nice.txt, which gave labels"),
    ):
        with pytest.raises(ValueError, match=message):
            run_recipe({**good, **change})
    assert not (tmp_path / "run").exists()
