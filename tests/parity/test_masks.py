"""Masks, positions and caches in every form that plain `generate` takes."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, LlamaConfig, Phi3Config, StaticCache

from hf_value_steer import (
    AbstentionConfig,
    AbstentionLogitsProcessor,
    BlockCache,
    UnsupportedError,
    ValueFilterConfig,
    ValueFilterLogitsProcessor,
    value_steer_generate,
)
from hf_value_steer.errors import ScoringError
from hf_value_steer.hosts.transformers import CACHE
from tests.families import _DECODER, _HYBRID, build, prompts, random_head
from tests.steer import GREEDY, accepting, rejecting, steer
from tests.tiny_models import build_tiny


KERNELS = ["shared_prefix", "masked", "expanded"]


def filtered(model, arguments, accept=False, **options):
    config = accepting(model, num_candidates=4, **options) if accept else rejecting(model, **options)
    return steer(model, config, **arguments)


def same(one, other):
    torch.testing.assert_close(one.token_values, other.token_values, atol=1e-5, rtol=0, equal_nan=True)
    return torch.equal(one.sequences, other.sequences)


def holes(mask):
    mask = mask.clone()
    mask[0, 3], mask[1, 6] = 0, 0
    return mask


def right_padded(mask):
    mask = torch.ones_like(mask)
    mask[1, -2:] = 0
    return mask


SHAPES = {"left": lambda mask: mask, "holes": holes, "right": right_padded, "full": torch.ones_like}


@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16], ids=str)
def test_a_mask_means_the_same_in_every_dtype(dtype, shape, kernel):
    model, arguments = build("llama"), prompts(3)
    mask = SHAPES[shape](arguments["attention_mask"])
    if kernel == "shared_prefix" and shape in ("holes", "right"):
        with pytest.raises(UnsupportedError, match="shared_prefix"):
            filtered(model, {**arguments, "attention_mask": mask.to(dtype)}, lookahead=kernel)
        return
    expected = filtered(model, {**arguments, "attention_mask": mask}, lookahead="expanded")
    assert expected.interventions.any()
    assert same(filtered(model, {**arguments, "attention_mask": mask.to(dtype)}, lookahead=kernel), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_mask_of_one_row_is_for_all(family, kernel):
    model, ids = build(family), prompts(3)["input_ids"]
    mask = torch.ones(1, ids.shape[1], dtype=torch.long)
    mask[0, :2] = 0
    one = {"input_ids": ids, "attention_mask": mask}
    every = {"input_ids": ids, "attention_mask": mask.expand(3, -1).contiguous()}
    assert torch.equal(filtered(model, one, accept=True).sequences, model.generate(**every, **GREEDY))
    assert same(filtered(model, one, lookahead=kernel), filtered(model, every, lookahead="expanded"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("padded", [False, True])
def test_prompts_as_embeddings(family, kernel, padded):
    model, arguments = build(family), prompts(2)
    if not padded:
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    expected = filtered(model, arguments, lookahead=kernel)
    embedded = {"inputs_embeds": model.get_input_embeddings()(arguments["input_ids"])}
    if padded:
        embedded["attention_mask"] = arguments["attention_mask"]
    found = filtered(model, embedded, lookahead=kernel)
    assert expected.interventions.any()
    assert torch.equal(found.sequences, expected.sequences[:, arguments["input_ids"].shape[1] :])


# Position embeddings that follow the longest row.


def longrope(original, family="phi3", **options):
    half = _DECODER["hidden_size"] // _DECODER["num_attention_heads"] // 2
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * half,
        "long_factor": [6.0 + i for i in range(half)],
        "original_max_position_embeddings": original,
        "factor": 4.0,
    }
    sizes = {**_DECODER, **options, "rope_parameters": scaling}
    config = (Phi3Config if family == "phi3" else LlamaConfig)(**sizes, original_max_position_embeddings=original)
    return grown(config)


def dynamic(original):
    scaling = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    return grown(LlamaConfig(**{**_DECODER, "max_position_embeddings": original}, rope_parameters=scaling))


def grown(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    model.generation_config.update(eos_token_id=2, pad_token_id=0)
    return model


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "make",
    [lambda: longrope(8, "llama"), lambda: dynamic(8), lambda: dynamic(12)],
    ids=["longrope", "dynamic", "late"],
)
def test_lazy_and_eager_agree_where_rope_follows_the_longest_row(make, kernel):
    # The padded rows are shorter than the original length, the first row is longer.
    lazy = filtered(make(), prompts(3), lookahead=kernel, max_interventions=6)
    eager = filtered(make(), prompts(3), lookahead=kernel, max_interventions=6, evaluation="eager")
    assert lazy.interventions[1:].any() and same(lazy, eager)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sliding", ["default", "dynamic"])
def test_rope_of_its_own_for_each_kind_of_layer(sliding, kernel):
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    kinds = {"full_attention": rope, "sliding_attention": {**rope, "rope_type": sliding}}
    sizes = {**_DECODER, "max_position_embeddings": 8, **_HYBRID, "rope_parameters": kinds}
    lazy, eager = (
        filtered(grown(Gemma3TextConfig(**sizes)), prompts(3), lookahead=kernel, evaluation=each)
        for each in ("lazy", "eager")
    )
    assert lazy.interventions.any() and same(lazy, eager)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("length", [10, 14])
def test_a_prompt_longer_than_the_original_length_of_phi3(length, kernel):
    model, arguments = longrope(8), prompts(2, length)
    plain = model.generate(**arguments, **GREEDY)
    assert torch.equal(filtered(model, arguments, accept=True, lookahead=kernel).sequences, plain)
    lazy, eager = (filtered(model, arguments, lookahead=kernel, evaluation=each) for each in ("lazy", "eager"))
    assert lazy.interventions.any() and same(lazy, eager)


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("original", [13, 16])
def test_a_cache_that_the_model_drops_in_mid_text_is_an_error(original, evaluation):
    model = longrope(original)
    with pytest.raises(ScoringError, match=rf"has dropped its cache after {original} tokens"):
        filtered(model, prompts(2), evaluation=evaluation)
    filtered(model, {**prompts(2), "max_new_tokens": original - 11}, evaluation=evaluation)


# Caches.


def caches(model):
    text = model.config.get_text_config()
    return {
        "dynamic": lambda: {CACHE: DynamicCache(config=text)},
        "block": lambda: {CACHE: BlockCache(text)},
        "static": lambda: {CACHE: StaticCache(text, max_cache_len=40)},
        "static by name": lambda: {"cache_implementation": "static", "disable_compile": True},
    }


@pytest.mark.parametrize("kind", ["dynamic", "block", "static", "static by name"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_caches_that_were_made_in_inference_mode(family, kind):
    model = build(family)
    with torch.inference_mode():
        inside = filtered(model, {**prompts(2), **caches(model)[kind]()})
        kept = caches(model)[kind]()
        filtered(model, {**prompts(2), **kept})
    assert same(inside, filtered(model, {**prompts(2), **caches(model)[kind]()}))


@pytest.mark.parametrize("kind", ["dynamic", "block", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_a_cache_that_was_reset_is_as_good_as_new(family, kind):
    model = build(family)
    kept = caches(model)[kind]()
    filtered(model, {**prompts(2), **kept})
    kept[CACHE].reset()
    if kind in ("dynamic", "block"):
        kept = caches(model)[kind]()  # those of transformers are not emptied by `reset`
    assert same(filtered(model, {**prompts(2), **kept}), filtered(model, {**prompts(2), **caches(model)[kind]()}))


@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("options", [{"prefill_chunk_size": 4}, {"prefill_chunk_size": 32}, {}], ids=str)
def test_static_caches_with_chunks_of_the_prompt(family, kernel, options):
    model = build(family)
    static = {"cache_implementation": "static", "disable_compile": True, **options}
    plain = model.generate(**prompts(2), **GREEDY, **static)
    assert torch.equal(filtered(model, {**prompts(2), **static}, accept=True, lookahead=kernel).sequences, plain)
    assert same(
        filtered(model, {**prompts(2), **static}, lookahead=kernel), filtered(model, prompts(2), lookahead=kernel)
    )


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("what", ["output_attentions", "output_hidden_states"])
def test_static_caches_return_attentions_and_hidden_states(family, what):
    model, ids = build(family, "eager"), prompts(2)["input_ids"]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    arguments |= {"cache_implementation": "static", "disable_compile": True, what: True}
    plain = model.generate(**arguments, **GREEDY, return_dict_in_generate=True)
    found = filtered(model, arguments, accept=True)
    field = what.removeprefix("output_")
    for mine, theirs in zip(found[field], plain[field], strict=True):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one[..., : other.shape[-1]], other)  # the buffer has one slot more
    rejecting = filtered(model, arguments)
    assert rejecting.interventions.any() and len(rejecting[field]) == len(found[field])


@pytest.mark.parametrize("kind", ["dynamic", "static by name"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_text_that_ends_at_the_last_position_of_the_model(family, kind):
    model = build(family)
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = 21
    torch.manual_seed(0)
    model = grown(config)
    arguments = {**prompts(2), **caches(model)[kind](), "max_new_tokens": 10}
    plain = model.generate(**prompts(2), **caches(model)[kind](), do_sample=False, max_new_tokens=10)
    assert torch.equal(filtered(model, arguments, accept=True).sequences, plain)
    filtered(model, arguments)


def test_a_hybrid_of_windows_is_what_the_other_tests_mean_by_gemma3():
    assert build("gemma3").config.layer_types == _HYBRID["layer_types"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_processors_take_masks_as_the_strategy_does(family, static, dtype):
    model, arguments = build(family), prompts(3)
    arguments["attention_mask"] = arguments["attention_mask"].to(dtype)
    if static:
        arguments |= {"cache_implementation": "static", "disable_compile": True}
    config = rejecting(model, proposal="topk")
    expected = filtered(model, prompts(3), proposal="topk")
    processed = model.generate(**arguments, **GREEDY, logits_processor=[ValueFilterLogitsProcessor(model, config)])
    assert expected.interventions.any() and torch.equal(processed, expected.sequences)


@pytest.mark.parametrize("kind", ["dynamic", "block", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_processors_go_on_from_a_filled_cache_with_the_new_tokens_alone(family, kind):
    model, more = build(family), torch.tensor([[5, 6, 7]] * 3)
    head = random_head(model)
    filtering = ValueFilterConfig(value_head=head, threshold=0.4, num_candidates=4, proposal="topk")
    abstaining = AbstentionConfig(value_head=head, threshold=0.45, patience=2)
    for make, config in ((ValueFilterLogitsProcessor, filtering), (AbstentionLogitsProcessor, abstaining)):
        texts = []
        for steering in (
            {"custom_generate": value_steer_generate, "value_steer": config},
            {"logits_processor": [make(model, config)]},
        ):
            filled = caches(model)[kind]()
            model(**prompts(3), **filled)
            mask = torch.cat([prompts(3)["attention_mask"], torch.ones_like(more)], dim=1)
            texts.append(model.generate(input_ids=more, attention_mask=mask, **filled, **GREEDY, **steering))
        assert torch.equal(*texts)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_processors_of_models_whose_cache_counts_no_tokens(family):
    model = build_tiny(family)
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.45, num_candidates=4, proposal="topk")
    call = {**prompts(2), **GREEDY}
    steered = model.generate(**call, custom_generate=value_steer_generate, value_steer=config)
    assert torch.equal(model.generate(**call, logits_processor=[ValueFilterLogitsProcessor(model, config)]), steered)
