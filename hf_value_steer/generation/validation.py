"""What a steered generation refuses, by name and before the first token."""

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from packaging.version import Version
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation import GenerationMode

from hf_value_steer.backbone.parts import vocabulary_size
from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.configuration.methods import SteeringConfig
from hf_value_steer.errors import ScoringError, UnsupportedError
from hf_value_steer.generation.block_cache import BlockCache
from hf_value_steer.generation.cache import SUPPORTED_LAYERS
from hf_value_steer.generation.families import NEEDS, VERIFIED
from hf_value_steer.generation.kernels import BY_ROW
from hf_value_steer.hosts.transformers import (
    CACHE,
    READ_BY_THE_PROMPT,
    VERSION,
    cache_of,
    dropped_arguments,
    holds_text,
    splits_over_processes,
)


# `generate` takes these, but does not hand them to a `custom_generate` callable.
_DROPPED = {
    "streamer": "call `enable_value_steer(model)` and leave out `custom_generate`, or pass it as `token_streamer=`",
    "assistant_model": "assisted decoding cannot be steered",
    "synced_gpus": "FSDP and DeepSpeed ZeRO-3 are not supported",
}


def refuse_unsupported(model: PreTrainedModel, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise an `UnsupportedError` for anything that steering could not honour exactly.

    Args:
        model: the backbone.
        config: the prepared generation config.
        model_kwargs: what `generate` prepared for the model's forward.
    """
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedError(
            f"`value_steer` works with greedy search and sampling, but these arguments ask for {mode.value} "
            f"(num_beams={config.num_beams}). In beam search, use ValueFilterLogitsProcessor or "
            "AbstentionLogitsProcessor."
        )
    if not config.use_cache:
        raise UnsupportedError("`use_cache=False` cannot be steered: candidates share the cached prefix.")
    refuse_model(model)
    refuse_cache(cache_of(model_kwargs), config.max_length)
    for name, value in model_kwargs.items():
        if isinstance(value, torch.Tensor) and name not in BY_ROW | READ_BY_THE_PROMPT:
            raise UnsupportedError(f"`{name}` is not understood by the look-ahead of value steering; leave it out.")


def refuse_model(model: PreTrainedModel) -> None:
    """Raise an `UnsupportedError` for a model whose look-ahead was not verified."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in VERIFIED or model.config.is_encoder_decoder:
        close = difflib.get_close_matches(config.model_type, VERIFIED, n=5)
        known = f"; among the {len(VERIFIED)} that were are {', '.join(close)}" if close else ""
        raise UnsupportedError(
            f"Value steering was not verified for model type {config.model_type!r}{known}. All are on the page "
            "docs/families.md; `hf-value-steer doctor MODEL` says more."
        )
    needed = NEEDS.get(config.model_type)
    if needed is not None and VERSION < Version(needed):
        raise UnsupportedError(
            f"Model type {config.model_type!r} needs transformers {needed}, this is {VERSION}; "
            "before, its own cached decoding is wrong."
        )
    if splits := splits_over_processes(model):
        raise UnsupportedError(
            f"A model under {splits} cannot be steered: nothing holds its processes in step. Load it with "
            '`tp_plan="auto"`, or serve it with vLLM.'
        )
    owner = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)  # PEFT puts its own there
    refuse_adapters(model, owner)


def refuse_adapters(*models: Any) -> None:
    """Raise an `UnsupportedError` for PEFT adapters that look-aheads do not know of.

    Args:
        models: the model that is steered, and the models around it.
    """
    for model in models:
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UnsupportedError(
                "A PEFT adapter of virtual tokens (prefix tuning, prompt tuning, P-tuning) cannot be steered: mask "
                "and positions of the look-ahead do not know of them. Adapters of weights (LoRA and others) can."
            )


def refuse_cache(cache: Any, max_length: int) -> None:
    if cache is None:
        raise UnsupportedError("`generate` has made no cache for this model, and without one it cannot be steered.")
    if type(cache) not in (DynamicCache, StaticCache, BlockCache) or cache.offloading:
        kind = "offloaded " if getattr(cache, "offloading", False) else ""
        raise UnsupportedError(
            f"Cache {kind}{type(cache).__name__!r} cannot look ahead; use a DynamicCache (the default), a StaticCache "
            "or a BlockCache."
        )
    for layer in cache.layers:
        if type(layer) not in SUPPORTED_LAYERS:
            raise UnsupportedError(f"Cache layers of type {type(layer).__name__} cannot look ahead.")
        full = isinstance(layer, StaticLayer) and not layer.is_sliding
        if full and layer.max_cache_len < max_length and holds_text(cache):
            raise UnsupportedError(
                f"The StaticCache of this call holds {layer.max_cache_len} tokens, but the text may get {max_length} "
                "long: steering forwards the last token, too, so give it one slot more than plain generate needs."
            )


def require_kept(model: PreTrainedModel, inputs: Mapping[str, Any], cache: Cache, length: int) -> None:
    """Raise a `ScoringError` if the model goes on without the `cache` that it was given, after `length` tokens."""
    if cache_of(inputs) is not cache:
        raise ScoringError(
            f"{type(model).__name__} has dropped its cache after {length} tokens, where it changes "
            "its position embedding: a text cannot be steered across this length. Keep it shorter, or begin with "
            "a longer prompt."
        )


def refuse_unguidable(
    input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: dict[str, Any], lookahead: str
) -> None:
    """Raise an `UnsupportedError` for what guidance by bridge tokens cannot honour, beside [`refuse_unsupported`]."""
    if input_ids.shape[1] < 2 or model_kwargs.get("inputs_embeds") is not None:
        raise UnsupportedError("Guidance reads the prompt's tokens: pass `input_ids` of at least two.")
    if holds_text(cache_of(model_kwargs)):
        raise UnsupportedError(
            f"`{CACHE}` holds text already, but guidance has to read the whole prompt: leave it out."
        )
    if config.output_attentions or config.output_hidden_states:
        raise UnsupportedError("`output_attentions` and `output_hidden_states` cannot be returned beside guidance.")
    if lookahead not in ("auto", "expanded"):
        raise UnsupportedError(f'lookahead={lookahead!r} cannot be used beside guidance, only "expanded".')


def refuse_dropped_arguments() -> None:
    """Raise if the calling `generate` was given an argument that it does not hand to us.

    Without this, `streamer=` beside `custom_generate=` would see the prompt, then nothing, and a reader thread would
    wait for ever.
    """
    for name in dropped_arguments(_DROPPED):
        raise UnsupportedError(f"`{name}` does not reach a `custom_generate` callable: {_DROPPED[name]}.")


def refuse_other_kind(config: Any, kind: type[SteeringConfig]) -> None:
    """Raise a `TypeError` unless `config` is of this kind."""
    if not isinstance(config, kind):
        raise TypeError(f"`config` has to be a {kind.__name__}, got a {type(config).__name__}.")


def ending_tokens(config: AbstentionConfig, eos: int, model: PreTrainedModel) -> list[int]:
    """The tokens that abstention ends a row with: the message and EOS.

    Raises:
        ValueError: if the model has no such token.
    """
    ending, vocabulary = [*(config.message_ids or ()), eos], vocabulary_size(model)
    if unknown := [token for token in ending if token >= vocabulary]:
        raise ValueError(
            f"Abstention would end rows with tokens {unknown} (`message_ids` and EOS), but this model has only "
            f"{vocabulary}."
        )
    return ending


def eos_token(config: GenerationConfig, reason: str) -> int:
    """The (first) EOS id, needed to end rows early.

    Raises:
        ValueError: if the generation config has none.
    """
    ids = config.eos_token_id
    if ids is None:
        raise ValueError(f"{reason} ends rows with an EOS token, but the generation config has no `eos_token_id`.")
    return int(ids[0] if isinstance(ids, list) else ids)
