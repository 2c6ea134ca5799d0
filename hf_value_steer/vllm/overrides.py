"""What one request may choose for itself, in `SamplingParams.extra_args` or `vllm_xargs` of an HTTP request.

`{"filter.threshold": 0.2}`, `{"filter.alpha": 0.05}`, `{"filter.num_candidates": 4}`, `{"filter": "off"}`, and the
same for `abstain`, which has no candidates. Other keys are none of our business.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_value_steer.configuration import SteeringConfig


FIELDS = {"filter": ("threshold", "alpha", "num_candidates"), "abstain": ("threshold", "alpha")}
MOST_CANDIDATES = 64


def apply_overrides(
    methods: Mapping[str, SteeringConfig], extra_args: Mapping[str, Any] | None
) -> dict[str, SteeringConfig]:
    """The methods of the engine as one request wants them; a method that is off is not among them.

    Raises:
        ValueError: names the key, if it is unknown, its value is out of range, or the engine runs no such method.
    """
    chosen = dict(methods)
    changes: dict[str, dict[str, Any]] = {}
    for key, value in (extra_args or {}).items():
        method, dot, field = key.partition(".")
        if method not in FIELDS:
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
        if method in chosen:
            chosen[method] = _replaced(chosen[method], fields)
    return chosen


def _checked(key: str, field: str, value: Any) -> Any:
    kind = int if field == "num_candidates" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"`{key}` has to be {'an integer' if kind is int else 'a number'}, got {value!r}.")
    if field == "num_candidates" and not 1 <= value <= MOST_CANDIDATES:
        raise ValueError(f"`{key}` has to be between 1 and {MOST_CANDIDATES}, got {value}.")
    return value


def _replaced(config: SteeringConfig, fields: dict[str, Any]) -> SteeringConfig:
    """Threshold and alpha exclude each other, so that one of the request puts aside the other of the engine."""
    if "threshold" in fields or "alpha" in fields:
        fields = {"threshold": None, "alpha": None, **fields}
    return replace(config, **fields)
