"""Configurations: `ValueHeadConfig` describes an artefact, the frozen dataclasses describe choices of one call."""

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer.calibration.filtering import check_probability
from hf_value_steer.policy import Fallback, Polarity
from hf_value_steer.schema import SCHEMA, VersionedConfig, check_schema


def refuse_unknown(given: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Raise a `ValueError` if one of the `given` keys is not among those that `owner` knows."""
    known = sorted(known)
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(known)}."
            raise ValueError(f"`{key}` is not a field of {owner}: {hint}")


def as_python(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's, also within a list or tuple; a list as a tuple."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = value.tolist()
    return tuple(map(as_python, value)) if isinstance(value, list | tuple) else value


def check_threshold(threshold: Any, name: str = "threshold") -> None:
    """Raise unless `threshold` is `None`, a number in (0, 1), or a non-empty sequence of such numbers."""
    if threshold is None:
        return
    values = threshold if isinstance(threshold, list | tuple) else [threshold]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not values or not numbers or not all(0.0 < value < 1.0 for value in values):
        raise ValueError(
            f"`{name}` has to be a number in (0, 1), or a sequence of them, one a row; got {threshold!r}."
        )


_ATTRIBUTE_KEYS = ("name", "polarity", "threshold", "weight")


def check_attributes(attributes: Sequence[Mapping[str, Any]]) -> None:
    """Raise a `ValueError` unless these are the attributes of one head, see [`ValueHeadConfig`]."""
    for index, attribute in enumerate(attributes):
        place = f"attributes[{index}]"
        refuse_unknown(attribute, _ATTRIBUTE_KEYS, f"`{place}`")
        name, polarity, weight = attribute.get("name"), attribute.get("polarity"), attribute.get("weight", 1.0)
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"`{place}.name` has to be a text, got {name!r}.")
        if polarity not in get_args(Polarity):
            raise ValueError(f"`{place}.polarity` has to be one of {', '.join(get_args(Polarity))}, got {polarity!r}.")
        check_probability(attribute.get("threshold"), f"{place}.threshold")
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise ValueError(f"`{place}.weight` has to be a finite number above 0, got {weight!r}.")
    names = [attribute["name"] for attribute in attributes]
    if len(set(names)) < max(len(names), 2):
        raise ValueError(
            f"`attributes` has to hold at least two, of different names, got {names}; for a single one there are "
            "`attribute`, `polarity` and `threshold`."
        )


# What `transformers` itself writes into a config.json or passes while it loads one.
INHERITED_KEYS = frozenset(
    {
        "_attn_implementation",
        "_commit_hash",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "torch_dtype",
    }
)


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
        backbone_fingerprint (`str`, *optional*): [`~hf_value_steer.backbone.fingerprint`] of its weights. When it is
            there, generation on other weights is refused.
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
        schema_version (`int`): what the fields of this config mean, see [`hf_value_steer.schema`].
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


MOST_CANDIDATES = 1024  # beyond it one look-ahead takes minutes, and more memory than there is
_METHODS: dict[str, type["MethodConfig"]] = {}


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What the runtime configurations share.

    Args:
        allow_backbone_mismatch (`bool`): use what was trained although its fingerprint names another backbone.
    """

    method: ClassVar[str]

    allow_backbone_mismatch: bool = False

    def __init_subclass__(cls) -> None:
        if "method" in vars(cls):
            _METHODS[cls.method] = cls

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, as_python(getattr(self, field.name)))

    def _check_integer(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"`{name}` has to be an integer of at least {minimum}, got {value!r}.")

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"`{name}` has to be one of {', '.join(choices)}, got {getattr(self, name)!r}.")

    def with_value_head(self, _value_head: PreTrainedModel) -> "MethodConfig":
        """This config with a value head where it needs one and names none."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the fields that differ from their defaults, and `method`.

        Raises:
            ValueError: if a field holds a model that was not loaded from anywhere, which JSON cannot name.
        """
        pairs = ((field, getattr(self, field.name)) for field in fields(self))
        chosen = {field.name: value for field, value in pairs if value is not field.default}
        for name, value in chosen.items():
            if isinstance(value, PreTrainedModel):
                if not value.name_or_path:
                    raise ValueError(f"`{name}` has no name: save it and pass its folder or Hub id instead.")
                chosen[name] = value.name_or_path
        return {"method": self.method, **chosen}

    def to_json_string(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict())


@dataclass(frozen=True, kw_only=True)
class SteeringConfig(MethodConfig):
    """What the configurations of methods with a value head share.

    Args:
        value_head ([`ValueHead`] or `str`, *optional*): the head, or its Hub id or folder.
        threshold (`float` or sequence of `float`, *optional*): threshold in (0, 1), or one for each row of the
            returned batch. The head's own by default.
        alpha (`float`, *optional*): instead of `threshold`: the rate, in (0, 1), that the head's calibration is to
            promise; it says of what ([`Calibration.guarantee`]). Choose `alpha` before you look at the thresholds,
            unless the calibration's mode is `"uniform"`.
        min_new_tokens (`int`): number of new tokens before the method starts to act.
        allow_backbone_mismatch (`bool`): use the head although its fingerprint names another backbone.
    """

    value_head: PreTrainedModel | str | None = None
    threshold: float | Sequence[float] | None = None
    alpha: float | None = None
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold(self.threshold)
        if self.alpha is not None:
            check_probability(self.alpha, "alpha")
            if self.threshold is not None:
                raise ValueError("`threshold` and `alpha` both say where to act: pass one of them.")
        self._check_integer("min_new_tokens", 0)
        if self.value_head is not None and not isinstance(self.value_head, PreTrainedModel | str):
            raise TypeError(f"`value_head` has to be a ValueHead, a Hub id or a folder, got {self.value_head!r}.")

    def with_value_head(self, value_head: PreTrainedModel) -> "SteeringConfig":
        """This config with `value_head` where it names none."""
        return self if self.value_head is not None else replace(self, value_head=value_head)


@dataclass(frozen=True, kw_only=True)
class ValueFilterConfig(SteeringConfig):
    r"""Value-filtered decoding (arXiv 2605.14746): commit the first of K candidates whose value is acceptable.

    Takes the arguments of [`SteeringConfig`] and:

    Args:
        num_candidates (`int`): K, the natural sample included; at most 1,024.
        proposal (`str`): `"sample"` draws alternatives independently from the processed distribution, `"topk"` takes
            the most likely tokens. Greedy decoding always takes the most likely ones.
        evaluation (`str`): `"lazy"` forwards alternatives for rows that reject the natural sample; `"eager"` forwards
            all candidates in one pass. Both commit the same tokens.
        fallback (`str`): if no candidate is acceptable: `"argmin"` commits the most acceptable one, `"args"` the one
            with the lowest `u - prob_weight * probability` (ARGS, arXiv 2402.01694; `u` = undesirability), and
            `"abstain"` ends the row.
        prob_weight (`float`): `w` of `"args"`, not negative.
        max_interventions (`int`, *optional*): rows are left alone after so many interventions.
        output_candidates (`bool`): return the candidates and their values.
        lookahead (`str`): how candidates are forwarded: `"shared_prefix"` (the prefix is read once for all of them,
            without a mask), `"masked"` (along the query dimension, under a 4-D mask), `"expanded"` (along the batch
            dimension, any model and cache), or with `"auto"` the best that was verified for the model. Where the step
            is compiled, so is the look-ahead with `"auto"` and `"masked"`.
        seed (`int`, *optional*): seed of the alternatives; by default it follows the global generator's state.
    """

    method: ClassVar[str] = "filter"

    num_candidates: int = 8
    proposal: Literal["sample", "topk"] = "sample"
    evaluation: Literal["lazy", "eager"] = "lazy"
    fallback: Fallback = "argmin"
    prob_weight: float = 1.0
    max_interventions: int | None = None
    output_candidates: bool = False
    lookahead: Literal["auto", "shared_prefix", "masked", "expanded"] = "auto"
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("num_candidates", 1)
        if self.num_candidates > MOST_CANDIDATES:
            raise ValueError(f"`num_candidates` has to be at most {MOST_CANDIDATES}, got {self.num_candidates}.")
        self._check_choice("proposal", ("sample", "topk"))
        self._check_choice("evaluation", ("lazy", "eager"))
        self._check_choice("fallback", ("argmin", "args", "abstain"))
        self._check_choice("lookahead", ("auto", "shared_prefix", "masked", "expanded"))
        if type(self.prob_weight) not in (int, float) or not 0 <= self.prob_weight < math.inf:
            raise ValueError(f"`prob_weight` has to be a finite number of at least 0, got {self.prob_weight!r}.")
        if self.max_interventions is not None:
            self._check_integer("max_interventions", 0)
        if self.seed is not None:
            self._check_integer("seed", 0)


@dataclass(frozen=True, kw_only=True)
class AbstentionConfig(SteeringConfig):
    r"""Dynamic abstention (arXiv 2604.18419): end a row as soon as its value says that it will not end well.

    Takes the arguments of [`SteeringConfig`] and:

    Args:
        patience (`int`): number of consecutive unacceptable values after which a row stops.
        message_ids (sequence of `int`, *optional*): token ids that are appended before EOS.
    """

    method: ClassVar[str] = "abstain"

    patience: int = 1
    message_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("patience", 1)
        if self.message_ids is not None:
            ids = self.message_ids
            if not isinstance(ids, tuple) or not all(type(token) is int and token >= 0 for token in ids):
                raise ValueError(f"`message_ids` has to be a sequence of token ids, got {ids!r}.")


@dataclass(frozen=True, kw_only=True)
class BridgeGuidanceConfig(MethodConfig):
    r"""Stable value guidance (arXiv 2605.11712): later layers attend to bridge tokens that a value module makes.

    Args:
        module ([`ValueGuidanceModule`] or `str`, *optional*): the module, or its Hub id or folder.
        refresh_interval (`int`): the bridge is made anew from the state of every so many-th token; 0 keeps that of the
            prompt's last token.
        momentum (`float`): in [0, 1), how much of the bridge before stays at a refresh.
        neutral_when_safe (`bool`): tokens that the module is content with do not see a bridge, and are those of the
            backbone. `False`, as in the paper: the bridge is always there.
        allow_backbone_mismatch (`bool`): use the module although its fingerprint names another backbone.
    """

    method: ClassVar[str] = "guide"

    module: PreTrainedModel | str | None = None
    refresh_interval: int = 1
    momentum: float = 0.8
    neutral_when_safe: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("refresh_interval", 0)
        if type(self.momentum) not in (int, float) or not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"`momentum` has to be a number in [0, 1), got {self.momentum!r}.")
        if self.module is not None and not isinstance(self.module, PreTrainedModel | str):
            raise TypeError(f"`module` has to be a ValueGuidanceModule, a Hub id or a folder, got {self.module!r}.")


ValueSteer: TypeAlias = MethodConfig | Mapping[str, Any] | Sequence[MethodConfig | Mapping[str, Any]]


def parse_value_steer(value_steer: ValueSteer) -> dict[str, MethodConfig]:
    """Read the `value_steer` argument: a config, its JSON form, or a list of them, one a method.

    Returns:
        `dict` from method name (`"filter"`, `"abstain"`, `"activate"`, `"guide"`) to its config.
    """
    items: Sequence[Any] = value_steer if isinstance(value_steer, list | tuple) else [value_steer]
    configs = [_parse_one(item) for item in items]
    methods = [config.method for config in configs]
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"`value_steer` takes one config a method, at least one; got methods {methods}.")
    return dict(zip(methods, configs, strict=True))


def _parse_one(item: MethodConfig | Mapping[str, Any]) -> MethodConfig:
    if isinstance(item, MethodConfig):
        return item
    if not isinstance(item, Mapping):
        raise TypeError(
            f"`value_steer` takes a config, its dict form or a list of them, got {type(item).__name__}. A head goes "
            "into a config: `value_steer=ValueFilterConfig(value_head=head)`."
        )
    options = dict(item)
    method = options.pop("method", None)
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f'`value_steer` needs a "method", one of {", ".join(_METHODS)}; got {method!r}.')
    cls = _METHODS[method]
    refuse_unknown(options, (field.name for field in fields(cls)), cls.__name__)
    return cls(**options)
