"""Baked checkpoints, loaded by plain `transformers` in a process that has never heard of us."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from hf_value_steer.activation import SteeringVectors
from hf_value_steer.activation.exports import BIASED, plan_export
from hf_value_steer.backbone.parts import fingerprint
from tests import hostile
from tests.families import build
from tests.tiny_models import build_tiny, tiny_config
from tests.unit.test_steering_vectors import SEQUENCES, random_vectors


MULTIPLIER = 4.0
KINDS = {
    "bias": "llama gpt2 opt phi gpt_neox gpt_neo gptj bloom starcoder2 granite helium smollm3 nemotron".split(),
    "llama": "mistral qwen2 gemma phi3".split(),
    "custom code": "qwen3 gemma3_text olmo2 mixtral cohere".split(),
}
FAMILIES = {family: kind for kind, families in KINDS.items() for family in families}
IDS = torch.tensor([[5, 17, 3, 44, 71, 8, 23, 9]])

FRESH = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ids, folder, tensors = torch.tensor([%r]), Path(sys.argv[1]), {}
torch.set_num_threads(1)
for checkpoint in sorted(path for path in folder.iterdir() if path.is_dir()):
    trust = (checkpoint / "modeling_steered.py").exists()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=trust)
    with torch.no_grad():
        tensors[f"{checkpoint.name}.logits"] = model(ids).logits
        tensors[f"{checkpoint.name}.tokens"] = model.generate(ids, do_sample=False, max_new_tokens=12)
assert "hf_value_steer" not in sys.modules
save_file(tensors, folder / "fresh.safetensors")
"""


def tiny(family):
    """A tiny model; windows are taken out where the plain export cannot hold one."""
    model = build_tiny(family)
    if FAMILIES.get(family) == "llama":
        config = copy.deepcopy(model.config)
        config.sliding_window = None
        if family == "qwen2":
            config = Qwen2Config(**{**config.to_dict(), "use_sliding_window": False, "layer_types": None})
        state = model.state_dict()
        model = AutoModelForCausalLM.from_config(config).eval()
        model.load_state_dict(state)
        with torch.no_grad():  # qwen2 has biases, which start at zero
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    """Every family baked, with what the steered model says, and what the checkpoint says in a fresh process."""
    folder, expected, reports = tmp_path_factory.mktemp("baked"), {}, {}
    for family in FAMILIES:
        model = tiny(family)
        layers = range(model.config.num_hidden_layers)
        vectors = random_vectors(model, layers).scale(model, SEQUENCES)
        reports[family] = vectors.bake(model, MULTIPLIER, folder / family)
        with torch.no_grad(), vectors.apply(model, MULTIPLIER):
            expected[family] = model(IDS).logits, model.generate(IDS, do_sample=False, max_new_tokens=12)
    script = FRESH % IDS[0].tolist()
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, cwd=folder, capture_output=True)
    return folder, expected, reports, load_file(folder / "fresh.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_baked_equals_hooked_in_a_fresh_process(baked, family):
    folder, expected, reports, fresh = baked
    logits, tokens = expected[family]
    assert (fresh[f"{family}.logits"] - logits).abs().max() < 2e-4
    assert torch.equal(fresh[f"{family}.tokens"], tokens)
    report = reports[family]
    assert report["kind"] == FAMILIES[family]
    assert report["max_logit_change"] > 0.1 and report["max_logit_difference"] < 2e-4
    written = json.loads((folder / family / "steering" / "report.json").read_text())
    assert written == report
    assert written["original"] == {"name_or_path": None, "revision": None, "fingerprint": fingerprint(tiny(family))}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in BIASED])
def test_a_baked_bias_costs_nothing(baked, family):
    model, checkpoint = tiny(family), AutoModelForCausalLM.from_pretrained(baked[0] / family)
    assert str(checkpoint) == str(model)  # the same modules, biases included, so the same work
    sizes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (model, checkpoint)]
    assert sizes[0] == sizes[1]


def test_custom_code_is_never_loaded_unsteered(baked):
    with pytest.raises(ValueError, match="trust_remote_code|steered_qwen3"):
        AutoConfig.from_pretrained(baked[0] / "qwen3")


@pytest.mark.parametrize("text", ["Python", "docstring", "lines"])
def test_no_text_of_a_config_gets_into_code(baked, tmp_path, text):
    model, text = tiny("qwen3"), hostile.TEXTS[text]
    model.config.model_type = text  # what a config.json leaves there that is loaded as one of another type
    random_vectors(model).bake(model, 1.0, tmp_path / "baked")
    code = [(folder / "modeling_steered.py").read_text() for folder in (baked[0] / "qwen3", tmp_path / "baked")]
    assert code[0] == code[1]
    assert json.loads((tmp_path / "baked" / "config.json").read_text())["model_type"] == "steered_qwen3"


def test_windows_are_not_lost_in_an_export_as_llama():
    assert plan_export(build("mistral")).kind == "custom code"
    assert plan_export(build_tiny("qwen2")).kind == "custom code"


def test_sharded_tied_bfloat16(tmp_path):
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    vectors = random_vectors(model).scale(model, SEQUENCES)
    report = vectors.bake(model, 2.0, tmp_path / "baked", max_shard_size="20KB")
    assert len(list((tmp_path / "baked").glob("model-*.safetensors"))) > 1
    assert 0 < report["offset_rounding"] < 2**-8
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "baked").dtype == torch.bfloat16


def nothing_written(folder):
    return not any(folder.iterdir())


def test_refused_before_anything_is_written(tmp_path):
    model = build("llama")
    vectors = random_vectors(model).scale(model, SEQUENCES)
    with vectors.apply(model), pytest.raises(ValueError, match="steered by vectors now"):
        vectors.bake(model, 1.0, tmp_path / "baked")
    with pytest.raises(ValueError, match="16 wide"):
        SteeringVectors.from_tensors({0: torch.ones(16)}).bake(model, 1.0, tmp_path / "baked")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="quantised"):
        vectors.bake(model, 1.0, tmp_path / "baked")
    del model.config.quantization_config
    assert nothing_written(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there already"):
        vectors.bake(model, 1.0, tmp_path / "there")


def test_a_bias_in_the_wrong_place_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_value_steer.activation.exports.BIASED", {"gpt2": "attn.c_proj"})
    model = build_tiny("gpt2")
    vectors = random_vectors(model).scale(model, SEQUENCES)
    with pytest.raises(ValueError, match="does not compute what the steered model does"):
        vectors.bake(model, 4.0, tmp_path / "baked")
    assert nothing_written(tmp_path)
