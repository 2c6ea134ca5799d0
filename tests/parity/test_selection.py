"""`selection="soft"`: every token is the oracle's; what is acceptable is kept; a large beta is the filter."""

import pytest
import torch
from transformers import set_seed

from hf_value_steer import ValueFilterConfig, ValueFilterLogitsProcessor
from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation.soft_selection import reweigh, soft_thresholds
from hf_value_steer.policy import acceptable
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


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("evaluation", ["lazy", "eager", "auto"])
@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
@pytest.mark.parametrize("layers", [["final"], [0]], ids=str)
def test_the_most_likely_tokens_are_reweighed_as_by_the_oracle(layers, polarity, evaluation, do_sample):
    model = build("llama")
    head = random_head(model, polarity) if layers == ["final"] else layered_head(model, layers)
    options = {"value_head": head, "threshold": 0.5, "num_candidates": 4, "proposal": "topk"}
    config = ValueFilterConfig(**options, evaluation=evaluation, selection="soft", beta=0.5, output_candidates=True)
    oracle, call = Oracle(config), {"max_new_tokens": 14, "do_sample": do_sample}
    set_seed(3)
    expected = model.generate(**prompts(3), **call, custom_generate=oracle)
    out = steer(model, config, 3, **call)
    assert torch.equal(out.sequences, expected) and out.interventions.any() and not out.interventions.all()
    assert out.candidates.shape[-1] == 5 and (out.candidates[..., 1:] >= 0).sum(-1).max() == (4 if do_sample else 3)
    for row, values in enumerate(oracle.values):
        torch.testing.assert_close(out.token_values[row, : len(values)], torch.tensor(values), rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", [{"min_new_tokens": 5}, {"max_interventions": 1}], ids=str)
def test_where_it_does_not_act_the_natural_sample_is_kept(how):
    model = build("llama")
    call = {"do_sample": True, "max_new_tokens": 10, "eos_token_id": None}
    soft = rejecting(model, selection="soft", proposal="topk", beta=4.0, num_candidates=2, **how)
    out, plain = steer(model, soft, 1, **call), steer(model, None, 1, **call)
    assert out.interventions.any()
    if "min_new_tokens" in how:
        assert torch.equal(out.sequences[:, :-5], plain.sequences[:, :-5])
    else:
        assert (out.interventions.sum(dim=1) <= 1).all()


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


def test_the_law_holds_in_the_tails():
    """Values next to 0 and 1, and a large `beta`: float32 would lose the scores beside them."""
    luck = torch.rand(40_000, 4, generator=torch.Generator().manual_seed(0))

    def shares(values, scores, beta, polarity):
        rows = [torch.tensor(each).expand(len(luck), -1) for each in (values, scores)]
        columns = reweigh(rows[0], torch.ones_like(rows[0], dtype=torch.bool), rows[1], beta, polarity, luck)
        return columns.bincount(minlength=4) / len(luck)

    scores = [-1.0, -1.5, -2.0, -3.0]
    torch.testing.assert_close(
        shares([0.3] * 4, scores, 1e9, "undesirable"), torch.tensor(scores).softmax(-1), rtol=0, atol=0.01
    )
    values = [1e-9, 1e-7, 1e-5, 1e-4]
    for polarity, sign in (("undesirable", 1), ("desirable", -1)):
        weights = torch.tensor(scores).double() - 0.5 * sign * torch.tensor(values).double().logit()
        torch.testing.assert_close(
            shares(values, scores, 0.5, polarity), weights.softmax(-1).float(), rtol=0, atol=0.01
        )
    thresholds = soft_thresholds(torch.tensor([0.999999]), luck[:, 0][None], 1.0, "undesirable")
    accepted = acceptable(torch.tensor(0.9999999), thresholds, "undesirable").double().mean()
    assert abs(float(accepted) - 0.118) < 0.01


@pytest.mark.parametrize("selection", [{}, {"selection": "soft"}, {"selection": "soft", "proposal": "topk"}], ids=str)
@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
def test_a_call_that_bans_everything_says_so(evaluation, selection):
    model = build("llama")

    def ban(input_ids, scores):
        return scores.fill_(-torch.inf) if input_ids.shape[1] > 12 else scores

    config = rejecting(model, evaluation=evaluation, **selection)
    with pytest.raises(ValueError, match="allow no token at new token"):
        steer(model, config, do_sample=True, max_new_tokens=8, logits_processor=[ban])


def test_where_nothing_is_drawn_it_is_refused():
    model = build("llama")
    with pytest.raises(UnsupportedError, match="it needs `do_sample=True`, or"):
        steer(model, rejecting(model, selection="soft"))
    with pytest.raises(ValueError, match="no step is a dead end"):
        rejecting(model, selection="soft", proposal="topk", fallback="abstain")
    with pytest.raises(ValueError, match="`beta` has to be a finite number above 0"):
        rejecting(model, selection="soft", beta=0.0)
    with pytest.raises(ValueError, match="selection"):
        rejecting(model, selection="hard")
    with pytest.raises(UnsupportedError, match='cannot do `selection="soft"`'):
        ValueFilterLogitsProcessor(model, rejecting(model, selection="soft"))
