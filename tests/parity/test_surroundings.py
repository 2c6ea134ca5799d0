"""Other surroundings than the bench: caches that are called otherwise or are not there, wrappers, copies, devices."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers import Cache, CompileConfig

from hf_value_steer import (
    AbstentionConfig,
    AbstentionLogitsProcessor,
    ActivationConfig,
    GuidanceModule,
    GuidanceModuleConfig,
    ValueFilterConfig,
    ValueFilterLogitsProcessor,
    ValueSteerForCausalLM,
)
from hf_value_steer.generation import candidates
from hf_value_steer.hosts.transformers import CACHE
from tests.families import accepting_head, build, prompts, random_head
from tests.steer import rejecting, steer
from tests.tiny_models import build_tiny
from tests.unit.test_steering_vectors import SEQUENCES, random_vectors


GREEDY = {"do_sample": False, "max_new_tokens": 12}
steer = partial(steer, **GREEDY)


# The cache has another name.


@pytest.mark.parametrize("family", ["llama", "mamba", "gemma2", "falcon_h1"])
def test_the_cache_is_found_whatever_it_is_called(family):
    model = build_tiny(family)
    plain = model.generate(**prompts(3), **GREEDY)
    assert torch.equal(steer(model, ValueFilterConfig(value_head=accepting_head(model))).sequences, plain)
    config = rejecting(model)
    assert steer(model, config).interventions.any()


@pytest.mark.parametrize("options", [{"patience": 2}, {"patience": 3}, {"min_new_tokens": 5}, {}], ids=str)
def test_an_abstaining_processor_counts_its_steps(llama, options):
    config = AbstentionConfig(value_head=random_head(llama), threshold=0.55, **options)
    expected = steer(llama, config)
    found = llama.generate(**prompts(3), **GREEDY, logits_processor=[AbstentionLogitsProcessor(llama, config)])
    assert expected.abstained.any() and torch.equal(found, expected.sequences)


def test_a_filtering_processor_counts_its_steps(llama):
    config = ValueFilterConfig(value_head=random_head(llama), threshold=0.4, proposal="topk", min_new_tokens=3)
    plain, processor = llama.generate(**prompts(3), **GREEDY), ValueFilterLogitsProcessor(llama, config)
    found, first = llama.generate(**prompts(3), **GREEDY, logits_processor=[processor]), plain.shape[1] - 12
    assert torch.equal(found[:, : first + 3], plain[:, : first + 3]) and not torch.equal(found, plain)
    assert torch.equal(found, steer(llama, config).sequences)


@pytest.mark.parametrize("family", ["llama", "mamba", "gemma2", "falcon_h1"])
def test_vectors_tell_prompt_and_generated_tokens_apart(family):
    """Steered prompt, then steered tokens: together all, and each of them something else."""
    model = build_tiny(family)
    vectors, texts = random_vectors(model).scale(model, SEQUENCES), {}
    for tokens in ("all", "prompt", "generated"):
        with vectors.apply(model, 8.0, tokens=tokens):
            texts[tokens] = model.generate(**prompts(1), **GREEDY)
    texts["none"] = model.generate(**prompts(1), **GREEDY)
    first = prompts(1)["input_ids"].shape[1]
    assert texts["generated"][0, first] == texts["none"][0, first]
    assert texts["prompt"][0, first] == texts["all"][0, first]
    assert len({tuple(text[0].tolist()) for text in texts.values()}) == 4


# There is no cache.


@pytest.mark.parametrize("options", [{"tokens": "generated"}, {"tokens": "prompt"}, {"mode": "last_token"}], ids=str)
def test_vectors_that_depend_on_the_position_need_a_cache(llama, options):
    vectors = random_vectors(llama).scale(llama, SEQUENCES)
    with vectors.apply(llama, 4.0, **options), pytest.raises(ValueError, match="has no cache"):
        llama.generate(**prompts(1), **GREEDY, use_cache=False)
    with vectors.apply(llama, 4.0, **options), pytest.raises(ValueError, match="has no cache"):
        llama(prompts(1)["input_ids"][:, :1])
    with vectors.apply(llama, 4.0):
        llama.generate(**prompts(1), **GREEDY, use_cache=False)


@pytest.mark.parametrize("make", [ValueFilterLogitsProcessor, AbstentionLogitsProcessor])
def test_processors_need_a_cache(llama, make):
    kind = {ValueFilterLogitsProcessor: ValueFilterConfig, AbstentionLogitsProcessor: AbstentionConfig}[make]
    processor = make(llama, kind(value_head=random_head(llama), threshold=0.4))
    with pytest.raises(RuntimeError, match="No forward pass with a cache was seen"):
        llama.generate(**prompts(1), **GREEDY, use_cache=False, logits_processor=[processor])
    processor = make(llama, kind(value_head=random_head(llama), threshold=0.4))
    with pytest.raises(RuntimeError, match="No forward pass with a cache was seen"):
        build("qwen2").generate(**prompts(1), **GREEDY, logits_processor=[processor])


def test_a_generation_without_a_cache_is_refused(llama):
    with pytest.raises(ValueError, match="use_cache=False"):
        steer(llama, ValueFilterConfig(value_head=random_head(llama)), use_cache=False)


# A prompt comes in pieces, or after other text.


def processors_of(model):
    head = random_head(model)
    filtering = ValueFilterConfig(value_head=head, threshold=0.4, proposal="topk", num_candidates=4, min_new_tokens=3)
    abstaining = AbstentionConfig(value_head=head, threshold=0.55, patience=2, min_new_tokens=2)
    return {"filter": (ValueFilterLogitsProcessor, filtering), "abstain": (AbstentionLogitsProcessor, abstaining)}


@pytest.mark.parametrize("chunk", [3, 5, 10, 11])
@pytest.mark.parametrize("kind", ["filter", "abstain"])
def test_a_processor_reads_a_prompt_in_chunks(llama, kind, chunk):
    make, config = processors_of(llama)[kind]
    expected = llama.generate(**prompts(2), **GREEDY, logits_processor=[make(llama, config)])
    used = make(llama, config)
    llama.generate(**prompts(2, 7), **GREEDY, logits_processor=[used])
    for processor in (make(llama, config), used):
        arguments = {**prompts(2), **GREEDY, "prefill_chunk_size": chunk}
        assert torch.equal(llama.generate(**arguments, logits_processor=[processor]), expected)


@pytest.mark.parametrize("more", [1, 4])
@pytest.mark.parametrize("kind", ["filter", "abstain"])
def test_a_processor_starts_anew_in_the_next_turn(llama, kind, more):
    make, config = processors_of(llama)[kind]
    first = llama.generate(**prompts(1), **GREEDY, eos_token_id=None, return_dict_in_generate=True)
    text = torch.cat([first.sequences, torch.tensor([[5, 9, 33, 60]])[:, :more]], dim=1)
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text), **GREEDY}
    expected = llama.generate(**inputs, logits_processor=[make(llama, config)])
    used = make(llama, config)
    llama.generate(**prompts(1, 7), **GREEDY, logits_processor=[used])
    for processor in (make(llama, config), used):
        cache = {CACHE: copy.deepcopy(first[CACHE])}
        assert torch.equal(llama.generate(**inputs, **cache, logits_processor=[processor]), expected)


@pytest.mark.parametrize("options", [{"tokens": "generated"}, {"tokens": "prompt"}, {"mode": "last_token"}], ids=str)
@pytest.mark.parametrize("chunk", [5, 10])
def test_vectors_that_depend_on_the_position_refuse_chunks(llama, options, chunk):
    vectors = random_vectors(llama).scale(llama, SEQUENCES)
    arguments = {**prompts(2), **GREEDY, "prefill_chunk_size": chunk}
    with vectors.apply(llama, 4.0, **options), pytest.raises(ValueError, match="A prompt in chunks"):
        llama.generate(**arguments)
    config = ActivationConfig(vectors=vectors, multiplier=4.0, **options)
    with pytest.raises(ValueError, match="A prompt in chunks"):
        steer(llama, config, prefill_chunk_size=chunk)
    both = [config, ValueFilterConfig(value_head=random_head(llama), threshold=0.4)]
    if "mode" in options:
        with pytest.raises(ValueError, match="A prompt in chunks"):
            steer(llama, both, prefill_chunk_size=chunk)
    else:  # the loop knows what each forward reads
        assert torch.equal(steer(llama, both, prefill_chunk_size=chunk).sequences, steer(llama, both).sequences)


@pytest.mark.parametrize("more", [1, 3])
def test_vectors_know_the_prompt_of_the_next_turn(llama, more):
    """What comes in at once after a cache is prompt, however short it is."""
    vectors = random_vectors(llama).scale(llama, SEQUENCES)
    first = llama.generate(**prompts(1), **GREEDY, eos_token_id=None, return_dict_in_generate=True)
    text = torch.cat([first.sequences, torch.tensor([[5, 9, 33]])[:, :more]], dim=1)
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text), **GREEDY, "max_new_tokens": 1}
    inputs |= {"output_logits": True, "return_dict_in_generate": True}

    def logits(**options):
        with vectors.apply(llama, 4.0, **options):
            return llama.generate(**inputs, **{CACHE: copy.deepcopy(first[CACHE])}).logits[0]

    plain = llama.generate(**inputs, **{CACHE: copy.deepcopy(first[CACHE])}).logits[0]
    torch.testing.assert_close(logits(tokens="prompt"), logits())
    torch.testing.assert_close(logits(tokens="generated"), plain)
    assert not torch.allclose(logits(), plain)


def test_a_processor_keeps_no_cache_alive(llama):
    processor = AbstentionLogitsProcessor(llama, processors_of(llama)["abstain"][1])
    for processors in ([], [processor]):
        out = llama.generate(**prompts(1), **GREEDY, logits_processor=processors, return_dict_in_generate=True)
        cache = weakref.ref(out[CACHE])
        del out
        gc.collect()
        assert cache() is None


# The model is inside another.

LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
WRAPPERS = {
    "peft": lambda model: get_peft_model(model, LORA),
    "compile": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: torch.compile(get_peft_model(model, LORA), backend="eager"),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("options", [{"mode": "last_token"}, {"tokens": "generated"}, {"tokens": "prompt"}], ids=str)
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_vectors_are_applied_inside_wrappers(wrap, options):
    model = build("llama")
    vectors = random_vectors(model).scale(model, SEQUENCES)
    torch.manual_seed(0)
    wrapped = WRAPPERS[wrap](model)
    texts = []
    for target in (model, wrapped):
        with vectors.apply(target, -3.0, **options, allow_backbone_mismatch=True):
            texts.append(wrapped.generate(**prompts(2), **GREEDY))
    with vectors.apply(wrapped, -3.0, allow_backbone_mismatch=True):
        everywhere = wrapped.generate(**prompts(2), **GREEDY)
    assert torch.equal(*texts) and not torch.equal(texts[1], everywhere)
    assert not torch.equal(texts[1], wrapped.generate(**prompts(2), **GREEDY))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_processors_work_inside_wrappers(wrap):
    torch.manual_seed(0)
    model = build("llama")
    wrapped = WRAPPERS[wrap](model)
    config = AbstentionConfig(value_head=random_head(model), threshold=0.55, patience=2)
    texts = [
        wrapped.generate(**prompts(3), **GREEDY, logits_processor=[AbstentionLogitsProcessor(target, config)])
        for target in (model, wrapped)
    ]
    assert torch.equal(*texts) and not torch.equal(texts[1], wrapped.generate(**prompts(3), **GREEDY))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_of_peft_are_refused(kind):
    model = build("llama")
    wrapped = get_peft_model(model, kind(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match="virtual tokens"):
        steer(wrapped, ValueFilterConfig(value_head=random_head(model), threshold=0.4))


def test_what_cannot_generate_is_refused():
    vectors = random_vectors(build("llama"))
    with pytest.raises(TypeError, match="`model` has to be a transformers model that can generate, got Linear"):
        with vectors.apply(nn.Linear(2, 2)):
            pass


# A model was copied.


@pytest.mark.parametrize("change", ["weights", "output embedding", "layers"])
def test_a_copy_decodes_with_its_own_weights(change):
    """Also after the original's step was compiled."""
    torch._dynamo.reset()
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    model = build("llama")
    filtering = rejecting(model)
    arguments = {"cache_implementation": "static", "compile_config": config}
    before = steer(model, filtering, **arguments)
    other = copy.deepcopy(model)
    with torch.no_grad():
        if change == "weights":
            for parameter in other.parameters():
                parameter.copy_(parameter.roll(1, 0))
        elif change == "output embedding":
            other.lm_head = nn.Linear(32, 101, bias=False)
        else:
            other.model.layers[0], other.model.layers[1] = other.model.layers[1], other.model.layers[0]
    found, expected = steer(other, filtering, **arguments), steer(other, filtering)
    assert torch.equal(found.sequences, expected.sequences) and not torch.equal(found.sequences, before.sequences)
    assert torch.equal(steer(model, filtering, **arguments).sequences, before.sequences)
    torch._dynamo.reset()


# Outputs are ordinary ones.


def outputs():
    model = build("llama")
    head = random_head(model)
    module = GuidanceModule(GuidanceModuleConfig(hidden_size=32, layer=0, value_width=16))
    states, mask = torch.randn(2, 3, 32), torch.ones(2, 3, dtype=torch.bool)
    return {
        "generate": steer(model, ValueFilterConfig(value_head=head, threshold=0.4)),
        "head": head(torch.randn(2, 3, 32)),
        "wrapper": ValueSteerForCausalLM(model, head)(**prompts(2)),
        "guidance": module(states, states, mask),
    }


@pytest.mark.parametrize("name", ["generate", "head", "wrapper", "guidance"])
def test_outputs_are_dicts_and_trees(name):
    output = outputs()[name]
    assert len(list(output.values())) == len(list(output.keys())) == len(list(output.items())) == len(output)
    leaves, _ = tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert tensors and all(isinstance(leaf, torch.Tensor | Cache) or leaf is None for leaf in leaves)
    again = tree_map(lambda leaf: leaf, output)
    assert type(again) is type(output) and set(again.keys()) == set(output.keys())
    # What DistributedDataParallel looks for gradients in.
    found = list(nn.parallel.distributed._find_tensors(output))
    assert {id(tensor) for tensor in tensors} <= {id(tensor) for tensor in found}


def test_heads_can_be_exported():
    head = random_head(build("llama")).eval()
    features = torch.randn(2, 32)
    program = torch.export.export(head, (features,))
    torch.testing.assert_close(program.module()(features).value, head(features).value)


def test_the_output_of_generate_prints_as_a_summary():
    text = repr(outputs()["generate"])
    assert len(text) < 500 and "3 row(s) of 23 tokens" in text and "touched" in text and "abstained" in text
    assert "tensor(" not in text


# Devices that are not here.


@pytest.mark.parametrize("kind", ["xpu", "mps", "cuda"])
def test_alternatives_follow_the_generator_of_the_device(kind, monkeypatch):
    """Two calls in a row draw other alternatives, although the CPU's generator stands still."""
    states = iter([torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3, 4], dtype=torch.uint8)])
    monkeypatch.setattr(f"torch.{kind}.get_rng_state", lambda *_: next(states))
    device = torch.device(kind)
    first, second = candidates.random_key(device, None), candidates.random_key(device, None)
    assert first != second and len(first) == 16
    assert candidates.random_key(device, 5) == candidates.random_key(torch.device("cpu"), 5)
