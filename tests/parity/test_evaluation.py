"""`evaluation="auto"`: the same text, by steps that are the cheaper ones."""

from types import SimpleNamespace

import pytest
import torch

from hf_value_steer import ActivationConfig, ValueFilterConfig
from hf_value_steer.generation import costs
from hf_value_steer.generation.costs import Costs
from hf_value_steer.generation.steps import Cheaper, Eager, Lazy
from tests.families import accepting_head, build, layered_head, random_head
from tests.steer import rejecting, steer
from tests.unit.test_steering_vectors import random_vectors


@pytest.fixture
def taken(monkeypatch):
    """Which kinds of steps are taken, and costs that are measured anew."""
    kinds = []
    monkeypatch.setattr(costs, "_measured", {})
    for kind in (Lazy, Eager):

        def counted(self, draw, own=kind.__call__, name=kind.__name__):
            kinds.append(name)
            return own(self, draw)

        monkeypatch.setattr(kind, "__call__", counted)
    return kinds


@pytest.mark.parametrize("layers", [[0], ["final"]], ids=str)
@pytest.mark.parametrize("break_even", [0.0, 0.2, 2.0])
@pytest.mark.parametrize("temporal", ["none", "mean"])
def test_the_text_is_the_same(break_even, layers, temporal, taken, monkeypatch):
    model = build("llama")
    options = {"value_head": layered_head(model, layers, temporal), "threshold": 0.45, "num_candidates": 4}
    call = {"do_sample": True, "max_new_tokens": 40, "eos_token_id": None}
    expected = steer(model, ValueFilterConfig(**options), 3, **call)
    taken.clear()
    monkeypatch.setattr(costs, "_measure", lambda *_: Costs(1.0, 2.0, 1.0 + break_even))
    out = steer(model, ValueFilterConfig(**options, evaluation="auto"), 3, **call)
    assert expected.interventions.any() and torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.token_values, expected.token_values)
    assert set(taken) == {0.0: {"Eager"}, 0.2: {"Lazy", "Eager"}, 2.0: {"Lazy"}}[break_even]
    assert taken == sorted(taken, reverse=True)  # from lazy to eager, and never back


def test_measuring_leaves_no_trace(taken):
    model = build("llama")
    call = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 2}
    plain = steer(model, None, 5, **call)
    out = steer(model, ValueFilterConfig(value_head=accepting_head(model), evaluation="auto"), 5, **call)
    assert torch.equal(out.sequences, plain.sequences) and len(costs._measured) == 1
    measured = next(iter(costs._measured.values()))
    assert min(vars(measured).values()) > 0
    timed = len(taken)
    again = steer(model, ValueFilterConfig(value_head=accepting_head(model), evaluation="auto"), 5, **call)
    assert torch.equal(again.sequences, plain.sequences) and next(iter(costs._measured.values())) is measured
    assert len(taken) - timed == 12  # nothing is timed twice
    steer(model, ValueFilterConfig(value_head=accepting_head(model), evaluation="auto", num_candidates=3), 5, **call)
    assert len(costs._measured) == 2


@pytest.mark.parametrize("family", ["mistral", "gpt2", "gemma3"])
@pytest.mark.parametrize("fallback", ["argmin", "args", "abstain"])
def test_every_family_and_fallback(family, fallback, taken):
    model = build(family)
    expected = steer(model, rejecting(model, fallback=fallback), 1, max_new_tokens=14)
    out = steer(model, rejecting(model, fallback=fallback, evaluation="auto"), 1, max_new_tokens=14)
    assert expected.interventions.any() and torch.equal(out.sequences, expected.sequences)


def test_a_broken_head_is_told_by_the_text_and_not_by_the_measuring(taken):
    model, head = build("llama"), random_head(build("llama"))
    own = head.forward

    def broken(*args, **kwargs):
        output = own(*args, **kwargs)
        output.value = output.value * torch.nan
        return output

    head.forward = broken
    with pytest.raises(RuntimeError, match="not finite at new token 0"):
        steer(model, ValueFilterConfig(value_head=head, evaluation="auto"))


@pytest.mark.parametrize("layers", [["final"], [0]], ids=str)
@pytest.mark.parametrize(
    "how", [{"multiplier": (2.0, 1.0, -1.0)}, {"multiplier": 2.0, "tokens": "generated"}], ids=str
)
def test_beside_vectors(how, layers, taken):
    model = build("llama")
    vectors = random_vectors(model)
    options = {"value_head": layered_head(model, layers), "threshold": 0.45, "num_candidates": 4}
    call = {"do_sample": True, "max_new_tokens": 10}
    outs = [
        steer(
            model, [ValueFilterConfig(**options, evaluation=each), ActivationConfig(vectors=vectors, **how)], 3, **call
        )
        for each in ("lazy", "auto")
    ]
    assert outs[0].interventions.any() and torch.equal(outs[1].sequences, outs[0].sequences)
    assert len(costs._measured) == 1


def test_with_returned_attentions(taken):
    model = build("llama", "eager")
    for call in ({"output_attentions": True}, {}):
        expected = steer(model, rejecting(model), 1, max_new_tokens=6, **call)
        out = steer(model, rejecting(model, evaluation="auto"), 1, max_new_tokens=6, **call)
        assert torch.equal(out.sequences, expected.sequences)
    assert len(costs._measured) == 2  # by what candidates are forwarded with


def test_where_nothing_can_be_timed_steps_are_lazy(taken, monkeypatch):
    model, calls = build("llama"), []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    expected = steer(model, rejecting(model))
    times = len(calls)
    out = steer(model, rejecting(model, evaluation="auto"))
    assert torch.equal(out.sequences, expected.sequences) and len(calls) == 2 * times and not costs._measured
    handle.remove()
    monkeypatch.setattr(costs, "_measure", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    taken.clear()
    assert torch.equal(steer(model, rejecting(model, evaluation="auto")).sequences, expected.sequences)
    assert set(taken) == {"Lazy"}


def test_what_is_cheaper():
    assert Costs(1.0, 3.0, 1.5).break_even == 0.25
    assert Costs(1.0, 1.0, 1.5).break_even > 1  # a look that costs nothing
    assert Costs(1.0, 2.0, 0.9).break_even < 0

    def step(looked):
        return lambda _: (None, SimpleNamespace(room=object() if looked else None))

    def kinds(looks, break_even, rows=1):
        lazy, eager, found = iter(looks), [], []
        draw = SimpleNamespace(tokens=torch.zeros(rows))
        auto = Cheaper(lambda _: step(next(lazy))(_), lambda _: eager.append(1) or (None, None), break_even)
        for _ in looks:
            before = len(eager)
            auto(draw)
            found.append("eager" if len(eager) > before else "lazy")
        return found

    assert kinds([False] * 50, 0.06) == ["lazy"] * 50  # 5 % are expected
    assert set(kinds([False] * 50, 0.04)) == {"eager"}
    assert set(kinds([False] * 50, 0.3, rows=16)) == {"eager"}  # of 16 rows one is looked at in 56 % of the steps
    found = kinds([True] * 50, 0.5)
    assert found[0] == "lazy" and found[-1] == "eager"
