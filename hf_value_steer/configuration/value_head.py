"""`ValueHeadConfig`: what a value head is, and which backbone and feature it belongs to."""

from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from hf_value_steer.checks import (
    check_attributes,
    check_decay,
    check_layers,
    check_projection,
    check_threshold,
    refuse_unknown,
)
from hf_value_steer.choices import Polarity, Temporal
from hf_value_steer.configuration.operating_point import check_operating_point
from hf_value_steer.files.schema import INHERITED_KEYS, SCHEMA, VersionedConfig, check_schema


# Fields that older versions do not know.
_UNSAID = ("feature_norms", "operating_point", "projection_size", "temporal_decay")


@strict
class ValueHeadConfig(VersionedConfig):
    r"""What a value head is, and which backbone and feature it belongs to.

    Unknown keys are refused. The *feature* is what the head reads of each token: the outputs of decoder layers, or
    the tensor that the backbone's output embedding consumes (`"final"`: last layer, after the final norm).

    Args:
        hidden_size (`int`): width of the feature, that of all its layers together.
        architecture (`str`): `"mlp"` (Linear-Tanh-Linear-ReLU-Linear, as in value-steer) or `"linear"`.
        projection_size (`int`, *optional*): width of the inner layers of an `"mlp"`; `hidden_size` by default.
        polarity (`str`): meaning of a high value, `"undesirable"` (P(unsafe)) or `"desirable"` (P(correct)).
        attribute (`str`, *optional*): what is valued, for instance `"toxicity"`. With `attributes` their names joined
            by `" + "`, unless it is given.
        backbone (`str`, *optional*): Hub id of the backbone that the head was trained on.
        backbone_revision (`str`, *optional*): its revision.
        backbone_fingerprint (`str`, *optional*): [`~hf_value_steer.backbone.parts.fingerprint`] of its weights. When
            it is there, generation on other weights is refused.
        feature_layers (`list`): the layers of the feature, side by side. Each is a number, counted from 0 or, if it is
            negative, from the end; a fraction of the depth, a `float` in [0, 1]; or `"final"`. Layer `l` is
            `hidden_states[l + 1]` of `transformers`.
        feature_norms (`list` of `float`, *optional*): mean Euclidean norm of each of them over the training tokens.
        temporal (`str`): what the head remembers of the tokens before, from the prompt's last one on: nothing
            (`"none"`), or the mean (`"mean"`) or an exponential mean (`"ema"`) of what its first layer makes of them.
        temporal_decay (`float`, *optional*): for `"ema"`, the weight in (0, 1) of what was before; 0.9 by default.
        feature_dtype (`str`, *optional*): dtype of the backbone during training, for instance `"bfloat16"`.
        chat_template (`str`, *optional*): how training prompts were formatted: `"none"` for plain continuations,
            else a name or digest of the template.
        threshold (`float`, *optional*): default threshold in (0, 1); with `attributes` 0.5, unless it is given.
        operating_point (`dict`, *optional*): how a filter uses this head, where its config does not say: any of
            `"num_candidates"`, `"rollback"`, `"selection"`, `"beta"` and, instead of the threshold, `"alpha"`; see
            [`ValueFilterConfig`].
        attributes (`list` of `dict`, *optional*): makes a head of several attributes, which has one output for each
            and answers with one value for all. Each has a `"name"`, a `"polarity"`, a `"threshold"` in (0, 1) and, for
            `combine="sum"`, a `"weight"` above 0 (1 by default). `polarity` itself is `"undesirable"` then.
        combine (`str`): what the value of a head of several attributes is made of: how far, in log odds, each one is
            beyond its threshold, on its undesirable side. `"worst"`: the largest of these, so that the value is below
            one half exactly if every attribute passes its own threshold. `"sum"`: their weighted mean, so that one
            attribute can make up for another. Other thresholds than one half move those of all attributes by the same
            odds.
        library_version (`str`): version of this library that made the head.
        schema_version (`int`): what the fields of this config mean, see [`hf_value_steer.files.schema`].
        training (`dict`, *optional*): how the head was trained; free form, JSON.
    """

    model_type: ClassVar[str] = "hvs_value_head"
    old_model_type: ClassVar[str] = "value_head"
    has_no_defaults_at_init: ClassVar[bool] = True

    hidden_size: int
    architecture: Literal["mlp", "linear"] = "mlp"
    projection_size: int | None = None
    polarity: Polarity = "undesirable"
    attribute: str | None = None
    backbone: str | None = None
    backbone_revision: str | None = None
    backbone_fingerprint: str | None = None
    feature_layers: list[int | float | str] | None = None
    feature_norms: list[float] | None = None
    temporal: Temporal = "none"
    temporal_decay: float | None = None
    feature_dtype: str | None = None
    chat_template: str | None = None
    threshold: float | None = None
    operating_point: dict[str, Any] | None = None
    attributes: list[dict[str, Any]] | None = None
    combine: Literal["worst", "sum"] = "worst"
    library_version: str | None = None
    schema_version: int = SCHEMA
    training: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown(set(kwargs) - INHERITED_KEYS, (field.name for field in fields(self)), type(self).__name__)
        self.library_version = self.library_version or version("hf-value-steer")
        self.feature_layers = ["final"] if self.feature_layers is None else list(self.feature_layers)
        if self.temporal == "ema" and self.temporal_decay is None:
            self.temporal_decay = 0.9
        if self.attributes is not None:
            check_attributes(self.attributes)
            self.attributes = [{"weight": 1.0, **attribute} for attribute in self.attributes]
            self.attribute = self.attribute or " + ".join(attribute["name"] for attribute in self.attributes)
            self.threshold = 0.5 if self.threshold is None else self.threshold
        super().__post_init__(**kwargs)

    @property
    def trained_on_chats(self) -> bool:
        """Whether training prompts were put into a chat template, as far as that is recorded."""
        return self.chat_template not in (None, "none")

    @property
    def reads_final_alone(self) -> bool:
        """Whether it reads nothing but the final state of the token itself."""
        return self.feature_layers == ["final"] and self.temporal == "none"

    @classmethod
    def renewed(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """As for every config; `feature_layer` and `feature_norm` had one value each, and are gone."""
        gone = {"feature_layer": "final", "feature_norm": "post"}
        return {key: value for key, value in super().renewed(record).items() if gone.get(key) != value}

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; it does not mention what older versions did not know, where the head does without it."""
        record: dict[str, Any] = super().to_dict()
        unsaid = ["attributes", "combine"] if self.attributes is None else []
        unsaid += ["feature_layers"] if self.feature_layers == ["final"] else []
        unsaid += ["temporal"] if self.temporal == "none" else []
        unsaid += [name for name in _UNSAID if record[name] is None]
        return {key: value for key, value in record.items() if key not in unsaid}

    def validate_value_head(self) -> None:
        """Part of `@strict` validation."""
        check_schema(self.schema_version)
        if self.hidden_size < 1:
            raise ValueError(f"`hidden_size` has to be a positive integer, got {self.hidden_size}.")
        check_threshold(self.threshold)
        if self.operating_point is not None:
            check_operating_point(self.operating_point)
        check_layers(self.feature_layers)
        if self.feature_norms is not None and len(self.feature_norms) != len(self.feature_layers or ()):
            raise ValueError(
                f"`feature_norms` has to hold one number for each of {self.feature_layers}, got {self.feature_norms}."
            )
        check_projection(self.projection_size, self.architecture)
        check_decay(self.temporal_decay, self.temporal)
        if self.attributes is not None:
            check_attributes(self.attributes)
            if self.polarity != "undesirable":
                raise ValueError(
                    '`polarity` of a head of several attributes is "undesirable", whatever theirs are: its value says '
                    f"how far they are beyond their thresholds; got {self.polarity!r}."
                )
        weighted = any(attribute.get("weight", 1.0) != 1.0 for attribute in self.attributes or ())
        if self.combine == "sum" and self.attributes is None:
            raise ValueError('`combine`="sum" needs `attributes`, at least two.')
        if self.combine == "worst" and weighted:
            raise ValueError('A `weight` does nothing where the worst attribute counts: pass `combine="sum"`.')
