"""The parts of the guidance module against their equations, written out by hand."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from hf_value_steer.configuration.guidance_module import PRESETS, GuidanceModuleConfig
from hf_value_steer.guidance.module import GuidanceModule
from hf_value_steer.guidance.parts import BridgeGenerator, Discriminator


WIDTH, VALUE = 16, 8


def make(**options):
    torch.manual_seed(0)
    config = {"hidden_size": WIDTH, "layer": 0, "num_bridges": 3, "value_width": VALUE, "value_heads": 2}
    module = GuidanceModule(GuidanceModuleConfig(**config | {"bridge_heads": 2} | options)).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
            elif "norm" in name and name.endswith("bias"):
                parameter.normal_()
    return module


def attention(query, key, value, module):
    """Multi-head attention of one query sequence, `(queries, width)`, written out."""
    width, heads = query.shape[-1], module.num_heads
    projected = [x @ w.T + b for x, w, b in zip((query, key, value), module.in_proj_weight.chunk(3),
                                                module.in_proj_bias.chunk(3), strict=True)]  # fmt: skip
    q, k, v = (x.view(len(x), heads, width // heads).transpose(0, 1) for x in projected)
    shares = (q @ k.mT / math.sqrt(width // heads)).softmax(-1)
    return module.out_proj((shares @ v).transpose(0, 1).reshape(len(query), width))


def test_a_discriminator_by_hand():
    discriminator = Discriminator(2, 0.0)
    with torch.no_grad():
        discriminator.first.weight.copy_(torch.tensor([[1.0, -2.0]]))
        discriminator.first.bias.fill_(0.5)
        discriminator.last.weight.fill_(2.0)
        discriminator.last.bias.fill_(-1.0)
    # inner = 1 * 1 - 2 * 0.5 + 0.5 = 0.5; gelu(0.5) = 0.5 * Phi(0.5) = 0.345731
    value = torch.tensor([1.0, 0.5])
    assert discriminator(value).item() == pytest.approx(2 * 0.345731 - 1, abs=1e-5)
    # gelu'(0.5) = Phi(0.5) + 0.5 * phi(0.5) = 0.691462 + 0.5 * 0.352065
    slope = 2 * (0.691462 + 0.5 * 0.352065)
    torch.testing.assert_close(discriminator.gradient(value), torch.tensor([slope, -2 * slope]), atol=1e-5, rtol=0)


def test_values_are_those_of_the_equation():
    module, states, prompt = make(), torch.randn(2, 3, WIDTH), torch.randn(2, 5, WIDTH)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, :2] = False
    module.set_statistics(torch.randn(WIDTH), torch.rand(WIDTH) + 0.5)
    value = module.encode(states, module.read_prompt(prompt), mask)
    part = module.conditional
    for row in range(2):
        h, p = ((x[row] - module.standardise.mean) / module.standardise.scale for x in (states, prompt))
        p = p[mask[row]]
        f_u = F.gelu(h @ module.unconditional[0].weight.T + module.unconditional[0].bias)
        f_h, f_p = (F.gelu(x @ part.encoder[0].weight.T + part.encoder[0].bias) for x in (h, p))
        crossed = attention(part.query_norm(f_h), part.prompt_norm(f_p), part.prompt_norm(f_p), part.attention)
        combined = f_u + part.weight * part.norm(crossed)
        expected = module.normaliser[3](F.gelu(module.normaliser[0](combined)))
        torch.testing.assert_close(value[row], expected, atol=1e-5, rtol=1e-5)
    assert part.weight.item() == 3.0


@pytest.mark.parametrize("correction", ["gradient", "newton"])
def test_the_correction_follows_the_gradient_of_autograd(correction):
    module = make(correction=correction, step=0.7, threshold=0.4)
    value = torch.randn(64, VALUE, requires_grad=True)
    logits, delta = module.correct(value)
    (gradient,) = torch.autograd.grad(module.discriminator(value).sum(), value)
    margin = (logits - math.log(0.4 / 0.6))[:, None]
    beyond = (margin > 0).float()
    factor = 0.7 * beyond if correction == "gradient" else 0.7 * beyond * margin / gradient.square().sum(-1, True)
    torch.testing.assert_close(delta, -factor * gradient)
    assert 0 < beyond.mean() < 1
    assert (delta[margin[:, 0] <= 0] == 0).all()


def test_a_newton_step_reaches_the_threshold_of_a_linear_discriminator():
    module = make(correction="newton")
    with torch.no_grad():
        module.discriminator.first.bias.fill_(50.0)  # where gelu is the identity
        module.discriminator.last.bias.sub_(module.discriminator(torch.zeros(1, VALUE)) - 1.0)
    value = torch.randn(32, VALUE) * 0.1
    logits, delta = module.correct(value)
    moved = module.discriminator(value + delta)
    torch.testing.assert_close(moved, logits.clamp(max=0.0), atol=1e-4, rtol=0)


def test_bridges_are_those_of_the_equation():
    generator = BridgeGenerator(WIDTH, VALUE, 3, 2)
    torch.nn.init.normal_(generator.seeds)
    states, delta = torch.randn(2, 4, WIDTH), torch.randn(2, 4, VALUE)
    bridges = generator(states, delta)
    assert bridges.shape == (2, 4, 3, WIDTH)
    assert generator.gate.item() == pytest.approx(math.log1p(math.exp(-2.0)))
    context = torch.stack([states[1, 2], generator.lift(delta[1, 2])])
    attended = attention(generator.seeds, context, context, generator.attention)
    residual = states[1, 2] + generator.gate * attended
    mean, variance = residual.mean(-1, True), residual.var(-1, correction=0, keepdim=True)
    torch.testing.assert_close(bridges[1, 2], (residual - mean) / (variance + 1e-5).sqrt(), atol=1e-5, rtol=1e-4)


def test_bridges_look_like_the_states_of_the_backbone():
    module = make()
    mean, scale = torch.randn(WIDTH) * 5, torch.rand(WIDTH) * 9 + 1
    module.set_statistics(mean, scale)
    with torch.no_grad():
        module.generator.raw_gate.fill_(-200.0)
    noise = F.layer_norm(torch.randn(5, WIDTH), (WIDTH,))
    bridges = module.bridge(mean + scale * noise, torch.zeros(5, VALUE))
    torch.testing.assert_close(bridges, (mean + scale * noise)[:, None].expand(5, 3, WIDTH), atol=1e-3, rtol=1e-3)


def test_the_injection_is_the_mean_over_the_seeds():
    module, states, delta = make(injection="inject"), torch.randn(2, WIDTH), torch.randn(2, VALUE)
    module.set_statistics(torch.zeros(WIDTH), torch.full((WIDTH,), 2.0))
    attended = module.generator.attend(states / 2, delta)
    torch.testing.assert_close(module.injection(states, delta), 2 * attended.mean(-2, keepdim=True))


def test_the_loss_leaves_out_tokens_without_a_label():
    module, states, prompt = make(), torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH)
    labels = torch.tensor([[1.0, math.nan, 0.0], [math.nan, 0.3, math.nan]])
    out = module(states, prompt, torch.ones(2, 4, dtype=torch.bool), labels)
    counted = ~labels.isnan()
    expected = -(labels * out.value.log() + (1 - labels) * (1 - out.value).log())[counted].mean()
    torch.testing.assert_close(out.loss, expected)


def test_without_the_conditional_path_the_prompt_does_not_matter():
    module, states = make(conditional=False), torch.randn(1, 3, WIDTH)
    mask = torch.ones(1, 4, dtype=torch.bool)
    one, other = (module(states, torch.randn(1, 4, WIDTH), mask).logits for _ in range(2))
    assert torch.equal(one, other)


def test_save_and_load(tmp_path):
    module = make(attribute="toxicity")
    module.set_statistics(torch.randn(WIDTH), torch.rand(WIDTH))
    module.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    for again in (GuidanceModule.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(again, GuidanceModule) and again.fingerprint() == module.fingerprint()
        for name, tensor in module.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
    assert AutoConfig.from_pretrained(tmp_path).layer == 0
    assert module.to(torch.bfloat16).generator.seeds.dtype == torch.float32
    with torch.no_grad():
        module.generator.seeds[0, 0] = math.nan
    module.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="guidance module holds NaN or infinite weights in generator.seeds"):
        GuidanceModule.from_pretrained(tmp_path)


def test_presets():
    for name in PRESETS:
        config = GuidanceModuleConfig.preset(name, step=0.5)
        assert config.step == 0.5 and config.hidden_size % config.bridge_heads == 0
    with pytest.raises(ValueError, match="There is no preset 'gpt3'"):
        GuidanceModuleConfig.preset("gpt3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": -1}, "`layer` counts from 0"),
        ({"value_heads": 3}, "`value_width` has to be a multiple of `value_heads`"),
        ({"threshold": 1.0}, "`threshold` has to be a number"),
        ({"dropout": 1.0}, "`dropout`"),
        ({"step": -1.0}, "`step`"),
        ({"num_bridges": 0}, "`num_bridges`"),
        ({"correction": "none"}, "correction"),
        ({"bridges": 3}, "`bridges` is not a field of GuidanceModuleConfig"),
    ],
)
def test_wrong_values_are_refused_by_name(options, message):
    with pytest.raises(Exception, match=message):
        make(**options)
