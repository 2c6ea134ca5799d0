"""Inference-time value steering for language models, native to Hugging Face `transformers`.

What is exported is imported when it is first asked for, so that `import hf_value_steer` is quick. `AutoConfig` and
`AutoModel` know our artefacts as soon as transformers is imported as well, before or after.
"""

import re
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_value_steer.hosts.imports import when_imported
from hf_value_steer.hosts.versions import refuse_other_transformers


if TYPE_CHECKING:
    from hf_value_steer.activation.steering_vectors import SteeringVectors as SteeringVectors
    from hf_value_steer.backbone.parts import fingerprint as fingerprint
    from hf_value_steer.configuration.abstain import AbstentionConfig as AbstentionConfig
    from hf_value_steer.configuration.activate import ActivationConfig as ActivationConfig
    from hf_value_steer.configuration.filter import ValueFilterConfig as ValueFilterConfig
    from hf_value_steer.configuration.guidance_module import GuidanceModuleConfig as GuidanceModuleConfig
    from hf_value_steer.configuration.guide import GuidanceConfig as GuidanceConfig
    from hf_value_steer.configuration.value_head import ValueHeadConfig as ValueHeadConfig
    from hf_value_steer.errors import ArtefactError as ArtefactError
    from hf_value_steer.errors import MismatchError as MismatchError
    from hf_value_steer.errors import ScoringError as ScoringError
    from hf_value_steer.errors import SteeringError as SteeringError
    from hf_value_steer.errors import UnsupportedError as UnsupportedError
    from hf_value_steer.errors import UploadError as UploadError
    from hf_value_steer.generate import disable_value_steer as disable_value_steer
    from hf_value_steer.generate import enable_value_steer as enable_value_steer
    from hf_value_steer.generation.block_cache import BlockCache as BlockCache
    from hf_value_steer.generation.decoding import value_steer_generate as value_steer_generate
    from hf_value_steer.generation.logits_process import AbstentionLogitsProcessor as AbstentionLogitsProcessor
    from hf_value_steer.generation.logits_process import ValueFilterLogitsProcessor as ValueFilterLogitsProcessor
    from hf_value_steer.generation.output import ValueSteerDecoderOnlyOutput as ValueSteerDecoderOnlyOutput
    from hf_value_steer.guidance.module import GuidanceModule as GuidanceModule
    from hf_value_steer.heads.value_head import ValueHead as ValueHead
    from hf_value_steer.heads.value_head import ValueHeadOutput as ValueHeadOutput
    from hf_value_steer.hub import export_custom_generate as export_custom_generate
    from hf_value_steer.judges.in_the_loop import TextJudge as TextJudge
    from hf_value_steer.scoring import ScoredText as ScoredText
    from hf_value_steer.scoring import score_text as score_text
    from hf_value_steer.wrapper import ValueSteerForCausalLM as ValueSteerForCausalLM

# Where what is exported is defined.
_HOME = {
    "AbstentionConfig": "configuration.abstain",
    "AbstentionLogitsProcessor": "generation.logits_process",
    "ActivationConfig": "configuration.activate",
    "ArtefactError": "errors",
    "BlockCache": "generation.block_cache",
    "GuidanceConfig": "configuration.guide",
    "GuidanceModule": "guidance.module",
    "GuidanceModuleConfig": "configuration.guidance_module",
    "MismatchError": "errors",
    "ScoredText": "scoring",
    "ScoringError": "errors",
    "SteeringError": "errors",
    "SteeringVectors": "activation.steering_vectors",
    "TextJudge": "judges.in_the_loop",
    "UnsupportedError": "errors",
    "UploadError": "errors",
    "ValueFilterConfig": "configuration.filter",
    "ValueFilterLogitsProcessor": "generation.logits_process",
    "ValueHead": "heads.value_head",
    "ValueHeadConfig": "configuration.value_head",
    "ValueHeadOutput": "heads.value_head",
    "ValueSteerDecoderOnlyOutput": "generation.output",
    "ValueSteerForCausalLM": "wrapper",
    "disable_value_steer": "generate",
    "enable_value_steer": "generate",
    "export_custom_generate": "hub",
    "fingerprint": "backbone.parts",
    "score_text": "scoring",
    "value_steer_generate": "generation.decoding",
}

# What older cards on the Hub import.
_RENAMED = {
    "BridgeGuidanceConfig": "GuidanceConfig",
    "ValueGuidanceConfig": "GuidanceModuleConfig",
    "ValueGuidanceModule": "GuidanceModule",
}

# These make their classes known to `AutoConfig` and `AutoModel`.
_REGISTERING = ("heads.value_head", "guidance.module", "wrapper")

# What the command line imports before it knows what to do: without transformers and torch.
_LIGHT = re.compile(
    r"(arguments|checks|choices|cli|errors)\b|hosts(\.imports|\.versions)?$|configuration(\.operating_point)?$"
)

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"`{name}` is `{_RENAMED[name]}` now: import that.", DeprecationWarning, stacklevel=2)
    name = _RENAMED.get(name, name)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    for module in _REGISTERING:
        import_module(f"{__name__}.{module}")


def _is_heavy(module: str) -> bool:
    package, _, inside = module.partition(".")
    return package == __name__ and not _LIGHT.match(inside)


refuse_other_transformers()
when_imported("transformers", _register, needed_by=_is_heavy)
