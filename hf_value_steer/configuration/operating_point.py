"""How a value head is meant to filter: what the config of a call leaves open, the head may say."""

import math
from collections.abc import Mapping
from typing import Any

from hf_value_steer.checks import MOST_CANDIDATES, check_choice, check_probability, refuse_unknown
from hf_value_steer.choices import Selection


# What is chosen where neither the config nor the head says it.
DEFAULTS: Mapping[str, Any] = {"num_candidates": 8, "rollback": 0, "selection": "first", "beta": 1.0}
# For what must not follow the head: a step takes the first acceptable candidate, and none is taken back.
PLAIN: Mapping[str, Any] = {"rollback": 0, "selection": "first"}


def check_operating_point(point: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless this is an operating point, see [`ValueHeadConfig`]."""
    refuse_unknown(point, ["alpha", *DEFAULTS], "`operating_point`")
    if missing := [name for name, choice in point.items() if choice is None]:
        raise ValueError(f"`operating_point` says nothing of {', '.join(missing)}: leave it out, or choose.")
    if "alpha" in point:
        check_probability(point["alpha"], "alpha")
    check_choices(**{name: choice for name, choice in point.items() if name != "alpha"})


def check_choices(num_candidates: Any = None, rollback: Any = None, selection: Any = None, beta: Any = None) -> None:
    """Raise a `ValueError` unless each of these is open, which is `None`, or a choice of a filter."""
    for name, value, least in (("num_candidates", num_candidates, 1), ("rollback", rollback, 0)):
        if value is not None and (type(value) is not int or not least <= value <= MOST_CANDIDATES):
            raise ValueError(f"`{name}` has to be an integer from {least} to {MOST_CANDIDATES}, got {value!r}.")
    if selection is not None:
        check_choice(selection, Selection, "selection")
    if beta is not None and (type(beta) not in (int, float) or not 0 < beta < math.inf):
        raise ValueError(f"`beta` has to be a finite number above 0, got {beta!r}.")
