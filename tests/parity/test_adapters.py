"""PEFT in every form: right, or refused by name; and a head that knows which adapters it was trained with."""

import copy

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)

from hf_value_steer import (
    AbstentionConfig,
    AbstentionLogitsProcessor,
    ActivationConfig,
    MismatchError,
    UnsupportedError,
    ValueFilterConfig,
    ValueFilterLogitsProcessor,
    disable_value_steer,
    enable_value_steer,
)
from hf_value_steer.backbone.parts import fingerprint, underlying
from tests.families import accepting_head, build, prompts, random_head
from tests.steer import GREEDY
from tests.unit.test_steering_vectors import random_vectors


pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`", "ignore:Model has `tie_word_embeddings=True`"
)
LORA = {"target_modules": ["q_proj", "v_proj", "lm_head"], "init_lora_weights": False, "task_type": TaskType.CAUSAL_LM}
VIRTUAL = {"num_virtual_tokens": 3, "task_type": TaskType.CAUSAL_LM}


def adapted(model=None, *names):
    torch.manual_seed(1)
    model = get_peft_model(model or build("llama"), LoraConfig(**LORA), adapter_name=(names or ("default",))[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**LORA))
    return model.eval()


def head_of(model, **options):
    inside = underlying(model)
    head = random_head(inside)
    for name, choice in options.items():
        setattr(head.config, name, choice)
    return head.eval()


@pytest.mark.parametrize("kind", ["lora", "ia3", "modules_to_save"])
def test_a_peft_model_can_be_enabled(kind):
    config = {
        "lora": LoraConfig(**LORA),
        "ia3": IA3Config(
            task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]
        ),
        "modules_to_save": LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, modules_to_save=["lm_head"]),
    }[kind]
    model = get_peft_model(build("llama"), config).eval()
    assert enable_value_steer(model) is model
    inside = underlying(model)
    plain = model.generate(**prompts(3), **GREEDY)
    accept = ValueFilterConfig(value_head=accepting_head(inside))
    assert torch.equal(model.generate(**prompts(3), **GREEDY, value_steer=accept), plain)
    config = {"value_head": random_head(inside), "threshold": 0.4, "num_candidates": 4}
    arguments = {**prompts(3), **GREEDY, "return_dict_in_generate": True}
    lazy, eager = (
        model.generate(**arguments, value_steer=ValueFilterConfig(**config, evaluation=each))
        for each in ("lazy", "eager")
    )
    assert lazy.interventions.any() and torch.equal(lazy.sequences, eager.sequences)
    disable_value_steer(model)
    with pytest.raises(ValueError, match="value_steer"):
        model.generate(**prompts(3), **GREEDY, value_steer=accept)


@pytest.mark.parametrize("kernel", ["auto", "shared_prefix", "masked", "expanded"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_an_adapter_for_each_row(count, kernel):
    # Of three rows; with three candidates, looking ahead in one row gives a forward of three rows, too.
    model = enable_value_steer(adapted(None, "one", "two"))
    head, names = random_head(underlying(model)), ["one", "__base__", "two"]
    config = {"value_head": head, "threshold": 0.4, "num_candidates": count, "lookahead": kernel, "seed": 1}
    call = {**prompts(3), **GREEDY, "return_dict_in_generate": True}
    lazy, eager = (
        model.generate(**call, adapter_names=names, value_steer=ValueFilterConfig(**config, evaluation=each))
        for each in ("lazy", "eager")
    )
    assert lazy.interventions.any() and torch.equal(lazy.sequences, eager.sequences)
    for row, name in enumerate(names):
        model.base_model.enable_adapter_layers()
        model.base_model.disable_adapter_layers() if name == "__base__" else model.set_adapter(name)
        alone = model.generate(**call, value_steer=ValueFilterConfig(**config))
        torch.testing.assert_close(alone.token_values[row], lazy.token_values[row], atol=1e-4, rtol=0, equal_nan=True)
        assert torch.equal(alone.sequences[row], lazy.sequences[row])
    model.base_model.enable_adapter_layers()


@pytest.mark.parametrize("count", [3, 4])
def test_the_filtering_processor_knows_the_adapter_of_each_row(count):
    model = enable_value_steer(adapted(None, "one", "two"))
    config = ValueFilterConfig(
        value_head=random_head(underlying(model)), threshold=0.4, num_candidates=count, proposal="topk"
    )
    call = {**prompts(3), **GREEDY, "adapter_names": ["one", "__base__", "two"]}
    processed = model.generate(**call, logits_processor=[ValueFilterLogitsProcessor(model, config)])
    assert torch.equal(processed, model.generate(**call, value_steer=config))


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_are_refused_everywhere(kind):
    model = get_peft_model(build("llama"), kind(**VIRTUAL)).eval()
    head = random_head(underlying(model))
    enable_value_steer(model)
    for rows in (1, 3):
        with pytest.raises(UnsupportedError, match="virtual tokens"):
            model.generate(**prompts(rows), **GREEDY, value_steer=ValueFilterConfig(value_head=head))
    for make, config in (
        (ValueFilterLogitsProcessor, ValueFilterConfig),
        (AbstentionLogitsProcessor, AbstentionConfig),
    ):
        with pytest.raises(UnsupportedError, match="virtual tokens"):
            make(model, config(value_head=head))


# Which adapters a head was trained with.


def switched_off(model):
    model.base_model.disable_adapter_layers()


def another(model):
    model.add_adapter("other", LoraConfig(**LORA))
    model.set_adapter("other")


def merged(model):
    model.merge_adapter()


@pytest.mark.parametrize("change", [switched_off, another, merged])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_head_of_other_adapters_is_refused(change, base):
    targets = ["c_attn"] if base == "gpt2" else ["q_proj", "v_proj"]
    model = get_peft_model(
        build(base), LoraConfig(**{**LORA, "target_modules": targets}, fan_in_fan_out=base == "gpt2")
    ).eval()
    enable_value_steer(model)
    inside = underlying(model)
    head = head_of(model, backbone_fingerprint=fingerprint(inside))
    call = {**prompts(2), **GREEDY, "value_steer": ValueFilterConfig(value_head=head)}
    model.generate(**call)
    change(model)
    with pytest.raises(MismatchError, match="fingerprint"):
        model.generate(**call)


@pytest.mark.parametrize("kind", ["lora", "modules_to_save", "ia3"])
def test_adapters_that_are_switched_off_leave_the_backbone_as_it_was(kind):
    plain = build("llama")
    before = fingerprint(plain)
    config = {
        "lora": LoraConfig(**LORA),
        "modules_to_save": LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, modules_to_save=["lm_head"]),
        "ia3": IA3Config(
            task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]
        ),
    }[kind]
    model = get_peft_model(plain, config).eval()
    assert fingerprint(plain) != before
    model.base_model.disable_adapter_layers()
    assert fingerprint(plain) == before
    model.base_model.enable_adapter_layers()
    assert fingerprint(plain) != before


def test_the_fingerprint_follows_the_active_adapter():
    model = adapted(None, "one", "two")
    inside, found = underlying(model), {}
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        found.setdefault(name, set()).add(fingerprint(inside))
    assert len(found["one"]) == len(found["two"]) == 1 and found["one"] != found["two"]


def test_a_merge_is_seen_although_no_version_counter_moves():
    model = adapted()
    inside = underlying(model)
    before, versions = fingerprint(inside), [each._version for each in inside.parameters()]
    model.merge_adapter()
    assert fingerprint(inside) != before
    model.unmerge_adapter()
    assert versions == [each._version for each in inside.parameters()] or fingerprint(inside)


def test_a_copy_has_a_fingerprint_of_its_own():
    model = adapted()
    other = copy.deepcopy(model)
    assert fingerprint(underlying(other)) == fingerprint(underlying(model))
    with torch.no_grad():
        next(iter(underlying(other).parameters())).data.mul_(2)
    assert fingerprint(underlying(other)) != fingerprint(underlying(model))


@pytest.mark.parametrize("method", ["filter", "activate"])
def test_what_is_merged_and_switched_off_is_unmerged_once(method):
    model = enable_value_steer(adapted())
    inside, before = underlying(model), model.generate(**prompts(2), **GREEDY)
    with model.disable_adapter():
        base = model.generate(**prompts(2), **GREEDY)
    weights = inside.model.layers[0].self_attn.q_proj.base_layer.weight
    unmerged = weights.detach().clone()
    config = {
        "filter": ValueFilterConfig(value_head=accepting_head(inside)),
        "activate": ActivationConfig(vectors=random_vectors(inside), multiplier=0.0),
    }[method]
    model.merge_adapter()
    with model.disable_adapter():
        for _ in range(2):
            assert torch.equal(model.generate(**prompts(2), **GREEDY, value_steer=config), base)
    torch.testing.assert_close(weights, unmerged)
    assert torch.equal(model.generate(**prompts(2), **GREEDY), before)


@pytest.mark.parametrize("kind", ["tokens", "scaling", "scaling of one layer"])
def test_a_head_of_another_strength_of_the_adapter_is_refused(kind):
    tokens = {"trainable_token_indices": [3, 5]} if kind == "tokens" else {}
    torch.manual_seed(1)
    plain = build("llama")
    alone = fingerprint(plain)
    model = get_peft_model(plain, LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, **tokens)).eval()
    before = fingerprint(plain)
    if kind == "tokens":
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.data.normal_()
    else:
        layers = [each for each in plain.modules() if isinstance(getattr(each, "scaling", None), dict)]
        for layer in layers[:1] if kind == "scaling of one layer" else layers:
            layer.scale_layer(0.5)
    assert len({before, alone, fingerprint(plain)}) == 3
    model.base_model.disable_adapter_layers()
    assert fingerprint(plain) == alone
