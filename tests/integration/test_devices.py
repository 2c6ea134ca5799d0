"""Weights that are offloaded, quantised, or sharded over processes."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

from hf_value_steer import ValueFilterConfig
from hf_value_steer.backbone.parts import fingerprint
from hf_value_steer.generation.kernels import KERNELS
from tests.families import _DECODER, build, layered_head, prompts, random_head
from tests.oracle import Oracle
from tests.steer import steer
from tests.tiny_models import build_tiny


ROOT = Path(__file__).resolve().parents[2]
SAMPLING = {"do_sample": True, "max_new_tokens": 10, "eos_token_id": None}


steer = partial(steer, **SAMPLING)


def test_weights_offloaded_to_disk(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights"
    )
    assert offloaded.lm_head.weight.is_meta
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.4)
    out, expected = steer(offloaded, config), steer(model, config)
    assert out.interventions.any() and torch.equal(out.sequences, expected.sequences)
    with pytest.raises(ValueError, match="offloaded or sharded, so this backbone cannot be identified"):
        fingerprint(offloaded)


@pytest.mark.parametrize("temporal", ["none", "mean"])
@pytest.mark.parametrize("layers", [[0], [1], [2, "final"]], ids=str)
def test_a_head_on_a_layer_of_a_model_that_is_partly_on_disk(tmp_path, layers, temporal):
    """Below the offloaded layers, on the first of them, and on the next and the final state."""
    model = build_tiny("llama", 4)
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.rotary_emb"), "cpu")
    places |= dict.fromkeys((*(f"model.layers.{layer}" for layer in (1, 2, 3)), "model.norm", "lm_head"), "disk")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights"
    )
    config = ValueFilterConfig(value_head=layered_head(model, layers, temporal), threshold=0.5)
    out, expected = steer(offloaded, config), steer(model, config)
    assert out.interventions.any() and torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.token_values, expected.token_values, rtol=0, atol=1e-5, equal_nan=True)


def saved(folder, seed):
    set_seed(seed)
    sizes = _DECODER | {"hidden_size": 128, "intermediate_size": 256}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


def quantised(folder, kind="Int8WeightOnlyConfig"):
    from torchao import quantization
    from transformers import TorchAoConfig

    config = TorchAoConfig(getattr(quantization, kind)())
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_weights_have_a_fingerprint(tmp_path, kind):
    folder, other = saved(tmp_path / "one", 0), saved(tmp_path / "other", 1)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model, again, others = quantised(folder, kind), quantised(folder, kind), quantised(other, kind)
    assert fingerprint(model) == fingerprint(again)
    assert len({fingerprint(each) for each in (plain, model, others)}) == 3


@pytest.mark.filterwarnings("ignore")
def test_torchao_weights(tmp_path):
    model = quantised(saved(tmp_path, 0))
    assert type(model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.5, num_candidates=4)
    out = steer(model, config)
    set_seed(0)
    expected = model.generate(**prompts(3), **SAMPLING, custom_generate=Oracle(config))
    assert out.interventions.any() and torch.equal(out.sequences, expected)


RANK = """
import torch, sys
from transformers import AutoModelForCausalLM
from tests.integration.test_devices import KERNELS, ValueFilterConfig, random_head, steer
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
for kernel in KERNELS:
    for evaluation in ("lazy", "eager"):
        config = ValueFilterConfig(
            value_head=random_head(model), threshold=0.4, lookahead=kernel, evaluation=evaluation
        )
        name = f"{kernel}-{evaluation}-{torch.distributed.get_rank()}"
        torch.save(steer(model, config).sequences, f"{sys.argv[2]}/{name}")
"""


def test_tensor_parallel_ranks_commit_the_same_tokens(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**_DECODER | {"vocab_size": 102}))
    model.save_pretrained(tmp_path / "model")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*command, str(tmp_path / "model"), str(tmp_path)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    expected = steer(model.eval(), ValueFilterConfig(value_head=random_head(model), threshold=0.4))
    assert expected.interventions.any()
    for kernel in KERNELS:
        for evaluation in ("lazy", "eager"):
            for rank in (0, 1):
                sequences = torch.load(tmp_path / f"{kernel}-{evaluation}-{rank}")
                assert torch.equal(sequences, expected.sequences), (kernel, evaluation, rank)
