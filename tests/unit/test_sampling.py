"""Top-p without a sort of the vocabulary draws what transformers' top-p draws."""

import pytest
import torch
from transformers import TopPLogitsWarper, set_seed

from hf_value_steer.training import sampling
from hf_value_steer.training.sampling import NucleusWarper, generate_arguments
from tests.families import build, prompts


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
