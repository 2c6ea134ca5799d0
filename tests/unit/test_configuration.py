"""Configurations: defaults, JSON, and every wrong value refused by name."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

from hf_value_steer import AbstentionConfig, GuidanceConfig, ValueFilterConfig, ValueHead, ValueHeadConfig
from hf_value_steer.configuration.parse import parse_value_steer


@pytest.mark.parametrize(
    "config",
    [ValueFilterConfig(), AbstentionConfig(message_ids=[3, 4], patience=2), GuidanceConfig(momentum=0.5)],
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
        (ValueFilterConfig, {"threshold": "0.3"}, "`threshold` .* got '0.3'"),
        (ValueFilterConfig, {"threshold": np.array([])}, "`threshold`"),
        (ValueFilterConfig, {"threshold": np.bool_(True)}, "`threshold`"),
        (
            ValueFilterConfig,
            {"num_candidates": 100_000},
            "`num_candidates` has to be an integer from 1 to 1024, got 100000",
        ),
        (ValueFilterConfig, {"prob_weight": "1"}, "`prob_weight` .* got '1'"),
        (AbstentionConfig, {"message_ids": "stop"}, "`message_ids` .* got 'stop'"),
        (AbstentionConfig, {"message_ids": 5}, "`message_ids`"),
        (AbstentionConfig, {"message_ids": [True]}, "`message_ids`"),
        (GuidanceConfig, {"momentum": "0.5"}, "`momentum` .* got '0.5'"),
        (ValueFilterConfig, {"threshold": []}, "`threshold`"),
        (ValueFilterConfig, {"threshold": [0.3, 1.3]}, "`threshold`"),
        (ValueFilterConfig, {"num_candidates": 0}, "`num_candidates` .* from 1 to 1024, got 0"),
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


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (ValueFilterConfig, {"threshold": np.float32(0.5), "num_candidates": np.int64(4)}, (0.5, 4)),
        (ValueFilterConfig, {"threshold": torch.tensor(0.5), "seed": np.uint8(3)}, (0.5, 3)),
        (ValueFilterConfig, {"threshold": np.array([0.25, 0.5]), "prob_weight": np.float16(2)}, ((0.25, 0.5), 2.0)),
        (ValueFilterConfig, {"threshold": [np.float64(0.25), 0.5], "alpha": None}, ((0.25, 0.5), None)),
        (AbstentionConfig, {"message_ids": np.array([3, 4]), "patience": np.int32(2)}, ((3, 4), 2)),
        (AbstentionConfig, {"message_ids": torch.tensor([3]), "min_new_tokens": np.int64(1)}, ((3,), 1)),
        (GuidanceConfig, {"momentum": np.float32(0.5), "refresh_interval": np.int64(2)}, (0.5, 2)),
    ],
)
def test_numbers_of_numpy_and_torch_are_numbers(cls, options, expected):
    config = cls(**options)
    assert tuple(getattr(config, name) for name in options) == expected
    assert cls(**json.loads(json.dumps({k: v for k, v in config.to_dict().items() if k != "method"}))) == config


@pytest.mark.parametrize(
    ("value_steer", "message"),
    [
        (ValueHead(ValueHeadConfig(hidden_size=4)), r"got ValueHead. A head goes into a config"),
        ("org/head", "got str. A head goes into a config"),
        ({"filter": {"threshold": 0.5}}, r'needs a "method", one of filter'),
        ({"method": {"filter": {}}}, r'needs a "method"'),
        ({"method": ["filter"]}, r'needs a "method"'),
        ([[{"method": "filter"}]], "got list"),
        (7, "got int"),
        (True, "got bool"),
    ],
)
def test_what_is_no_config_is_refused_with_what_to_pass(value_steer, message):
    with pytest.raises((TypeError, ValueError), match=message):
        parse_value_steer(value_steer)


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
