"""Backbone and head as one model, model cards, and the `custom_generate` repository."""

import copy
import json
import pickle

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, pipeline, set_seed

import hf_value_steer
from hf_value_steer import (
    AbstentionConfig,
    AbstentionLogitsProcessor,
    SteeringVectors,
    ValueFilterConfig,
    ValueHead,
    ValueHeadConfig,
    ValueSteerForCausalLM,
    disable_value_steer,
    enable_value_steer,
    export_custom_generate,
)
from hf_value_steer.backbone.parts import fingerprint, underlying
from hf_value_steer.doctor import diagnose
from hf_value_steer.errors import UnsupportedError
from hf_value_steer.training.vectors import vectors_from_value_head
from tests.families import FAMILIES, build, layered_head, prompts, random_head


@pytest.fixture
def folders(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "backbone")
    head = random_head(model)
    head.config.backbone_fingerprint = fingerprint(model)
    head.save_pretrained(tmp_path / "head")
    return tmp_path


def text(model, **extra):
    set_seed(0)
    return model.generate(**prompts(2), max_new_tokens=10, do_sample=True, **extra)


@pytest.fixture
def expected(folders):
    model = enable_value_steer(AutoModelForCausalLM.from_pretrained(folders / "backbone"))
    steered = text(model, value_steer={"method": "filter", "value_head": str(folders / "head")})
    assert not torch.equal(steered, text(model))
    return steered


def test_put_together_generate_save_and_load(folders, expected):
    model = ValueSteerForCausalLM.from_pretrained(folders / "backbone", value_head=str(folders / "head"))
    assert torch.equal(text(model), expected)
    model.save_pretrained(folders / "reference")
    names = sorted(path.name for path in (folders / "reference").rglob("*") if path.is_file())
    assert names == ["README.md", "config.json", "config.json", "model.safetensors"]
    model.save_pretrained(folders / "whole", save_backbone=True)
    for saved in ("reference", "whole"):
        assert torch.equal(text(ValueSteerForCausalLM.from_pretrained(folders / saved)), expected)
        assert torch.equal(text(AutoModelForCausalLM.from_pretrained(folders / saved)), expected)
    half = ValueSteerForCausalLM.from_pretrained(folders / "whole", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.value_head.dtype == torch.float32


def test_its_own_way_of_steering_is_kept(folders, expected):
    steer = [ValueFilterConfig(threshold=0.4), AbstentionConfig(threshold=0.7, patience=2)]
    model = ValueSteerForCausalLM.from_pretrained(folders / "backbone", str(folders / "head"), value_steer=steer)
    model.save_pretrained(folders / "saved", save_backbone=True)
    assert torch.equal(text(ValueSteerForCausalLM.from_pretrained(folders / "saved")), text(model))
    assert torch.equal(text(model, value_steer={"method": "filter"}), expected)
    assert not torch.equal(text(model), expected)


def test_forward_returns_values(folders):
    model = ValueSteerForCausalLM.from_pretrained(folders / "backbone", value_head=str(folders / "head"))
    inputs = prompts(2)
    out = model(**inputs)
    hidden = model.backbone.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(out.token_values, model.value_head(hidden).value)
    torch.testing.assert_close(out.logits, model.backbone(**inputs).logits)
    assert model(**inputs, logits_to_keep=1).token_values.shape == (2, 1)


@pytest.mark.parametrize("layers", [[0], [-1], [0, "final"]], ids=str)
def test_forward_returns_values_of_a_head_on_layers(layers):
    backbone, inputs = build("llama"), prompts(2)
    model = ValueSteerForCausalLM(backbone, layered_head(backbone, layers))
    hidden, norm = backbone(**inputs, output_hidden_states=True).hidden_states, backbone.model.norm
    above = {}
    backbone.model.layers[-1].register_forward_hook(lambda _module, _args, output: above.update(last=output))
    out = model(**inputs)
    places = {0: hidden[1], -1: above["last"], "final": norm(above["last"])}
    values = model.value_head(torch.cat([places[layer] for layer in layers], dim=-1)).value
    torch.testing.assert_close(out.token_values, values)
    for kept in (torch.tensor([1, 4, 7]), 3, 0):
        part = model(**inputs, logits_to_keep=kept)
        wanted = values[:, kept] if isinstance(kept, torch.Tensor) else values[:, -kept:]
        torch.testing.assert_close(part.token_values, wanted)
        assert part.logits.shape[:2] == wanted.shape


@pytest.mark.parametrize("temporal", ["mean", "ema"])
def test_forward_refuses_a_head_over_time(folders, temporal):
    backbone = build("llama")
    model = ValueSteerForCausalLM(backbone, layered_head(backbone, [0], temporal))
    with pytest.raises(UnsupportedError, match=f"`temporal`='{temporal}'.*`score_text`"):
        model(**prompts(2))
    steered = model.generate(**prompts(2), max_new_tokens=6, return_dict_in_generate=True)
    assert steered.token_values.shape[0] == 2
    model.save_pretrained(folders / temporal, save_backbone=True)
    again = ValueSteerForCausalLM.from_pretrained(folders / temporal)
    assert again.value_head.config.temporal == temporal and torch.equal(text(again), text(model))


@pytest.fixture
def whole(folders):
    return ValueSteerForCausalLM.from_pretrained(folders / "backbone", value_head=str(folders / "head"))


def test_the_config_answers_for_the_backbone_and_does_not_save_it(whole, folders):
    config, backbone = whole.config, whole.backbone.config
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "eos_token_id", "pad_token_id", "rope_parameters"):
        assert getattr(config, name) == getattr(backbone, name)
    assert config.get_text_config() is backbone and config.get_text_config(decoder=True) is backbone
    assert config.model_type == "hvs_value_steer" and not hasattr(config, "no_such_field")
    backbone.quantization_config = {"quant_method": "none"}
    whole.save_pretrained(folders / "saved")
    saved = json.loads((folders / "saved" / "config.json").read_text())
    assert set(saved) == {
        "architectures", "backbone", "backbone_revision", "backbone_subfolder", "model_type",
        "schema_version", "transformers_version", "value_steer",
    }  # fmt: skip
    for again in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert again.vocab_size == config.vocab_size and again.to_dict() == config.to_dict()
    assert not hasattr(type(config)(), "vocab_size")


def test_what_users_of_a_model_call(whole, folders):
    out = text(whole, return_dict_in_generate=True, output_scores=True)
    scores = whole.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert torch.equal(
        scores, whole.backbone.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    )
    assert whole.can_generate() and whole.output_modalities == whole.backbone.output_modalities
    assert not hasattr(whole, "generate_batch")  # it would not be steered
    whole.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=2, pad_token_id=0)
    assert whole.backbone.generation_config is whole.generation_config
    assert whole.generate(**prompts(1)).shape[1] == prompts(1)["input_ids"].shape[1] + 3
    again, info = ValueSteerForCausalLM.from_pretrained(
        folders / "backbone", str(folders / "head"), output_loading_info=True
    )
    assert type(again) is ValueSteerForCausalLM and not info["missing_keys"]


@pytest.mark.parametrize("choice", [{}, {"mode": "last_token"}, {"tokens": "generated"}])
def test_vectors_act_on_the_backbone_inside(whole, choice):
    vectors = SteeringVectors.from_tensors(
        {0: torch.ones(32), 1: torch.arange(32.0)}, backbone_fingerprint=fingerprint(whole.backbone), num_layers=2
    )
    vectors.check_fit(whole)
    plain = whole.backbone.generate(**prompts(2), do_sample=False, max_new_tokens=8)
    with vectors.apply(whole, 3.0, **choice):
        inside = whole.backbone.generate(**prompts(2), do_sample=False, max_new_tokens=8)
        outside = whole.generate(**prompts(2), do_sample=False, max_new_tokens=8, value_steer=ACCEPTING)
    with vectors.apply(whole.backbone, 3.0, **choice):
        assert torch.equal(whole.backbone.generate(**prompts(2), do_sample=False, max_new_tokens=8), inside)
    assert torch.equal(inside, outside) and not torch.equal(inside, plain)


ACCEPTING = {"method": "filter", "threshold": 0.5, "max_interventions": 0}


def test_vectors_are_made_and_scaled_of_the_backbone_inside(whole):
    sequences = [[5, 17, 3, 44], [9, 10, 60, 7]]
    for model in (whole, whole.backbone):
        vectors = vectors_from_value_head(model, whole.value_head, sequences, layers=[0])
        assert vectors.backbone_fingerprint == fingerprint(whole.backbone)
        assert vectors.backbone == whole.backbone.name_or_path
    torch.testing.assert_close(vectors.scale(whole, sequences).norms, vectors.scale(model, sequences).norms)


def test_what_takes_a_model_acts_on_the_backbone_inside(whole, expected):
    assert underlying(whole) is underlying(torch.compile(whole, backend="eager")) is whole.backbone
    config = ValueFilterConfig(value_head=whole.value_head)
    assert enable_value_steer(whole) is whole
    assert torch.equal(text(whole.backbone, value_steer=config), expected)
    assert torch.equal(text(whole), expected) and torch.equal(text(whole, value_steer=config), expected)
    disable_value_steer(whole)
    with pytest.raises(ValueError, match="value_steer"):
        text(whole.backbone, value_steer=config)
    config = AbstentionConfig(value_head=whole.value_head, threshold=0.6)
    ids = [
        text(whole.backbone, logits_processor=[AbstentionLogitsProcessor(model, config)])
        for model in (whole, whole.backbone)
    ]
    assert torch.equal(*ids)
    assert "FAIL" not in [check.status for check in diagnose(whole)]


def test_what_does_not_fit_together_is_refused(folders):
    with pytest.raises(ValueError, match="is a plain backbone: pass `value_head="):
        ValueSteerForCausalLM.from_pretrained(folders / "backbone")
    other = build("llama", seed=5)
    with pytest.raises(ValueError, match="it would mean nothing here"):
        ValueSteerForCausalLM(other, ValueHead.from_pretrained(folders / "head"))
    nameless = ValueSteerForCausalLM(other, random_head(other))
    with pytest.raises(ValueError, match="pass `save_backbone=True`"):
        nameless.save_pretrained(folders / "nameless")


def test_text_generation_pipeline(tokenizer):
    config = LlamaConfig(**{**FAMILIES["llama"].to_dict(), "vocab_size": len(tokenizer), "pad_token_id": 2})
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config).eval()
    model = ValueSteerForCausalLM(backbone, random_head(backbone), {"method": "filter", "threshold": 0.45})
    backbone.generation_config.update(max_new_tokens=8, pad_token_id=2)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    steered = pipe(["Hello there", "you"], batch_size=2, do_sample=False, return_tensors=True)
    inputs = tokenizer("Hello there", return_tensors="pt")
    expected = model.generate(**inputs, do_sample=False)[0].tolist()
    assert steered[0][0]["generated_token_ids"] == expected
    assert expected != backbone.generate(**inputs, do_sample=False)[0].tolist()
    assert "ValueSteerForCausalLM" in repr(pipe)


def test_fingerprints_tell_backbones_apart(folders):
    model = build("llama")
    assert fingerprint(model) == fingerprint(AutoModelForCausalLM.from_pretrained(folders / "backbone"))
    assert fingerprint(model) != fingerprint(build("llama", seed=1))
    stored = model.to(torch.bfloat16)
    identity = fingerprint(stored)
    assert identity == fingerprint(stored.float()) == fingerprint(stored.half())
    with torch.no_grad():
        stored.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    assert fingerprint(stored) != identity


def test_the_generated_card(folders):
    head = ValueHead(ValueHeadConfig(hidden_size=8, attribute="toxicity", backbone="org/base", threshold=0.25))
    head.save_pretrained(folders / "card")
    card = ModelCard.load(folders / "card" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "hf-value-steer",
        "tags": ["value-head", "value-steering", "toxicity"],
    }
    assert "Default threshold: 0.25." in card.text and "## Limits" in card.text


def test_the_custom_generate_repository(folders, expected):
    repository = export_custom_generate(folders / "recipe")
    files = sorted(str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file())
    assert files == ["README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"]
    assert "custom_generate" in ModelCard.load(repository / "README.md").data.tags
    model = AutoModelForCausalLM.from_pretrained(folders / "backbone")
    config = ValueFilterConfig(value_head=str(folders / "head"))
    recipe = {"custom_generate": str(repository), "trust_remote_code": True}
    assert torch.equal(text(model, **recipe, value_steer=json.loads(config.to_json_string())), expected)
    assert torch.equal(text(enable_value_steer(model), **recipe, value_steer=config), expected)
    with pytest.raises(ValueError, match="`value_steer` is missing"):
        text(model, **recipe)


def test_public_names():
    assert hf_value_steer.__all__ == sorted(hf_value_steer.__all__)
    assert all(getattr(hf_value_steer, name).__doc__ for name in hf_value_steer.__all__)
