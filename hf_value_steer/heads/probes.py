"""How a linear probe that was trained elsewhere becomes a head: its weights are read, nothing of it is run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from hf_value_steer.checks import as_python
from hf_value_steer.choices import Polarity
from hf_value_steer.configuration.value_head import ValueHeadConfig
from hf_value_steer.heads.artefact import Artefact


_CLASSIFIERS = ("LogisticRegression", "LogisticRegressionCV", "SGDClassifier")

Layers = int | float | str | Sequence[int | float | str]


class FromProbes(Artefact):
    """What makes a head of a probe."""

    @classmethod
    def from_linear(cls, weight: Any, bias: Any = 0.0, *, layer: Layers, polarity: Polarity, **config: Any) -> Self:
        """A linear probe as a head: the value is `sigmoid(weight @ feature + bias)`.

        Args:
            weight (tensor, array or list of shape `(width,)` or `(1, width)`): the log odds that a feature adds.
            bias (`float`): the log odds where the feature is zero.
            layer (`int`, `float`, `str` or a list of them): what the probe reads, as in `feature_layers` of
                [`ValueHeadConfig`]. What `transformers` calls `hidden_states[l + 1]` is layer `l`, and its last one is
                `"final"`.
            polarity (`str`): what a high value means, `"undesirable"` or `"desirable"`.
            config: further fields of [`ValueHeadConfig`]: `attribute`, `threshold`, `backbone_fingerprint`, ... With
                `temporal="mean"` the head reads the mean of the features since the prompt's last token.

        Raises:
            ValueError: for other shapes, for weights that are NaN, infinite or all zero, and for `attributes`.
        """
        weights, biases = _numbers(weight, "weight"), _numbers(bias, "bias")
        rows = weights.reshape(1, -1).float()
        if not rows.numel() or weights.shape not in (rows.shape, rows.shape[1:]):
            raise ValueError(
                f"`weight` has to be of shape (width,) or (1, width), one number for each of the feature, got "
                f"{tuple(weights.shape)}."
            )
        if biases.numel() != 1:
            raise ValueError(f"`bias` has to be one number, got {tuple(biases.shape)}.")
        if not rows.any():
            raise ValueError("`weight` is zero: such a head gives all tokens one value.")
        if config.get("attributes") is not None:
            raise ValueError("`attributes` are for heads of several, a probe is of one: pass its name as `attribute`.")
        if taken := sorted({"hidden_size", "architecture", "feature_layers"} & config.keys()):
            raise ValueError(f"`{taken[0]}` follows from the weights and `layer`: leave it out.")
        places = as_python(layer, list)
        head = cls(
            ValueHeadConfig(
                hidden_size=rows.shape[1],
                architecture="linear",
                feature_layers=places if isinstance(places, list) else [places],
                polarity=polarity,
                **config,
            )
        )
        head.net[0].load_state_dict({"weight": rows, "bias": biases.reshape(1)})
        head.eval()
        return head

    @classmethod
    def from_sklearn(cls, probe: Any, *, layer: Layers, polarity: Polarity, positive: Any = 1, **config: Any) -> Self:
        """A classifier of scikit-learn as a head: the value is its `predict_proba` of the class `positive`.

        Args:
            probe: a fitted binary `LogisticRegression`, `LogisticRegressionCV` or `SGDClassifier(loss="log_loss")`; or
                a `Pipeline` that ends in one, after any number of `StandardScaler` and `PCA`, which become part of
                the weights.
            layer, polarity, config: as in [`from_linear`].
            positive: the class, one of `classes_`, whose probability the value is.

        Raises:
            ValueError: if it is not fitted, is of more than two classes or none of the class `positive`, or has a step
                of another kind. Other classifiers have no log odds. Also if float32 cannot hold the weights exactly
                enough: where a feature that hardly varies was divided by how much it does.
        """
        weight, bias = _of_sklearn(probe, positive)
        config = _recorded(config, source="scikit-learn")
        return cls.from_linear(weight, bias, layer=layer, polarity=polarity, **config)

    @classmethod
    def from_trl(
        cls, model: Any, *, scale: float, offset: float, polarity: Polarity = "desirable", **config: Any
    ) -> Self:
        """The value head of a model that was tuned by PPO with TRL. It reads the final state.

        Its output is no log odds, but the return that is expected of a text. The value is
        `sigmoid((output - offset) / scale)`: one half where the return is `offset`, and 0.73 where it is `scale` more.
        Nothing in the checkpoint says which numbers these are. Take them from returns of the training, or from outputs
        on texts of your own: `offset` between those of good and of bad texts, `scale` about as much as they spread.

        Args:
            model: an `AutoModelForCausalLMWithValueHead`, its `v_head`, or the state dict of either.
            scale (`float`): above 0.
            offset (`float`): the return at which the value is one half.
            polarity (`str`): what a high return means.
            config: as in [`from_linear`].

        Raises:
            ValueError: if there is no `summary` with weight and bias, or `scale` or `offset` is out of range.
        """
        scale, offset = as_python(scale), as_python(offset)
        if type(scale) not in (int, float) or not 0 < scale < math.inf:
            raise ValueError(f"`scale` has to be a finite number above 0, got {scale!r}.")
        if type(offset) not in (int, float) or not math.isfinite(offset):
            raise ValueError(f"`offset` has to be a finite number, got {offset!r}.")
        if "layer" in config:
            raise ValueError("`layer` is not for TRL's head, which reads the final state.")
        weight, bias = _of_trl(model)
        config = _recorded(config, source="trl", scale=scale, offset=offset)
        return cls.from_linear(weight / scale, (bias - offset) / scale, layer="final", polarity=polarity, **config)


def _numbers(values: Any, name: str) -> Tensor:
    """A copy in float64, on the CPU."""
    try:
        copied = values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.array(values, float))
        numbers = copied.to(torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` has to be dense and of numbers, got a {type(values).__name__}.") from error
    if not numbers.float().isfinite().all():
        raise ValueError(f"`{name}` holds numbers that are NaN, infinite or beyond float32.")
    return numbers


def _recorded(config: Mapping[str, Any], **origin: Any) -> dict[str, Any]:
    """Fields of a config that also say where the head comes from."""
    if not isinstance(config.get("training"), Mapping | None):
        raise ValueError(f"`training` has to be a dict, got {config['training']!r}.")
    return {**config, "training": {**origin, **(config.get("training") or {})}}


def _of_sklearn(probe: Any, positive: Any) -> tuple[Tensor, Tensor]:
    """Weight `(1, width)` and bias `(1,)` of the log odds of the class `positive`."""
    *steps, classifier = [step for _, step in probe.steps] if _kind(probe) == "Pipeline" else [probe]
    _require_log_odds(classifier)
    _require_fitted(classifier, "coef_")
    classes = classifier.classes_.tolist()
    if len(classes) != 2:
        raise ValueError(f"`probe` has to be of two classes, got {len(classes)}: {classes[:8]}.")
    if positive not in classes:
        raise ValueError(f"`positive` has to be one of the classes of the probe, {classes}; got {positive!r}.")
    sign = 1 if classes[1] == positive else -1
    weight = sign * _numbers(classifier.coef_, "coef_")
    bias = sign * _numbers(classifier.intercept_, "intercept_")
    for step in reversed(steps):
        weight, bias = _before(step, weight, bias)
    means = [mean for step in steps if (mean := getattr(step, "mean_", None)) is not None]
    if means:
        _require_exact(weight, _numbers(means[0], "mean_"))
    return weight, bias


def _require_exact(weight: Tensor, mean: Tensor) -> None:
    """Raise a `ValueError` if rounding moves the log odds of the mean feature `(width,)` by more than a hundredth."""
    rounding = float(weight.abs() @ mean.abs()) * torch.finfo(torch.float32).eps
    if not rounding <= 0.01:
        raise ValueError(
            f"`probe` has weights that float32 holds to {rounding:.2g} in the log odds only: it divides by how much "
            "something varies that hardly does. Leave those features or components out, or do not whiten."
        )


def _require_log_odds(classifier: Any) -> None:
    """Raise a `ValueError` unless `predict_proba` of this classifier is the sigmoid of its decision function."""
    kind = _kind(classifier)
    if hasattr(classifier, "best_estimator_"):
        raise ValueError(f"`probe` ends in a {kind}: pass its `best_estimator_`.")
    said = {name: getattr(classifier, name, None) for name in ("loss", "multi_class")}
    if kind == "SGDClassifier" and said["loss"] != "log_loss":
        kind += f"(loss={said['loss']!r})"
    elif said["multi_class"] == "multinomial":  # before scikit-learn 1.8: log odds are twice the decision function
        kind += "(multi_class='multinomial')"
    if kind not in _CLASSIFIERS:
        raise ValueError(
            f"`probe` ends in {kind}, whose decision function is no log odds: fit a LogisticRegression to the same "
            "features, or to that function, and pass what it makes of the weights to `ValueHead.from_linear`."
        )


def _require_fitted(step: Any, attribute: str) -> None:
    if not hasattr(step, attribute):
        raise ValueError(f"`probe` has a {_kind(step)} that is not fitted: call `fit` first.")


def _before(step: Any, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of what goes into a step, from those of what comes out of it."""
    if step is None or step == "passthrough":
        return weight, bias
    if _kind(step) == "StandardScaler":
        _require_fitted(step, "scale_")
        if step.with_std:
            weight = weight / _numbers(step.scale_, "scale_")
        if step.with_mean:
            bias = bias - weight @ _numbers(step.mean_, "mean_")
        return weight, bias
    if _kind(step) == "PCA":
        _require_fitted(step, "components_")
        if step.whiten:
            least = np.finfo(step.explained_variance_.dtype).eps
            weight = weight / _numbers(step.explained_variance_, "explained_variance_").sqrt().clamp(min=least)
        weight = weight @ _numbers(step.components_, "components_")
        return weight, bias - weight @ _numbers(step.mean_, "mean_")
    raise ValueError(
        f"`probe` has the step {_kind(step)}, but only StandardScaler and PCA can become part of the weights: fit it "
        "without that step."
    )


def _kind(part: Any) -> str:
    return type(part).__name__


def _of_trl(model: Any) -> tuple[Tensor, Tensor]:
    """Weight `(1, width)` and bias `(1,)` of the layer `summary`."""
    head = getattr(model, "v_head", model)
    state = head.state_dict() if isinstance(head, nn.Module) else head
    for name in ("v_head.summary", "summary"):
        parts = f"{name}.weight", f"{name}.bias"
        if isinstance(state, Mapping) and state.keys() >= set(parts):
            weight, bias = (_numbers(state[part], part) for part in parts)
            return weight, bias
    found = sorted(map(str, state))[:6] if isinstance(state, Mapping) else f"a {_kind(model)}"
    raise ValueError(
        "`model` has to be TRL's model with a value head, its `v_head` or the state dict of one, with "
        f"`summary.weight` and `summary.bias`; got {found}."
    )
