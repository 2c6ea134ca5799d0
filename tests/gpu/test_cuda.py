"""The engine on a CUDA device: the same identities as on the CPU."""

import pytest
import torch
from transformers import set_seed

from hf_value_steer import AbstentionConfig, ValueFilterConfig, enable_value_steer
from tests.families import FAMILIES, accepting_head, build, prompts, random_head


pytestmark = pytest.mark.gpu


def run(model, config=None, **arguments):
    set_seed(0)
    inputs = {name: tensor.cuda() for name, tensor in prompts(5).items()}
    call = {**inputs, "max_new_tokens": 24, "do_sample": True, "top_p": 0.95, "return_dict_in_generate": True}
    return model.generate(**call, **arguments, **({} if config is None else {"value_steer": config}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_identity(family, dtype):
    model = enable_value_steer(build(family).to("cuda", dtype))
    config = ValueFilterConfig(value_head=accepting_head(model))
    assert torch.equal(run(model, config).sequences, run(model).sequences)


@pytest.mark.parametrize("fallback", ["argmin", "args", "abstain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lazy_equals_eager(family, fallback):
    model = enable_value_steer(build(family).cuda())
    options = {"value_head": random_head(model), "threshold": 0.4, "fallback": fallback}
    lazy, eager = (run(model, ValueFilterConfig(**options, evaluation=evaluation)) for evaluation in ("lazy", "eager"))
    assert lazy.interventions.any() and torch.equal(lazy.sequences, eager.sequences)
    torch.testing.assert_close(lazy.values, eager.values, rtol=0, atol=1e-4, equal_nan=True)


def test_abstention():
    model = enable_value_steer(build("llama").cuda())
    out = run(model, AbstentionConfig(value_head=random_head(model), threshold=0.5, patience=2))
    assert out.abstained.any()
