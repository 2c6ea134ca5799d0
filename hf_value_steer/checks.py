"""Checks of what callers give: each says in one sentence what it expected."""

import difflib
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, get_args

from hf_value_steer.choices import Polarity
from hf_value_steer.errors import FieldError


MOST_CANDIDATES = 1024  # beyond it one look-ahead takes minutes, and more memory than there is
_ATTRIBUTE_KEYS = ("name", "polarity", "threshold", "weight")


def check_probability(value: Any, name: str) -> None:
    """Raise a `ValueError` unless `value` is a number in (0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
        raise ValueError(f"`{name}` has to be a number in (0, 1), got {value!r}.")


def check_choice(choice: Any, kind: Any, name: str) -> None:
    """Raise a `ValueError` unless `choice` is one of those of the `Literal` that `kind` is."""
    if choice not in get_args(kind):
        raise ValueError(f"`{name}` has to be one of {', '.join(get_args(kind))}, got {choice!r}.")


def refuse_unknown(given: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Raise a [`FieldError`] if one of the `given` keys is not among those that `owner` knows."""
    known = sorted(known)
    for key in given:
        if key not in known:
            close = closest(str(key), known)
            hint = f"did you mean `{close}`?" if close else f"known keys: {', '.join(known)}."
            raise FieldError(str(key), f"`{key}` is not a field of {owner}: {hint}")


def closest(word: str, known: Iterable[str]) -> str | None:
    """What a misspelt word may be meant to be."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def as_python(value: Any, sequence: type[list[Any]] | type[tuple[Any, ...]] = tuple) -> Any:
    """Numbers and arrays of numpy and torch as Python's, also those in a list or tuple, which becomes a `sequence`."""
    value = _plain(value)
    return sequence(map(_plain, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def import_optional(module: str, purpose: str) -> ModuleType:
    """Import a module of the extra `train`; an `ImportError` says what for, and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{purpose} needs {module}: pip install "hf-value-steer[train]".') from error


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


def check_layers(layers: Any) -> None:
    """Raise a [`FieldError`] unless these are feature layers, see [`ValueHeadConfig`]."""
    if not isinstance(layers, list | tuple) or not layers:
        raise FieldError("feature_layers", f"`feature_layers` has to be a list of at least one layer, got {layers!r}.")
    for index, layer in enumerate(layers):
        number = isinstance(layer, int | float) and not isinstance(layer, bool)
        if layer != "final" and not (number and (isinstance(layer, int) or 0.0 <= layer <= 1.0)):
            raise FieldError(
                "feature_layers",
                f"`feature_layers[{index}]` has to be a layer's number, a fraction of the depth in [0, 1] or "
                f'"final", got {layer!r}.',
            )
    if len(set(map(repr, layers))) < len(layers):
        raise FieldError("feature_layers", f"`feature_layers` names a layer twice: {list(layers)}.")


def check_projection(projection_size: int | None, architecture: str) -> None:
    """Raise a [`FieldError`] unless a head of this architecture has inner layers of this width."""
    if projection_size is not None and (architecture != "mlp" or projection_size < 1):
        raise FieldError(
            "projection_size",
            '`projection_size` is a positive integer, the width inside an "mlp"; got '
            f"{projection_size} for {architecture!r}.",
        )


def check_decay(temporal_decay: float | None, temporal: str) -> None:
    """Raise a [`FieldError`] unless a head with this memory has this decay, or none is said."""
    if temporal_decay is None:
        return
    if temporal != "ema":
        raise FieldError("temporal_decay", f'`temporal_decay` is for `temporal`="ema", this head has {temporal!r}.')
    check_probability(temporal_decay, "temporal_decay")


def check_attributes(attributes: Sequence[Mapping[str, Any]]) -> None:
    """Raise a `ValueError` unless these are the attributes of one head, see [`ValueHeadConfig`]."""
    for index, attribute in enumerate(attributes):
        place = f"attributes[{index}]"
        refuse_unknown(attribute, _ATTRIBUTE_KEYS, f"`{place}`")
        name, polarity, weight = attribute.get("name"), attribute.get("polarity"), attribute.get("weight", 1.0)
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"`{place}.name` has to be a text, got {name!r}.")
        check_choice(polarity, Polarity, f"{place}.polarity")
        check_probability(attribute.get("threshold"), f"{place}.threshold")
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise ValueError(f"`{place}.weight` has to be a finite number above 0, got {weight!r}.")
    names = [attribute["name"] for attribute in attributes]
    if len(set(names)) < max(len(names), 2):
        raise ValueError(
            f"`attributes` has to hold at least two, of different names, got {names}; for a single one there are "
            "`attribute`, `polarity` and `threshold`."
        )
