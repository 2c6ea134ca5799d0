"""Prompts with images: models of text and images, with every kernel that may be taken for them."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

from hf_value_steer import AbstentionConfig, AbstentionLogitsProcessor, ValueFilterConfig, ValueFilterLogitsProcessor
from hf_value_steer.errors import UnsupportedError
from tests.families import _DECODER, _HYBRID, accepting_head, layered_head, random_head
from tests.steer import GREEDY, steer


IMAGE, BEGIN, END = 100, 98, 99
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"image_token_id": IMAGE, "vision_start_token_id": BEGIN, "vision_end_token_id": END, "video_token_id": 97}


def llava():
    vision = CLIPVisionConfig(**VISION, image_size=8, patch_size=4)
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(**_DECODER), image_token_index=IMAGE)


def gemma3():
    vision = SiglipVisionConfig(**VISION, image_size=8, patch_size=4)
    text = Gemma3TextConfig(**_DECODER, **_HYBRID)
    places = {"boi_token_index": BEGIN, "eoi_token_index": END, "image_token_index": IMAGE, "mm_tokens_per_image": 4}
    return Gemma3Config(vision_config=vision, text_config=text, **places)


def qwen(kind):
    sizes = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    sizes |= {
        Qwen2VLConfig: {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        Qwen2_5_VLConfig: {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "window_size": 8,
                           "fullatt_block_indexes": [1]},
        Qwen3VLConfig: {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32,
                        "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }[kind]  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
    text = {**_DECODER, "head_dim": 8, "rope_parameters": rope}
    return kind(text_config=text, vision_config=sizes, **TOKENS)


CONFIGS = {
    "llava": llava,
    "gemma3": gemma3,
    "qwen2_vl": lambda: qwen(Qwen2VLConfig),
    "qwen2_5_vl": lambda: qwen(Qwen2_5_VLConfig),
    "qwen3_vl": lambda: qwen(Qwen3VLConfig),
}


def build(name, layers=2):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.text_config.num_hidden_layers = layers
    if kinds := getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = (kinds * layers)[:layers]
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # which some projections begin with
                parameter.normal_()
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.generation_config.update(eos_token_id=2, pad_token_id=0, bos_token_id=1)
    return model


def batch(name, rows=3):
    """Texts with an image each, left-padded, of different lengths."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (rows, 16), generator=generator)
    ids[:, 6:12] = torch.tensor([BEGIN, *[IMAGE] * 4, END])
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
        ids[row, : 2 * row] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name.startswith("qwen"):
        inputs["pixel_values"] = torch.randn(16 * rows, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    else:
        inputs["pixel_values"] = torch.randn(rows, 3, 8, 8, generator=generator)
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("kernel", ["auto", "shared_prefix", "masked", "expanded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_with_images(name, kernel, rows):
    model, inputs = build(name), batch(name, rows)
    plain = model.generate(**inputs, **GREEDY)
    accept = ValueFilterConfig(value_head=accepting_head(model), lookahead=kernel)
    assert torch.equal(steer(model, accept, **inputs).sequences, plain)
    config = {"value_head": random_head(model), "threshold": 0.45, "num_candidates": 4, "lookahead": kernel}
    lazy = steer(model, ValueFilterConfig(**config), **inputs)
    eager = steer(model, ValueFilterConfig(**config, evaluation="eager"), **inputs)
    expected = steer(model, ValueFilterConfig(**{**config, "lookahead": "expanded"}), **inputs)
    assert lazy.interventions.any() and torch.equal(lazy.sequences, eager.sequences)
    torch.testing.assert_close(lazy.token_values, expected.token_values, atol=1e-5, rtol=0, equal_nan=True)
    assert torch.equal(lazy.sequences, expected.sequences)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_image_changes_what_is_decided(name):
    model, inputs = build(name), batch(name)
    config = ValueFilterConfig(value_head=random_head(model), threshold=0.45)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert not torch.equal(steer(model, config, **inputs).prompt_values, steer(model, config, **other).prompt_values)


@pytest.mark.parametrize("temporal", ["none", "mean"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_head_on_a_layer_reads_the_text_model(name, temporal):
    """One of as many layers as the image model has cannot be told from it, and is refused by name."""
    model, inputs = build(name, layers=3), batch(name)
    head = layered_head(model, [1], temporal)
    config = ValueFilterConfig(value_head=head, threshold=0.5, num_candidates=4, proposal="topk")
    steered = steer(model, config, **inputs)
    eager = steer(model, replace(config, evaluation="eager"), **inputs)
    processed = model.generate(**inputs, **GREEDY, logits_processor=[ValueFilterLogitsProcessor(model, config)])
    assert steered.interventions.any()
    with torch.no_grad():
        state = model(**batch(name, 1), output_hidden_states=True).hidden_states[2][0, -1:]
    alone = steer(model, config, **batch(name, 1))
    torch.testing.assert_close(alone.prompt_values, head(state).value, atol=1e-5, rtol=0)
    assert torch.equal(steered.sequences, eager.sequences) and torch.equal(steered.sequences, processed)
    torch.testing.assert_close(steered.token_values, eager.token_values, atol=1e-5, rtol=0, equal_nan=True)
    with pytest.raises(UnsupportedError, match="A head that reads layers cannot be used here: .* found 2"):
        steer(build(name), config, **inputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_processors_read_prompts_with_images(name):
    model, inputs, head = build(name), batch(name), random_head(build(name))
    abstain = AbstentionConfig(value_head=head, threshold=0.45, patience=2)
    filtering = ValueFilterConfig(value_head=head, threshold=0.45, num_candidates=4, proposal="topk")
    for make, config in ((AbstentionLogitsProcessor, abstain), (ValueFilterLogitsProcessor, filtering)):
        processed = model.generate(**inputs, **GREEDY, logits_processor=[make(model, config)])
        assert torch.equal(processed, steer(model, config, **inputs).sequences)
