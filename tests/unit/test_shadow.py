"""A shadow: the same weights and results, and nothing that is set on it reaches the model."""

import functools
import gc
import types
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers import LlamaForCausalLM

from hf_value_steer import ValueFilterConfig, value_steer_generate
from hf_value_steer.backbone.points import Here, _changes, feature_point, layer_point
from hf_value_steer.backbone.shadow import shadow
from tests.families import FAMILIES, accepting_head, build, prompts, random_head


IDS = torch.tensor([[5, 17, 3, 44, 71, 8]])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_the_same_over_the_same_weights(family):
    model = build(family)
    twin = shadow(model)
    assert type(twin) is type(model) and twin is not model and twin.config is not model.config
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    mine, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)
    assert not {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}
    assert [name for name, _ in model.named_modules()] == [name for name, _ in twin.named_modules()]
    assert torch.equal(
        twin.generate(IDS, do_sample=False, max_new_tokens=6), model.generate(IDS, do_sample=False, max_new_tokens=6)
    )


def test_what_is_set_on_it_stays_there():
    model = build("llama")
    twin = shadow(model)
    twin.config._attn_implementation, twin.anything = "eager", 1
    twin.lm_head.register_forward_pre_hook(lambda *_: None)
    layer_point(twin, 0).attach(lambda state: state * 0)
    twin.model.layers[1] = nn.Identity()
    assert model.config._attn_implementation == "sdpa" and not hasattr(model, "anything")
    assert not model.lm_head._forward_pre_hooks and not isinstance(model.model.layers[1], nn.Identity)
    assert type(model.model.layers[0]).forward is not type(twin.model.layers[0]).forward


def test_a_parameter_that_is_assigned_later_is_seen_by_both():
    model = build("llama")
    twin = shadow(model)
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert twin.lm_head.weight is model.lm_head.weight


class Recorder:
    """Remembers which modules its hooks were given."""

    def __init__(self):
        self.seen = []

    def hook(self, module, *_):
        self.seen.append(module)

    def with_kwargs(self, module, _args, kwargs):
        self.seen.append(module)
        return _args, kwargs

    def partly(self, _extra, module, *_):
        self.seen.append(module)


@torch.no_grad()
def test_hooks_of_the_user_run_once_and_are_given_the_module_of_the_model():
    model, recorder = build("llama"), Recorder()
    layer = model.model.layers[0]
    layer.register_forward_hook(recorder.hook)
    layer.register_forward_pre_hook(recorder.with_kwargs, with_kwargs=True)
    layer.register_forward_hook(functools.partial(recorder.partly, "extra"))
    by_module = {layer: "here"}
    layer.register_forward_hook(lambda module, *_: by_module[module] and None)
    changed = layer.register_forward_hook(lambda _module, _args, output: output * 2.0)
    expected = model(IDS).logits
    assert len(recorder.seen) == 3
    recorder.seen.clear()
    assert torch.equal(shadow(model)(IDS).logits, expected)
    assert recorder.seen == [layer] * 3
    changed.remove()
    assert not torch.equal(shadow(model)(IDS).logits, expected)


REPARAMETRISED = {
    "weight norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer),
    "old weight norm": lambda layer: nn.utils.weight_norm(layer),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", REPARAMETRISED)
def test_weights_that_are_computed_anew_for_each_forward(change):
    model = build("llama")
    REPARAMETRISED[change](model.model.layers[0].self_attn.q_proj)
    REPARAMETRISED[change](model.model.layers[1].mlp.up_proj)
    model.eval()
    plain = model.generate(**prompts(2), do_sample=False, max_new_tokens=8)
    config = ValueFilterConfig(value_head=accepting_head(model))
    steered = model.generate(
        **prompts(2), do_sample=False, max_new_tokens=8, custom_generate=value_steer_generate, value_steer=config
    )
    assert torch.equal(steered, plain)
    if "old" not in change:
        assert parametrize.is_parametrized(shadow(model).model.layers[0].self_attn.q_proj)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_adapters_of_peft():
    model = build("llama")
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    assert torch.equal(shadow(wrapped)(IDS).logits, wrapped(IDS).logits)
    with wrapped.disable_adapter():
        assert torch.equal(shadow(model)(IDS).logits, model(IDS).logits)


def test_references_of_every_kind_are_translated():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.aside = nn.Linear(2, 2), {"plain": [nn.Linear(2, 2)]}
            self.back, self.weak = [self], weakref.ref(self.inner)
            self.call, self.bound = functools.partial(self.inner), self.inner.forward
            inner = self.inner
            self.closure = lambda: inner

    odd = Odd()
    twin = shadow(odd)
    assert twin.inner is not odd.inner and twin.back[0] is twin and twin.weak() is twin.inner
    assert twin.aside["plain"][0] is not odd.aside["plain"][0]
    assert twin.call.func is twin.bound.__self__ is twin.closure() is twin.inner
    assert odd.closure() is odd.inner and odd.back[0] is odd


def test_it_goes_when_the_call_is_over():
    model = build("llama")
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.4, num_candidates=4)
    arguments = {**prompts(2), "max_new_tokens": 4, "custom_generate": value_steer_generate, "value_steer": config}
    model.generate(**arguments)

    def modules():
        gc.collect()
        return sum(issubclass(type(each), nn.Module) for each in gc.get_objects())

    before = modules()
    for _ in range(20):
        model.generate(**arguments)
    assert modules() == before


def test_a_watcher_acts_in_its_own_block_and_nothing_is_left():
    model, seen = build("llama"), []
    point = feature_point(model)
    kind = type(model.lm_head)
    with point.watched(seen.append), point.watched(lambda feature: feature * 0.0):
        assert not model(IDS).logits.any() and len(seen) == 1
    assert type(model.lm_head) is kind and not point.watchers and model(IDS).logits.any() and len(seen) == 1
    with pytest.raises(ZeroDivisionError), point.watched(lambda _: 1 / 0):
        model(IDS)
    assert type(model.lm_head) is kind and not point.watchers
    with Here() as here:
        assert here() and not Here()()
    assert not here()


# Hooks that write what a forward reads.


def own_weight(model):
    """A weight that a hook computes."""
    linear = model.model.layers[0].mlp.down_proj
    weight = linear._parameters.pop("weight")
    linear.register_parameter("weight_v", weight)
    linear.register_forward_pre_hook(lambda module, _args: setattr(module, "weight", module.weight_v * 2.0))
    return weight


def own_scale(model):
    """A number that depends on what is read."""
    mlp = model.model.layers[0].mlp
    mlp.scale = 1.0
    mlp.register_forward_pre_hook(lambda module, args: setattr(module, "scale", 1 + args[0].abs().mean()))
    plain = type(mlp).forward
    mlp.forward = types.MethodType(lambda self, x: plain(self, x) * self.scale, mlp)
    return model.model.layers[0].mlp.down_proj.weight


def of_another_module(model):
    """A layer that hands something to another one."""
    first, second = model.model.layers[0], model.model.layers[1].mlp
    second.extra = 0.0
    first.register_forward_hook(lambda _module, _args, output: setattr(second, "extra", 5 * output))
    plain = type(second).forward
    second.forward = types.MethodType(lambda self, x: plain(self, x) + self.extra, second)
    return second.down_proj.weight


class Capturing(LlamaForCausalLM):
    """A model with a hook of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(self._capture)

    def _capture(self, _module, _args, output):
        self.captured = output

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + self.captured[:, -1:, :1] * torch.linspace(-3, 3, out.logits.shape[-1])
        return out


@pytest.mark.parametrize("write", [own_weight, own_scale, of_another_module, "a class"])
def test_what_a_hook_writes_is_read_by_the_forward(write):
    model = build("llama")
    if write == "a class":
        own = Capturing(model.config).eval()
        own.load_state_dict(model.state_dict())
        own.generation_config = model.generation_config
        model, weight = own, own.lm_head.weight
    else:
        weight = write(model)
    config = ValueFilterConfig(value_head=accepting_head(model))
    arguments = {**prompts(2), "do_sample": False, "max_new_tokens": 8, "output_logits": True}
    arguments["return_dict_in_generate"] = True
    texts = []
    for _ in range(2):  # before plain `generate` has run, and after it with other weights
        steered = model.generate(**arguments, custom_generate=value_steer_generate, value_steer=config)
        plain = model.generate(**arguments)
        assert torch.equal(steered.sequences, plain.sequences)
        torch.testing.assert_close(torch.stack(steered.logits), torch.stack(plain.logits))
        texts.append(plain.sequences)
        with torch.no_grad():
            weight.copy_(weight.roll(1, 0))
    assert not torch.equal(*texts)


def test_a_hook_that_removes_itself_runs_once():
    def once(model):
        handles = []

        def hook(_module, _args, output):
            handles[0].remove()
            return output * 3.0

        handles.append(model.model.layers[0].mlp.register_forward_hook(hook))

    model, arguments = build("llama"), {**prompts(2), "do_sample": False, "max_new_tokens": 8}
    config = ValueFilterConfig(value_head=accepting_head(model))
    once(model)
    steered = model.generate(**arguments, custom_generate=value_steer_generate, value_steer=config)
    once(model)
    assert torch.equal(steered, model.generate(**arguments))


def test_python_state_of_a_module_stays_consistent():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.count, self.seen, self.by_length = 0, [], {}

        def forward(self, states):
            self.count += 1
            self.seen.append(len(states))
            self.by_length.setdefault(len(states), []).append(1)
            assert len(self.seen) == self.count == sum(map(len, self.by_length.values()))
            return states

    model = build("llama")
    model.model.norm = nn.Sequential(model.model.norm, Counting())
    arguments = {**prompts(2), "do_sample": False, "max_new_tokens": 4}
    config = ValueFilterConfig(value_head=accepting_head(model))
    for steer in ({}, {"custom_generate": value_steer_generate, "value_steer": config}, {}):
        model.generate(**arguments, **steer)
    assert model.model.norm[1].count == 8


class Slotted(nn.Linear):
    __slots__ = ("scale",)

    def forward(self, states):
        return super().forward(states) * self.scale


def test_modules_of_unusual_kinds():
    model = build("llama")
    slotted = Slotted(32, 48, bias=False)
    slotted.scale = 0.5
    model.model.layers[0].mlp.up_proj = slotted
    outside = nn.Module()
    outside.factor, outside.inside = 2.0, model
    short = nn.Linear(2, 2)
    model.outside, vars(model)["gone"] = weakref.ref(outside), weakref.proxy(short)
    del short
    twin = shadow(model)
    assert twin.outside().factor == 2.0 and twin.outside().inside is twin
    with torch.no_grad():
        assert torch.equal(twin(IDS).logits, model(IDS).logits)


def test_what_the_garbage_collector_finalises_in_the_middle_of_a_change_waits_for_its_end():
    point, order = feature_point(build("llama")), []
    detach = point.attach(lambda _: None)
    _changes.make(lambda: (order.append("first"), _changes.make(lambda: (detach(), order.append("second"))))[0])
    assert order == ["first", "second"] and not point.watchers


@pytest.mark.parametrize("missing", ["table", "class"])
def test_a_module_that_was_copied_in_the_middle_of_a_change_can_be_watched(missing):
    model, seen = build("llama"), []
    point = layer_point(model, 0)
    kind = type(model.model.layers[0])
    detach = point.attach(lambda _: None)
    if missing == "table":
        del vars(model.model.layers[0])["_value_steer_watchers"]
    else:
        model.model.layers[0].__class__ = kind
    with point.watched(seen.append):
        model(IDS)
    assert len(seen) == 1
    detach()
    model(IDS)
    assert len(seen) == 1 and type(model.model.layers[0]) is kind


def test_a_function_that_keeps_a_module_in_a_default_of_a_keyword():
    model = build("gpt2").train()
    block = model.transformer.h[0]

    def forward(*args, _own=block.forward, **kwargs):
        return _own(*args, **kwargs)

    block.forward = forward
    twin = shadow(model).eval()
    inside = twin.transformer.h[0].forward.__kwdefaults__["_own"].__self__
    assert inside is not block and not inside.training and block.training
    assert torch.equal(twin(IDS).logits, twin(IDS).logits)
