"""The protocol of methods: a sixth one from outside, and going back in a row as if nothing had been."""

import gc
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import BaseStreamer

from hf_value_steer import AbstentionConfig, BlockCache, UnsupportedError
from hf_value_steer.generation.method import Method
from hf_value_steer.hosts.transformers import CACHE
from hf_value_steer.policy import Candidates, decide
from tests.families import accepting_head, build, random_head
from tests.steer import rejecting, steer
from tests.tiny_models import build_tiny


SAMPLING = {"do_sample": True, "top_p": 0.95, "repetition_penalty": 1.2, "max_new_tokens": 14, "min_new_tokens": 14}
OUTPUTS = {"output_scores": True, "output_logits": True, "output_hidden_states": True}


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        self.tokens.append(None)


class Rewriter(Method):
    """Takes tokens of one row back: `tokens` is asked what to commit instead, the same ones by default."""

    rowwise = ("seen",)

    def __init__(self, row=1, back=3, steps=(5, 9), tokens=lambda before: before):
        self.method, self.row, self.back, self.steps, self.tokens = "rewriter", row, back, steps, tokens

    def bind(self, call):
        self.seen = torch.zeros(call.rows)
        return [self]

    def observe(self, moment):
        if moment.outcome is not None:
            self.seen = self.seen * 0.5 + moment.outcome.tokens * moment.live

    def rewrite(self, moment):
        if moment.step not in self.steps:
            return {}
        text = torch.cat([moment.draw.input_ids, moment.outcome.tokens[:, None]], dim=1)
        return {self.row: self.tokens(text[self.row, -self.back :].clone())}


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


def caches(kind, model):
    return {CACHE: BlockCache(model.config)} if kind == "block" else {"cache_implementation": kind}


@pytest.mark.parametrize("kind", ["dynamic", "block", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
def test_tokens_that_are_taken_back_and_committed_again_leave_no_trace(family, kind, evaluation):
    model = build(family)
    if kind == "static" and family in ("mistral", "gemma3"):
        pytest.skip("a static window overwrites its past")
    asked = [
        rejecting(model, evaluation=evaluation, seed=0, output_candidates=True),
        AbstentionConfig(value_head=random_head(model), threshold=0.9, patience=3),
    ]

    def generate(*more):
        streamer = Recorder()
        extra = {**OUTPUTS, **SAMPLING, **caches(kind, model), "disable_compile": True}
        out = steer(model, [*asked, *more], token_streamer=streamer, **extra)
        return out, streamer.tokens

    rewriter, idle = Rewriter(), Rewriter(steps=())
    (out, streamed), (expected, streamed_before) = generate(rewriter), generate(idle)
    assert expected.interventions.any()
    assert out.keys() == expected.keys()
    for name in out.keys() - {CACHE}:
        same(out[name], expected[name])
    for mine, theirs in zip(out[CACHE].layers, expected[CACHE].layers, strict=True):
        same((mine.keys, mine.values), (theirs.keys, theirs.values))
    assert len(streamed) == len(streamed_before)
    same(streamed[:-1], streamed_before[:-1])
    same(rewriter.seen, idle.seen)


def test_other_tokens_in_their_place_are_gone_on_from():
    model = build("llama")
    asked = [rejecting(model, threshold=0.99), Rewriter(steps=(5,), tokens=lambda _: torch.tensor([30, 31, 32]))]
    streamer = Recorder()
    out = steer(model, asked, token_streamer=streamer, output_logits=True, eos_token_id=None)
    plain = steer(model, eos_token_id=None)
    assert torch.equal(out.sequences[[0, 2]], plain.sequences[[0, 2]])
    text, length = out.sequences[1], out.sequences.shape[1] - 10
    assert text[length + 2 : length + 5].tolist() == [30, 31, 32]
    mask = torch.ones(1, length + 5, dtype=torch.long)
    mask[0, :3] = 0
    alone = steer(
        model, input_ids=text[None, : length + 5], attention_mask=mask, max_new_tokens=5, output_logits=True,
        eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(alone.sequences[0], text)
    for step in range(5):
        same(out.logits[5 + step][1], alone.logits[step][0])
    assert torch.equal(torch.stack(streamer.tokens[1:-1], dim=1), out.sequences[:, length:])


def test_a_row_that_is_over_by_other_tokens_has_ended():
    model = build("llama")
    ending = Rewriter(steps=(5,), tokens=lambda before: torch.tensor([*before[:2], 2]))
    out = steer(model, [rejecting(model, threshold=0.99), ending])
    length = out.sequences.shape[1] - 10
    assert out.sequences[1, length + 4] == 2 and (out.sequences[1, length + 5 :] == 0).all()


@pytest.mark.parametrize("tokens", [4, 0])
def test_more_than_is_remembered_cannot_be_taken_back(tokens):
    model = build("llama")
    rewriter = Rewriter(tokens=lambda before: before.new_zeros(tokens))
    with pytest.raises(ValueError, match="cannot be taken back"):
        steer(model, [rejecting(model, threshold=0.99), rewriter])


def test_the_ending_of_abstention_cannot_be_taken_back():
    model = build("llama")
    abstention = AbstentionConfig(value_head=accepting_head(model), threshold=0.1, message_ids=[33, 44, 55, 66])
    with pytest.raises(ValueError, match="prescribed"):
        steer(model, [abstention, Rewriter(row=0, steps=(3,))])


def test_a_row_does_not_go_on_after_an_end_that_is_put_into_it():
    model = build("llama")
    ending = Rewriter(steps=(5,), tokens=lambda before: torch.tensor([30, 2, 31]))
    with pytest.raises(ValueError, match="after its end"):
        steer(model, [rejecting(model, threshold=0.99), ending])


def test_a_method_that_takes_no_part_is_an_error():
    model = build("llama")
    idle = Rewriter()
    idle.bind = lambda call: []
    with pytest.raises(ValueError, match="takes no part"):
        steer(model, idle)


def test_nothing_of_a_call_waits_for_the_garbage_collector():
    model, heads = build("llama"), random_head(build("llama"))
    asked = [rejecting(model), AbstentionConfig(value_head=heads, threshold=0.9), Rewriter(steps=())]
    gc.collect()
    gc.disable()
    try:
        before = sum(type(each) is DynamicCache for each in gc.get_objects())
        for _ in range(3):
            steer(model, asked)
        assert sum(type(each) is DynamicCache for each in gc.get_objects()) == before
    finally:
        gc.enable()


def test_what_cannot_go_back_is_refused_by_name():
    model = build_tiny("mamba2")
    with pytest.raises(UnsupportedError, match="LinearAttentionLayer"):
        steer(model, [rejecting(model), Rewriter()])
    model = build("mistral")
    with pytest.raises(UnsupportedError, match="StaticSlidingWindowLayer"):
        steer(model, [rejecting(model), Rewriter()], cache_implementation="static", disable_compile=True)
    embedded = model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    with pytest.raises(UnsupportedError, match="inputs_embeds"):
        steer(model, [rejecting(model), Rewriter(row=0)], inputs_embeds=embedded)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        steer(build("mistral", "eager"), [rejecting(model), Rewriter()], output_attentions=True)


class Sixth(Rewriter):
    """Uses every hook: values tokens by a head, keeps what is below 0.6, writes 42 as the second token of row 0."""

    values_texts = judges = True
    most = 3

    def __init__(self, head, **options):
        super().__init__(**options)
        self.head, self.called = head, Counter()

    def bind(self, call):
        self.vocabulary = call.model.config.vocab_size
        return super().bind(call)

    @contextmanager
    def around_forward(self, reading):
        self.called["prompt" if reading.prompt else "forward"] += 1
        yield

    def values(self, features, rows=None):
        return self.head(features).value

    def prescribe(self, draw):
        self.called["prescribe"] += 1
        if draw.step == 1:
            draw.tokens[0], draw.forced[0] = 42, True

    def acting(self, draw):
        return draw.live & ~draw.forced

    def accepts(self, values, draw):
        return values < 0.6

    def propose(self, draw, rows, known, acting):
        self.called["propose"] += 1
        others = (draw.tokens[rows, None] + torch.tensor([1, 2])) % self.vocabulary
        return Candidates(torch.cat([draw.tokens[rows, None], others.masked_fill(~acting[:, None], -1)], dim=1), known)

    def decide(self, draw, rows, candidates, values, acting):
        self.called["decide"] += 1
        return decide(candidates, values, torch.full(rows.shape, 0.6), "undesirable", "argmin", acting)

    def observe(self, moment):
        self.called["observe"] += 1
        super().observe(moment)

    def record(self, moment):
        self.called["record"] += 1
        return {"guided": self.seen > 0}

    def undo(self, rows, snapshot):
        self.called["undo"] += 1
        super().undo(rows, snapshot)


@pytest.mark.parametrize("evaluation", ["lazy", "eager", "auto"])
def test_a_sixth_method_is_an_object(evaluation):
    model, outs = build("llama"), []
    for steps in ((), (6,)):
        sixth = Sixth(random_head(model), steps=steps)
        sixth.evaluation = evaluation
        outs.append(steer(model, sixth, output_logits=True, eos_token_id=None))
        assert sixth.called["undo"] == (4 if steps else 0)
    one, other = outs
    assert one.interventions.any() and one.sequences[0, -9] == 42 and one.guided.all()
    for name in one.keys() - {CACHE}:
        same(one[name], other[name])
    assert all(
        sixth.called[hook] for hook in ("prompt", "forward", "prescribe", "propose", "decide", "observe", "record")
    )


def test_two_methods_that_judge_are_one_too_many():
    model = build("llama")
    with pytest.raises(ValueError, match="one method that decides"):
        steer(model, [rejecting(model), Sixth(random_head(model))])


def test_a_method_without_values_is_enough():
    model = build("llama")
    plain, out = steer(model), steer(model, Rewriter())
    assert torch.equal(out.sequences, plain.sequences) and out.token_values.isnan().all()
