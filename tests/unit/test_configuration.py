"""Configurations: defaults, JSON, and every wrong value refused by name."""

import copy
import json
import pickle

import pytest

from hf_value_steer import AbstentionConfig, BridgeGuidanceConfig, ValueFilterConfig, ValueHead, ValueHeadConfig
from hf_value_steer.configuration import parse_value_steer


@pytest.mark.parametrize(
    "config",
    [ValueFilterConfig(), AbstentionConfig(message_ids=[3, 4], patience=2), BridgeGuidanceConfig(momentum=0.5)],
)
def test_json_copy_and_pickle(config):
    for again in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        *parse_value_steer(json.loads(config.to_json_string())).values(),
    ):
        assert again == config


def test_the_dict_form_holds_what_differs_from_the_defaults():
    config = ValueFilterConfig(value_head="org/head", threshold=[0.3, 0.4], num_candidates=4)
    expected = {"method": "filter", "value_head": "org/head", "threshold": (0.3, 0.4), "num_candidates": 4}
    assert config.to_dict() == expected


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ValueFilterConfig, {"threshold": 0.0}, r"`threshold` has to be a number in \(0, 1\)"),
        (ValueFilterConfig, {"threshold": 1}, "`threshold`"),
        (ValueFilterConfig, {"threshold": float("nan")}, "`threshold`"),
        (ValueFilterConfig, {"threshold": True}, "`threshold`"),
        (ValueFilterConfig, {"threshold": "0.3"}, "`threshold`"),
        (ValueFilterConfig, {"threshold": []}, "`threshold`"),
        (ValueFilterConfig, {"threshold": [0.3, 1.3]}, "`threshold`"),
        (ValueFilterConfig, {"num_candidates": 0}, "`num_candidates` has to be an integer of at least 1, got 0"),
        (ValueFilterConfig, {"num_candidates": 2.5}, "`num_candidates`"),
        (ValueFilterConfig, {"proposal": "greedy"}, "`proposal` has to be one of sample, topk, got 'greedy'"),
        (ValueFilterConfig, {"evaluation": "both"}, "`evaluation`"),
        (ValueFilterConfig, {"fallback": "none"}, "`fallback`"),
        (ValueFilterConfig, {"prob_weight": -1.0}, "`prob_weight`"),
        (ValueFilterConfig, {"prob_weight": float("nan")}, "`prob_weight`"),
        (ValueFilterConfig, {"max_interventions": -1}, "`max_interventions`"),
        (ValueFilterConfig, {"min_new_tokens": -1}, "`min_new_tokens`"),
        (ValueFilterConfig, {"seed": -1}, "`seed`"),
        (AbstentionConfig, {"patience": 0}, "`patience`"),
        (AbstentionConfig, {"message_ids": [1.5]}, "`message_ids`"),
    ],
)
def test_wrong_values_are_refused_by_name(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_a_value_head_of_another_type_is_refused():
    with pytest.raises(TypeError, match="`value_head` has to be a ValueHead, a Hub id or a folder"):
        ValueFilterConfig(value_head=3)


@pytest.mark.parametrize(
    ("value_steer", "message"),
    [
        ({"method": "filter", "treshold": 0.3}, "`treshold` is not a field of ValueFilterConfig: did you mean"),
        ({"method": "abstain", "zzz": 1}, "`zzz` is not a field of AbstentionConfig: known keys:"),
        ({"method": "steer"}, "one of filter, abstain, guide, activate; got 'steer'"),
        ({"threshold": 0.3}, 'needs a "method"'),
        ([], "at least one"),
        ([ValueFilterConfig(), {"method": "filter"}], "one config a method"),
    ],
)  # fmt: skip
def test_wrong_value_steer_is_refused(value_steer, message):
    with pytest.raises(ValueError, match=message):
        parse_value_steer(value_steer)


def test_value_steer_of_another_type_is_refused():
    with pytest.raises(TypeError, match="takes a config, its dict form or a list"):
        parse_value_steer([3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 4, "treshold": 0.3}, "did you mean `threshold`"),
        ({"hidden_size": 4, "threshold": 1.5}, "`threshold` has to be a number in"),
        ({"hidden_size": 0}, "`hidden_size` has to be a positive integer"),
        ({"hidden_size": "4"}, "expected int"),
        ({"hidden_size": 4, "polarity": "bad"}, "polarity"),
        ({"hidden_size": 4, "feature_norm": "pre"}, "feature_norm"),
        ({}, "hidden_size"),
    ],
)
def test_head_configs_are_strict(options, message):
    with pytest.raises(Exception, match=message):
        ValueHeadConfig(**options)


def test_a_head_in_memory_has_no_json_form(tmp_path):
    head = ValueHead(ValueHeadConfig(hidden_size=4))
    with pytest.raises(ValueError, match="`value_head` has no name: save it"):
        ValueFilterConfig(value_head=head).to_dict()
    head.save_pretrained(tmp_path)
    loaded = ValueFilterConfig(value_head=ValueHead.from_pretrained(tmp_path))
    assert loaded.to_dict() == {"method": "filter", "value_head": str(tmp_path)}
