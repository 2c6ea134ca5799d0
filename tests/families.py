"""Tiny random models of every supported family, in float32, with windows shorter than the texts of the tests."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from hf_value_steer import ValueHead, ValueHeadConfig
from hf_value_steer.backbone.parts import feature_width
from tests.oracle import states


VOCABULARY = 101
WINDOW = 8
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW, "head_dim": 8}

FAMILIES = {
    "llama": LlamaConfig(**_DECODER),
    "mistral": MistralConfig(**_DECODER, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**_DECODER),
    "qwen3": Qwen3Config(**_DECODER, head_dim=8),
    "gemma3": Gemma3TextConfig(**_DECODER, **_HYBRID),
    "gpt2": GPT2Config(**_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "opt": OPTConfig(
        **_TOKENS,
        hidden_size=64,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        do_layer_norm_before=False,
    ),
}


def build(family: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A model with weights large enough that its next-token distribution is far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


def random_head(model: PreTrainedModel, polarity: str = "undesirable", architecture: str = "mlp") -> ValueHead:
    """An untrained head whose values spread over (0, 1) instead of staying near 0.5."""
    torch.manual_seed(7)
    config = ValueHeadConfig(
        hidden_size=feature_width(model), polarity=polarity, architecture=architecture, threshold=0.5
    )
    head = ValueHead(config)
    with torch.no_grad():
        head.net[-1].weight.mul_(8.0)
    return head


def layered_head(
    model: PreTrainedModel, layers: list, temporal: str = "none", polarity: str = "undesirable"
) -> ValueHead:
    """A random head on some layers, whose values spread around one half on what stands there."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, VOCABULARY, (9,), generator=generator).tolist() for _ in range(40)]
    with torch.no_grad():
        features = torch.stack([states(model, text, layers)[-1] for text in texts])
        torch.manual_seed(7)
        head = ValueHead(
            ValueHeadConfig(
                hidden_size=features.shape[1], feature_layers=layers, temporal=temporal, polarity=polarity,
                threshold=0.5, projection_size=24,
            )
        ).eval()  # fmt: skip
        first, last = head.net[0], head.net[-1]
        first.weight.div_(features.std(0).clamp(min=1e-6)).mul_(4.0 if temporal != "none" else 2.0)
        first.bias.copy_(-(first.weight @ features.mean(0)))
        last.bias.zero_()
        last.weight.mul_(2.0 / head.net(features).std())
        last.bias.sub_(head.net(features).median())
    return head


def accepting_head(model: PreTrainedModel) -> ValueHead:
    """A head whose value is 0.5 whatever it reads: with threshold 0.9 it accepts everything."""
    head = ValueHead(ValueHeadConfig(hidden_size=feature_width(model), architecture="linear", threshold=0.9))
    with torch.no_grad():
        head.net[0].weight.zero_()
        head.net[0].bias.zero_()
    return head


def prompts(rows: int, length: int = 11) -> dict[str, torch.Tensor]:
    """Random prompts, left-padded to one length where there are several."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, rows):
        padding = (3 * row) % (length - 1)
        attention_mask[row, :padding] = 0
        input_ids[row, :padding] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}
