"""What a call forbids binds the EOS and message tokens that a method inserts, too."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TopKLogitsWarper

from hf_value_steer import (
    AbstentionConfig,
    AbstentionLogitsProcessor,
    ValueFilterConfig,
    ValueFilterLogitsProcessor,
    value_steer_generate,
)
from tests.families import prompts, random_head


EOS, LENGTH, MESSAGE = 2, 11, [7, 8]
CALL = {"do_sample": False, "max_new_tokens": 14}


class Forbid(LogitsProcessor):
    """A processor of the user that forbids some tokens until the text has a length."""

    def __init__(self, tokens, length):
        self.tokens, self.length = tokens, length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] < self.length:
            scores = scores.index_fill(1, torch.tensor(self.tokens), -torch.inf)
        return scores


class ForbidLogitsWarper(Forbid):
    """A ban of the user that is called as if it only narrowed the sampling."""


# From arguments of a call to the first number of new tokens after which EOS may come.
BANS = {
    "nothing": ({}, 0),
    "min_new_tokens": ({"min_new_tokens": 8}, 8),
    "min_length": ({"min_length": LENGTH + 5}, 5),
    "sampling": ({"min_new_tokens": 6, "do_sample": True, "top_k": 5, "temperature": 0.7}, 6),
    "a processor of the user": ({"logits_processor": [Forbid([EOS], LENGTH + 4)]}, 4),
    "a processor after a warper": (
        {"logits_processor": LogitsProcessorList([TopKLogitsWarper(20), Forbid([EOS], LENGTH + 4)])},
        4,
    ),
    "a processor called a warper": ({"logits_processor": [ForbidLogitsWarper([EOS], LENGTH + 4)]}, 4),
    "suppress_tokens": ({"suppress_tokens": [EOS]}, None),
    "bad_words_ids": ({"bad_words_ids": [MESSAGE[:1]], "suppress_tokens": [EOS]}, None),
}


# A processor that comes after a warper of the user knows nothing of what it took away.
SEEN_BY_PROCESSORS = [name for name in BANS if name != "a processor after a warper"]


def hopeless(model, **options):
    return AbstentionConfig(value_head=random_head(model), threshold=1e-6, **options)


def dead_ends(model):
    return ValueFilterConfig(
        value_head=random_head(model), threshold=1e-6, fallback="abstain", num_candidates=3, seed=1
    )


def new_tokens(model, call, **steering):
    arguments = {**prompts(2), **CALL, **call, **steering}
    return model.generate(**arguments)[:, LENGTH:].tolist()


@pytest.mark.parametrize("message", [None, MESSAGE])
@pytest.mark.parametrize("name", BANS)
def test_abstention_ends_a_text_as_soon_as_the_call_lets_it(llama, name, message):
    call, first = BANS[name]
    config = hopeless(llama, message_ids=message)
    ending = [*(message or []), EOS]
    for row in new_tokens(llama, call, custom_generate=value_steer_generate, value_steer=config):
        if first is None:
            assert EOS not in row and len(row) == CALL["max_new_tokens"]
        else:
            assert EOS not in row[:first] and row[first : first + len(ending)] == ending


@pytest.mark.parametrize("name", SEEN_BY_PROCESSORS)
def test_the_abstaining_processor_obeys_the_same_rule(llama, name):
    call, _ = BANS[name]
    config = hopeless(llama, message_ids=MESSAGE)
    torch.manual_seed(0)
    expected = new_tokens(llama, call, custom_generate=value_steer_generate, value_steer=config)
    torch.manual_seed(0)
    call = {**call, "logits_processor": [*call.get("logits_processor", []), AbstentionLogitsProcessor(llama, config)]}
    assert new_tokens(llama, call) == expected


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("name", BANS)
def test_a_dead_end_ends_a_text_where_the_call_lets_it(llama, name, evaluation):
    call, first = BANS[name]
    config = ValueFilterConfig(**{**vars(dead_ends(llama)), "evaluation": evaluation})
    for row in new_tokens(llama, call, custom_generate=value_steer_generate, value_steer=config):
        end = row.index(EOS) if EOS in row else None
        assert end == first


@pytest.mark.parametrize("name", SEEN_BY_PROCESSORS)
def test_a_dead_end_of_the_processor_obeys_the_same_rule(llama, name):
    call, first = BANS[name]
    processors = [*call.get("logits_processor", []), ValueFilterLogitsProcessor(llama, dead_ends(llama))]
    for row in new_tokens(llama, {**call, "logits_processor": processors}):
        assert (row.index(EOS) if EOS in row else None) == first


def test_before_the_end_may_come_a_dead_end_takes_the_most_acceptable_candidate(llama):
    arguments = {**prompts(2), **CALL, "max_new_tokens": 8, "custom_generate": value_steer_generate}
    config = dead_ends(llama)
    least_bad = ValueFilterConfig(**{**vars(config), "fallback": "argmin"})
    waiting = llama.generate(**arguments, min_new_tokens=8, value_steer=config)
    assert torch.equal(waiting, llama.generate(**arguments, min_new_tokens=8, value_steer=least_bad))


@pytest.mark.parametrize("message", [[7], [7, 8, 9]])
def test_a_forced_end_wins_over_the_rest_of_a_message(llama, message):
    config = hopeless(llama, message_ids=message, min_new_tokens=3)
    call = {"max_new_tokens": 4, "forced_eos_token_id": EOS}
    for row in new_tokens(llama, call, custom_generate=value_steer_generate, value_steer=config):
        assert row[3] == EOS


def test_a_suppressed_word_of_the_message_keeps_the_text_going(llama):
    config = hopeless(llama, message_ids=MESSAGE)
    steering = {"custom_generate": value_steer_generate, "value_steer": config}
    call = {"suppress_tokens": [MESSAGE[1]]}
    assert new_tokens(llama, call, **steering) == new_tokens(llama, call)


def test_a_streak_is_counted_while_the_end_is_forbidden(llama):
    config = hopeless(llama, patience=3)
    for row in new_tokens(llama, {"min_new_tokens": 6}, custom_generate=value_steer_generate, value_steer=config):
        assert row.index(EOS) == 6


@pytest.mark.parametrize("ids", [[101], [5, 1_000_000]])
@pytest.mark.parametrize("where", ["generate", "processor"])
def test_a_message_beyond_the_vocabulary_is_refused(llama, ids, where):
    config = hopeless(llama, message_ids=ids)
    with pytest.raises(ValueError, match=rf"tokens \[{ids[-1]}\].*has only 101"):
        if where == "processor":
            AbstentionLogitsProcessor(llama, config)
        else:
            new_tokens(llama, {}, custom_generate=value_steer_generate, value_steer=config)


@pytest.mark.parametrize("eos", [50, [50, 2]])
@pytest.mark.parametrize("method", ["abstain", "filter"])
def test_processors_end_with_the_eos_of_the_call(llama, method, eos):
    config = hopeless(llama) if method == "abstain" else dead_ends(llama)
    make = AbstentionLogitsProcessor if method == "abstain" else ValueFilterLogitsProcessor
    call = {"eos_token_id": eos}
    expected = new_tokens(llama, call, custom_generate=value_steer_generate, value_steer=config)
    assert new_tokens(llama, {**call, "logits_processor": [make(llama, config)]}) == expected == [[50]] * 2
