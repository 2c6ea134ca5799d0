"""How a checkpoint that adds vectors behind its layers can be written, family by family.

A bias on the last linear map before the residual is added to the stream like an offset behind the layer. Some families
have one, some get one by a switch in their configuration, and some are Llama in all but name, which has such a switch.
Everything else becomes a checkpoint with a few lines of code of its own.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from hf_value_steer.backbone.parts import layers_path


# The module inside a layer whose bias reaches the residual stream as it is.
BIASED = {
    "biogpt": "fc2",
    "bloom": "mlp.dense_4h_to_h",
    "codegen": "mlp.fc_out",
    "gpt2": "mlp.c_proj",
    "gpt_bigcode": "mlp.c_proj",
    "gpt_neo": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "gptj": "mlp.fc_out",
    "opt": "fc2",
    "persimmon": "mlp.dense_4h_to_h",
    "phi": "mlp.fc2",
    "starcoder2": "mlp.c_proj",
    "xglm": "fc2",
}
# Families with `mlp_bias` in their configuration, and `mlp.down_proj` in their layers.
SWITCHED = ("arcee", "cwm", "granite", "helium", "llama", "nemotron", "seed_oss", "smollm3")

_SHARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters initializer_range use_cache "
    "bos_token_id eos_token_id pad_token_id attention_dropout"
).split()


@dataclass(frozen=True)
class Export:
    """A checkpoint in the making.

    Args:
        kind (`str`): `"bias"` (same family), `"llama"` (exported as Llama) or `"custom code"`.
        config: of the checkpoint.
        state (`dict`): tensors of the checkpoint; biases that are missing are zero.
        spot (`str`): name of the biased module inside a layer.
        scale (`float`): what the layer multiplies the output of that module with.
    """

    kind: str
    config: PreTrainedConfig
    state: Mapping[str, Tensor]
    spot: str = "mlp.down_proj"
    scale: float = 1.0


def plan_export(model: PreTrainedModel) -> Export:
    """The plainest checkpoint that can hold offsets behind the layers of `model`."""
    config, state = copy.deepcopy(model.config), model.state_dict()
    kind = config.model_type
    if kind == "opt" and not config.do_layer_norm_before:
        return Export("bias", config, state, "final_layer_norm")
    if kind in BIASED and f"{layers_path(model)}.0.{BIASED[kind]}.bias" in state:
        return Export("bias", config, state, BIASED[kind])
    if kind in SWITCHED:
        config.mlp_bias = True
        return Export("bias", config, state, scale=getattr(config, "residual_multiplier", 1.0))
    if kind in _AS_LLAMA and _attends_like_llama(config):
        return _AS_LLAMA[kind](config, state)
    return Export("custom code", config, state)


def _attends_like_llama(config: PreTrainedConfig) -> bool:
    """Whether every layer sees all of the text, and all of each head turns in the default way."""
    rope = config.rope_parameters or {}
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    limited = window is not None and not hasattr(config, "layer_types") and window < config.max_position_embeddings
    whole = rope.get("partial_rotary_factor", 1.0) == 1.0
    return not slides and not limited and whole and rope.get("rope_type", "default") != "longrope"


def _llama_config(config: PreTrainedConfig, activation: str, **changes: Any) -> LlamaConfig:
    shared = {name: getattr(config, name) for name in _SHARED if hasattr(config, name)}
    return LlamaConfig(**{**shared, "hidden_act": activation, "mlp_bias": True, "dtype": config.dtype, **changes})


def _as_it_is(config: PreTrainedConfig, state: Mapping[str, Tensor]) -> Export:
    """Mistral and Qwen2, whose queries, keys and values have biases."""
    llama = _llama_config(config, config.hidden_act, attention_bias=config.model_type == "qwen2")
    return Export("llama", llama, state)


def _from_phi3(config: PreTrainedConfig, state: Mapping[str, Tensor]) -> Export:
    """Its query, key and value maps are one matrix, and so are gate and up."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    cuts = {
        "qkv_proj": (("q_proj", "k_proj", "v_proj"), (queries, keys, keys)),
        "gate_up_proj": (("gate_proj", "up_proj"), (config.intermediate_size,) * 2),
    }
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        fused = name.split(".")[-2]
        if fused not in cuts:
            converted[name] = tensor
            continue
        parts, sizes = cuts[fused]
        pieces = torch.split(tensor, list(sizes))
        converted |= {name.replace(fused, part): piece.contiguous() for part, piece in zip(parts, pieces, strict=True)}
    return Export("llama", _llama_config(config, config.hidden_act, head_dim=head), converted)


def _from_gemma(config: PreTrainedConfig, state: Mapping[str, Tensor]) -> Export:
    """Its norms multiply with 1 + weight, and its embeddings are scaled on the way in, but not on the way out."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    scale = torch.tensor(config.hidden_size**0.5, dtype=state[embedding].dtype, device=state[embedding].device)
    changed = {name: 1.0 + tensor for name, tensor in state.items() if name.endswith("norm.weight")}
    output = state[embedding] if config.tie_word_embeddings else state[head]
    changed |= {embedding: state[embedding] * scale, head: output.clone()}
    activation = config.hidden_activation if getattr(config, "hidden_activation", None) else config.hidden_act
    llama = _llama_config(config, activation, tie_word_embeddings=False)
    return Export("llama", llama, {**state, **changed})


_AS_LLAMA: dict[str, Callable[[PreTrainedConfig, Mapping[str, Tensor]], Export]] = {
    "gemma": _from_gemma,
    "ministral": _as_it_is,
    "mistral": _as_it_is,
    "phi3": _from_phi3,
    "qwen2": _as_it_is,
}
