"""Tables of what we bind to in another package, compared with the package that is installed, without running it."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


PASSED_ON = "*"  # stands for whatever else a function may demand: we hand on what we were given
Table = Mapping[str, str]  # from "module:qualified.name" to names that are separated by spaces
Problems = Callable[[Any, list[str]], list[str]]


def differences(table: Table, problems: Problems) -> list[str]:
    """What `table` says and the installed package does not have, a text each; `problems` is one of those below."""
    return [problem for path, names in table.items() for problem in _look(path, names.split(), problems)]


def size(table: Table) -> str:
    """How much `table` holds, in words."""
    return f"{sum(len(names.split()) for names in table.values())} in {len(table)} places"


def _look(path: str, names: list[str], problems: Problems) -> list[str]:
    module, _, qualified = path.partition(":")
    try:
        target: Any = importlib.import_module(module)
        for part in qualified.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError):
        return [path]
    return [f"{path} {problem}" for problem in problems(target, names)]


def parameters(function: Any, names: list[str]) -> list[str]:
    """Parameters that are gone, and those that are new and have to be given."""
    there = inspect.signature(function).parameters
    known = {*names, "self"}
    ordinary = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    demanded = [each.name for each in there.values() if each.kind in ordinary and each.default is each.empty]
    new = [f"demands {name}" for name in demanded if name not in known]
    return [name for name in names if name not in {*there, PASSED_ON}] + ([] if PASSED_ON in names else new)


def fields(kind: type, names: list[str]) -> list[str]:
    """Fields of a dataclass that are gone."""
    there = {name for base in kind.__mro__ for name in inspect.get_annotations(base)}
    return [name for name in names if name not in there]


def attributes(kind: type, names: list[str]) -> list[str]:
    """Attributes, properties and methods of a class that are gone."""
    there = {name for base in kind.__mro__[:-1] for name in _set_on_self(base)}
    return [name for name in names if name not in there]


def _set_on_self(kind: type) -> set[str]:
    """Attributes, properties and annotations of a class, and what its code assigns to `self`."""
    declared = {*vars(kind), *inspect.get_annotations(kind)}
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # a base in C
        return declared
    assigned = {word.removeprefix("self.").rstrip(":,") for word in source.split() if word.startswith("self.")}
    return assigned | declared
