"""Heads of several attributes: one value for all of them, by hand."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_value_steer import ValueFilterConfig, ValueHead, ValueHeadConfig
from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.arguments.train import JudgedAttribute, TrainArguments, parse_attributes
from hf_value_steer.backbone.parts import fingerprint
from hf_value_steer.calibration import Calibration
from hf_value_steer.generation.scorer import bind
from hf_value_steer.hub import head_card
from hf_value_steer.policy import acceptable
from hf_value_steer.training.losses import coherence, token_loss
from hf_value_steer.training.trainer import HeadInTraining, join_rows, token_metrics


RUDE = {"name": "rude", "polarity": "undesirable", "threshold": 0.3}
POLITE = {"name": "polite", "polarity": "desirable", "threshold": 0.6}


def log_odds(probability):
    return math.log(probability / (1 - probability))


def sigmoid(logit):
    return 1 / (1 + math.exp(-logit))


def transparent(*attributes, **config):
    """A head whose outputs are its inputs: the features are the logits of the attributes."""
    width = len(attributes)
    head = ValueHead(ValueHeadConfig(hidden_size=width, architecture="linear", attributes=list(attributes), **config))
    with torch.no_grad():
        head.net[0].weight.copy_(torch.eye(width))
        head.net[0].bias.zero_()
    return head


LOGITS = torch.tensor([[-2.0, 2.0], [0.5, 2.0], [-2.0, -1.0], [0.5, -1.0]])


def test_the_worst_by_hand():
    head = transparent(RUDE, POLITE)
    expected = [max(rude - log_odds(0.3), log_odds(0.6) - polite) for rude, polite in LOGITS.tolist()]
    out = head(LOGITS)
    assert out.logits.tolist() == pytest.approx(expected, abs=1e-6)
    assert out.value.tolist() == pytest.approx([sigmoid(logit) for logit in expected], abs=1e-6)
    assert (out.value < 0.5).tolist() == [True, False, False, False]
    assert head.attribute_values(LOGITS).tolist() == [
        pytest.approx([sigmoid(rude), sigmoid(polite)], abs=1e-6) for rude, polite in LOGITS.tolist()
    ]
    assert head.config.polarity == "undesirable" and head.config.threshold == 0.5


def test_a_weighted_sum_by_hand():
    head = transparent({**RUDE, "weight": 3}, POLITE, combine="sum")
    expected = [(3 * (rude - log_odds(0.3)) + log_odds(0.6) - polite) / 4 for rude, polite in LOGITS.tolist()]
    assert head(LOGITS).logits.tolist() == pytest.approx(expected, abs=1e-6)
    # One can make up for another, which it cannot where the worst counts.
    assert (head(torch.tensor([[-0.5, 5.0]])).value < 0.5).all()
    assert (transparent(RUDE, POLITE)(torch.tensor([[-0.5, 5.0]])).value > 0.5).all()


def around(threshold, count=201):
    """Logits whose sigmoids are `threshold` and the float32 numbers next to it, on both sides."""
    centre = np.float32(log_odds(threshold))
    step = max(np.spacing(np.float32(threshold)) / (threshold * (1 - threshold)), np.spacing(abs(centre)))
    return torch.tensor((centre + np.linspace(-20 * step, 20 * step, count)).astype(np.float32))


@pytest.mark.parametrize("thresholds", [(0.3, 0.6), (0.5, 0.5), (1e-4, 0.999), (0.97, 0.05), (0.1234567, 0.7654321)])
def test_below_one_half_exactly_if_every_attribute_passes(thresholds):
    rude, polite = ({**each, "threshold": c} for each, c in zip((RUDE, POLITE), thresholds, strict=True))
    head = transparent(rude, polite)
    logits = torch.cartesian_prod(around(thresholds[0]), around(thresholds[1]))
    values = head.attribute_values(logits)
    passed = (values[:, 0] < torch.tensor(thresholds[0])) & (values[:, 1] > torch.tensor(thresholds[1]))
    combined = head(logits).value
    assert torch.equal(acceptable(combined, torch.tensor(head.config.threshold), "undesirable"), passed)
    assert passed.any() and not passed.all() and not combined.isnan().any()
    tied = (values == torch.tensor(thresholds)).any(dim=1)
    assert tied.any() and (combined[tied] >= 0.5).all()


def test_passing_all_is_enough_for_a_sum():
    head = transparent(RUDE, POLITE, combine="sum")
    logits = torch.cartesian_prod(around(0.3), around(0.6))
    values = head.attribute_values(logits)
    passed = (values[:, 0] < torch.tensor(0.3)) & (values[:, 1] > torch.tensor(0.6))
    assert passed.any() and (head(logits[passed]).value < 0.5).all()


def test_another_threshold_moves_all_by_the_same_odds():
    head, odds = transparent(RUDE, POLITE), log_odds(0.2)
    logits = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)) * 3
    passed = (logits[:, 0] < log_odds(0.3) + odds) & (logits[:, 1] > log_odds(0.6) - odds)
    assert torch.equal(head(logits).value < 0.2, passed) and passed.any()


@pytest.mark.parametrize("combine", ["worst", "sum"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 1])
def test_one_attribute_that_is_not_finite_is_no_value(column, broken, combine):
    head = transparent(RUDE, POLITE, combine=combine)
    logits = LOGITS.clone()
    logits[2, column] = broken
    with torch.no_grad():  # an infinite feature times a weight of zero would spoil both outputs
        head.net[0] = torch.nn.Identity()
    values, own = head(logits).value, head.attribute_values(logits)
    assert values.isnan().tolist() == [False, False, True, False]
    assert own[2].isnan().tolist() == [column == 0, column == 1] and not own[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("architecture", ["mlp", "linear"])
def test_shapes_and_loss(architecture):
    torch.manual_seed(0)
    head = ValueHead(
        ValueHeadConfig(hidden_size=6, architecture=architecture, attributes=[RUDE, POLITE, {**RUDE, "name": "c"}])
    )
    features, labels = torch.randn(4, 5, 6), torch.rand(4, 5, 3)
    out = head(features, labels=labels)
    values = head.attribute_values(features)
    assert out.logits.shape == out.value.shape == (4, 5) and values.shape == (4, 5, 3)
    by_hand = -(labels * values.log() + (1 - labels) * (1 - values).log()).mean()
    torch.testing.assert_close(out.loss, by_hand)
    with pytest.raises(ValueError, match="size"):
        head(features, labels=labels[..., 0])
    alone = ValueHead(ValueHeadConfig(hidden_size=6, architecture=architecture))
    assert alone.attribute_values(features).shape == (4, 5, 1)
    assert torch.equal(alone.attribute_values(features)[..., 0], alone(features).value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": [RUDE]}, "at least two, of different names"),
        ({"attributes": []}, "at least two"),
        ({"attributes": [RUDE, {**POLITE, "name": "rude"}]}, r"different names, got \['rude', 'rude'\]"),
        ({"attributes": [RUDE, {**POLITE, "treshold": 0.3}]}, "`treshold` is not a field of `attributes.*: did you"),
        ({"attributes": [RUDE, {"name": "x", "polarity": "desirable"}]}, r"`attributes\[1\].threshold` has to be"),
        ({"attributes": [RUDE, {**POLITE, "threshold": 1.0}]}, r"`attributes\[1\].threshold`.*got 1.0"),
        ({"attributes": [RUDE, {**POLITE, "polarity": "good"}]}, "polarity` has to be one of undesirable, desirable"),
        ({"attributes": [{**RUDE, "name": " "}, POLITE]}, r"`attributes\[0\].name` has to be a text"),
        ({"attributes": [{**RUDE, "weight": 0}, POLITE], "combine": "sum"}, "weight` has to be a finite number"),
        ({"attributes": [{**RUDE, "weight": math.inf}, POLITE], "combine": "sum"}, "weight` has to be a finite"),
        ({"attributes": [{**RUDE, "weight": True}, POLITE], "combine": "sum"}, "weight` has to be a finite number"),
        ({"attributes": [{**RUDE, "weight": 2.0}, POLITE]}, 'pass `combine="sum"`'),
        ({"attributes": [RUDE, POLITE], "polarity": "desirable"}, "`polarity` of a head of several attributes"),
        ({"attributes": [RUDE, POLITE], "combine": "best"}, "combine"),
        ({"attributes": ["rude", "polite"]}, "attributes"),
        ({"combine": "sum"}, '`combine`="sum" needs `attributes`'),
    ],
)  # fmt: skip
def test_wrong_configs_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        ValueHeadConfig(hidden_size=4, **options)


def test_a_config_names_what_it_values():
    config = ValueHeadConfig(hidden_size=4, attributes=[RUDE, POLITE])
    assert config.attribute == "rude + polite" and RUDE.keys() == {"name", "polarity", "threshold"}
    assert ValueHeadConfig(hidden_size=4, attributes=[RUDE, POLITE], attribute="manners").attribute == "manners"


def test_round_trips(tmp_path):
    torch.manual_seed(0)
    attributes = [{**RUDE, "weight": 2.0}, POLITE]
    head = ValueHead(ValueHeadConfig(hidden_size=8, attributes=attributes, combine="sum", threshold=0.4))
    head.save_pretrained(tmp_path)
    features = torch.randn(3, 8)
    for again in (ValueHead.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(again) is ValueHead and torch.equal(again(features).value, head(features).value)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.attributes == [{**RUDE, "weight": 2.0}, {**POLITE, "weight": 1.0}]
    assert (config.combine, config.threshold) == ("sum", 0.4)
    head.config.attributes[0]["threshold"] = 0.25
    head.save_pretrained(tmp_path)
    again = ValueHead.from_pretrained(tmp_path)
    assert again.config.attributes[0]["threshold"] == 0.25
    assert torch.equal(again(features).value, head(features).value)
    head.config.attributes[0]["threshold"] = 2.5
    with pytest.raises(Exception, match=r"`attributes\[0\].threshold`"):
        head.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="value-steer knows only heads of one attribute"):
        head.save_value_steer(tmp_path / "head.bin")


def test_a_calibration_is_about_the_attributes_as_they_are():
    head = transparent(RUDE, POLITE)
    scores = torch.rand(99, generator=torch.Generator().manual_seed(0)).numpy()
    head.calibration = Calibration.from_scores(scores, head_fingerprint=head.fingerprint())
    config = ValueFilterConfig(value_head=head, alpha=0.1)
    assert bind(config, head, 1, torch.device("cpu")).threshold.item() == head.calibration.threshold(0.1)
    head.config.attributes[1]["threshold"] = 0.600001
    with pytest.raises(ValueError, match="calibration.json is about another head"):
        bind(config, head, 1, torch.device("cpu"))
    alone = ValueHead(ValueHeadConfig(hidden_size=4))
    assert alone.fingerprint() == fingerprint(alone)


def test_weights_and_config_have_to_agree(tmp_path):
    ValueHead(ValueHeadConfig(hidden_size=8, attributes=[RUDE, POLITE])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["attributes"].append({**RUDE, "name": "third"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="size mismatch|mismatched"):
        ValueHead.from_pretrained(tmp_path)


def test_a_card_lists_the_attributes():
    worst = head_card(transparent(RUDE, POLITE, backbone="org/base"))
    assert "# Value head: rude + polite" in worst.text and worst.data.tags[-2:] == ["rude", "polite"]
    assert "| rude | undesirable | 0.3 |\n| polite | desirable | 0.6 |" in worst.text
    assert "below one half, each passes its own threshold" in worst.text
    weighted = head_card(transparent({**RUDE, "weight": 3}, POLITE, combine="sum")).text
    assert "| rude | undesirable | 0.3 | 3 |" in weighted and "weighted mean" in weighted
    assert "several attributes" not in head_card(ValueHead(ValueHeadConfig(hidden_size=4))).text


def test_entries_are_read():
    assert parse_attributes(["rude=lexicon:a=b.txt", "fine=llm:http://me@host#m@desirable", "x=j@undesirable"]) == [
        JudgedAttribute("rude", "lexicon:a=b.txt", "undesirable"),
        JudgedAttribute("fine", "llm:http://me@host#m", "desirable"),
        JudgedAttribute("x", "j", "undesirable"),
    ]
    for entry in ("lexicon:words.txt", "rude=", "=lexicon:words.txt", "rude=@desirable"):
        with pytest.raises(ValueError, match="takes entries name=judge or name=judge@desirable"):
            parse_attributes([entry])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass one of them"),
        ({"judge": "j", "attributes": ["a=j", "b=k"]}, "pass one of them"),
        ({"attributes": ["a=j"]}, "at least two"),
        ({"attributes": ["a=j", "a=k"]}, "different names"),
        ({"attributes": ["a=j", "b=k"], "polarity": "desirable"}, "`attributes` say theirs"),
        ({"judge": "j", "combine": "sum"}, "`combine`='sum' is for several"),
    ],
)
def test_wrong_training_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainArguments(collection="c", output="o", **options)


def test_what_one_judge_is_recorded_as_has_not_changed():
    assert not {"attributes", "combine"} & TrainArguments(collection="c", output="o", judge="j").record().keys()
    several = TrainArguments(collection="c", output="o", attributes=["a=j", "b=k@desirable"])
    again = TrainArguments(collection="c", output="o", **several.record())
    assert again == several and several.judges() == ["j", "k"]
    with pytest.raises(ValueError, match="pass one of them"):
        CalibrateArguments(collection="c", value_head="h")


def test_losses_are_means_over_attributes():
    logits, targets = torch.randn(5, 2), torch.rand(5, 2)
    follows = torch.tensor([False, True, True, False, True])
    for kind in ("bce", "focal"):
        single = [token_loss(logits[:, i], targets[:, i], kind, 2.0).mean() for i in range(2)]
        torch.testing.assert_close(token_loss(logits, targets, kind, 2.0).mean(), sum(single) / 2)
    single = [coherence(logits[:, i], follows) for i in range(2)]
    torch.testing.assert_close(coherence(logits, follows), sum(single) / 2)


def test_a_folded_head_of_several_attributes():
    torch.manual_seed(0)
    features, mean, scale = torch.randn(7, 6) * 3 + 5, torch.randn(6), torch.rand(6) + 0.5
    head = ValueHead(ValueHeadConfig(hidden_size=6, attributes=[RUDE, POLITE]))
    model = HeadInTraining(head, mean, scale, "bce", 1.0, 0.1)
    out = model(**join_rows([{"features": features, "labels": torch.rand(7, 2)}]))
    assert out["logits"].shape == (7, 2) and out["loss"].shape == ()
    torch.testing.assert_close(model.folded().attribute_logits(features), out["logits"], rtol=1e-4, atol=1e-5)


def test_metrics_of_each_attribute_and_their_mean():
    logits = np.array([[-1.0, 2.0], [2.0, 1.0], [0.5, -1.0], [-2.0, 0.0]], dtype=np.float32)
    labels = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    found = token_metrics(SimpleNamespace(predictions=logits, label_ids=labels), ["a", "b"])
    for column, name in enumerate("ab"):
        alone = token_metrics(SimpleNamespace(predictions=logits[:, column], label_ids=labels[:, column]))
        assert alone == {key: found[f"{key}_{name}"] for key in ("auroc", "calibration_error")}
    assert found["auroc"] == 1.0 and len(found) == 6
    assert found["calibration_error"] == pytest.approx(
        (found["calibration_error_a"] + found["calibration_error_b"]) / 2
    )
