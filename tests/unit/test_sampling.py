"""Top-p without a sort of the vocabulary draws what transformers' top-p draws."""

import pytest
import torch
from transformers import TopPLogitsWarper, set_seed

from hf_value_steer import ValueFilterConfig, enable_value_steer
from hf_value_steer.training import sampling
from hf_value_steer.training.sampling import NucleusWarper, generate_arguments
from tests.families import build, prompts, random_head


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("most_likely", [7, 4096])
def test_the_nucleus_is_that_of_the_whole_sort(top_p, spread, most_likely, monkeypatch):
    monkeypatch.setattr(sampling, "MOST_LIKELY", most_likely)
    scores = spread * torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    scores[:, ::3] = -torch.inf
    scores[0, 1:] = -torch.inf
    scores[0, 0] = 0.0
    before = scores.clone()
    torch.testing.assert_close(NucleusWarper(top_p)(None, scores), TopPLogitsWarper(top_p)(None, scores))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_generates_the_same_tokens(top_k, temperature):
    model, inputs = build("llama"), prompts(3)
    asked = {"do_sample": True, "temperature": temperature, "top_p": 0.8, "top_k": top_k}
    set_seed(3)
    expected = model.generate(**inputs, **asked, max_new_tokens=20)
    set_seed(3)
    assert torch.equal(model.generate(**inputs, **generate_arguments(asked), max_new_tokens=20), expected)


@pytest.mark.parametrize("asked", [{"do_sample": False}, {"do_sample": True, "top_p": 1.0}])
def test_nothing_to_warp(asked):
    first = NucleusWarper(0.5)
    assert generate_arguments(asked, first) == {**asked, "logits_processor": [first]}


def test_a_filter_ends_texts_as_under_the_warpers_of_generate():
    """What a nucleus leaves out is not forbidden: where nothing is acceptable the text ends."""
    model = enable_value_steer(build("llama"))
    asked = {"do_sample": True, "temperature": 1.3, "top_p": 0.4, "top_k": 0}
    how = {**prompts(4), "max_new_tokens": 12, "eos_token_id": 5, "pad_token_id": 0, "return_dict_in_generate": True}
    config = ValueFilterConfig(
        value_head=random_head(model), threshold=0.4, num_candidates=1, fallback="abstain", seed=0
    )
    outs = []
    for arguments in (asked, generate_arguments(asked)):
        torch.manual_seed(0)
        outs.append(model.generate(**how, **arguments, value_steer=config))
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert torch.equal(outs[0].abstained, outs[1].abstained) and outs[0].abstained.any()
