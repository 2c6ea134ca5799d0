"""A forward in two parts: what is left in the middle goes on to the same logits."""

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_value_steer.backbone.features import FINAL
from hf_value_steer.backbone.parts import decoder_layers
from hf_value_steer.backbone.shadow import shadow
from hf_value_steer.generation.forwards import Split, Undivided, choose_forwards
from hf_value_steer.hosts.transformers import CACHE
from tests.families import FAMILIES, build


IDS = torch.arange(5, 17).reshape(2, 6)


@pytest.fixture(params=FAMILIES)
def model(request):
    return shadow(build(request.param))


def forwards(model):
    return Split(model), Undivided(model)


@torch.no_grad()
def test_both_ways_give_the_same(model):
    split, whole = (each.run_to({FINAL: Split(model).point}, {"input_ids": IDS}) for each in forwards(model))
    assert torch.equal(split.features[FINAL], whole.features[FINAL])
    assert split.logits is None
    torch.testing.assert_close(Split(model).resume_from(split), whole.logits)


@torch.no_grad()
def test_it_goes_on_from_another_feature(model):
    forward = Split(model)
    reached = forward.run_to({FINAL: forward.point}, {"input_ids": IDS})
    expected = forward.resume_from(reached)[1:, 2:3]
    reached.features = reached.features.each(lambda state: state[1:, 2:3])
    torch.testing.assert_close(forward.resume_from(reached), expected)


@torch.no_grad()
def test_hidden_states_and_attentions_are_there(model):
    forward, asked = Split(model), {"output_hidden_states": True}
    reached = forward.run_to({FINAL: forward.point}, {"input_ids": IDS, **asked})
    expected = model(input_ids=IDS, **asked).hidden_states
    assert len(reached.hidden_states) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(reached.hidden_states, expected, strict=True))


@torch.no_grad()
def test_the_layers_run_once_and_the_output_embedding_once(model):
    forward, cache = Split(model), model(input_ids=IDS, use_cache=True)[CACHE]
    calls = {"layers": 0, "embedded": 0}
    decoder_layers(model)[0].register_forward_hook(lambda *_: calls.update(layers=calls["layers"] + 1))
    head = forward.point.module
    head.register_forward_pre_hook(lambda _, args: calls.update(embedded=calls["embedded"] + args[0].shape[1]))
    reached = forward.run_to({FINAL: forward.point}, {"input_ids": IDS[:, :1], CACHE: cache})
    forward.resume_from(reached)
    assert calls == {"layers": 1, "embedded": 2}  # it is shown a position when it is left, and when it goes on
    assert cache.get_seq_length() == 7


def test_an_error_in_the_middle_leaves_nothing_behind(model):
    forward = Split(model)

    def broken(*_):
        raise RuntimeError("in the middle")

    handle = decoder_layers(model)[0].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        forward.run_to({FINAL: forward.point}, {"input_ids": IDS})
    handle.remove()
    assert not forward.point.watchers
    forward.run_to({FINAL: forward.point}, {"input_ids": IDS[:, :3]})
    assert forward.stack.module(input_ids=IDS).last_hidden_state.shape[1] == IDS.shape[1]


def test_compiled_forwards_are_not_left_in_the_middle(model):
    assert isinstance(choose_forwards(model), Split)
    vars(model)["forward"] = torch.compile(model.forward, backend="eager")
    assert isinstance(choose_forwards(model), Undivided)


class Twice(LlamaForCausalLM):
    """A forward of one's own, which may do anything between the layers and the output embedding."""

    def forward(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(*args, **kwargs)


def hooked(where):
    model = build("llama")
    where(model).register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: hooked(lambda model: model),
        lambda: hooked(lambda model: model.model),
        lambda: Twice(build("llama").config),
    ],
)
def test_where_it_is_not_certain_the_forward_stays_whole(make):
    assert isinstance(choose_forwards(shadow(make())), Undivided)


@pytest.mark.parametrize("where", [lambda model: model.model.layers[0], lambda model: model.lm_head])
def test_hooks_on_layers_and_output_embedding_do_not_matter(where):
    assert isinstance(choose_forwards(shadow(hooked(where))), Split)


def test_a_quantised_output_embedding_is_shown_positions():
    model = build("llama")
    weight = torch.nn.Parameter(model.lm_head.weight.data.as_subclass(type("Quantised", (torch.Tensor,), {})))
    model.lm_head.weight = weight
    assert isinstance(choose_forwards(shadow(model)), Undivided)
