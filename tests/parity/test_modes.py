"""Autocast, accelerate, pickled state: the modes in which a model may be when it is steered."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from hf_value_steer import (
    AbstentionConfig,
    AbstentionLogitsProcessor,
    ActivationConfig,
    ScoringError,
    UnsupportedError,
    ValueFilterConfig,
    ValueFilterLogitsProcessor,
    enable_value_steer,
)
from hf_value_steer.hosts.transformers import CACHE
from tests.families import accepting_head, build, prompts, random_head
from tests.steer import GREEDY, rejecting, steer
from tests.unit.test_steering_vectors import random_vectors


def dtypes(out):
    return [(layer.keys.dtype, layer.values.dtype) for layer in out[CACHE].layers]


@pytest.mark.parametrize("kernel", ["auto", "shared_prefix", "masked", "expanded"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_over_float32_weights(dtype, family, kernel):
    model = build(family)
    with torch.autocast("cpu", dtype):
        plain = model.generate(**prompts(3), **GREEDY, return_dict_in_generate=True)
        accept = steer(model, ValueFilterConfig(value_head=accepting_head(model), lookahead=kernel))
        config = {"value_head": random_head(model), "threshold": 0.4, "num_candidates": 4, "lookahead": kernel}
        lazy = steer(model, ValueFilterConfig(**config))
        eager = steer(model, ValueFilterConfig(**config, evaluation="eager"))
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(accept.sequences, plain.sequences)
    assert lazy.interventions.any() and eager.interventions.any()
    assert dtypes(lazy) == dtypes(eager) == dtypes(plain)


PREPARED = """
import sys, torch
from accelerate import Accelerator
from tests.parity.test_modes import *
model = build("llama")
config = rejecting(model)
expected = steer(model, config)
prepared = enable_value_steer(Accelerator(cpu=True, mixed_precision=sys.argv[1]).prepare(model))
found = steer(prepared, config)
assert found.interventions.any() and (sys.argv[1] != "no" or torch.equal(found.sequences, expected.sequences))
"""


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_model_that_accelerate_has_prepared(precision):
    subprocess.run([sys.executable, "-c", PREPARED, precision], check=True)  # whose state is the process's


def test_hooks_of_accelerate_on_every_module():
    model = build("llama")
    config = rejecting(model)
    expected = steer(model, config)
    for module in model.modules():
        if not list(module.children()):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", offload=False))
    assert torch.equal(steer(model, config).sequences, expected.sequences)


@pytest.mark.parametrize("what", ["enable", "processor", "vectors"])
def test_data_parallel_is_refused_by_name(what):
    inside = build("llama")
    model = torch.nn.DataParallel(inside)
    act = {
        "enable": lambda: enable_value_steer(model),
        "processor": lambda: ValueFilterLogitsProcessor(model, ValueFilterConfig(value_head=random_head(inside))),
        "vectors": lambda: random_vectors(inside).apply(model).__enter__(),
    }
    with pytest.raises(UnsupportedError, match="inside DataParallel"):
        act[what]()


@pytest.mark.parametrize("name", ["DeepSpeed ZeRO-3", "FullyShardedDataParallel", "fully_shard"])
def test_weights_that_are_gathered_from_processes_are_refused_by_name(name, monkeypatch):
    monkeypatch.setattr("hf_value_steer.generation.validation.splits_over_processes", lambda model: name)
    model = build("llama")
    for config in (ValueFilterConfig(value_head=random_head(model)), ActivationConfig(vectors=random_vectors(model))):
        with pytest.raises(UnsupportedError, match=name):
            steer(model, config)


SHARDED = """
import os, torch
from torch.distributed.fsdp import FullyShardedDataParallel
from tests.parity.test_modes import *
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model, head = build("llama"), random_head(build("llama"))
model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0], device_id=torch.device("cpu"))
with pytest.raises(UnsupportedError, match="FullyShardedDataParallel"):
    steer(model, ValueFilterConfig(value_head=head))
"""


def test_a_layer_under_fsdp_is_refused():
    subprocess.run([sys.executable, "-c", SHARDED], check=True)


# Processors that are used again.


def resized(model):
    model.resize_token_embeddings(120)


def another_output_embedding(model):
    embedding = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    with torch.no_grad():
        embedding.weight.copy_(model.lm_head.weight)
    model.set_output_embeddings(embedding)


def bfloat16(model):
    model.to(torch.bfloat16)


def eager_attention(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [resized, another_output_embedding, bfloat16, eager_attention])
def test_a_processor_is_used_again_after_the_model_has_changed(change):
    model = build("llama")
    config = rejecting(model, proposal="topk")
    processor = ValueFilterLogitsProcessor(model, config)
    call = {**prompts(3), **GREEDY, "logits_processor": [processor]}
    assert torch.equal(model.generate(**call), steer(model, config).sequences)
    change(model)
    assert torch.equal(model.generate(**call), steer(model, config).sequences)


@pytest.mark.parametrize("method", ["filter", "abstain"])
def test_a_kept_processor_holds_nothing_of_its_last_call(method):
    model = build("llama")
    head = random_head(model)
    if method == "filter":
        processor = ValueFilterLogitsProcessor(model, ValueFilterConfig(value_head=head, proposal="topk"))
    else:
        processor = AbstentionLogitsProcessor(model, AbstentionConfig(value_head=head, threshold=0.99))
    for _ in range(2):
        out = model.generate(**prompts(3), **GREEDY, logits_processor=[processor], return_dict_in_generate=True)
        (text,) = processor.texts.values()
        gone = [weakref.ref(out[CACHE]), weakref.ref(text)]
        del out, text
        gc.collect()
        assert [each() for each in gone] == [None, None] and not processor.texts


@pytest.mark.parametrize("make", [ValueFilterLogitsProcessor, AbstentionLogitsProcessor])
def test_a_processor_of_another_model_is_an_error(make):
    model = build("llama")
    config = ValueFilterConfig if make is ValueFilterLogitsProcessor else AbstentionConfig
    processor = make(model, config(value_head=random_head(model)))
    for other in (copy.deepcopy(model), build("llama", seed=3)):
        with pytest.raises(ScoringError, match="No forward pass"):
            other.generate(**prompts(2), **GREEDY, logits_processor=[processor])


@pytest.mark.parametrize("wrong", ["head", "other config", "dict"])
def test_what_is_no_config_for_a_processor_is_refused(wrong):
    model = build("llama")
    config = {"head": random_head(model), "other config": AbstentionConfig(), "dict": {"method": "filter"}}[wrong]
    with pytest.raises(TypeError, match="`config` has to be a ValueFilterConfig"):
        ValueFilterLogitsProcessor(model, config)
