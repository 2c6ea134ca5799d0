"""What this library takes for granted of transformers: every internal name that it uses, and how it is called.

Whatever depends on the version of transformers is decided here, from what is there and not from a version's number.
The tables at the end list all of it; `hf-value-steer doctor` and a test compare them with the installed package.
"""

import inspect
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
    cache_utils,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import BaseStreamer
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import _hook_installation_lock

from hf_value_steer.hosts.bindings import Table, attributes, differences, parameters, size


VERSION = Version(version("transformers"))

# The name of the cache in `generate`, in a model's forward and in its output: `past_key_values` up to 5.23, where
# state space models have `cache_params`; `cache` from 5.24 on, for all of them.
_IN_PREPARATION = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _IN_PREPARATION else "past_key_values"
_CACHE_NAMES = tuple(dict.fromkeys((CACHE, "past_key_values", "cache_params")))

# Stands in a cache for a layer that keeps nothing of its own: 5.23 and later.
DummyLayer: type | None = getattr(cache_utils, "DummyLayer", None)

# What only the forward of a prompt reads, all of it or none: images and the like.
READ_BY_THE_PROMPT = frozenset(
    {*MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL, "image_grid_thw", "video_grid_thw", "second_per_grid_ts"}
)

# Held while transformers installs its hooks on a model, which may happen in another thread.
installing_hooks = _hook_installation_lock


def cache_name(arguments: Mapping[str, Any]) -> str:
    """Under which name a model's forward takes its cache, given `generate`'s arguments for it."""
    return next((name for name in _CACHE_NAMES if arguments.get(name) is not None), CACHE)


def cache_of(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a forward, under whatever name it is there."""
    return next((value for value in arguments.values() if isinstance(value, Cache)), None)


def length_of(cache: Cache) -> int | None:
    """How many tokens a cache has taken in; `None` where its layers do not count them."""
    counting = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    return int(cache.get_seq_length()) if counting else None


def holds_text(cache: Cache) -> bool:
    """Whether a cache has taken in any token."""
    if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return bool(cache.get_seq_length() > 0)
    return any(
        all(layer.has_previous_state.values()) for layer in cache.layers if hasattr(layer, "has_previous_state")
    )


def prefill(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]
) -> ModelOutput:
    """Forward a prompt as `generate` does, in chunks if the call asks for them."""
    return model._prefill(input_ids, config, kwargs, is_first_iteration=True)


def next_kwargs(model: PreTrainedModel, outputs: ModelOutput, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The forward's arguments for the token after the one that gave `outputs`."""
    return model._update_model_kwargs_for_generation(outputs, kwargs)  # type: ignore[no-any-return]


def sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    kwargs: dict[str, Any],
) -> Any:
    """The loop of plain `generate`: greedy search and sampling."""
    return model._sample(input_ids, processors, criteria, config, streamer=streamer, **kwargs)


def decoding(model: PreTrainedModel) -> AbstractContextManager[None]:
    """A context in which the experts of `model` are those for decoding."""
    return model._optimize_model_for_decode()  # type: ignore[no-any-return]


def pad_token(config: GenerationConfig) -> Tensor:
    """The token that fills rows that have ended, a tensor without dimensions."""
    return config._pad_token_tensor  # type: ignore[no-any-return]


def rows_can_end(criteria: StoppingCriteriaList) -> bool:
    """Whether a row can end before the others, which is then padded: if a criterion looks for EOS."""
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria)


def splits_over_processes(model: PreTrainedModel) -> str | None:
    """What gathers the weights of a model from several processes, if it is so: all have to take every step."""
    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3"
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return "FullyShardedDataParallel"
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return "fully_shard" if several and any(isinstance(module, FSDPModule) for module in model.modules()) else None


def bans_and_warpers(
    processors: LogitsProcessorList,
) -> tuple[LogitsProcessorList, LogitsProcessorList, LogitsProcessorList]:
    """Processors that may forbid tokens; from the first one on that only narrows the sampling, the others; and of
    these those of the user, which may forbid tokens, too, unless they say `only_narrows`.
    """
    users = [not type(each).__module__.startswith("transformers.") for each in processors]
    warping = [type(each).__name__.endswith("LogitsWarper") for each in processors]
    first = next((i for i, warps in enumerate(warping) if warps and not users[i]), len(processors))
    rest = zip(processors[first:], users[first:], strict=True)
    late = [each for each, of_user in rest if of_user and not getattr(each, "only_narrows", False)]
    return LogitsProcessorList(processors[:first]), LogitsProcessorList(processors[first:]), LogitsProcessorList(late)


def compile_config(model: PreTrainedModel, config: GenerationConfig, kwargs: dict[str, Any]) -> CompileConfig | None:
    """How plain `generate` would compile its decoding step with these arguments, `None` if it would not."""
    if not model._valid_auto_compile_criteria(kwargs, config):
        return None
    return config.compile_config or model._default_compile_config()


def attention_of(config: PreTrainedConfig) -> str:
    """The name of the attention function that a (text) config asks for."""
    return str(config._attn_implementation)


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Let the model of `config` attend by the function of this name."""
    config._attn_implementation = name


def _callers() -> Iterator[types.FrameType]:
    """The frames of what is running, from the inside out."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def stage_of_generate() -> Literal["prompt", "chunk", "decode"] | None:
    """What the forward that is running reads for `generate`: a whole prompt, a chunk of one, or what comes after it.

    `None` if it was not called by `generate`. A forward is not told, so this looks at the frames of the callers.
    """
    for frame in _callers():
        if frame.f_code is _PREFILL:
            return "prompt" if frame.f_locals["generation_config"].prefill_chunk_size is None else "chunk"
        if frame.f_code is _GENERATE:
            return "decode"
    return None


def config_of_generate() -> GenerationConfig | None:
    """The prepared generation config of the `generate` that is running, if one is."""
    given = next((frame.f_locals for frame in _callers() if frame.f_code is _GENERATE), {})
    return given.get("generation_config")


def dropped_arguments(names: Iterable[str]) -> list[str]:
    """Which of these arguments the `generate` that is running was given.

    It does not hand them to a `custom_generate` callable, and there is no public way to learn of them: this looks at
    the frames of the callers.
    """
    given = next((frame.f_locals for frame in _callers() if frame.f_code.co_name == "generate"), {})
    return [name for name in names if given.get(name) not in (None, False)]


_PREFILL = inspect.unwrap(GenerationMixin._prefill).__code__
_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__

_GENERATION = "transformers:GenerationMixin"
_MODEL = "transformers:PreTrainedModel"
_CACHES = "transformers.cache_utils"

PARAMETERS: Table = {
    f"{_GENERATION}.generate": "inputs generation_config custom_generate streamer assistant_model synced_gpus *",
    f"{_GENERATION}.prepare_inputs_for_generation": f"input_ids next_sequence_length {CACHE} *",
    f"{_GENERATION}._prefill": "input_ids generation_config model_kwargs is_first_iteration",
    f"{_GENERATION}._update_model_kwargs_for_generation": "outputs model_kwargs *",
    f"{_GENERATION}._sample": "input_ids logits_processor stopping_criteria generation_config streamer *",
    f"{_GENERATION}._optimize_model_for_decode": "",
    f"{_GENERATION}._valid_auto_compile_criteria": "model_kwargs generation_config",
    f"{_MODEL}._default_compile_config": "",
    f"{_MODEL}.get_output_embeddings": "",
    f"{_CACHES}:StaticCache": "config max_cache_len *",
    f"{_CACHES}:DynamicCache": "config *",
    f"{_CACHES}:Cache.update": "key_states value_states layer_idx *",
    f"{_CACHES}:CacheLayerMixin.get_mask_sizes": "query_length",
    f"{_CACHES}:DynamicLayer.crop": "tokens_to_remove",
    f"{_CACHES}:DynamicSlidingWindowLayer.crop": "tokens_to_remove",
    f"{_CACHES}:DynamicSlidingWindowLayer.activate_past_recording": "",
    f"{_CACHES}:LinearAttentionLayer": "number_of_states *",
    "transformers:AttentionInterface.register": "key value",
    "transformers.utils.hub:cached_file": "path_or_repo_id filename *",
    "transformers.dynamic_module_utils:get_class_from_dynamic_module": (
        "class_reference pretrained_model_name_or_path *"
    ),
}
ATTRIBUTES: Table = {
    "transformers:GenerationConfig": "_pad_token_tensor compile_config prefill_chunk_size",
    "transformers:PreTrainedConfig": "_attn_implementation get_text_config",
    _MODEL: "_keep_in_fp32_modules_strict base_model",
    "transformers.generation:EosTokenCriteria": "eos_token_id",
    f"{_CACHES}:Cache": "layers offloading get_seq_length",
    f"{_CACHES}:CacheLayerMixin": "keys values is_initialized lazy_initialization get_max_length",
    f"{_CACHES}:DynamicSlidingWindowLayer": "is_sliding cumulative_length record_past sliding_window",
    f"{_CACHES}:StaticLayer": "is_sliding cumulative_length max_cache_len",
    f"{_CACHES}:StaticSlidingWindowLayer": "cumulative_length cumulative_length_int max_cache_len",
    f"{_CACHES}:LinearAttentionCacheLayerMixin": (
        "number_of_states conv_states recurrent_states is_conv_states_initialized is_recurrent_states_initialized "
        "conv_kernel_size has_previous_state dtype device"
    ),
    f"{_CACHES}:LinearAttentionAndFullAttentionLayer": "keys conv_states",
    f"{_CACHES}:LinearAttentionAndSlidingWindowAttentionLayer": "keys conv_states record_past",
    f"{_CACHES}:LinearAttentionAndStaticFullAttentionLayer": "cumulative_length conv_states",
    f"{_CACHES}:LinearAttentionAndStaticSlidingWindowAttentionLayer": "cumulative_length_int conv_states",
}


def differences_of_transformers() -> list[str]:
    """What of the tables the installed transformers does not have, a text each."""
    return [*differences(PARAMETERS, parameters), *differences(ATTRIBUTES, attributes)]


def size_of_tables() -> str:
    """How much the tables hold, in words."""
    return f"calls: {size(PARAMETERS)}; state: {size(ATTRIBUTES)}"
