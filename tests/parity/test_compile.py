"""With a static cache the ordinary step is compiled exactly when plain `generate` compiles it, and once."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from hf_value_steer import AbstentionConfig, ValueFilterConfig, value_steer_generate
from hf_value_steer.errors import ScoringError
from hf_value_steer.generation.depth_graph import DepthGraph
from hf_value_steer.generation.kernels import Whole
from hf_value_steer.hosts.transformers import CACHE
from tests.families import accepting_head, build, layered_head, prompts, random_head
from tests.steer import rejecting, steer
from tests.tiny_models import build_tiny


@pytest.fixture
def compile_config():
    """As on an accelerator, with a backend that takes no time."""
    torch._dynamo.reset()
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    yield config
    torch._dynamo.reset()


def generate(model, compile_config, config=None):
    sampling = {"do_sample": True, "max_new_tokens": 20, "cache_implementation": "static"}
    return steer(model, config, 3, **sampling, compile_config=compile_config)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_identity_and_no_recompilation(family, compile_config):
    model = build(family)
    plain = generate(model, compile_config)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    counters.clear()
    config = ValueFilterConfig(value_head=accepting_head(model))
    steered = generate(model, compile_config, config)
    assert torch.equal(steered.sequences, plain.sequences)
    assert 0 < counters["stats"]["unique_graphs"] <= graphs
    counters.clear()
    again = generate(model, compile_config, config)
    assert torch.equal(again.sequences, steered.sequences) and counters["stats"]["unique_graphs"] == 0
    assert torch.equal(generate(model, compile_config).sequences, plain.sequences)


@pytest.mark.parametrize("fallback", ["argmin", "abstain"])
@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_the_look_ahead_is_compiled_once_and_commits_the_same(family, evaluation, fallback, compile_config):
    model = build(family)
    options = {"value_head": random_head(model), "threshold": 0.4, "evaluation": evaluation, "fallback": fallback}
    config = ValueFilterConfig(**options, num_candidates=4)
    ordinary = generate(model, None, config)
    counters.clear()
    compiled = generate(model, compile_config, config)
    assert compiled.interventions.any() and torch.equal(compiled.sequences, ordinary.sequences)
    torch.testing.assert_close(compiled.token_values, ordinary.token_values, equal_nan=True, rtol=1e-4, atol=1e-5)
    shapes = 2 if evaluation == "lazy" else 1  # the look-ahead, and the ordinary step
    filling = family == "gemma3"  # a window that fills up makes another graph
    assert counters["stats"]["unique_graphs"] <= shapes + filling
    counters.clear()
    generate(model, compile_config, config)
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("lookahead", ["shared_prefix", "expanded"])
def test_a_kernel_that_was_asked_for_is_used_beside_the_compiled_step(lookahead, compile_config, monkeypatch):
    model = build("qwen3")
    config = rejecting(model, lookahead=lookahead)
    ordinary = generate(model, None, config)
    monkeypatch.setattr(Whole, "inputs", None)
    compiled = generate(model, compile_config, config)
    assert compiled.interventions.any() and torch.equal(compiled.sequences, ordinary.sequences)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.usefixtures("compile_config")
@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
def test_a_forward_that_the_user_compiled(evaluation):
    def steered(model):
        config = ValueFilterConfig(value_head=random_head(model), num_candidates=4, evaluation=evaluation)
        return steer(model, config, 3, do_sample=True, max_new_tokens=12, eos_token_id=None)

    model, expected = build("llama"), steered(build("llama"))
    model.forward = torch.compile(model.forward, backend="eager")
    out = steered(model)
    assert expected.interventions.any() and torch.equal(out.interventions, expected.interventions)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.token_values, expected.token_values)


@pytest.mark.usefixtures("compile_config")
def test_abstention_keeps_a_whole_graph_whole():
    model = build("llama")
    config = AbstentionConfig(value_head=random_head(model, "desirable"), threshold=0.01)
    arguments = {**prompts(2), "max_new_tokens": 6}
    expected = steer(model, config, **arguments)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    out = steer(model, config, **arguments)
    assert out.token_values.isfinite().any()
    torch.testing.assert_close(out.token_values, expected.token_values, equal_nan=True)


@pytest.mark.usefixtures("compile_config")
def test_a_graph_that_was_made_without_us_is_made_anew():
    model = build("llama")
    steer = {"custom_generate": value_steer_generate, "value_steer": ValueFilterConfig(value_head=random_head(model))}
    expected = model.generate(**prompts(2), max_new_tokens=2, **steer)
    model.forward = torch.compile(model.forward, backend="eager")
    plain = model.generate(**prompts(2), max_new_tokens=2)
    assert torch.equal(model.generate(**prompts(2), max_new_tokens=2, **steer), expected)
    assert not torch.equal(plain, expected)


def test_an_output_embedding_that_is_passed_by_is_refused(monkeypatch):
    model = build("llama")
    steer = {"custom_generate": value_steer_generate, "value_steer": ValueFilterConfig(value_head=random_head(model))}
    another = torch.nn.Linear(32, 101)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: another)
    with pytest.raises(RuntimeError, match="The output embedding was called where it cannot be watched"):
        model.generate(**prompts(2), max_new_tokens=2, **steer)


@pytest.mark.parametrize("lookahead", ["expanded", "shared_prefix"])
@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
def test_a_look_ahead_that_is_not_compiled_beside_a_step_that_is(evaluation, lookahead, compile_config):
    model = build("qwen3")
    config = rejecting(model, evaluation=evaluation, lookahead=lookahead)
    ordinary, compiled = generate(model, None, config), generate(model, compile_config, config)
    assert compiled.interventions.any() and torch.equal(compiled.sequences, ordinary.sequences)
    torch.testing.assert_close(compiled.token_values, ordinary.token_values, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("temporal", ["none", "mean"])
def test_heads_on_layers_commit_the_same(temporal, evaluation, compile_config):
    model = build("qwen3")
    options = {"value_head": layered_head(model, [0, "final"], temporal), "evaluation": evaluation}
    config = ValueFilterConfig(**options, threshold=0.45, num_candidates=4)
    ordinary = generate(model, None, config)
    compiled = generate(model, compile_config, config)
    assert compiled.interventions.any() and torch.equal(compiled.sequences, ordinary.sequences)
    torch.testing.assert_close(compiled.token_values, ordinary.token_values, equal_nan=True, rtol=1e-4, atol=1e-5)
    on_a_layer = ValueFilterConfig(
        value_head=layered_head(model, [0], temporal), threshold=0.45, num_candidates=4, evaluation=evaluation
    )
    ordinary, compiled = generate(model, None, on_a_layer), generate(model, compile_config, on_a_layer)
    assert compiled.interventions.any() and torch.equal(compiled.sequences, ordinary.sequences)


DEPTH_FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2")


@pytest.fixture
def graphs(monkeypatch):
    """How often an eager step at a layer ran as one graph."""
    calls, own = [], DepthGraph.__call__
    monkeypatch.setattr(DepthGraph, "__call__", lambda self, *given: calls.append(1) or own(self, *given))
    return calls


@pytest.mark.parametrize("fallback", ["argmin", "abstain"])
@pytest.mark.parametrize("temporal", ["none", "mean"])
@pytest.mark.parametrize("family", DEPTH_FAMILIES)
def test_an_eager_step_at_a_layer_is_one_graph(family, temporal, fallback, compile_config, graphs):
    """Sliding windows too; and the graph serves the calls after it."""
    model, steps = build_tiny(family, 4), 20
    options = {"value_head": layered_head(model, [1], temporal), "threshold": 0.45, "fallback": fallback}
    config = ValueFilterConfig(**options, num_candidates=4, evaluation="eager")
    call = {"do_sample": True, "max_new_tokens": steps, "cache_implementation": "static", "output_logits": True}
    ordinary = steer(model, config, 3, **call)
    compile_config.fullgraph = True
    counters.clear()
    compiled = steer(model, config, 3, **call, compile_config=compile_config)
    assert compiled.token_values.isfinite().any() and torch.equal(compiled.sequences, ordinary.sequences)
    torch.testing.assert_close(compiled.token_values, ordinary.token_values, equal_nan=True, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(compiled.logits), torch.stack(ordinary.logits), rtol=1e-3, atol=1e-3)
    filling = family in ("gemma3_text", "qwen3")  # a window that fills up makes another graph
    assert 1 <= counters["stats"]["unique_graphs"] <= 1 + filling
    assert len(graphs) == len(compiled.logits)
    counters.clear()
    ending = {"eos_token_id": 5} if fallback == "abstain" else {}
    again = steer(model, config, 4, **call, **ending, compile_config=compile_config)
    assert len(graphs) == len(compiled.logits) + len(again.logits)
    assert counters["stats"]["unique_graphs"] == 0 and not counters["graph_break"]


def test_the_cache_of_compiled_steps_at_a_layer_goes_on(compile_config, graphs):
    model = build_tiny("gemma3_text", 4)
    head = layered_head(model, [1])
    for reads in ([0, 1], [2, 3]):  # and another method reads layers below and above
        abstain = AbstentionConfig(value_head=layered_head(model, reads), threshold=0.99, patience=9)
        config = [ValueFilterConfig(value_head=head, threshold=0.45, evaluation="eager", num_candidates=4), abstain]
        call = {"max_new_tokens": 12, "cache_implementation": "static", "eos_token_id": 2}
        ordinary = steer(model, config, **call)
        compiled = steer(model, config, **call, compile_config=compile_config)
        assert graphs and compiled.interventions.any() and torch.equal(compiled.sequences, ordinary.sequences)
        assert torch.equal(compiled.abstention_step, ordinary.abstention_step)
        for mine, theirs in zip(compiled[CACHE].layers, ordinary[CACHE].layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-3, atol=1e-4)


def test_a_value_that_is_no_number_ends_a_compiled_step_at_a_layer(compile_config, graphs):
    model = build_tiny("llama", 4)
    head = layered_head(model, [1])
    config = ValueFilterConfig(value_head=head, threshold=0.45, evaluation="eager")
    call = {"max_new_tokens": 6, "cache_implementation": "static", "compile_config": compile_config}
    steer(model, config, **call)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(ScoringError):
        steer(model, config, **call)
    assert graphs
