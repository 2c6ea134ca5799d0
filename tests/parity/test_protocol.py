"""The protocol of methods: a sixth one from outside."""

import gc
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from hf_value_steer import AbstentionConfig
from hf_value_steer.generation.method import Method
from hf_value_steer.policy import Candidates, decide
from tests.families import build, random_head
from tests.steer import rejecting, steer


class Onlooker(Method):
    """Changes nothing, and has a state of its own."""

    method, rowwise = "onlooker", ("seen",)

    def bind(self, call):
        self.seen = torch.zeros(call.rows)
        return [self]

    def observe(self, moment):
        if moment.outcome is not None:
            self.seen = self.seen * 0.5 + moment.outcome.tokens * moment.live


def test_a_method_that_takes_no_part_is_an_error():
    model = build("llama")
    idle = Onlooker()
    idle.bind = lambda call: []
    with pytest.raises(ValueError, match="takes no part"):
        steer(model, idle)


def test_nothing_of_a_call_waits_for_the_garbage_collector():
    model, heads = build("llama"), random_head(build("llama"))
    asked = [rejecting(model), AbstentionConfig(value_head=heads, threshold=0.9), Onlooker()]
    gc.collect()
    gc.disable()
    try:
        before = sum(type(each) is DynamicCache for each in gc.get_objects())
        for _ in range(3):
            steer(model, asked)
        assert sum(type(each) is DynamicCache for each in gc.get_objects()) == before
    finally:
        gc.enable()


class Sixth(Onlooker):
    """Uses every hook: values tokens by a head, keeps what is below 0.4, writes 42 as the second token of row 0."""

    values_texts = judges = True
    most = 3

    def __init__(self, head, back=0):
        self.head, self.back, self.called = head, back, Counter()

    def bind(self, call):
        self.vocabulary, self.first = call.model.config.vocab_size, 0
        return super().bind(call)

    def separate(self, row, stops):
        self.called["separate"] += 1
        self.first = row

    @contextmanager
    def around_forward(self, reading):
        self.called["prompt" if reading.prompt else "forward"] += 1
        yield

    def values(self, features, rows=None):
        return self.head(features).value

    def prescribe(self, draw):
        self.called["prescribe"] += 1
        if draw.step == 1 and self.first == 0:
            draw.tokens[0], draw.forced[0] = 42, True

    def acting(self, draw):
        return draw.live & ~draw.forced

    def accepts(self, values, draw):
        return values < 0.4

    def propose(self, draw, rows, known, acting):
        self.called["propose"] += 1
        if draw.candidates is not None:
            return Candidates(draw.candidates[rows], known)
        others = (draw.tokens[rows, None] + torch.tensor([1, 2])) % self.vocabulary
        return Candidates(torch.cat([draw.tokens[rows, None], others.masked_fill(~acting[:, None], -1)], dim=1), known)

    def visit(self, draw):
        self.called["visit"] += 1
        return draw.scores.topk(3).indices

    def decide(self, draw, rows, candidates, values, acting):
        self.called["decide"] += 1
        return decide(candidates, values, torch.full(rows.shape, 0.4), "undesirable", "argmin", acting)

    def observe(self, moment):
        self.called["observe"] += 1
        super().observe(moment)

    def record(self, moment):
        self.called["record"] += 1
        return {"guided": self.seen > 0}

    def restore(self, rows, state):
        self.called["restore"] += 1
        super().restore(rows, state)

    def rewritten(self, row, moments, taken):
        self.called["rewritten"] += 1


HOOKS = ("prompt", "forward", "prescribe", "propose", "decide", "observe", "record")


@pytest.mark.parametrize("evaluation", ["lazy", "eager", "auto"])
def test_a_sixth_method_is_an_object(evaluation):
    model, sixth = build("llama"), Sixth(random_head(build("llama")))
    sixth.evaluation = evaluation
    out = steer(model, sixth, eos_token_id=None)
    assert out.interventions.any() and out.sequences[0, -9] == 42 and out.guided.all()
    assert all(sixth.called[hook] for hook in HOOKS) and not sixth.called["separate"]


def test_a_sixth_method_goes_back():
    model, outs = build("llama"), []
    for evaluation in ("lazy", "eager"):
        sixth = Sixth(random_head(model), back=3)
        sixth.evaluation = evaluation
        out = steer(model, sixth, eos_token_id=None, max_new_tokens=20)
        assert all(sixth.called[hook] for hook in (*HOOKS, "separate", "restore", "rewritten", "visit"))
        seen = torch.zeros(3)
        for tokens in out.sequences[:, -20:].T:  # its state is that of the text that was kept
            seen = seen * 0.5 + tokens
        assert torch.equal(sixth.seen, seen)
        outs.append(out)
    assert (outs[0].taken_back_steps >= 0).any() and torch.equal(outs[0].sequences, outs[1].sequences)


def test_two_methods_that_judge_are_one_too_many():
    model = build("llama")
    with pytest.raises(ValueError, match="one method that decides"):
        steer(model, [rejecting(model), Sixth(random_head(model))])


def test_a_method_without_values_is_enough():
    model = build("llama")
    plain, out = steer(model), steer(model, Onlooker())
    assert torch.equal(out.sequences, plain.sequences) and out.token_values.isnan().all()
