"""Whether something is of the kind that an annotation says, in one sentence if it is not."""

import reprlib
from contextlib import suppress
from functools import cache
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Len, Lt

from hf_value_steer.checks import MOST_CANDIDATES
from hf_value_steer.errors import FieldError


MOST = 1_000_000  # of what is counted: no run that holds, or does, more comes to an end
Count = Annotated[int, Ge(1), Le(MOST)]
Amount = Annotated[int, Ge(0), Le(MOST)]  # 0 is none at all
Limit = Annotated[int, Ge(1)]  # of what there is: any that is higher takes all of it
Folds = Annotated[int, Ge(2), Le(1000)]  # something is trained for each
Candidates = Annotated[int, Ge(1), Le(MOST_CANDIDATES)]
Rollback = Annotated[int, Ge(0), Le(MOST_CANDIDATES)]
Seed = Annotated[int, Ge(-(2**63)), Le(2**63 - 1)]  # what torch takes
NumpySeed = Annotated[int, Ge(0), Le(2**32 - 1)]
NotNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Probability = Annotated[float, Gt(0), Lt(1)]
Share = Annotated[float, Ge(0), Le(1)]
Part = Annotated[float, Ge(0), Lt(1)]  # beside which something is left
Texts = Annotated[list[str], Len(1)]
Layers = Annotated[list[Any], Len(1)]  # numbers, fractions or words: `check_layers` looks at them
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "missing": "there",
    "string_type": "a text",
    "too_long": "a list of {max_length} or fewer",
    "too_short": "a list of {min_length} or more",
}
_BOUNDS = ("ge", "gt", "le", "lt", "max_length", "min_length")
_NUMBERS: dict[str, tuple[type, str]] = {
    "float_type": (float, " (in YAML 1.0e-3, not 1e-3)"),
    "int_type": (int, " (write it without quotes)"),
}
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 40


def check_kind(name: str, kind: Any, value: Any, *, in_yaml: bool = False) -> None:
    """Refuse a value that is not of a kind, or has a part that is not. Texts do not stand for numbers.

    Args:
        name (`str`): what errors call the value.
        kind: an annotation, such as `list[float] | None`. `None` is a value only where it says so.
        value: anything.
        in_yaml (`bool`): whether YAML may be what it was written in, of which errors then say how it reads it.

    Raises:
        FieldError: names the value, or the part of it, and says what was expected.
    """
    from pydantic import ValidationError  # takes a while to import, and `--help` needs none of it

    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=True)[0]
        part = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in fault["loc"])
        got = "" if fault["type"] == "missing" else f", got {shown(fault['input'])}"
        hint = _hint(fault) if in_yaml else ""
        raise FieldError(name, f"`{name}{part}` has to be {_expected(fault)}{got}{hint}.") from None


def shown(value: Any) -> str:
    """A value as in Python, on one line, and short whatever it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # what Python says of whole numbers of thousands of digits
        return "a number of thousands of digits"


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _expected(fault: Any) -> str:
    if fault["type"] == "literal_error":
        options: str = fault["ctx"]["expected"]
        return "one of " + options.replace("'", "").replace(" or ", ", ")
    bounds = {name: f"{bound:,}".removesuffix(".0") for name, bound in fault.get("ctx", {}).items() if name in _BOUNDS}
    return _EXPECTED.get(fault["type"], "something else ({msg})").format(msg=fault["msg"], **bounds)


def _hint(fault: Any) -> str:
    kind, given = fault["type"], fault["input"]
    if kind == "string_type" and not isinstance(given, list | dict | None):
        return " (in YAML a text like this needs quotes)"
    if kind in _NUMBERS and isinstance(given, str):
        number, hint = _NUMBERS[kind]
        with suppress(ValueError):  # no number at all
            number(given)
            return hint
    return ""
