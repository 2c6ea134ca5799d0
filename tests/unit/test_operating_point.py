"""What a head says of how it is meant to be used, and who follows it."""

import pytest
import torch

from hf_value_steer import (
    UnsupportedError,
    ValueFilterConfig,
    ValueFilterLogitsProcessor,
    ValueHead,
    ValueHeadConfig,
)
from tests.families import build, random_head
from tests.steer import steer


POINT = {"num_candidates": 3, "rollback": 4}
OPTIONS = {"do_sample": True, "max_new_tokens": 16, "eos_token_id": None}


def pointed(model, **point):
    head = random_head(model)
    head.config.operating_point, head.config.threshold = point, 0.45
    return head


def test_a_filter_follows_the_head_and_a_config_overrides_it(tmp_path):
    model = build("llama")
    pointed(model, **POINT).save_pretrained(tmp_path)
    saved = steer(model, {"method": "filter", "value_head": str(tmp_path), "seed": 3}, **OPTIONS)
    said = steer(model, ValueFilterConfig(value_head=random_head(model), threshold=0.45, seed=3, **POINT), **OPTIONS)
    assert torch.equal(saved.sequences, said.sequences) and (saved.taken_back_steps >= 0).any()
    without = steer(model, ValueFilterConfig(value_head=str(tmp_path), seed=3, rollback=0), **OPTIONS)
    assert without.taken_back_steps is None


def test_what_a_config_leaves_open_is_settled():
    config, head = ValueFilterConfig(beta=2.0), ValueHeadConfig(hidden_size=8, operating_point={**POINT, "alpha": 0.1})
    settled = config.settled(head.operating_point)
    chosen = (settled.num_candidates, settled.rollback, settled.selection, settled.beta, settled.alpha)
    assert chosen == (3, 4, "first", 2.0, 0.1)
    assert settled.settled({"rollback": 1}) == settled
    assert ValueFilterConfig(threshold=0.3).settled(head.operating_point).alpha is None
    default = config.settled(None)
    assert (default.num_candidates, default.rollback, default.selection) == (8, 0, "first")
    assert config.to_dict() == {"method": "filter", "beta": 2.0}


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"rollback": -1}, "`rollback` has to be an integer from 0 to 1024, got -1"),
        ({"num_candidates": 0}, "`num_candidates` has to be an integer from 1 to 1024, got 0"),
        ({"selection": "hard"}, "`selection` has to be one of first, soft"),
        ({"rollback": None}, "`operating_point` says nothing of rollback"),
        ({"beta": 0}, "`beta` has to be a finite number above 0"),
        ({"alpha": 1.5}, "`alpha` has to be a number in"),
        ({"threshold": 0.5}, "`threshold` is not a field of `operating_point`"),
    ],
)
def test_wrong_operating_points_are_refused(point, message):
    with pytest.raises(Exception, match=message):
        ValueHeadConfig(hidden_size=8, operating_point=point)


def test_a_processor_wants_to_be_told_that_it_does_not_go_back():
    model = build("llama")
    with pytest.raises(UnsupportedError, match="cannot do `rollback`=4 .pass `rollback=0`"):
        ValueFilterLogitsProcessor(model, ValueFilterConfig(value_head=pointed(model, rollback=4)))
    ValueFilterLogitsProcessor(model, ValueFilterConfig(value_head=pointed(model, rollback=4), rollback=0))


def test_saved_and_read_again(tmp_path):
    head = pointed(build("llama"), **POINT)
    head.save_pretrained(tmp_path)
    assert ValueHead.from_pretrained(tmp_path).config.operating_point == POINT
    assert "operating_point" not in random_head(build("llama")).config.to_dict()
