"""Every committed token is the one that the cache-free oracle picks; lazy equals eager; the cache is the text's."""

from functools import partial

import pytest
import torch
from transformers import set_seed

from hf_value_steer import ValueFilterConfig
from hf_value_steer.hosts.transformers import CACHE
from tests.families import FAMILIES, build, prompts, random_head
from tests.oracle import Oracle
from tests.steer import steer


NEW_TOKENS = 14
CASES = {
    "greedy": ({"do_sample": False, "repetition_penalty": 1.2}, {}),
    "sampled": ({"do_sample": True, "top_p": 0.95, "repetition_penalty": 1.2}, {}),
    "topk": ({"do_sample": True, "top_k": 30}, {"proposal": "topk"}),
}


steer = partial(steer, seed=5, max_new_tokens=NEW_TOKENS)


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("fallback", ["argmin", "args", "abstain"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_commits_what_the_oracle_commits(family, case, fallback, evaluation):
    model, inputs = build(family), prompts(3)
    arguments, options = CASES[case]
    polarity, threshold = ("desirable", 0.65) if case == "topk" else ("undesirable", 0.35)
    config = ValueFilterConfig(
        value_head=random_head(model, polarity), threshold=threshold, num_candidates=4, fallback=fallback,
        evaluation=evaluation, prob_weight=0.7, **options,
    )  # fmt: skip
    out = steer(model, config, **arguments)
    oracle = Oracle(config)
    set_seed(5)
    expected = model.generate(**inputs, **arguments, max_new_tokens=NEW_TOKENS, custom_generate=oracle)
    assert torch.equal(out.sequences, expected)
    for row, values in enumerate(oracle.values):
        torch.testing.assert_close(out.token_values[row, : len(values)], torch.tensor(values), rtol=0, atol=1e-4)
        assert out.token_values[row, len(values) :].isnan().all()
        assert out.interventions[row, : len(values)].tolist() == oracle.interventions[row]
    assert out.interventions.any()


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_returned_cache_continues_like_a_fresh_prefill(family, evaluation):
    model, inputs = build(family), prompts(3)
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.3, num_candidates=6, evaluation=evaluation)
    out = steer(model, config, do_sample=True, eos_token_id=None)
    assert out.interventions.float().mean() > 0.2
    length = out.sequences.shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, length - 11, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cached = model(
        out.sequences[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], **{CACHE: out[CACHE]}
    ).logits[:, -1]
    fresh = model(out.sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
    torch.testing.assert_close(cached, fresh, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_reported_candidates_are_the_ones_decided_on(family):
    model, inputs = build(family), prompts(4)
    options = {"value_head": random_head(model), "threshold": 0.4, "num_candidates": 5, "output_candidates": True}
    call = {**inputs, "do_sample": True, "output_hidden_states": True}
    lazy = steer(model, ValueFilterConfig(**options), **call)
    eager = steer(model, ValueFilterConfig(**options, evaluation="eager"), **call)
    assert torch.equal(lazy.sequences, eager.sequences)
    torch.testing.assert_close(lazy.token_values, eager.token_values, rtol=0, atol=1e-5, equal_nan=True)
    for mine, theirs in zip(lazy.hidden_states, eager.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    new = lazy.sequences[:, 11:]
    drawn = lazy.candidates >= 0
    assert torch.equal(drawn, ~lazy.candidate_values.isnan())
    assert torch.equal(lazy.candidates[drawn], eager.candidates[drawn])
    assert torch.equal(lazy.interventions, new != torch.where(drawn[..., 0], lazy.candidates[..., 0], new))
    committed = (lazy.candidates == new[..., None]).any(-1)
    assert committed[~lazy.token_values.isnan()].all()
    single = lazy.candidates_evaluated == 1
    assert torch.equal(
        drawn[..., 1:].any(-1)[~single & drawn[..., 0]], torch.ones_like(new[~single & drawn[..., 0]]) > 0
    )
