"""Steered output equals plain `generate`, row by row, up to the row's first intervention."""

import pytest
import torch

from hf_value_steer import ValueFilterConfig
from hf_value_steer.hosts.transformers import CACHE
from tests.families import FAMILIES, accepting_head, build, prompts, random_head
from tests.steer import steer


ARGUMENTS = {
    "greedy": {"do_sample": False, "repetition_penalty": 1.3},
    "sampling": {
        "do_sample": True,
        "temperature": 1.1,
        "top_k": 40,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
    },
}


def run(model, inputs, arguments, config=None, **extra):
    return steer(model, config, 11, **{**inputs, **arguments, "max_new_tokens": 24, **extra})


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("mode", ARGUMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_accepts_everything_changes_nothing(family, mode, rows, evaluation):
    model, inputs = build(family), prompts(rows)
    plain = run(model, inputs, ARGUMENTS[mode], output_scores=True, output_logits=True)
    config = ValueFilterConfig(value_head=accepting_head(model), evaluation=evaluation, num_candidates=4)
    steered = run(model, inputs, ARGUMENTS[mode], config, output_scores=True, output_logits=True)
    assert torch.equal(steered.sequences, plain.sequences)
    assert not steered.interventions.any()
    tolerance = {"rtol": 0, "atol": 0} if evaluation == "lazy" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.stack(steered.logits), torch.stack(plain.logits), **tolerance)
    torch.testing.assert_close(torch.stack(steered.scores), torch.stack(plain.scores), **tolerance)
    assert steered[CACHE].get_seq_length() == plain[CACHE].get_seq_length()


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("mode", ARGUMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_intervention_changes_its_own_row_only_and_nothing_before(family, mode, evaluation):
    model, inputs = build(family), prompts(5)
    plain = run(model, inputs, ARGUMENTS[mode]).sequences
    threshold = (1e-7, 0.5, 1 - 1e-7, 0.3, 1 - 1e-7)
    config = ValueFilterConfig(value_head=random_head(model), threshold=threshold, evaluation=evaluation)
    out = run(model, inputs, ARGUMENTS[mode], config)
    prompt = inputs["input_ids"].shape[1]
    assert out.interventions[0].any() and not out.interventions[2].any() and not out.interventions[4].any()
    for row, interventions in enumerate(out.interventions):
        first = int(interventions.int().argmax()) if interventions.any() else plain.shape[1] - prompt
        end = min(prompt + first, plain.shape[1], out.sequences.shape[1])
        assert torch.equal(out.sequences[row, :end], plain[row, :end])
        if interventions.any():
            assert out.sequences[row, end] != plain[row, end]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_eager_attention_and_user_cache_and_embeddings(family):
    model, inputs = build(family, attention="eager"), prompts(3)
    config = ValueFilterConfig(value_head=accepting_head(model))
    plain = run(model, inputs, ARGUMENTS["sampling"], output_attentions=True, output_hidden_states=True)
    steered = run(model, inputs, ARGUMENTS["sampling"], config, output_attentions=True, output_hidden_states=True)
    assert torch.equal(steered.sequences, plain.sequences)
    for name in ("attentions", "hidden_states"):
        for mine, theirs in zip(getattr(steered, name), getattr(plain, name), strict=True):
            torch.testing.assert_close(mine, theirs)
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    embeds["attention_mask"] = inputs["attention_mask"]
    greedy = {"do_sample": False}
    assert torch.equal(run(model, embeds, greedy, config).sequences, run(model, embeds, greedy).sequences)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_generation_goes_on_from_a_returned_cache(family):
    model, inputs = build(family), prompts(2)
    head = random_head(model)
    config = ValueFilterConfig(value_head=head, threshold=0.5)
    greedy = {"do_sample": False, "eos_token_id": None}
    whole = run(model, inputs, greedy, config)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 12, dtype=torch.long)], dim=1)
    first = run(model, inputs, greedy, config, max_new_tokens=12)
    assert torch.equal(first.sequences, whole.sequences[:, :23])
    inputs = {"input_ids": first.sequences, "attention_mask": mask, CACHE: first[CACHE]}
    assert torch.equal(run(model, inputs, greedy, config, max_new_tokens=12).sequences, whole.sequences)


def test_num_return_sequences_and_thresholds_a_row(llama):
    config = ValueFilterConfig(value_head=accepting_head(llama), threshold=(0.9,) * 6)
    arguments = {"do_sample": True, "num_return_sequences": 3}
    plain = run(llama, prompts(2), arguments)
    assert torch.equal(run(llama, prompts(2), arguments, config).sequences, plain.sequences)
