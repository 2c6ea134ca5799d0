"""Inference-time value steering for language models, native to Hugging Face `transformers`."""

# ruff: noqa: E402
import warnings
from typing import Any

from hf_value_steer.hosts.versions import refuse_other_transformers


refuse_other_transformers()

from hf_value_steer.activation.steering_vectors import SteeringVectors
from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.configuration.activate import ActivationConfig
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.guidance_module import GuidanceModuleConfig
from hf_value_steer.configuration.guide import GuidanceConfig
from hf_value_steer.configuration.value_head import ValueHeadConfig
from hf_value_steer.errors import (
    ArtefactError,
    MismatchError,
    ScoringError,
    SteeringError,
    UnsupportedError,
    UploadError,
)
from hf_value_steer.generate import disable_value_steer, enable_value_steer
from hf_value_steer.generation.block_cache import BlockCache
from hf_value_steer.generation.decoding import value_steer_generate
from hf_value_steer.generation.logits_process import AbstentionLogitsProcessor, ValueFilterLogitsProcessor
from hf_value_steer.generation.output import ValueSteerDecoderOnlyOutput
from hf_value_steer.guidance.module import GuidanceModule
from hf_value_steer.heads.value_head import ValueHead, ValueHeadOutput
from hf_value_steer.hub import export_custom_generate
from hf_value_steer.wrapper import ValueSteerForCausalLM


__all__ = [
    "AbstentionConfig",
    "AbstentionLogitsProcessor",
    "ActivationConfig",
    "ArtefactError",
    "BlockCache",
    "GuidanceConfig",
    "GuidanceModule",
    "GuidanceModuleConfig",
    "MismatchError",
    "ScoringError",
    "SteeringError",
    "SteeringVectors",
    "UnsupportedError",
    "UploadError",
    "ValueFilterConfig",
    "ValueFilterLogitsProcessor",
    "ValueHead",
    "ValueHeadConfig",
    "ValueHeadOutput",
    "ValueSteerDecoderOnlyOutput",
    "ValueSteerForCausalLM",
    "disable_value_steer",
    "enable_value_steer",
    "export_custom_generate",
    "value_steer_generate",
]

# What older cards on the Hub import.
_RENAMED: dict[str, type[Any]] = {
    "BridgeGuidanceConfig": GuidanceConfig,
    "ValueGuidanceConfig": GuidanceModuleConfig,
    "ValueGuidanceModule": GuidanceModule,
}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    renamed = _RENAMED[name]
    warnings.warn(f"`{name}` is `{renamed.__name__}` now: import that.", DeprecationWarning, stacklevel=2)
    return renamed
