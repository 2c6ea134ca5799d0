"""The rest of `generate`'s arguments: honoured exactly, or refused before the first token."""

import threading
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    MaxLengthCriteria,
    StaticCache,
    set_seed,
)
from transformers.generation import BaseStreamer, StoppingCriteria

from hf_value_steer import (
    AbstentionConfig,
    ValueFilterConfig,
    disable_value_steer,
    enable_value_steer,
    value_steer_generate,
)
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.hosts.transformers import CACHE
from tests.families import FAMILIES, accepting_head, build, prompts, random_head
from tests.steer import accepting


class Recorder(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.clone())

    def end(self):
        self.ended = True


@pytest.fixture
def model():
    model = enable_value_steer(build("llama"))
    model.generation_config.max_new_tokens = 12
    return model


def test_a_streamer_sees_prompt_and_tokens_as_in_plain_generate(model):
    plain, steered = Recorder(), Recorder()
    model.generate(**prompts(1), max_new_tokens=8, streamer=plain)
    model.generate(**prompts(1), max_new_tokens=8, streamer=steered, value_steer=accepting(model))
    assert steered.ended and len(plain.pieces) == 9
    assert all(torch.equal(*pair) for pair in zip(plain.pieces, steered.pieces, strict=True))


def test_a_streamer_beside_the_callable_is_refused_instead_of_left_hanging(model):
    with pytest.raises(ValueError, match="`streamer` does not reach a `custom_generate` callable"):
        model.generate(
            **prompts(1), custom_generate=value_steer_generate, value_steer=accepting(model), streamer=Recorder()
        )
    recorder = Recorder()
    model.generate(
        **prompts(1), max_new_tokens=4, custom_generate=value_steer_generate, value_steer=accepting(model),
        token_streamer=recorder,
    )  # fmt: skip
    assert recorder.ended and len(recorder.pieces) == 5


def test_streaming_from_a_thread(model):
    recorder = Recorder()
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.4)
    arguments = {**prompts(1), "max_new_tokens": 12, "streamer": recorder, "value_steer": config}
    thread = threading.Thread(target=model.generate, kwargs=arguments)
    thread.start()
    thread.join()
    expected = model.generate(**prompts(1), max_new_tokens=12, value_steer=config)
    assert torch.equal(torch.cat([piece.flatten() for piece in recorder.pieces]), expected[0])


class StopAt(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("rows", [1, 3])
def test_stopping_criteria_and_processors_of_the_caller(model, rows):
    token = model.generate(**prompts(1), max_new_tokens=6)[0, -2].item()
    arguments = {**prompts(rows), "max_new_tokens": 12, "stopping_criteria": [StopAt(token), MaxLengthCriteria(20)]}
    assert torch.equal(model.generate(**arguments, value_steer=accepting(model)), model.generate(**arguments))


def test_without_eos_finished_rows_are_still_checked(model):
    head = random_head(model)
    config = ValueFilterConfig(value_head=head, threshold=0.5, num_candidates=6, output_candidates=True)
    out = model.generate(
        **prompts(3), max_new_tokens=12, eos_token_id=None, stopping_criteria=[StopAt(40)], value_steer=config,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert not out.token_values.isnan().any()


ARGUMENTS = [
    {"min_new_tokens": 10},
    {"bad_words_ids": [[5], [6, 7]]},
    {"min_p": 0.05, "do_sample": True},
    {"typical_p": 0.8, "do_sample": True},
    {"epsilon_cutoff": 0.01, "do_sample": True},
    {"eta_cutoff": 0.01, "do_sample": True},
    {"suppress_tokens": [4, 9]},
    {"sequence_bias": [[[8], 3.0]]},
    {"exponential_decay_length_penalty": (3, 1.5)},
    {"forced_eos_token_id": 2},
    {"prefill_chunk_size": 4},
    {"guidance_scale": 1.4},
    {"eos_token_id": [2, 17, 30]},
    {"renormalize_logits": True, "temperature": 0.7, "do_sample": True},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: next(iter(arguments)))
def test_decoding_arguments_keep_their_meaning(model, arguments):
    call, config = {**prompts(3), "max_new_tokens": 14, **arguments}, accepting(model)
    set_seed(4)
    plain = model.generate(**call)
    set_seed(4)
    assert torch.equal(model.generate(**call, value_steer=config), plain)


def test_loading_a_head_takes_no_random_number(model, tmp_path):
    accepting_head(model).save_pretrained(tmp_path)
    call = {**prompts(3), "do_sample": True}
    set_seed(4)
    plain = model.generate(**call)
    set_seed(4)
    assert torch.equal(model.generate(**call, value_steer={"method": "filter", "value_head": str(tmp_path)}), plain)


def test_alternatives_obey_the_processors(model):
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.2, output_candidates=True)
    banned = list(range(3, 50))
    for do_sample in (False, True):
        out = model.generate(
            **prompts(2), max_new_tokens=12, suppress_tokens=banned, do_sample=do_sample, value_steer=config,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert out.interventions.any()
        assert not torch.isin(out.candidates, torch.tensor(banned)).any()


def test_a_cache_passed_in_is_used_and_left_consistent(model):
    plain_cache, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    plain = model.generate(**prompts(1), max_new_tokens=6, **{CACHE: plain_cache})
    steered = model.generate(**prompts(1), max_new_tokens=6, value_steer=accepting(model), **{CACHE: cache})
    assert torch.equal(plain, steered)
    assert cache.get_seq_length() == plain_cache.get_seq_length() == 16
    torch.testing.assert_close(cache.layers[0].keys, plain_cache.layers[0].keys)


def test_enable_and_disable_leave_other_instances_alone(model):
    other = build("llama")
    assert "generate" in vars(model) and "generate" not in vars(other)
    with pytest.raises(ValueError, match="value_steer"):
        other.generate(**prompts(1), value_steer=accepting(other))
    disable_value_steer(disable_value_steer(model))
    assert "generate" not in vars(model)
    with pytest.raises(TypeError, match="has to be a transformers model that can generate"):
        enable_value_steer(torch.nn.Linear(2, 2))


def test_min_new_tokens_and_max_interventions(model):
    head = random_head(model)
    arguments = {**prompts(3), "max_new_tokens": 16, "return_dict_in_generate": True, "eos_token_id": None}
    late = model.generate(**arguments, value_steer=ValueFilterConfig(value_head=head, threshold=0.2, min_new_tokens=5))
    assert not late.interventions[:, :5].any() and late.interventions[:, 5].any()
    for evaluation in ("lazy", "eager"):
        config = ValueFilterConfig(value_head=head, threshold=0.2, max_interventions=2, evaluation=evaluation)
        assert (model.generate(**arguments, value_steer=config).interventions.sum(1) == 2).all()


def test_fallback_abstain_ends_the_row_and_says_why(model):
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.05, fallback="abstain", num_candidates=2)
    out = model.generate(**prompts(3), max_new_tokens=10, value_steer=config, return_dict_in_generate=True)
    assert out.abstained.all()
    for row, step in enumerate(out.abstention_step.tolist()):
        assert out.sequences[row, 11 + step] == 2 and (out.sequences[row, 12 + step :] == 0).all()
        assert out.abstention_value[row] >= 0.05


def test_the_same_seed_gives_the_same_text_and_another_call_other_alternatives(model):
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.3)
    calls = []
    for _ in range(2):
        set_seed(0)
        calls.append([model.generate(**prompts(2), do_sample=True, value_steer=config) for _ in range(2)])
    assert all(torch.equal(*pair) for pair in zip(*calls, strict=True))
    assert not torch.equal(*calls[0])


REFUSED = [
    ({"num_beams": 3}, "greedy search and sampling, but these arguments ask for beam_search"),
    ({"num_beams": 3, "do_sample": True}, "beam_sample"),
    ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
    ({"use_cache": False}, "`use_cache=False` cannot be steered"),
    ({"cache_implementation": "offloaded"}, "Cache offloaded 'DynamicCache' cannot look ahead"),
    ({"token_type_ids": torch.zeros(1, 11, dtype=torch.long)}, "token_type_ids"),
    ({"stop_strings": ["x"]}, "`stop_strings` need the tokenizer"),
    ({"synced_gpus": True}, "`synced_gpus` does not reach"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda item: str(item)[:30])
def test_what_cannot_be_honoured_is_refused_before_the_first_token(model, arguments, message):
    recorder = Recorder()
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts(1), max_new_tokens=5, value_steer=accepting(model), streamer=recorder, **arguments)
    assert recorder.pieces == []


def test_assistants_and_foreign_caches_are_refused(model):
    with pytest.raises(ValueError, match="`assistant_model` does not reach|assisted_generation"):
        model.generate(**prompts(1), value_steer=accepting(model), assistant_model=build("llama"))
    static = StaticCache(config=model.config, max_cache_len=15)
    model(torch.tensor([[3]]), **{CACHE: static})
    with pytest.raises(ValueError, match="holds 15 tokens, but the text may get 16 long"):
        model.generate(**prompts(1), max_new_tokens=5, value_steer=accepting(model), **{CACHE: static})


def test_models_that_were_not_verified_are_refused():
    from transformers import RwkvConfig

    rwkv = AutoModelForCausalLM.from_config(RwkvConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2))
    with pytest.raises(ValueError, match="not verified for model type 'rwkv'"):
        enable_value_steer(rwkv).generate(torch.tensor([[3, 4]]), value_steer=accepting(rwkv), max_new_tokens=2)


def test_a_kernel_that_does_not_fit_is_refused(model, monkeypatch):
    masked = replace(accepting(model), lookahead="masked")
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(ValueError, match="lookahead='masked' cannot be used with model type 'llama', attn_impl"):
        model.generate(**prompts(1), value_steer=masked, max_new_tokens=2)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "eager")
    shared = replace(accepting(model), lookahead="shared_prefix")
    arguments = {"return_dict_in_generate": True, "output_attentions": True}
    with pytest.raises(ValueError, match='and the arguments of this call; "auto" takes one of masked, expanded'):
        model.generate(**prompts(1), value_steer=shared, max_new_tokens=2, **arguments)
    holes = prompts(1) | {"attention_mask": torch.tensor([[1] * 5 + [0] * 2 + [1] * 4])}
    with pytest.raises(ValueError, match="lookahead='shared_prefix' cannot be used"):
        model.generate(**holes, value_steer=shared, max_new_tokens=2)


def test_compile_config_is_no_obstacle(model):
    arguments = {**prompts(1), "max_new_tokens": 4, "compile_config": CompileConfig()}
    assert torch.equal(model.generate(**arguments, value_steer=accepting(model)), model.generate(**arguments))


class Forbid(LogitsProcessor):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf) if input_ids.shape[1] >= self.length else scores


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("length", [11, 13])
def test_a_processor_that_forbids_everything_is_an_error(model, length, do_sample):
    recorder = Recorder()
    with pytest.raises(ValueError, match=f"allow no token at new token {length - 11}"):
        model.generate(
            **prompts(1), logits_processor=[Forbid(length)], do_sample=do_sample, value_steer=accepting(model),
            streamer=recorder,
        )  # fmt: skip
    assert len(recorder.pieces) == 1 + length - 11


class Failing(ValueHead):
    """Turns to NaN after `healthy` calls, in natural samples (2-D) or in alternatives (3-D)."""

    def forward(self, hidden_states, labels=None):
        output = super().forward(hidden_states, labels)
        if hidden_states.dim() == self.dimensions:
            self.healthy -= 1
            if self.healthy < 0:
                output.value = torch.full_like(output.value, torch.nan)
        return output


@pytest.mark.parametrize(
    ("method", "dimensions"), [(ValueFilterConfig, 2), (ValueFilterConfig, 3), (AbstentionConfig, 2)]
)
def test_a_head_that_breaks_stops_the_call_and_nothing_unchecked_is_streamed(model, method, dimensions):
    source = random_head(model)
    head = Failing(source.config)
    head.load_state_dict(source.state_dict())
    head.dimensions, head.healthy = dimensions, 3
    recorder = Recorder()
    threshold = 0.3 if method is ValueFilterConfig else 0.99
    with pytest.raises(RuntimeError, match="not finite at new token"):
        model.generate(
            **prompts(1), max_new_tokens=30, streamer=recorder, eos_token_id=2,
            value_steer=method(value_head=head, threshold=threshold),
        )  # fmt: skip
    emitted = torch.cat([piece.flatten() for piece in recorder.pieces])
    checked = method(value_head=source, threshold=threshold)
    whole = model.generate(**prompts(1), max_new_tokens=30, value_steer=checked)[0]
    assert recorder.ended and len(emitted) < len(whole)
    assert torch.equal(emitted, whole[: len(emitted)])


def test_heads_that_do_not_fit_are_refused(model):
    wide = accepting_head(build("opt"))
    wide.config.hidden_size = 33
    with pytest.raises(ValueError, match="trained on hidden_size=33 .* has width 32; load the matching head"):
        model.generate(**prompts(1), value_steer=ValueFilterConfig(value_head=wide))
    other = accepting_head(model)
    other.config.backbone, other.config.backbone_fingerprint = "org/other", "0123456789abcdef"
    with pytest.raises(ValueError, match="trained on backbone 'org/other' with fingerprint 0123456789abcdef"):
        model.generate(**prompts(1), value_steer=ValueFilterConfig(value_head=other))
    override = ValueFilterConfig(value_head=other, allow_backbone_mismatch=True)
    model.generate(**prompts(1), max_new_tokens=2, value_steer=override)
    with pytest.raises(ValueError, match='`value_head` is missing from the "filter" config'):
        model.generate(**prompts(1), value_steer={"method": "filter"})
    bare = accepting_head(model)
    bare.config.threshold = None
    with pytest.raises(ValueError, match="`threshold` is missing: this value head has no default threshold"):
        model.generate(**prompts(1), value_steer=ValueFilterConfig(value_head=bare))
    with pytest.raises(ValueError, match="`threshold` holds 3 numbers, but the batch has 2 rows"):
        model.generate(**prompts(2), value_steer=accepting(model, threshold=[0.9] * 3))
    broken = accepting_head(model)
    with torch.no_grad():
        broken.net[0].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite weights in net.0.bias"):
        model.generate(**prompts(1), value_steer=ValueFilterConfig(value_head=broken))
    with pytest.raises(TypeError, match="has to be a ValueHead, got a LlamaForCausalLM"):
        model.generate(**prompts(1), value_steer=ValueFilterConfig(value_head=build("llama")))


def test_ending_rows_needs_an_eos_token(model):
    model.generation_config.eos_token_id = None
    for config in (
        AbstentionConfig(value_head=accepting_head(model)),
        ValueFilterConfig(value_head=accepting_head(model), fallback="abstain"),
    ):
        with pytest.raises(ValueError, match="ends rows with an EOS token"):
            model.generate(**prompts(1), max_new_tokens=3, value_steer=config)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_backbones_are_scored_in_float32(family):
    model = build(family).to(torch.bfloat16)
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.4)
    call = {**prompts(3), "max_new_tokens": 10, "return_dict_in_generate": True}
    out = enable_value_steer(model).generate(**call, value_steer=config)
    assert out.token_values.dtype == torch.float32 and out.interventions.any()
    steered = model.generate(**call, value_steer=accepting(model))
    assert torch.equal(steered.sequences, model.generate(**call).sequences)
