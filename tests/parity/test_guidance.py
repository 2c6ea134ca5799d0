"""Guidance in `generate` against the oracle, plain `generate`, beside the other methods, and what it refuses."""

import json

import pytest
import torch
from transformers import StaticCache

from hf_value_steer import (
    AbstentionConfig,
    BlockCache,
    GuidanceConfig,
    GuidanceModule,
    GuidanceModuleConfig,
    ValueFilterConfig,
    enable_value_steer,
)
from hf_value_steer.backbone.parts import decoder_layers, fingerprint
from hf_value_steer.hosts.transformers import CACHE
from tests.families import FAMILIES, build, layered_head, prompts, random_head
from tests.guidance_oracle import call, embed, guided_logits, text_mask
from tests.steer import steer
from tests.tiny_models import build_tiny


PROMPT, NEW_TOKENS = 11, 12


def make_module(model, **options):
    """A random module whose values spread, and whose bridges matter."""
    torch.manual_seed(11)
    config = {"hidden_size": model.config.hidden_size, "layer": 0, "num_bridges": 3, "value_width": 16}
    module = GuidanceModule(GuidanceModuleConfig(**config | {"bridge_heads": 4} | options)).eval()
    with torch.no_grad():
        module.generator.raw_gate.fill_(3.0)
        module.generator.norm.weight.mul_(3.0)
        module.discriminator.last.weight.mul_(20.0)
        if module.config.hidden_size == model.config.hidden_size:
            module.discriminator.last.bias -= median_logit(model, module)
    return module


def median_logit(model, module):
    """With this taken off, a module is content with about half of the tokens."""
    inputs, logits = prompts(4), []
    for ids, start in zip(inputs["input_ids"], inputs["attention_mask"].argmax(dim=1), strict=True):
        hidden, layers = embed(model, ids[start:])
        length = len(ids) - int(start)
        hidden = call(model, layers, 0, hidden, torch.arange(length), text_mask(model, 0, length))
        logits.append(module(hidden, hidden, torch.ones(1, length, dtype=torch.bool)).logits[0, -5:])
    ordered = torch.cat(logits).sort().values
    return ordered[7:9].mean()  # between two tokens, so that none is at the threshold


def check_against_oracle(model, out, inputs, module, interval, momentum, neutral):
    """The logits of every step are those of the oracle, and so is who was shown a bridge."""
    shown = []
    for row, start in enumerate(inputs["attention_mask"].argmax(dim=1).tolist()):
        text = out.sequences[row, start:]
        logits, seen = guided_logits(model, module, text, PROMPT - start, interval, momentum, neutral)
        torch.testing.assert_close(torch.stack(out.logits)[:, row], logits[:-1], rtol=1e-4, atol=1e-4)
        assert out.guided[row].tolist() == seen[1:]
        shown += seen
    assert all(shown) if not neutral else interval == 0 or 0 < sum(shown) < len(shown)


def generate(model, value_steer, inputs, **arguments):
    arguments = {**inputs, "max_new_tokens": NEW_TOKENS, "repetition_penalty": 1.2, **arguments}
    return steer(model, value_steer, 5, **arguments)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("interval", [1, 3, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_those_of_the_oracle(family, interval, rows):
    model, inputs = build(family), prompts(rows)
    module, neutral = make_module(model), rows == 4
    config = GuidanceConfig(module=module, refresh_interval=interval, momentum=0.6, neutral_when_safe=neutral)
    arguments = {"repetition_penalty": 1.0, "eos_token_id": None, "output_logits": True}
    out = generate(model, config, inputs, **arguments)
    check_against_oracle(model, out, inputs, module, interval, 0.6, neutral)
    assert torch.equal(torch.stack(out.logits, dim=1).argmax(-1), out.sequences[:, PROMPT:])
    plain = model(**inputs).logits[:, -1]
    assert neutral or not torch.allclose(out.logits[0], plain, rtol=1e-2, atol=1e-2)


def test_sampled_texts_and_ends_of_rows_are_those_of_the_oracle(llama):
    inputs, module = prompts(4), make_module(llama)
    config = GuidanceConfig(module=module)
    out = generate(llama, config, inputs, do_sample=True, top_p=0.9, output_logits=True, eos_token_id=None)
    check_against_oracle(llama, out, inputs, module, 1, 0.8, True)
    ended = generate(llama, config, inputs, do_sample=True, top_p=0.9)
    for row, (one, other) in enumerate(zip(ended.sequences, out.sequences, strict=False)):
        end = PROMPT + int((~ended.token_values[row].isnan()).sum())
        assert torch.equal(one[:end], other[:end]) and (one[end:] == 0).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ["static", "block"])
def test_every_cache_and_attention_gives_the_same(family, kind, attention):
    model, inputs = build(family, attention), prompts(4)
    config = GuidanceConfig(module=make_module(model), refresh_interval=2)
    expected = generate(build(family), config, inputs, output_logits=True)
    caches = {
        "static": lambda: StaticCache(config=model.config, max_cache_len=PROMPT + NEW_TOKENS + 1),
        "block": lambda: BlockCache(model.config),
    }
    out = generate(model, config, inputs, output_logits=True, **{CACHE: caches[kind]()})
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_lower_layers_and_the_cache_are_those_of_the_text_alone(family):
    model, inputs = build(family), prompts(1)
    config = GuidanceConfig(module=make_module(model), neutral_when_safe=False)
    seen = []
    handle = decoder_layers(model)[0].register_forward_hook(lambda _m, _a, output: seen.append(output))
    out = generate(model, config, inputs, eos_token_id=None)
    lower = torch.cat([each[0] if isinstance(each, tuple) else each for each in seen], dim=1)
    seen.clear()
    model(out.sequences, use_cache=False)
    handle.remove()
    whole = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(lower, whole, rtol=1e-4, atol=1e-4)
    assert out[CACHE].get_seq_length() == PROMPT + NEW_TOKENS - 1
    for layer in out[CACHE].layers:
        assert layer.keys.shape[2] <= PROMPT + NEW_TOKENS - 1


@pytest.mark.parametrize("injection", ["bridge", "inject"])
def test_a_content_module_and_a_closed_gate_leave_the_backbone_alone(llama, injection):
    inputs = prompts(4)
    plain = llama.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True,
                           return_dict_in_generate=True)  # fmt: skip
    content, closed = make_module(llama, injection=injection), make_module(llama, injection=injection)
    with torch.no_grad():
        content.discriminator.last.bias.fill_(-500.0)
        closed.generator.raw_gate.fill_(-200.0)
    for module, neutral in ((content, True), (closed, False)):
        config = GuidanceConfig(module=module, neutral_when_safe=neutral)
        out = generate(llama, config, inputs, output_logits=True, repetition_penalty=1.0)
        assert torch.equal(out.sequences, plain.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), rtol=1e-5, atol=1e-5)
        assert not out.guided.any()


def test_injection_adds_to_the_state(llama):
    module = make_module(llama, injection="inject")
    config = GuidanceConfig(module=module, neutral_when_safe=False, momentum=0.0, refresh_interval=1)
    out = generate(llama, config, prompts(1), output_logits=True)
    ids, memory = out.sequences[:, :-1], None

    def add(_module, _args, output):
        states = output.clone()
        nonlocal memory
        memory = module.read_prompt(states[:, :PROMPT])
        everything = torch.ones(1, PROMPT, dtype=torch.bool)
        _, delta = module.correct(module.encode(states[:, PROMPT - 1 :], memory, everything))
        states[:, PROMPT - 1 :] += module.injection(states[:, PROMPT - 1 :], delta)[:, :, 0]
        return states

    handle = llama.model.layers[0].register_forward_hook(add)
    logits = llama(ids, use_cache=False).logits[0, PROMPT - 1 :]
    handle.remove()
    torch.testing.assert_close(torch.stack(out.logits)[:, 0], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("interval", [1, 3])
def test_filter_and_guidance_together(family, interval, evaluation):
    """Every candidate has the bridge of its own state, and the bridge of the committed one goes on."""
    model, inputs = build(family), prompts(3)
    module, head = make_module(model), random_head(model)
    guide = GuidanceConfig(module=module, refresh_interval=interval, momentum=0.5)
    steer = [ValueFilterConfig(value_head=head, threshold=0.4, num_candidates=4, evaluation=evaluation), guide]
    out = generate(model, steer, inputs, output_logits=True, eos_token_id=None)
    assert out.interventions.any()
    check_against_oracle(model, out, inputs, module, interval, 0.5, True)


@pytest.mark.parametrize("temporal", ["none", "mean"])
@pytest.mark.parametrize("layers", [[0], [1], [2], [1, 3]], ids=str)
@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_head_on_layers_reads_tokens_and_no_bridges(family, evaluation, layers, temporal):
    """Below, at and above the layer of the bridges, its values are those of the states in the oracle's forward."""
    model, inputs = build_tiny(family, 4), prompts(3)
    module, head = make_module(model, layer=1), layered_head(model, layers, temporal)
    guide = GuidanceConfig(module=module, refresh_interval=3, momentum=0.5)
    filtering = ValueFilterConfig(value_head=head, threshold=0.5, num_candidates=4, evaluation=evaluation)
    out = generate(model, [filtering, guide], inputs, eos_token_id=None)
    assert out.interventions.any() and out.guided.any()
    for row, start in enumerate(inputs["attention_mask"].argmax(dim=1).tolist()):
        states, first = {}, PROMPT - start - 1
        guided_logits(model, module, out.sequences[row, start:], first + 1, 3, 0.5, True, states=states)
        feature = torch.cat([states[layer] for layer in layers], dim=-1)[first:]
        torch.testing.assert_close(out.token_values[row], head(feature).value[1:], rtol=0, atol=1e-4)


def test_filter_commits_the_first_acceptable_candidate_under_guidance(llama):
    steer = [
        ValueFilterConfig(value_head=random_head(llama), threshold=0.4, num_candidates=4, evaluation=evaluation)
        for evaluation in ("lazy", "eager")
    ]
    guide = GuidanceConfig(module=make_module(llama))
    lazy, eager = (generate(llama, [each, guide], prompts(4), do_sample=True) for each in steer)
    assert torch.equal(lazy.sequences, eager.sequences)
    torch.testing.assert_close(lazy.token_values, eager.token_values, rtol=0, atol=1e-5, equal_nan=True)


def test_abstention_and_guidance_together(llama):
    guide = GuidanceConfig(module=make_module(llama))
    out = generate(llama, [guide, AbstentionConfig(value_head=random_head(llama), threshold=1e-6)], prompts(4))
    assert out.abstained.all() and out.sequences.shape[1] == PROMPT + 1


def test_values_without_a_head_are_those_of_the_module(llama, tmp_path):
    module = make_module(llama)
    out = generate(llama, GuidanceConfig(module=module), prompts(2), eos_token_id=None)
    assert ((out.token_values > 0.5) == out.guided).all() and not out.interventions.any()
    module.save_pretrained(tmp_path)
    written = json.dumps(GuidanceConfig(module=str(tmp_path)).to_dict())
    enable_value_steer(build("llama")).generate(**prompts(2), value_steer=json.loads(written), max_new_tokens=2)


def test_a_module_that_breaks_stops_the_generation(llama):
    module = make_module(llama)
    make, calls = module.bridge, []

    def breaking(*args):
        calls.append(args)
        return make(*args) * (torch.nan if len(calls) > 3 else 1.0)

    module.bridge = breaking
    with pytest.raises(RuntimeError, match=r"not finite at new token 3 in row\(s\) \[0, 1\]"):
        generate(llama, GuidanceConfig(module=module), prompts(2), eos_token_id=None)


def test_a_layer_that_does_not_take_the_bridge_in_stops_the_generation(llama):
    model = build("llama")
    last = model.model.layers[1].self_attn
    plain = last.forward
    last.forward = lambda *args, **kwargs: plain(*args, **kwargs | {CACHE: None})
    config = GuidanceConfig(module=make_module(model), neutral_when_safe=False)
    with pytest.raises((RuntimeError, AttributeError)):
        generate(model, config, prompts(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 64}, "`module` was trained on hidden_size=64"),
        ({"layer": 1}, "`module` reads layer 1, above which this model of 2 layers has none"),
        ({"layer": 7}, "`module` reads layer 7"),
        ({"backbone_fingerprint": "0" * 16}, "`module` was trained on backbone None with fingerprint 0000"),
    ],
)
def test_modules_that_do_not_fit_are_refused_before_any_token(llama, options, message):
    with pytest.raises(ValueError, match=message):
        generate(llama, GuidanceConfig(module=make_module(llama, **options)), prompts(1))


def test_calls_that_cannot_be_guided_are_refused_before_any_token(llama):
    module = make_module(llama, backbone_fingerprint=fingerprint(llama))
    config = GuidanceConfig(module=module)
    one = {name: tensor[:, :1] for name, tensor in prompts(1).items()}
    with pytest.raises(ValueError, match="`input_ids` of at least two"):
        generate(llama, config, one)
    with pytest.raises(ValueError, match="`output_attentions` and `output_hidden_states`"):
        generate(llama, config, prompts(1), output_hidden_states=True)
    with pytest.raises(ValueError, match='lookahead="masked" cannot be used beside guidance|lookahead=.masked'):
        generate(llama, [config, ValueFilterConfig(value_head=random_head(llama), lookahead="masked")], prompts(1))
    with pytest.raises(ValueError, match="Guidance was not verified for model type 'phi'"):
        generate(build_tiny("phi"), config, prompts(1))
    with pytest.raises(ValueError, match='`module` is missing from the "guide" config'):
        generate(llama, {"method": "guide"}, prompts(1))
    with torch.no_grad():
        module.generator.seeds[0, 0] = torch.nan
    with pytest.raises(ValueError, match="guidance module holds NaN"):
        generate(llama, config, prompts(1))


@pytest.mark.parametrize("options", [{"refresh_interval": -1}, {"momentum": 1.0}, {"momentum": float("nan")}])
def test_wrong_values_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` has to be"):
        GuidanceConfig(**options)
