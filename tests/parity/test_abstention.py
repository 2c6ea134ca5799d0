"""Abstention against a plain recomputation, alone, with the filter, and as a logits processor."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache

from hf_value_steer import (
    AbstentionConfig,
    AbstentionLogitsProcessor,
    ValueFilterConfig,
    ValueFilterLogitsProcessor,
    score_text,
)
from hf_value_steer.errors import ScoringError
from hf_value_steer.hosts.transformers import CACHE
from tests.families import FAMILIES, build, layered_head, prompts, random_head
from tests.oracle import states
from tests.steer import steer


EOS, PROMPT = 2, 11
CALL = {**prompts(4), "max_new_tokens": 20, "repetition_penalty": 1.2}
generate = partial(steer, **CALL)


def expected_row(model, head, row, config):
    """What greedy decoding with abstention makes of one row, recomputed without cache or batch."""
    inputs = prompts(4)
    start = int((inputs["attention_mask"][row] == 0).sum())
    ids, streak, new = inputs["input_ids"][row : row + 1, start:], 0, []
    while len(new) < 20:
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[:, -1]
        value = head(hidden).value.item()
        if len(new) >= config.min_new_tokens:
            streak = 0 if value < config.threshold else streak + 1
        if streak >= config.patience:
            return [*new, *config.message_ids, EOS][:20], len(new), value
        padded = torch.cat([torch.zeros(1, start, dtype=torch.long), ids], dim=1)
        scores = model(ids, use_cache=False).logits[:, -1]
        for token in padded.unique():
            scores[0, token] = scores[0, token] * 1.2 if scores[0, token] < 0 else scores[0, token] / 1.2
        token = scores.argmax().item()
        new.append(token)
        if token == EOS:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return new, -1, None


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_stop_where_a_recomputation_stops_them(family):
    model = build(family)
    head = random_head(model)
    config = AbstentionConfig(value_head=head, threshold=0.55, patience=2, min_new_tokens=3, message_ids=[7, 8])
    out = generate(model, config)
    for row in range(4):
        tokens, step, value = expected_row(model, head, row, config)
        assert out.sequences[row, PROMPT : PROMPT + len(tokens)].tolist() == tokens
        assert out.abstention_step[row].item() == step
        assert out.abstained[row].item() == (step >= 0)
        if value is not None:
            assert out.abstention_value[row].item() == pytest.approx(value, abs=1e-5)
    assert out.abstained.any()


def test_polarity_turns_the_rule(llama):
    desirable, undesirable = random_head(llama, "desirable"), random_head(llama, "undesirable")
    low = generate(llama, AbstentionConfig(value_head=desirable, threshold=1e-6))
    assert not low.abstained.any()
    assert generate(llama, AbstentionConfig(value_head=undesirable, threshold=1e-6)).abstained.all()


def test_a_hopeless_prompt_gets_eos_at_once(llama):
    out = generate(llama, AbstentionConfig(value_head=random_head(llama), threshold=1e-6))
    assert out.sequences[:, PROMPT:].tolist() == [[EOS]] * 4
    assert out.abstention_step.tolist() == [0] * 4
    torch.testing.assert_close(out.abstention_value, out.prompt_values)


def test_min_new_tokens_of_the_call_is_kept(llama):
    out = generate(llama, AbstentionConfig(value_head=random_head(llama), threshold=1e-6), min_new_tokens=6)
    assert out.abstention_step.tolist() == [6] * 4


def test_filter_and_abstention_together(llama):
    head = random_head(llama)
    steer = [
        ValueFilterConfig(value_head=head, threshold=0.5, num_candidates=4),
        AbstentionConfig(value_head=head, threshold=0.45, patience=3, message_ids=[9]),
    ]
    both = generate(llama, steer)
    alone = generate(llama, steer[0])
    assert both.abstained.any() and both.interventions.any()
    for row in range(4):
        end = both.abstention_step[row].item() if both.abstained[row] else both.sequences.shape[1] - PROMPT
        assert torch.equal(both.sequences[row, PROMPT : PROMPT + end], alone.sequences[row, PROMPT : PROMPT + end])
        if both.abstained[row] and end + 2 <= both.sequences.shape[1] - PROMPT:
            assert both.sequences[row, PROMPT + end : PROMPT + end + 2].tolist() == [9, EOS]
            assert not both.interventions[row, end:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processors_do_what_the_strategy_does(family):
    model = build(family)
    head = random_head(model)
    abstain = AbstentionConfig(value_head=head, threshold=0.55, patience=2, min_new_tokens=2, message_ids=[7])
    filter_ = ValueFilterConfig(value_head=head, threshold=0.4, num_candidates=5, proposal="topk")
    for config, cls in ((abstain, AbstentionLogitsProcessor), (filter_, ValueFilterLogitsProcessor)):
        steered = generate(model, config).sequences
        processed = model.generate(**CALL, logits_processor=[cls(model, config)])
        assert torch.equal(steered, processed)


@pytest.mark.parametrize("temporal", ["none", "mean", "ema"])
@pytest.mark.parametrize("layers", [[0], [-1], [0, "final"]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_processors_read_layers_and_remember_as_the_strategy_does(family, layers, temporal):
    model = build(family)
    head = layered_head(model, layers, temporal)
    abstain = AbstentionConfig(value_head=head, threshold=0.5, patience=3, min_new_tokens=2, message_ids=[7])
    filter_ = ValueFilterConfig(value_head=head, threshold=0.4, num_candidates=5, proposal="topk")
    plain = model.generate(**CALL)
    for config, cls in ((abstain, AbstentionLogitsProcessor), (filter_, ValueFilterLogitsProcessor)):
        steered = generate(model, config).sequences
        assert not torch.equal(steered, plain)
        assert torch.equal(steered, model.generate(**CALL, logits_processor=[cls(model, config)]))


@pytest.mark.parametrize("fallback", ["argmin", "args", "abstain"])
def test_processor_fallbacks_do_what_the_strategy_does(llama, fallback):
    config = ValueFilterConfig(
        value_head=random_head(llama), threshold=0.2, num_candidates=3, proposal="topk", fallback=fallback
    )
    steered = generate(llama, config).sequences
    assert torch.equal(steered, llama.generate(**CALL, logits_processor=[ValueFilterLogitsProcessor(llama, config)]))


def hooks(model):
    head = model.get_output_embeddings()
    return len(model._forward_hooks) + len(model._forward_pre_hooks) + len(head._forward_pre_hooks)


def test_processors_are_stateless_pure_and_leave_no_hooks(llama):
    config = AbstentionConfig(value_head=random_head(llama), threshold=0.55, patience=2)
    processor = AbstentionLogitsProcessor(llama, config)
    calls = [llama.generate(**prompts(3), max_new_tokens=12, logits_processor=[processor]) for _ in range(2)]
    assert torch.equal(*calls)
    filtering = ValueFilterLogitsProcessor(llama, ValueFilterConfig(value_head=random_head(llama), threshold=0.4))
    seen = []

    def watch(_input_ids, scores):
        seen.append((scores, scores.clone()))
        return scores

    llama.generate(**prompts(3), max_new_tokens=6, logits_processor=[watch, filtering, processor])
    assert len(seen) == 6
    assert all(torch.equal(scores, before) for scores, before in seen)
    del processor, filtering
    assert hooks(llama) == 0


def test_beam_search_emits_acceptable_tokens_only(llama):
    head = random_head(llama)
    config = ValueFilterConfig(value_head=head, threshold=0.6, proposal="topk", num_candidates=8)
    processor = ValueFilterLogitsProcessor(llama, config)
    out = llama.generate(**prompts(1), max_new_tokens=10, num_beams=3, logits_processor=[processor], eos_token_id=None)
    values = head(llama.base_model(out).last_hidden_state).value[0, PROMPT:]
    plain = llama.generate(**prompts(1), max_new_tokens=10, num_beams=3, eos_token_id=None)
    assert (head(llama.base_model(plain).last_hidden_state).value[0, PROMPT:] >= 0.6).any()
    assert (values < 0.6).all()


def test_abstention_follows_reordered_beams(llama):
    head = random_head(llama)
    config = AbstentionConfig(value_head=head, threshold=0.5, patience=2)
    processor = AbstentionLogitsProcessor(llama, config)
    out = llama.generate(**prompts(1), max_new_tokens=15, num_beams=4, logits_processor=[processor])[0, PROMPT:]
    text = torch.cat([prompts(1)["input_ids"][0], out])
    values = head(llama.base_model(text[None]).last_hidden_state).value[0, PROMPT - 1 :]
    bad = (values >= 0.5).tolist()
    length = (out == EOS).int().argmax().item() if (out == EOS).any() else len(out)
    pairs = [step for step in range(1, length + 1) if bad[step] and bad[step - 1]]
    assert not [step for step in pairs if step < length]


@pytest.mark.parametrize("temporal", ["mean", "ema"])
@pytest.mark.parametrize("layers", [[0], ["final"], [-1, "final"]], ids=str)
@pytest.mark.parametrize("method", ["filter", "abstain"])
def test_reordered_beams_keep_their_own_memory(llama, layers, temporal, method):
    """At every step that of each beam is that of its text, read from scratch."""
    head, moved = layered_head(llama, layers, temporal), []
    if method == "filter":
        config = ValueFilterConfig(value_head=head, threshold=0.9, proposal="topk", num_candidates=8)
        processor = ValueFilterLogitsProcessor(llama, config)
    else:
        processor = AbstentionLogitsProcessor(llama, AbstentionConfig(value_head=head, threshold=0.9, patience=15))

    def checked(input_ids, scores):
        if input_ids.shape[1] > PROMPT:
            (text,) = processor.texts.values()
            moved.append(not torch.equal(text.input_ids, input_ids[:, :-1]))
        scores = processor(input_ids, scores)
        (text,) = processor.texts.values()
        scorer = text.scorer if method == "filter" else text.abstention.scorer
        read = [states(llama, row.tolist(), layers)[PROMPT - 1 :] for row in input_ids]
        torch.testing.assert_close(scorer.memory, torch.stack([head(each).memory for each in read]))
        return scores

    options = {"max_new_tokens": 12, "num_beams": 4, "min_new_tokens": 12}
    out = llama.generate(**prompts(1), **options, logits_processor=[checked])
    assert out.shape[1] == PROMPT + 12 and any(moved)


@pytest.mark.parametrize("temporal", ["none", "mean", "ema"])
def test_beam_search_emits_what_a_head_on_a_layer_accepts(llama, temporal):
    head = layered_head(llama, [0], temporal)

    def values(*processors):
        call = {**prompts(1), "max_new_tokens": 10, "num_beams": 3, "eos_token_id": None}
        text = llama.generate(**call, logits_processor=list(processors))[0].tolist()
        return next(score_text(llama, head, [text[PROMPT:]], [text[:PROMPT]], threshold=0.5)).values

    threshold = max(values()) - 1e-3
    config = ValueFilterConfig(value_head=head, threshold=threshold, proposal="topk", num_candidates=16)
    assert max(values(ValueFilterLogitsProcessor(llama, config))) < threshold


@pytest.mark.parametrize("method", ["filter", "abstain"])
@torch.no_grad()
def test_a_text_that_was_changed_between_two_steps_is_an_error(llama, method):
    head = layered_head(llama, [0], "mean")
    if method == "filter":
        processor = ValueFilterLogitsProcessor(llama, ValueFilterConfig(value_head=head, threshold=0.5))
    else:
        processor = AbstentionLogitsProcessor(llama, AbstentionConfig(value_head=head, threshold=0.5))
    ids, cache = prompts(1)["input_ids"], DynamicCache(config=llama.config)
    processor(ids, llama(ids, **{CACHE: cache}).logits[:, -1])
    scores = llama(torch.tensor([[5]]), **{CACHE: cache}).logits[:, -1]
    other = torch.cat([ids.flip(-1), torch.tensor([[5]])], dim=1)
    with pytest.raises(ScoringError, match="goes on with no text of the step before"):
        processor(other, scores)


def test_processors_refuse_what_they_cannot_follow(llama):
    config = AbstentionConfig(value_head=random_head(llama), threshold=0.5)
    repetitive = torch.tensor([[5, 6, 7, 8] * 4])
    for arguments in ({"use_cache": False}, {"prompt_lookup_num_tokens": 3}, {"guidance_scale": 1.5}):
        processor = AbstentionLogitsProcessor(llama, config)
        with pytest.raises(RuntimeError, match="use_cache=True|cannot follow"):
            llama.generate(repetitive, max_new_tokens=9, logits_processor=[processor], **arguments)
    with pytest.raises(ValueError, match="cannot do `max_interventions`: call"):
        ValueFilterLogitsProcessor(llama, ValueFilterConfig(value_head=random_head(llama), max_interventions=3))
