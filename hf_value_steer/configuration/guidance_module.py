"""`GuidanceModuleConfig`: what a guidance module is, and which backbone and layer it belongs to."""

import math
from dataclasses import fields
from importlib.metadata import version
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from hf_value_steer.checks import check_threshold, refuse_unknown
from hf_value_steer.files.schema import INHERITED_KEYS, SCHEMA, VersionedConfig, check_schema


_LARGE = {"num_bridges": 7, "value_width": 256, "value_heads": 16, "bridge_heads": 16}
# The backbones of the paper, with the hyperparameters of its code; the small ones are as by default.
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {"hidden_size": 768, "layer": 7},
    "qwen2-1.5b": {"hidden_size": 1536, "layer": 20},
    "llama-3.2-3b-instruct": {"hidden_size": 3072, "layer": 20, **_LARGE},
    "mistral-7b-instruct-v0.2": {"hidden_size": 4096, "layer": 22, **_LARGE},
}


@strict
class GuidanceModuleConfig(VersionedConfig):
    r"""The shape of a guidance module, and what it was trained for. Unknown keys are refused.

    The *state* of a token is the output of decoder layer `layer`, counted from 0: `hidden_states[layer + 1]`.

    Args:
        hidden_size (`int`): width of the state.
        layer (`int`): l*. Bridges exist in the layers above it.
        num_bridges (`int`): K, bridge tokens a row.
        value_width (`int`): width of the value space.
        value_heads (`int`), bridge_heads (`int`): heads of the attention over the prompt, and of the generator.
        dropout (`float`): in [0, 1), in training.
        conditional (`bool`): whether the value of a token depends on the prompt, too.
        correction (`str`): how the value is corrected where it is beyond `threshold`. `"gradient"`, the paper's form:
            `-step * grad`, with the gradient of the discriminator's logit in value space; `"newton"`, that of its
            code: `-step * margin * grad / |grad|^2`, which for `step=1` reaches the threshold to first order.
        step (`float`): its factor.
        threshold (`float`): in (0, 1); at lower values the discriminator is content and the correction zero.
        injection (`str`): `"bridge"`, or `"inject"` for the paper's ablation SVGT-Inject: what the generator made of
            its K seeds is averaged and added to the state of the token itself.
        attribute (`str`, *optional*): what a high value means, for instance `"toxicity"`.
        backbone, backbone_revision, backbone_fingerprint, chat_template, library_version, schema_version, training: as
            in [`ValueHeadConfig`].
    """

    model_type: ClassVar[str] = "hvs_value_guidance"
    old_model_type: ClassVar[str] = "value_guidance"
    has_no_defaults_at_init: ClassVar[bool] = True

    hidden_size: int
    layer: int
    num_bridges: int = 5
    value_width: int = 128
    value_heads: int = 4
    bridge_heads: int = 8
    dropout: float = 0.1
    conditional: bool = True
    correction: Literal["gradient", "newton"] = "newton"
    step: float = 1.0
    threshold: float = 0.5
    injection: Literal["bridge", "inject"] = "bridge"
    attribute: str | None = None
    backbone: str | None = None
    backbone_revision: str | None = None
    backbone_fingerprint: str | None = None
    chat_template: str | None = None
    library_version: str | None = None
    schema_version: int = SCHEMA
    training: dict[str, Any] | None = None

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "GuidanceModuleConfig":
        """The config for a backbone of the paper: a name in `PRESETS`, with some fields otherwise."""
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}, only {', '.join(PRESETS)}.")
        return cls(**PRESETS[name] | overrides)

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown(set(kwargs) - INHERITED_KEYS, (field.name for field in fields(self)), type(self).__name__)
        self.library_version = self.library_version or version("hf-value-steer")
        super().__post_init__(**kwargs)

    def validate_guidance_module(self) -> None:
        """Part of `@strict` validation."""
        check_schema(self.schema_version)
        for name in ("hidden_size", "num_bridges", "value_width", "value_heads", "bridge_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` has to be a positive integer, got {getattr(self, name)}.")
        if self.layer < 0:
            raise ValueError(f"`layer` counts from 0, got {self.layer}.")
        for heads, width in (("value_heads", "value_width"), ("bridge_heads", "hidden_size")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"`{width}` has to be a multiple of `{heads}`, got {getattr(self, width)} and "
                    f"{getattr(self, heads)}."
                )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` has to be in [0, 1), got {self.dropout}.")
        if not 0.0 <= self.step < math.inf:
            raise ValueError(f"`step` has to be a finite number of at least 0, got {self.step}.")
        check_threshold(self.threshold)
