"""`selection="soft"`: every token is the oracle's; what is acceptable is kept; a large beta is the filter."""

import pytest
import torch
from transformers import set_seed

from hf_value_steer import ValueFilterConfig, ValueFilterLogitsProcessor
from hf_value_steer.errors import UnsupportedError
from hf_value_steer.policy import acceptable, soft_thresholds
from tests.families import accepting_head, build, layered_head, prompts, random_head
from tests.oracle import Oracle
from tests.steer import rejecting, steer


SAMPLING = {"do_sample": True, "max_new_tokens": 14, "top_p": 0.95}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
@pytest.mark.parametrize("fallback", ["argmin", "abstain"])
@pytest.mark.parametrize("layers", [["final"], [0]], ids=str)
def test_every_token_is_the_oracles(layers, fallback, polarity, evaluation, cache):
    model = build("llama")
    head = random_head(model, polarity) if layers == ["final"] else layered_head(model, layers)
    options = {"value_head": head, "threshold": 0.5, "num_candidates": 4, "fallback": fallback}
    config = ValueFilterConfig(**options, evaluation=evaluation, selection="soft", beta=0.5)
    oracle = Oracle(config)
    set_seed(3)
    expected = model.generate(**prompts(3), **SAMPLING, custom_generate=oracle)
    kind = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    out = steer(model, config, 3, **SAMPLING, **kind)
    assert torch.equal(out.sequences, expected) and out.interventions.any()
    kept = out.token_values[~out.token_values.isnan() & ~out.interventions]
    assert not acceptable(kept, torch.tensor(0.5), head.config.polarity).all()  # some by luck


def test_what_is_acceptable_is_plain_generate():
    model = build("llama")
    config = ValueFilterConfig(value_head=accepting_head(model), selection="soft", beta=0.1)
    assert torch.equal(steer(model, config, 1, **SAMPLING).sequences, steer(model, None, 1, **SAMPLING).sequences)


def test_a_large_beta_is_the_filter_and_a_smaller_one_replaces_less():
    model = build("llama")
    options = {"value_head": random_head(model), "threshold": 0.4, "num_candidates": 4}
    hard = steer(model, ValueFilterConfig(**options), 1, **SAMPLING)
    soft = steer(model, ValueFilterConfig(**options, selection="soft", beta=1e9), 1, **SAMPLING)
    softer = steer(model, ValueFilterConfig(**options, selection="soft", beta=0.05), 1, **SAMPLING)
    assert hard.interventions.any() and torch.equal(soft.sequences, hard.sequences)
    assert softer.interventions.sum() < hard.interventions.sum()


def test_a_row_is_as_alone():
    model = build("llama")
    config = rejecting(model, selection="soft", beta=0.5, seed=7)
    together = steer(model, config, 1, **prompts(3), do_sample=True, top_k=1, max_new_tokens=8, eos_token_id=None)
    given = {name: each[:1] for name, each in prompts(3).items()}
    alone = steer(model, config, 1, **given, do_sample=True, top_k=1, max_new_tokens=8, eos_token_id=None)
    assert torch.equal(alone.sequences[0], together.sequences[0])


def test_thresholds_are_a_draw():
    threshold, luck = torch.tensor([0.2, 0.7]), torch.rand(2, 4000, generator=torch.Generator().manual_seed(0))
    for polarity in ("undesirable", "desirable"):
        drawn = soft_thresholds(threshold, luck, 0.8, polarity)
        assert drawn.shape == (2, 4000)
        for value in (0.05, 0.3, 0.6, 0.95):
            share = acceptable(torch.tensor(value), drawn, polarity).double().mean(dim=1)
            sign = 1 if polarity == "undesirable" else -1
            excess = sign * (torch.tensor(value).logit() - threshold.logit())
            torch.testing.assert_close(share, (-0.8 * excess).exp().clamp(max=1).double(), rtol=0, atol=0.03)
        assert not acceptable(torch.tensor(torch.nan), drawn, polarity).any()


def test_where_nothing_is_drawn_it_is_refused():
    model = build("llama")
    with pytest.raises(UnsupportedError, match="needs `do_sample=True`"):
        steer(model, rejecting(model, selection="soft"))
    with pytest.raises(ValueError, match='needs `proposal="sample"`'):
        rejecting(model, selection="soft", proposal="topk")
    with pytest.raises(ValueError, match="`beta` has to be a finite number above 0"):
        rejecting(model, selection="soft", beta=0.0)
    with pytest.raises(ValueError, match="selection"):
        rejecting(model, selection="hard")
    with pytest.raises(UnsupportedError, match='`selection="soft"` need'):
        ValueFilterLogitsProcessor(model, rejecting(model, selection="soft"))
