"""One small tree of errors: a caller can tell what does not fit from a text that must not be shown."""

import pytest
import torch

import hf_value_steer
from hf_value_steer import (
    ArtefactError,
    MismatchError,
    ScoringError,
    SteeringError,
    UnsupportedError,
    UploadError,
    ValueFilterConfig,
    ValueHead,
    ValueHeadConfig,
    enable_value_steer,
)
from tests.families import build, prompts, random_head


def broken(model):
    head = random_head(model)
    with torch.no_grad():
        head.net[-1].bias.fill_(1.0)
    head.forward = lambda features: type(head).forward(head, features * torch.inf)
    return head


def other_width(_model):
    return ValueHead(ValueHeadConfig(hidden_size=7, threshold=0.5))


def other_backbone(model):
    head = random_head(model)
    head.config.backbone_fingerprint = "0" * 16
    return head


def damaged(model):
    head = random_head(model)
    head.net[0].weight.data.fill_(torch.nan)
    return head


CASES = [
    (broken, {}, ScoringError),
    (other_width, {}, MismatchError),
    (other_backbone, {}, MismatchError),
    (damaged, {}, ArtefactError),
    (random_head, {"num_beams": 2}, UnsupportedError),
    (random_head, {"use_cache": False}, UnsupportedError),
]


@pytest.mark.parametrize(("make", "arguments", "kind"), CASES, ids=lambda each: getattr(each, "__name__", ""))
def test_what_a_caller_can_tell_apart(make, arguments, kind):
    model = enable_value_steer(build("llama"))
    config = ValueFilterConfig(value_head=make(model), threshold=0.5)
    with pytest.raises(SteeringError) as error:
        model.generate(**prompts(2), max_new_tokens=4, value_steer=config, **arguments)
    assert type(error.value) is kind


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (ArtefactError, ValueError),
        (MismatchError, ValueError),
        (UnsupportedError, ValueError),
        (ScoringError, RuntimeError),
        (UploadError, RuntimeError),
    ],
)
def test_each_is_the_built_in_error_that_it_was(kind, builtin):
    assert issubclass(kind, SteeringError) and issubclass(kind, builtin) and hasattr(hf_value_steer, kind.__name__)
