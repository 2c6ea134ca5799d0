"""`ValueHeadConfig`: what a value head is, and which backbone and feature it belongs to."""

from dataclasses import fields
from importlib.metadata import version
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from hf_value_steer.checks import check_attributes, check_threshold, refuse_unknown
from hf_value_steer.choices import Polarity
from hf_value_steer.files.schema import INHERITED_KEYS, SCHEMA, VersionedConfig, check_schema


@strict
class ValueHeadConfig(VersionedConfig):
    r"""What a value head is, and which backbone and feature it belongs to.

    Unknown keys are refused. The *feature* is the tensor that the backbone's output embedding consumes: final layer,
    after the final norm, per token.

    Args:
        hidden_size (`int`): width of the feature.
        architecture (`str`): `"mlp"` (Linear-Tanh-Linear-ReLU-Linear, as in value-steer) or `"linear"`.
        polarity (`str`): meaning of a high value, `"undesirable"` (P(unsafe)) or `"desirable"` (P(correct)).
        attribute (`str`, *optional*): what is valued, for instance `"toxicity"`. With `attributes` their names joined
            by `" + "`, unless it is given.
        backbone (`str`, *optional*): Hub id of the backbone that the head was trained on.
        backbone_revision (`str`, *optional*): its revision.
        backbone_fingerprint (`str`, *optional*): [`~hf_value_steer.backbone.parts.fingerprint`] of its weights. When
            it is there, generation on other weights is refused.
        feature_layer (`str`), feature_norm (`str`): the feature contract; `"final"` and `"post"` are what exists.
        feature_dtype (`str`, *optional*): dtype of the backbone during training, for instance `"bfloat16"`.
        chat_template (`str`, *optional*): how training prompts were formatted: `"none"` for plain continuations,
            else a name or digest of the template.
        threshold (`float`, *optional*): default threshold in (0, 1); with `attributes` 0.5, unless it is given.
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
    polarity: Polarity = "undesirable"
    attribute: str | None = None
    backbone: str | None = None
    backbone_revision: str | None = None
    backbone_fingerprint: str | None = None
    feature_layer: Literal["final"] = "final"
    feature_norm: Literal["post"] = "post"
    feature_dtype: str | None = None
    chat_template: str | None = None
    threshold: float | None = None
    attributes: list[dict[str, Any]] | None = None
    combine: Literal["worst", "sum"] = "worst"
    library_version: str | None = None
    schema_version: int = SCHEMA
    training: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown(set(kwargs) - INHERITED_KEYS, (field.name for field in fields(self)), type(self).__name__)
        self.library_version = self.library_version or version("hf-value-steer")
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

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; heads of one attribute do not mention several."""
        record: dict[str, Any] = super().to_dict()
        several = ("attributes", "combine") if self.attributes is None else ()
        return {key: value for key, value in record.items() if key not in several}

    def validate_value_head(self) -> None:
        """Part of `@strict` validation."""
        check_schema(self.schema_version)
        if self.hidden_size < 1:
            raise ValueError(f"`hidden_size` has to be a positive integer, got {self.hidden_size}.")
        check_threshold(self.threshold)
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
