"""Whether something is of the kind that an annotation says, in one sentence if it is not."""

import reprlib
from functools import cache
from typing import Any


_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "missing": "there",
    "string_type": "a text",
    "too_short": "a list that is not empty",
}
_NUMBERS = ("float_type", "int_type")
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
        ValueError: names the value, or the part of it, and says what was expected.
    """
    from pydantic import ValidationError  # takes a while to import, and `--help` needs none of it

    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=True)[0]
        part = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in fault["loc"])
        got = "" if fault["type"] == "missing" else f", got {shown(fault['input'])}"
        hint = _hint(fault) if in_yaml else ""
        raise ValueError(f"`{name}{part}` has to be {_expected(fault)}{got}{hint}.") from None


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
    return _EXPECTED.get(fault["type"]) or f"something else ({fault['msg']})"


def _hint(fault: Any) -> str:
    if fault["type"] in _NUMBERS and isinstance(fault["input"], str):
        return " (in YAML 1.0e-3, not 1e-3)"
    if fault["type"] == "string_type" and not isinstance(fault["input"], list | dict):
        return " (in YAML a text like this needs quotes)"
    return ""
