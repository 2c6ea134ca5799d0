"""Going back: a part of the grid against the oracle; then what is left behind, what is shown, and what is refused."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    set_seed,
)

from hf_value_steer import (
    AbstentionConfig,
    ActivationConfig,
    GuidanceConfig,
    ScoringError,
    SteeringVectors,
    UnsupportedError,
    ValueFilterConfig,
)
from hf_value_steer.generation.method import Method
from hf_value_steer.hosts.transformers import CACHE
from tests.families import accepting_head, build, layered_head, prompts, random_head
from tests.going_back import SAMPLE, Shown, examine
from tests.parity.test_guidance import make_module
from tests.rollback_oracle import GoingBack
from tests.steer import steer
from tests.tiny_models import build_tiny


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_every_token_and_value_is_the_oracles(case):
    examine(case)


def going_back(model, back=4, **options):
    head = options.pop("value_head", None) or random_head(model)
    options = {"threshold": 0.45, "num_candidates": 3, "rollback": back, "seed": 3, **options}
    return ValueFilterConfig(value_head=head, **options)


class Dictated(Method):
    """Prescribes every token of a text."""

    method = "dictated"

    def __init__(self, tokens):
        self.tokens = tokens

    def bind(self, call):
        return [self]

    def prescribe(self, draw):
        draw.tokens, draw.forced = self.tokens[:, draw.step].clone(), torch.ones_like(draw.forced)


def same(one, other):
    """Tensors, and what is made of them: whole numbers are equal, others close."""
    if isinstance(one, torch.Tensor):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4, equal_nan=True)
        else:
            assert torch.equal(one, other)
    else:
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            same(mine, theirs)


OUTPUTS = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
SAMPLING = {"do_sample": True, "top_p": 0.95, "repetition_penalty": 1.2, "max_new_tokens": 16, "eos_token_id": None}


def beside(name, model):
    """Methods beside the filter."""
    if name == "abstention":
        return [AbstentionConfig(value_head=random_head(model), threshold=0.7, patience=3, message_ids=[33, 44])]
    if name == "guidance":
        return [GuidanceConfig(module=make_module(model), refresh_interval=2)]
    directions = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    vectors = SteeringVectors.from_tensors({0: directions[0], 1: directions[1]})
    gate = {"value_head": random_head(model), "threshold": 0.5} if name == "gate" else {}
    return [] if name == "alone" else [ActivationConfig(vectors=vectors, multiplier=2.0, **gate)]


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("name", ["alone", "abstention", "vectors", "gate", "guidance"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_all_is_left_as_if_the_text_had_been_written_at_once(family, name, evaluation):
    model = build(family)
    more, outputs = beside(name, model), OUTPUTS
    if name == "guidance":
        outputs = {"output_scores": True, "output_logits": True}
    options = {**SAMPLING, **outputs, **({"eos_token_id": 2} if name == "abstention" else {})}
    out = steer(model, [going_back(model, evaluation=evaluation), *more], **options)
    assert (out.taken_back_steps >= 0).any()
    new = out.sequences[:, -out.token_values.shape[1] :]
    dictated = Dictated(torch.nn.functional.pad(new, (0, 16 - new.shape[1])))
    expected = steer(model, [going_back(model, back=0), *more, dictated], **options)
    ours = {"interventions", "candidates_evaluated", "dead_ends", "taken_back_steps", "taken_back_tokens"}
    for name in out.keys() - {CACHE, "taken_back_values", *ours}:
        same(out[name], expected[name])
    for mine, theirs in zip(out[CACHE].layers, expected[CACHE].layers, strict=True):
        same((mine.keys, mine.values), (theirs.keys, theirs.values))


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("back", [1, 4])
def test_rows_are_alone_and_a_batch(back, evaluation):
    """Up to its own first dead end a row is what it is without going back; and the others never notice."""
    model = build("llama")
    options = {"do_sample": True, "max_new_tokens": 16, "eos_token_id": None}
    out = steer(model, going_back(model, back, evaluation=evaluation), **options)
    without = steer(model, going_back(model, 0, evaluation=evaluation), **options)
    length = out.sequences.shape[1] - 16
    for row in range(3):
        steps = without.dead_ends[row].nonzero().flatten().tolist()
        first = max(min([*steps, 16]) - back, 0)
        assert torch.equal(out.sequences[row, : length + first], without.sequences[row, : length + first])
    one = going_back(model, back, evaluation=evaluation, threshold=(0.45, 0.999, 0.999))
    lone = steer(model, one, **options)
    plain = steer(model, **options)
    assert torch.equal(lone.sequences[1:], plain.sequences[1:]) and (lone.taken_back_steps[0] >= 0).any()


def test_a_search_that_fails_leaves_no_trace():
    model = build("llama")
    options = {"do_sample": True, "max_new_tokens": 16, "eos_token_id": None, **OUTPUTS}
    out, without = (steer(model, going_back(model, back, threshold=0.02), **options) for back in (4, 0))
    assert (out.taken_back_steps < 0).all() and out.dead_ends.any()
    for name in without.keys() - {CACHE}:
        same(out[name], without[name])


def test_a_streamer_is_never_further_behind_than_what_may_be_taken_back():
    model, committed = build("llama"), []

    class Counts(Method):
        method, follows = "counts", True

        def bind(self, call):
            return [self]

        def observe(self, moment):
            if moment.draw is not None and len(moment.live) == 3:  # and not in a search
                committed.append(moment.step - (len(streamer.tokens) - 1))

    streamer = Shown()
    options = {"do_sample": True, "max_new_tokens": 16, "eos_token_id": None, "token_streamer": streamer}
    out = steer(model, [going_back(model), Counts()], **options)
    assert (out.taken_back_steps >= 0).any()
    assert max(committed) == 5  # the token that was just drawn, and four before it
    assert torch.equal(torch.stack(streamer.tokens[1:-1], dim=1), out.sequences[:, -16:])


def test_after_an_error_nothing_is_shown_that_could_be_taken_back():
    model, head = build("llama"), random_head(build("llama"))
    calls = []

    def breaks(module, args, output):
        calls.append(len(calls))
        if len(calls) > 12:
            output.value.fill_(torch.nan)

    head.register_forward_hook(breaks)
    streamer = Shown()
    with pytest.raises(ScoringError):
        steer(model, going_back(model, value_head=head), do_sample=True, max_new_tokens=30, token_streamer=streamer)
    assert streamer.tokens[-1] is None and len(streamer.tokens) <= 2 + 12 - 4


def test_nothing_is_taken_back_that_was_not_judged():
    """Not before `min_new_tokens`, not after `max_interventions`, no prescribed token."""
    model, options = build("llama"), {"do_sample": True, "max_new_tokens": 16, "eos_token_id": None}
    out = steer(model, going_back(model, 8, min_new_tokens=6), **options)
    steps = out.taken_back_steps[out.taken_back_steps >= 0]
    assert len(steps) and (steps >= 6).all()
    few = steer(model, going_back(model, 8, max_interventions=2), **options)
    assert (few.interventions.sum(dim=1) <= 2).all() and (few.interventions.sum(dim=1) == 2).any()
    first = steer(model, going_back(model, threshold=0.02), **{**options, "max_new_tokens": 1})
    assert first.dead_ends.any() and (first.taken_back_steps < 0).all()


def test_a_banned_ending_is_flagged():
    """`fallback="abstain"` where the call forbids EOS: the most acceptable token is written, and it shows."""
    model = build("llama")
    options = {"do_sample": True, "max_new_tokens": 10, "eos_token_id": 2}
    out = steer(model, going_back(model, fallback="abstain", threshold=0.1), **options, min_new_tokens=10)
    kept = out.token_values >= 0.1
    assert kept.any() and torch.equal(kept, out.dead_ends) and not out.abstained.any()


def test_time_that_runs_out_ends_the_text():
    model = build("llama")
    options = {"do_sample": True, "max_new_tokens": 40, "eos_token_id": 2}
    out = steer(model, going_back(model), **options, stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(0.0)]))
    assert out.token_values.shape[1] == 1


class Twice(StoppingCriteria):
    """Ends a row that has written a token of the first half of the vocabulary twice running."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] == input_ids[:, -2]) | ((input_ids[:, -1] < 20) & (input_ids[:, -2] < 20))


def test_criteria_are_asked_about_the_text_that_is_kept():
    model, ended = build("llama"), 0
    for seed in range(4):
        options = {"do_sample": True, "max_new_tokens": 20, "eos_token_id": 2, **prompts(3)}
        options["stopping_criteria"] = StoppingCriteriaList([Twice()])
        oracle = GoingBack(going_back(model, threshold=0.5))
        set_seed(seed)
        with torch.no_grad():
            expected = model.generate(**options, custom_generate=oracle)
        out = steer(model, going_back(model, threshold=0.5), seed=seed, **options)
        assert torch.equal(out.sequences, expected)
        ended += oracle.seen["ended"]
    assert ended


def test_nothing_that_a_method_has_prescribed_is_taken_back():
    """An ending that has begun goes on; dead ends behind it do not go back into it."""
    model = build("llama")
    abstention = AbstentionConfig(value_head=accepting_head(model), threshold=0.1, message_ids=[33, 44, 55, 66])
    out = steer(model, [going_back(model, 8, threshold=0.3), abstention], do_sample=True, max_new_tokens=16)
    new = out.sequences[:, -out.token_values.shape[1] :]
    assert new[:, :5].tolist() == [[33, 44, 55, 66, 2]] * 3 and (out.taken_back_steps < 0).all()


class Penalty(LogitsProcessor):
    """Makes the last token of a text less likely. `remembers`: by a count of its calls, which no text tells."""

    def __init__(self, remembers):
        self.remembers, self.calls = remembers, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.scatter(1, input_ids[:, -1:], -5.0) + self.remembers * self.calls


def test_processors_that_remember_are_refused():
    model, options = build("llama"), {"do_sample": True, "max_new_tokens": 16, "eos_token_id": None}
    pure = steer(model, going_back(model), **options, logits_processor=LogitsProcessorList([Penalty(False)]))
    assert (pure.taken_back_steps >= 0).any()
    with pytest.raises(UnsupportedError, match="Penalty"):
        steer(model, going_back(model), **options, logits_processor=LogitsProcessorList([Penalty(True)]))


class Automaton(LogitsProcessor):
    """Forbids tokens by the sum of the text, which it adds up token by token, and does not take back."""

    def __init__(self):
        self.length, self.sums = 0, torch.zeros(3, dtype=torch.long)

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.length:
            self.sums, self.length = self.sums + input_ids[:, -1], input_ids.shape[1]
        forbidden = torch.arange(scores.shape[1]) % 5 == (self.sums % 5)[:, None]
        return scores.masked_fill(forbidden, -torch.inf)


def test_a_processor_that_never_goes_back_is_refused():
    model, processors = build("llama"), LogitsProcessorList([Automaton()])
    with pytest.raises(UnsupportedError, match="Automaton"):
        steer(model, going_back(model, threshold=0.3), do_sample=True, eos_token_id=None, logits_processor=processors)


class Undeclared(Method):
    """Counts tokens of its own accord."""

    method = "undeclared"

    def bind(self, call):
        self.seen = torch.zeros(call.rows)
        return [self]

    def observe(self, moment):
        self.seen = self.seen + 1


def test_a_method_that_does_not_say_what_its_state_is_is_refused():
    model = build("llama")
    with pytest.raises(UnsupportedError, match="Undeclared, whose state is not in its `rowwise`"):
        steer(model, [going_back(model), Undeclared()])
    steer(model, [going_back(model, back=0), Undeclared()])


@pytest.mark.parametrize("proposal", ["sample", "topk"])
@pytest.mark.parametrize("candidates", [1, 3])
def test_candidates_of_rewritten_places_are_those_that_it_was_chosen_from(candidates, proposal):
    model = build("llama")
    config = going_back(model, num_candidates=candidates, proposal=proposal, output_candidates=True)
    out = steer(model, config, do_sample=True, max_new_tokens=16, eos_token_id=None)
    assert (out.taken_back_steps >= 0).any()
    new = out.sequences[:, -16:]
    among = (out.candidates == new[:, :, None]) & (out.candidate_values == out.token_values[:, :, None])
    assert among.any(dim=-1).all()


def test_what_cannot_go_back_is_refused_by_name():
    model = build("mistral")
    with pytest.raises(UnsupportedError, match="StaticSlidingWindowLayer"):
        steer(model, going_back(model), cache_implementation="static", disable_compile=True)
    embedded = model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    with pytest.raises(UnsupportedError, match="inputs_embeds"):
        steer(model, going_back(model), inputs_embeds=embedded)
    follows = build("llama")
    follows.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    follows = type(follows)(follows.config).eval()
    with pytest.raises(UnsupportedError, match="follows the longest row"):
        steer(follows, going_back(model))
    with pytest.raises(UnsupportedError, match="output_attentions"):
        steer(build("mistral", "eager"), going_back(model), output_attentions=True)
    with pytest.raises(UnsupportedError, match="SynthID"):
        marks = {"keys": [1, 2, 3], "ngram_len": 3}
        steer(model, going_back(model), do_sample=True, watermarking_config=SynthIDTextWatermarkingConfig(**marks))


def test_a_static_window_that_is_never_full_goes_back():
    model = build("mistral")
    model.config.sliding_window = 64
    options = {"do_sample": True, "max_new_tokens": 16, "eos_token_id": None}
    static, dynamic = (
        steer(model, going_back(model), **options, cache_implementation=kind, disable_compile=True)
        for kind in ("static", "dynamic")
    )
    assert torch.equal(static.sequences, dynamic.sequences) and (static.taken_back_steps >= 0).any()


@pytest.mark.parametrize("model_type", ["mamba2", "zamba2", "falcon_h1", "qwen3_next"])
def test_recurrent_states_go_back(model_type):
    model = build_tiny(model_type)
    options = {"do_sample": True, "max_new_tokens": 16, "eos_token_id": None}
    out = steer(model, going_back(model), **options)
    new = out.sequences[:, -16:]
    expected = steer(model, [going_back(model, back=0), Dictated(new)], **options)
    assert (out.taken_back_steps >= 0).any()
    same(out.token_values, expected.token_values)


def test_a_head_over_time_goes_back():
    model = build("llama")
    head = layered_head(model, ["final"], "mean")
    options = {"do_sample": True, "max_new_tokens": 16, "eos_token_id": None}
    out = steer(model, going_back(model, value_head=head), **options)
    expected = steer(model, [going_back(model, 0, value_head=head), Dictated(out.sequences[:, -16:])], **options)
    assert (out.taken_back_steps >= 0).any()
    same(out.token_values, expected.token_values)
