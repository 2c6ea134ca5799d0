"""What one request may choose for itself, in `SamplingParams.extra_args` or `vllm_xargs` of an HTTP request.

`{"filter.threshold": 0.2}`, `{"filter.alpha": 0.05}`, `{"filter.num_candidates": 4}`, `{"filter": "off"}`, and the
same for `abstain`, which has no candidates. Other keys are left alone. But a key that looks like a misspelling of one
of these is refused: if it was ignored, the request would be steered in another way than its sender believes.
"""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from hf_value_steer.configuration.methods import SteeringConfig


FIELDS = {"filter": ("threshold", "alpha", "num_candidates"), "abstain": ("threshold", "alpha")}
KEYS = [key for method, fields in FIELDS.items() for key in (method, *(f"{method}.{field}" for field in fields))]
LIKENESS = 0.8  # a key that is so similar to one of ours counts as a misspelling: "filter_threshold", "fliter"
MOST_CANDIDATES = 64


def apply_overrides(
    methods: Mapping[str, SteeringConfig], extra_args: Mapping[str, Any] | None
) -> dict[str, SteeringConfig]:
    """The methods of the engine as one request wants them; a method that is off is not among them.

    Raises:
        ValueError: names the key, if it is unknown or a misspelling, its value is out of range, or the engine runs no
            such method.
    """
    chosen = dict(methods)
    changes: dict[str, dict[str, Any]] = {}
    for key, value in (extra_args or {}).items():
        method, dot, field = key.partition(".")
        if method not in FIELDS:
            _refuse_misspelling(key)
            continue
        if method not in methods:
            raise ValueError(f'`{key}`: this engine does not run "{method}", only {", ".join(methods)}.')
        if not dot and value == "off":
            del chosen[method]
        elif field in FIELDS[method]:
            changes.setdefault(method, {})[field] = _checked(key, field, value)
        else:
            known = [f'{method}="off"', *(f"{method}.{name}" for name in FIELDS[method])]
            raise ValueError(f"`{key}`={value!r} is no choice of a request; there are {', '.join(known)}.")
    for method, fields in changes.items():
        replaced = _replaced(methods[method], fields)  # what is wrong is wrong for a method that is off, too
        if method in chosen:
            chosen[method] = replaced
    return chosen


def _refuse_misspelling(key: str) -> None:
    field = key.rpartition(".")[2]
    meant = [f"filter.{field}"] if field in FIELDS["filter"] else get_close_matches(key, KEYS, 1, LIKENESS)
    if meant:
        raise ValueError(f"`{key}` is no choice of a request; did you mean `{meant[0]}`?")


def _checked(key: str, field: str, value: Any) -> Any:
    kind = int if field == "num_candidates" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"`{key}` has to be {'an integer' if kind is int else 'a number'}, got {value!r}.")
    if field == "num_candidates" and not 1 <= value <= MOST_CANDIDATES:
        raise ValueError(f"`{key}` has to be between 1 and {MOST_CANDIDATES}, got {value}.")
    if kind is not int and not 0 < value < 1:
        raise ValueError(f"`{key}` has to be a number in (0, 1), got {value}.")
    return value


def _replaced(config: SteeringConfig, fields: dict[str, Any]) -> SteeringConfig:
    """Change fields. Threshold and alpha exclude each other: one of the request replaces either of the engine."""
    if "threshold" in fields or "alpha" in fields:
        fields = {"threshold": None, "alpha": None, **fields}
    return replace(config, **fields)
