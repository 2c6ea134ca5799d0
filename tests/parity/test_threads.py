"""Alone: what one thread does with a model is seen by no other, and nothing is left behind."""

import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from transformers.generation import BaseStreamer

from hf_value_steer import (
    AbstentionConfig,
    AbstentionLogitsProcessor,
    ActivationConfig,
    GuidanceConfig,
    ValueFilterConfig,
    ValueFilterLogitsProcessor,
    enable_value_steer,
)
from tests.families import build, prompts, random_head
from tests.parity.test_guidance import make_module
from tests.unit.test_steering_vectors import SEQUENCES, random_vectors


ROUNDS = 200
GREEDY = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model():
    return enable_value_steer(build("llama"))


def filtering(model, kernel="auto", polarity="undesirable"):
    head = random_head(model, polarity)
    return ValueFilterConfig(value_head=head, threshold=0.4, num_candidates=4, lookahead=kernel)


def vectors_of(model):
    return random_vectors(model).scale(model, SEQUENCES)


class Job:
    """Something to do with a model, the same every time: a block to be in, and what `generate` is given."""

    def __init__(self, model, rows=2, block=nullcontext, **arguments):
        self.model, self.block = model, block
        self.arguments = {**prompts(rows), **GREEDY, **arguments}

    def __call__(self):
        with self.block():
            out = self.model.generate(**self.arguments)
        return out.sequences, out.get("token_values")


def plain(model):
    return Job(model)


def filtered(model, kernel="auto", polarity="undesirable"):
    return Job(model, value_steer=filtering(model, kernel, polarity))


def steered(model):
    vectors = vectors_of(model)
    return Job(model, block=lambda: vectors.apply(model, [4.0, -4.0], mode="last_token"))


def activated(model):
    return Job(model, value_steer=ActivationConfig(vectors=vectors_of(model), multiplier=4.0))


def abstaining(model):
    config = AbstentionConfig(value_head=random_head(model), threshold=0.55, patience=2)
    return Job(model, logits_processor=[AbstentionLogitsProcessor(model, config)])


def filtered_by_processor(model):
    return Job(model, logits_processor=[ValueFilterLogitsProcessor(model, filtering(model))])


PAIRS = {
    "plain, shared prefix": (plain, lambda model: filtered(model, "shared_prefix")),
    "plain, masked": (plain, lambda model: filtered(model, "masked")),
    "plain, expanded": (plain, lambda model: filtered(model, "expanded")),
    "filter, filter": (filtered, lambda model: filtered(model, "expanded", "desirable")),
    "vectors, plain": (steered, plain),
    "abstention processor, plain": (abstaining, plain),
    "vectors, filter": (steered, filtered),
    "config of vectors, plain": (activated, plain),
    "filter processor, abstention processor": (filtered_by_processor, abstaining),
    "vectors, other vectors": (steered, lambda model: Job(model, block=lambda: vectors_of(model).apply(model, -6.0))),
}


@pytest.fixture
def switching():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def same(found, expected):
    values = [entry[1] for entry in (found, expected)]
    equal = values[0] is values[1] is None or torch.equal(*(value.nan_to_num(-1.0) for value in values))
    return torch.equal(found[0], expected[0]) and equal


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("pair", PAIRS)
def test_two_threads_get_what_each_gets_alone(pair, model):
    jobs = [make(model) for make in PAIRS[pair]]
    alone = [job() for job in jobs]
    assert not torch.equal(alone[0][0], alone[1][0]), "the two jobs write the same: nothing is tested"
    start, wrong = threading.Barrier(2), []

    def work(job, expected):
        for number in range(ROUNDS):
            start.wait(60)
            try:
                if not same(job(), expected):
                    wrong.append(f"round {number}: other text or values")
            except Exception as error:
                wrong.append(f"round {number}: {error!r}")

    threads = [threading.Thread(target=work, args=each) for each in zip(jobs, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"{len(wrong)} of {2 * ROUNDS}: {wrong[:3]}"


class Held(BaseStreamer):
    """Calls `meanwhile` once, at the third token."""

    def __init__(self, meanwhile):
        self.meanwhile, self.calls = meanwhile, 0

    def put(self, value):
        self.calls += 1
        if self.calls == 4:
            self.meanwhile()

    def end(self):
        pass


def methods(model):
    head = random_head(model)
    return {
        **{kernel: filtering(model, kernel) for kernel in ("shared_prefix", "masked", "expanded")},
        "abstain": AbstentionConfig(value_head=head, threshold=0.9999),
        "activate": ActivationConfig(vectors=vectors_of(model), multiplier=4.0, mode="last_token"),
        "guide": GuidanceConfig(module=make_module(model)),
    }


@pytest.mark.parametrize("method", ["shared_prefix", "masked", "expanded", "abstain", "activate", "guide"])
def test_a_plain_call_finishes_while_a_steered_one_is_held(method, model):
    expected, found = plain(model)(), []

    def meanwhile():
        other = threading.Thread(target=lambda: found.append(plain(model)()))
        other.start()
        other.join(60)

    steered_call = Job(model, rows=1, value_steer=methods(model)[method])
    alone = steered_call()
    steered_call.arguments["streamer"] = Held(meanwhile)
    assert same(steered_call(), alone)
    assert found and same(found[0], expected)


def state(model):
    """Everything that somebody else could see of a model."""
    modules = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    tables = {
        name: {key: tuple(entry) for key, entry in attributes.items() if isinstance(entry, dict)}
        for name, (_, attributes) in modules.items()
    }
    return modules, tables, model.config.to_dict(), model.generation_config.to_dict(), model.training


class Unhappy(Exception):
    pass


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("method", ["shared_prefix", "masked", "expanded", "abstain", "activate", "guide"])
def test_a_model_is_untouched_during_a_call_and_after_it(method, raises, model):
    before, during = state(model), []

    def meanwhile():
        during.append(state(model))
        if raises:
            raise Unhappy

    call = Job(model, rows=1, value_steer=methods(model)[method], streamer=Held(meanwhile))
    with torch.autocast("cpu", enabled=False), pytest.raises(Unhappy) if raises else nullcontext():
        call()
    assert during[0] == before and state(model) == before
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
