"""A tiny random decoder of nearly every type that `AutoModelForCausalLM` knows, with each layer kind of its family.

`families.py` writes out the few families that most tests use. Here the configurations are derived: a field of the
configuration class whose name is in `_NAMES` gets the value there, a field that lists layer kinds gets each kind of
the family's default once, and `_OVERRIDES` says the rest.
"""

import dataclasses
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families import _DECODER, _TOKENS, VOCABULARY, WINDOW


class Unbuildable(Exception):
    """There is no tiny decoder of this type; the message says why."""


_HIDDEN, _LAYERS, _HEADS, _HEAD, _RANK, _EXPERTS = 32, 2, 4, 8, 16, 4

_NAMES: tuple[tuple[Any, str], ...] = (
    (_HIDDEN, "n_embd d_model emb_dim embedding_size input_embedding_size output_embedding_size lru_width"),
    (_HIDDEN, "pronunciation_embed_dim shape_embed_dim mm_embed_dim output_proj_dims audio_embed_dim"),
    (_LAYERS, "n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers"),
    (_LAYERS, "max_window_layers no_rope_layer_interval interleave_moe_layer_step"),
    (_HEADS, "n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads"),
    (_HEADS, "num_encoder_attention_heads num_decoder_attention_heads n_mamba_heads mamba_n_heads mamba_num_heads"),
    (_HEADS, "linear_num_value_heads linear_num_heads"),
    (2, "linear_num_key_heads swa_num_key_value_heads n_groups mamba_ngroups"),
    (16, "index_n_heads"),  # it scores a token through a relu by head: with few heads, many scores would tie at zero
    (
        _HEAD,
        "head_dim kv_channels dim_head attention_head_size v_head_dim index_head_dim linear_head_dim swa_head_dim",
    ),
    (_HEAD, "linear_key_head_dim linear_value_head_dim query_pre_attn_scalar hidden_size_per_layer_input"),
    (4, "qk_nope_head_dim qk_rope_head_dim rotary_dim"),
    (48, "ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff dff d_inner feed_forward_size"),
    (48, "shared_intermediate_size dense_intermediate_size intermediate_size_mlp"),
    (24, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size"),
    (24, "moe_shared_expert_intermediate_size"),
    (_RANK, "q_lora_rank kv_lora_rank o_lora_rank gated_norm_rank laurel_rank adapter_rank hc_lowrank d_rel"),
    (_RANK, "state_size ssm_state_size mamba_d_state router_hidden_size"),
    (_EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_k top_k_experts"),
    (1, "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    (1, "first_k_dense_replace num_dense_layers"),
    (128, "n_positions n_ctx max_seq_len max_target_positions context_length"),
    (
        WINDOW,
        "sliding_window sliding_window_size attention_window_size attention_chunk_size window_size",
    ),
    (WINDOW, "index_topk keep_window_size chunk_size mamba_chunk_size block_size"),
    (2 * WINDOW, "floor_scale local_attention"),
    (VOCABULARY, "vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size"),
    (_TOKENS["bos_token_id"], "decoder_start_token_id"),
    (None, "forced_eos_token_id begin_suppress_tokens suppress_tokens"),
    (True, "is_decoder use_sliding_window scale_embedding"),
    (False, "is_encoder_decoder tie_word_embeddings"),  # a tied head mostly repeats the token that was read
    (0.02, "initializer_range init_std"),
    (1.0, "logit_scale"),
)
_SIZES = _DECODER | {name: value for value, names in _NAMES for name in names.split()}

_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    *("num_encoder_layers", "num_decoder_layers"),
)
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")

_MLA = {"num_key_value_heads": _HEADS}
_MAMBA_THEN_ATTENTION = {"layer_types": ["linear_attention", "full_attention"]}
_FULL_THEN_SLIDING = {"layer_types": ["full_attention", "sliding_attention"]}
_SHARED_INDEXER = {"indexer_types": ["full", "shared"], **_MLA}
_LINEAR_THEN_HYBRID = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}

_OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": _HIDDEN, "ffn_hidden_size": 24, "moe_num_experts": _EXPERTS, "moe_top_k": 2},
    },
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": WINDOW},
        "o_groups": 2,
    },
    "bailing_hybrid": _MLA,
    "falcon_h1": {"mamba_d_ssm": 2 * _HIDDEN},
    "fuyu": {"text_config": "persimmon"},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "enable_moe_block": True,
        "global_head_dim": 2 * _HEAD,
    },
    "gemma4_unified_text": {"global_head_dim": 2 * _HEAD},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _SHARED_INDEXER,
    "got_ocr2": {"text_config": "qwen2"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA_THEN_ATTENTION,
    "hrm_text": {"H_cycles": 1, "L_cycles": 1},
    "hy_v4": _SHARED_INDEXER,
    "inkling_text": {"rel_extent": 128, "logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "kimi_linear": _MLA,
    "laguna": _FULL_THEN_SLIDING,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {**_MLA, "head_dim": 4, "zero_expert_num": 2},
    "mamba2": {"head_dim": 2 * _HEAD},
    "mellum": _FULL_THEN_SLIDING,
    "minicpm3": {**_MLA, "dim_model_base": _HIDDEN, "scale_emb": 1},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": _FULL_THEN_SLIDING,
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    # Only the cache of moshi knows the window, its masks do not: a shorter one disagrees.
    "moshi": {"audio_vocab_size": 101, "sliding_window": 128},
    "moss_transcribe_diarize": {"text_config": "qwen3"},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": _HEAD,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 1,
        "split_ngram_parts": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": WINDOW,
        "lsh_attn_chunk_length": WINDOW,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "sarvam_mla": _MLA,
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "youtu": {**_MLA, "embedding_initializer_range": 0.02},
    "zamba": _LINEAR_THEN_HYBRID,
    "zamba2": _LINEAR_THEN_HYBRID,
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "num_experts_per_tok": 1},
}

_FACTOR = 6.0
_FACTORS = {  # where the default gives one or two tokens over and over, or a nearly uniform distribution
    **dict.fromkeys(("afmoe", "aria_text", "cohere2", "diffllama", "falcon_h1", "gemma2", "gptj", "jais2"), 16.0),
    **dict.fromkeys(("lfm2_moe", "modernbert-decoder", "moshi", "nanochat", "phi", "qwen2_moe", "qwen4_exp"), 16.0),
    **dict.fromkeys(("qwen4_exp_text", "whisper", "xlm-roberta-xl"), 16.0),
    **dict.fromkeys(("megatron-bert", "xlnet"), 24.0),
    "marian": 12.0,
}

_DRAFT = "a draft model: it reads the hidden states and the cache of another model"
_CODEBOOKS = "it predicts several audio codebooks at once: a position is not one token"

_NOT_YET = "new, and not verified yet: it takes a configuration of its own to make it tiny"

UNBUILDABLE = {
    **dict.fromkeys(("dory", "dots3_note", "dots3_note_text", "inkling2_loop_text", "inkling2_text"), _NOT_YET),
    "blt": "it decodes patches of bytes, and `generate` cannot make a cache from its configuration",
    "gemma3n": "multimodal: its text decoder gemma3n_text is in the table, and its vision tower needs timm",
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "musicgen": _CODEBOOKS,
    "musicgen_melody": _CODEBOOKS,
}

MODEL_TYPES = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in UNBUILDABLE)

_PADDED = "in a left-padded batch only:"
CACHE_DISAGREES = {  # types whose own cached decoding is not what their full forward pass computes
    "cpmant": "its attention is bidirectional over all that one forward pass reads",
    "deepseek_v4": f"{_PADDED} from the first window on that is compressed after the prompt",
    "git": f"{_PADDED} with a cache, its padding mask is shifted by the tokens of an image that is not there",
    "prophetnet": "with a cache, its predicting stream has other logits",
    "recurrent_gemma": f"{_PADDED} with a cache, its mask is one key long, the length of a recurrent layer's cache",
    "reformer": "its hashing and chunking depend on what one forward pass reads",
    "rwkv": "in a batch of several rows only: its one-token step mixes the rows",
}


def _values(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The tiny values of one configuration class, and of the configurations inside it."""
    names = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in _SIZES.items() if name in names}
    values |= _OVERRIDES.get(config_class.model_type, {})
    for name, inner in config_class.sub_configs.items():
        if isinstance(values.get(name), str):
            values[name] = {"model_type": values[name], **_values(CONFIG_MAPPING[values[name]])}
        elif name not in values and dataclasses.is_dataclass(inner):
            values[name] = _values(inner)
    if names & {*_KINDS} - {*values}:
        deep = {name: value for name, value in values.items() if name not in _KINDS} | {"num_hidden_layers": 24}
        default = config_class(**deep)
        kinds = {name: [*dict.fromkeys(getattr(default, name) or ())] for name in _KINDS if name in names - {*values}}
        layers = max(values.get("num_hidden_layers", _LAYERS), *map(len, kinds.values()))
        values |= {name: kind + kind[-1:] * (layers - len(kind)) for name, kind in kinds.items() if kind}
        values["num_hidden_layers"] = layers
    return values


def _deepened(model_type: str, values: dict[str, Any], layers: int) -> dict[str, Any]:
    """The values with at least so many layers: the kinds of layers repeat."""
    before = values.get("num_hidden_layers", _LAYERS)
    if before >= layers:
        return values
    longer = {
        name: (kinds * layers)[:layers]
        for name, kinds in values.items()
        if name in _KINDS and isinstance(kinds, list) and len(kinds) == before
    }
    more = {name: layers for name in _COUNTS if name in values}
    own = {"attention_types": [[["global", "local"], layers // 2]]} if model_type == "gpt_neo" else {}
    return values | longer | more | own


def tiny_config(model_type: str, layers: int = _LAYERS) -> PreTrainedConfig:
    """The configuration of a tiny decoder of the type, of at least so many layers.

    Raises `Unbuildable` where there is none.
    """
    if model_type in UNBUILDABLE:
        raise Unbuildable(f"{model_type}: {UNBUILDABLE[model_type]}")
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_deepened(model_type, _values(config_class), layers))


def build_tiny(model_type: str, layers: int = _LAYERS) -> PreTrainedModel:
    """A tiny decoder of the type with weights large enough that its next-token distribution is far from uniform."""
    config = tiny_config(model_type, layers)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the module of gpt_bigcode has `torch.jit.script`
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(_FACTORS.get(model_type, _FACTOR))
    model.generation_config.update(**{name: _TOKENS[name] for name in _TOKENS if name.endswith("_token_id")})
    return model.eval()
