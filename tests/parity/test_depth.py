"""Tokens judged at a layer: the states that are read there, and whatever else a call asks for beside it."""

from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from transformers import set_seed

from hf_value_steer import (
    AbstentionConfig,
    AbstentionLogitsProcessor,
    ActivationConfig,
    GuidanceConfig,
    ValueFilterConfig,
    value_steer_generate,
)
from hf_value_steer.activation.apply import steered
from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation import depth
from hf_value_steer.generation.families import MASKED, SHARED_PREFIX
from hf_value_steer.generation.method import Method
from tests.families import layered_head, prompts
from tests.layers import CANDIDATES, model_of
from tests.layers import FAMILIES as TWELVE
from tests.oracle import states
from tests.parity.test_guidance import make_module
from tests.steer import steer
from tests.tiny_models import build_tiny
from tests.unit.test_steering_vectors import random_vectors


FAMILIES = (*TWELVE, "qwen2", "falcon", "gpt_neox", "olmo2", "starcoder2", "stablelm", "cohere", "mamba")
LAYERS = (0, 1, 2, 3, "final")
SEQUENCES = [[5, 9, 33, 7, 12, 41, 8], [77, 3, 15, 60, 22]]


class Recorder(Method):
    """Keeps the states of every committed token at all layers."""

    method = "record"
    values_texts = True
    reads = LAYERS

    def bind(self, call):
        self.seen = []
        return [self]

    def values(self, features, rows=None):
        return torch.full(features.shape[:-1], 0.5)

    def observe(self, moment):
        self.seen.append(moment.features.of(LAYERS))


def generate(model, steer, rows=3, **options):
    set_seed(3)
    arguments = {"max_new_tokens": 12, "do_sample": True, "return_dict_in_generate": True, "eos_token_id": None}
    return model.generate(
        **prompts(rows), **arguments | options, custom_generate=value_steer_generate, value_steer=steer
    )


def kernels(family):
    return ["expanded", *["shared_prefix"] * (family in SHARED_PREFIX), *["masked"] * (family in MASKED)]


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_all_layers_are_those_of_a_forward_without_a_cache(family, evaluation):
    model = model_of(family)
    vectors = random_vectors(model).scale(model, SEQUENCES)
    head, judged = layered_head(model, [1]), 0
    for kernel in kernels(family):
        for steering in ([], [ActivationConfig(vectors=vectors, multiplier=1.5)]):
            recorder = Recorder()
            config = ValueFilterConfig(
                value_head=head, threshold=0.45, num_candidates=CANDIDATES, lookahead=kernel, evaluation=evaluation
            )
            out = generate(model, [config, *steering, recorder])
            judged += int(out.interventions.sum())
            with steered(model, vectors, 1.5) if steering else nullcontext(), torch.no_grad():
                compare(model, out.sequences, torch.stack(recorder.seen, dim=1))
    assert judged > 5


def compare(model, sequences, found):
    for row, mask in enumerate(prompts(3)["attention_mask"]):
        text = sequences[row, int(mask.argmax()) :].tolist()
        expected = states(model, text, LAYERS)[-found.shape[1] :]
        for mine, own in zip(found[row].split(width(model), -1), expected.split(width(model), -1), strict=True):
            assert float((mine - own).norm(dim=-1).max()) <= 1e-4 * float(own.norm(dim=-1).max())


def width(model):
    return model.config.hidden_size


@contextmanager
def judged_behind_the_last_layer():
    with mock.patch.object(depth, "AT_DEPTH", frozenset()):
        yield


@contextmanager
def counted():
    """How often tokens were judged at a layer."""
    calls = []
    with mock.patch.object(depth.AtDepth, "__init__", autospec=True, side_effect=depth.AtDepth.__init__) as made:
        yield calls
        calls.append(made.call_count)


def abstaining(model):
    return [AbstentionConfig(value_head=layered_head(model, [3], "ema"), threshold=0.8, patience=2)]


def vectors_behind_a_gate(model):
    vectors = random_vectors(model).scale(model, SEQUENCES)
    rows = {"multiplier": [2.0, -1.0, 0.5], "tokens": "generated"}
    return [ActivationConfig(vectors=vectors, value_head=layered_head(model, ["final"]), threshold=0.5, **rows)]


def guided(model):
    return [GuidanceConfig(module=make_module(model))]


BESIDE = {
    "nothing": (lambda model: [], {}, True),
    "greedy": (lambda model: [], {"do_sample": False}, True),
    "abstention": (abstaining, {"eos_token_id": 2, "pad_token_id": 0}, True),
    "vectors": (vectors_behind_a_gate, {}, True),
    "guidance": (guided, {}, False),
    "hidden states": (lambda model: [], {"output_hidden_states": True, "output_scores": True}, False),
    "attentions": (lambda model: [], {"output_attentions": True}, False),
}


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("temporal", ["none", "mean"])
@pytest.mark.parametrize("beside", BESIDE)
def test_a_call_is_what_it_is_when_tokens_are_judged_behind_the_last_layer(beside, temporal, evaluation):
    model = model_of("llama")
    others, options, at_depth = BESIDE[beside]
    config = ValueFilterConfig(
        value_head=layered_head(model, [0, 2], temporal), threshold=0.45, num_candidates=4, evaluation=evaluation,
        output_candidates=True,
    )  # fmt: skip
    steer = [config, *others(model)]
    with counted() as calls:
        found = generate(model, steer, **options)
    with judged_behind_the_last_layer():
        expected = generate(model, steer, **options)
    assert calls == [int(at_depth)] and int(found.interventions.sum()) > 3
    for name in expected.keys() - {"past_key_values", "cache"}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)


def test_layers_above_never_see_a_rejected_token():
    model = model_of("llama")
    head = layered_head(model, [1])
    config = ValueFilterConfig(value_head=head, threshold=0.2, num_candidates=4)
    calls = {"below": 0, "above": 0}
    handles = [
        model.model.layers[layer].mlp.register_forward_pre_hook(
            lambda *_, name=name: calls.update({name: calls[name] + 1})
        )
        for layer, name in ((1, "below"), (2, "above"))
    ]
    out = generate(model, config, rows=1)
    for handle in handles:
        handle.remove()
    steps = int((out.candidates_evaluated > 1).sum())
    assert steps > 1 and calls == {"below": 1 + 12 + steps, "above": 1 + 12}


def test_with_hooks_of_the_user_on_layers_tokens_are_judged_behind_the_last_one():
    model = model_of("llama")
    config = ValueFilterConfig(value_head=layered_head(model, [1]), threshold=0.2, num_candidates=4)
    handle = model.model.layers[2].register_forward_hook(lambda _module, _args, output: output + 0.1)
    with counted() as calls:
        found = generate(model, config)
    with judged_behind_the_last_layer():
        expected = generate(model, config)
    handle.remove()
    assert calls == [0] and torch.equal(found.sequences, expected.sequences)


def test_heads_on_layers_that_do_not_fit_are_refused():
    model = model_of("llama")
    for layers, message in (([7], "this model has 4 layers"), ([1, -3], "twice"), ([0, 1], "has width 64")):
        head = layered_head(model, [1])
        head.config.feature_layers = layers
        with pytest.raises(ValueError, match=message):
            generate(model, ValueFilterConfig(value_head=head))


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
def test_layers_that_the_user_compiled(evaluation):
    """A graph would take in what is done between the layers: it is judged behind the last one."""
    model = build_tiny("llama", 4)
    options = {"value_head": layered_head(model, [1]), "threshold": 0.45, "evaluation": evaluation}
    call = {"do_sample": True, "max_new_tokens": 10}
    expected = steer(model, ValueFilterConfig(**options), 2, **call)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    out = steer(model, ValueFilterConfig(**options), 2, **call)
    torch._dynamo.reset()
    assert expected.interventions.any() and torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("layers", [[0], ["final"]], ids=str)
@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
def test_a_processor_of_ours_beside_a_judge_is_refused(evaluation, layers):
    """The last forward that it would read may be a look-ahead."""
    model = build_tiny("llama", 4)
    abstain = AbstentionConfig(value_head=layered_head(model, layers), threshold=0.9)
    config = ValueFilterConfig(value_head=layered_head(model, [1]), threshold=0.45, evaluation=evaluation)
    with pytest.raises(UnsupportedError, match="in the list of `value_steer`"):
        steer(model, config, logits_processor=[AbstentionLogitsProcessor(model, abstain)], eos_token_id=2)
    assert steer(model, [config, abstain], eos_token_id=2).sequences.shape[0] == 3
