"""The engine on a CUDA device: the same identities as on the CPU."""

import pytest
import torch
from transformers import set_seed

from hf_value_steer import AbstentionConfig, BlockCache, ValueFilterConfig, enable_value_steer
from hf_value_steer.generation.kernels import KERNELS
from hf_value_steer.generation.shared_prefix import attend
from hf_value_steer.hosts.transformers import CACHE
from tests.families import FAMILIES, accepting_head, build, layered_head, prompts, random_head


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
    torch.testing.assert_close(lazy.token_values, eager.token_values, rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("cache", ["dynamic", "static", "block"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_and_caches(kernel, cache):
    model = enable_value_steer(build("llama").cuda())
    options = {"value_head": random_head(model), "threshold": 0.4, "lookahead": kernel}
    kinds = {"dynamic": {}, "static": {"cache_implementation": "static"}}
    expected = run(model, ValueFilterConfig(**options | {"lookahead": "masked"}))
    out = run(model, ValueFilterConfig(**options), **kinds.get(cache, {CACHE: BlockCache(model.config)}))
    assert out.interventions.any() and torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_any_attention_implementation(implementation):
    model = enable_value_steer(build("qwen3").cuda())
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.4)
    expected = run(model, config)
    model.set_attn_implementation(implementation)
    assert torch.equal(run(model, config).sequences, expected.sequences)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attention_over_a_shared_prefix(dtype):
    queries, keys, values = (torch.randn(2, 4, n, 64, device="cuda", dtype=dtype) for n in (24, 700, 700))
    output, log_denominator = attend(queries, keys[:, :, 9:], values[:, :, 9:], 0.125)
    scores = queries.double() @ keys[:, :, 9:].double().mT * 0.125
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ values[:, :, 9:].double(), rtol=0, atol=1e-2)
    torch.testing.assert_close(log_denominator.double(), scores.logsumexp(-1), rtol=0, atol=1e-2)


def test_abstention():
    model = enable_value_steer(build("llama").cuda())
    out = run(model, AbstentionConfig(value_head=random_head(model), threshold=0.5, patience=2))
    assert out.abstained.any()


@pytest.mark.parametrize("evaluation", ["lazy", "eager", "auto"])
@pytest.mark.parametrize("temporal", ["none", "mean"])
def test_heads_on_a_layer_in_compiled_steps(temporal, evaluation):
    """Eager ones are one CUDA graph."""
    model = enable_value_steer(build("qwen3").cuda())
    options = {"value_head": layered_head(build("qwen3"), [0], temporal).cuda(), "threshold": 0.45}
    expected = run(model, ValueFilterConfig(**options))
    out = run(model, ValueFilterConfig(**options, evaluation=evaluation), cache_implementation="static")
    assert expected.interventions.any() and torch.equal(out.sequences, expected.sequences)
