"""Every kernel commits what the oracle commits, over every cache, and leaves the cache of the text behind."""

import pytest
import torch

from hf_value_steer import BlockCache, ValueFilterConfig
from hf_value_steer.generation.kernels import KERNELS, Expanded, Masked, SharedPrefix, choose_kernel
from hf_value_steer.hosts.transformers import CACHE
from tests.families import build, prompts, random_head
from tests.oracle import Oracle
from tests.steer import steer


CACHES = ("dynamic", "static", "block")


def generate(model, cache, config, **arguments):
    if cache == "block":
        arguments[CACHE] = BlockCache(model.config)
    elif cache == "static":
        arguments["cache_implementation"] = "static"
    return steer(model, config, 5, do_sample=True, max_new_tokens=14, **arguments)


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3"])
def case(request):
    model = build(request.param)
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.35, num_candidates=4)
    expected = generate(model, "dynamic", None, custom_generate=Oracle(config), eos_token_id=None)
    return model, config.value_head, expected


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_and_cache(case, kernel, cache, evaluation):
    model, head, expected = case
    config = ValueFilterConfig(
        value_head=head, threshold=0.35, num_candidates=4, lookahead=kernel, evaluation=evaluation
    )
    out = generate(model, cache, config, eos_token_id=None)
    assert torch.equal(out.sequences, expected) and out.interventions.any()
    assert int(out[CACHE].get_seq_length()) == out.sequences.shape[1] - 1
    mask = torch.cat([prompts(3)["attention_mask"], torch.ones(3, 14, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    fresh = model(out.sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
    inputs = {"attention_mask": mask, "position_ids": positions[:, -1:], CACHE: out[CACHE]}
    cached = model(out.sequences[:, -1:], **inputs).logits[:, -1]
    torch.testing.assert_close(cached, fresh, rtol=1e-4, atol=1e-4)


def test_a_model_loaded_with_eager_attention():
    model = build("qwen3")
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.35, num_candidates=4)
    expected = generate(model, "dynamic", config)
    model.set_attn_implementation("eager")
    out = generate(model, "dynamic", config)
    assert torch.equal(out.sequences, expected.sequences) and out.interventions.any()
    assert model.config._attn_implementation == "eager"


def test_what_auto_chooses(monkeypatch):
    llama = build("llama")
    assert isinstance(choose_kernel("auto", llama), SharedPrefix)
    assert isinstance(choose_kernel("auto", llama, torch.tensor([[0, 1, 1]])), SharedPrefix)
    assert isinstance(choose_kernel("auto", llama, torch.tensor([[1, 0, 1]])), Masked)
    assert isinstance(choose_kernel("auto", llama, output_attentions=True), Masked)
    monkeypatch.setattr(llama.config, "model_type", "bloom")
    assert isinstance(choose_kernel("auto", llama), Expanded)


def test_a_model_that_attends_on_its_own_is_not_steered_without_a_prefix(monkeypatch):
    model = build("llama")
    forward = model.model.layers[1].self_attn.forward

    def attend(hidden_states, **kwargs):
        cache = kwargs.pop(CACHE)
        if cache is None:
            return forward(hidden_states, **{CACHE: None}, **kwargs)
        cache.update(*[torch.zeros(len(hidden_states), 2, 1, 8)] * 2, 1)
        return hidden_states, None

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", attend)
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.35)
    with pytest.raises(RuntimeError, match='has an attention of its own; pass lookahead="expanded"'):
        generate(model, "dynamic", config)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_output_embedding_is_read_once_a_step(kernel):
    """However many rows look ahead: logits are computed when it is known which tokens go on."""
    model, computed = build("llama"), []
    config = ValueFilterConfig(value_head=random_head(model), num_candidates=4, lookahead=kernel)
    with model.lm_head.register_forward_hook(lambda *call: computed.append(call[-1].shape[:2].numel())):
        out = generate(model, "dynamic", config, eos_token_id=None, output_hidden_states=True)
    assert out.interventions.any()
    assert [count for count in computed if count] == [3] * 15
