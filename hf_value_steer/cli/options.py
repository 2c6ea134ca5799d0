"""From dataclasses of arguments to options: one spelling, groups, defaults, an example."""

import argparse
import inspect
import re
import shutil
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from hf_value_steer.checks import closest


_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Any: "NUMBER|TEXT"}
_REQUIRED = "required"
_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)  # argparse knows no exponents
Kinds = Sequence[type[Any]]  # dataclasses of arguments


class Help(argparse.RawDescriptionHelpFormatter):
    """Wide enough for our options, and no wider than can be read."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=min(shutil.get_terminal_size().columns, 120) - 2)


class Parser(argparse.ArgumentParser):
    """Errors are one line, which says where there is help; what is unknown is answered with what is like it."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}\nSee `{self.prog} --help`.", file=sys.stderr)
        self.exit(2)

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Say that these are no arguments of the command."""
        close = closest(words[0].partition("=")[0], self._option_string_actions)
        self.error(f"unrecognized arguments: {' '.join(words)}" + (f"; did you mean {close}?" if close else ""))


def parser_of(prog: str, summary: str, example: str, kinds: Kinds) -> Parser:
    """A parser of the fields of some dataclasses.

    A field's type says what it takes, and its default whether it may be left out. Its metadata holds the text
    `"help"`, and `"positional"` if it is no option. Groups are the classes that declare the fields, under the first
    sentences of their docstrings.
    """
    found = sorted(_grouped(kinds), key=lambda pair: pair[0] != _REQUIRED)
    needed = [each for title, each in found if title == _REQUIRED]
    words = [_name(each) if _positional(each) else f"{_flag(each.name)} {_metavar(each)}" for each in needed]
    parser = Parser(
        prog=prog,
        usage=" ".join(["%(prog)s", *words, "[options]"]),
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser._negative_number_matcher = _NEGATIVE
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(title for title, _ in found)}
    for title, each in found:
        groups[title].add_argument(each.name if _positional(each) else _flag(each.name), **_how(each, kinds))
    return parser


def read(parser: Parser, kinds: Kinds, words: Sequence[str], passes_on: bool = False) -> tuple[list[Any], list[str]]:
    """The dataclasses that some words spell, and, if the command passes them on, the words that are no options of it.

    What a dataclass refuses becomes an error of the parser, with options in the place of fields.
    """
    namespace, others = parser.parse_known_args(respelt(kinds, words))
    if others and not passes_on:
        parser.refuse(others)
    given = vars(namespace)
    try:
        return [kind(**{each.name: given[each.name] for each in fields(kind)}) for kind in kinds], others
    except ValueError as error:
        parser.error(as_options(str(error), kinds))


def respelt(kinds: Kinds, words: Sequence[str]) -> list[str]:
    """Words with our own options as they are spelt today: `-` in the place of `_`, and what was renamed."""
    names = {_flag(each.name): each for _, each in _grouped(kinds)}
    today = {name: name for name in names} | {f"--no-{name[2:]}": f"--no-{name[2:]}" for name in names}
    today |= {_flag(each.metadata["was"]): name for name, each in names.items() if "was" in each.metadata}
    end = list(words).index("--") if "--" in words else len(words)
    return [_respelt(word, today) if word.startswith("--") else word for word in words[:end]] + list(words[end:])


def _respelt(word: str, today: dict[str, str]) -> str:
    option, equals, value = word.partition("=")
    option = option.replace("_", "-")
    if option not in today:
        return word
    if today[option] != option:
        print(f"{option} is {today[option]} now.", file=sys.stderr)
    return f"{today[option]}{equals}{value}"


def as_options(message: str, kinds: Kinds, words: str = r"\w+") -> str:
    """A message that names fields, as one that names options.

    Args:
        words (`str`): what may be a field's name in it, as a regular expression.
    """
    options = {each.name: _name(each) if _positional(each) else _flag(each.name) for _, each in _grouped(kinds)}
    return re.sub(rf"`({words})(?:=True)?`", lambda found: options.get(found[1], found[0]), message)


def _grouped(kinds: Kinds) -> Iterator[tuple[str, Field[Any]]]:
    """All fields with the title of their group, those that a class declares itself before those of its bases."""
    for kind in kinds:
        for owner in kind.__mro__:
            for each in fields(kind):
                if _owner(kind, each.name) is owner:
                    yield _REQUIRED if _is_required(each) else _title(owner), each


def _owner(kind: type[Any], name: str) -> type[Any]:
    return next(each for each in kind.__mro__ if name in inspect.get_annotations(each))


def _title(kind: type[Any]) -> str:
    sentence = str(kind.__doc__).partition(".")[0].replace("`", "")
    return f"{sentence[0].lower()}{sentence[1:]}"


def _is_required(each: Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _default(each: Field[Any]) -> Any:
    if each.default_factory is not MISSING:
        return each.default_factory()
    return None if each.default is MISSING else each.default


def _positional(each: Field[Any]) -> bool:
    return bool(each.metadata.get("positional"))


def _name(each: Field[Any]) -> str:
    return each.name.upper() if _positional(each) else each.name


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _type(each: Field[Any]) -> Any:
    """The type of a field, without its bounds, and without the `None` that stands for what is not given."""
    kinds = [kind for kind in get_args(each.type) if kind is not types.NoneType]
    return _unbounded(kinds[0] if types.NoneType in get_args(each.type) else each.type)


def _unbounded(kind: Any) -> Any:
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return types.GenericAlias(list, _unbounded(get_args(kind)[0])) if get_origin(kind) is list else kind


def _entry(kind: Any) -> Any:
    """The type of one of the words that an option takes."""
    return get_args(kind)[0] if get_origin(kind) is list else kind


def _metavar(each: Field[Any]) -> str:
    entry = _entry(_type(each))
    return "{" + ",".join(get_args(entry)) + "}" if get_origin(entry) is Literal else _METAVARS[entry]


def _number_or_text(word: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(word)
    return word


def _how(each: Field[Any], kinds: Kinds) -> dict[str, Any]:
    """What `add_argument` is told of a field."""
    default = _default(each)
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    known = f" (default: {shown})" if shown not in (None, "") and not isinstance(shown, bool) else ""
    said = as_options(f"{each.metadata['help']}{known}", kinds).replace("%", "%%")
    how: dict[str, Any] = {"help": said, "default": default}
    kind = _type(each)
    if kind is bool:
        return how | {"action": "store_true" if default is False else argparse.BooleanOptionalAction}
    if _positional(each):
        return how | {"metavar": _name(each), "nargs": None if _is_required(each) else "?"}
    how |= {"metavar": _metavar(each), "required": _is_required(each)}
    entry = _entry(kind)
    if get_origin(kind) is list:
        how["nargs"] = "+"
    if get_origin(entry) is Literal:
        return how | {"choices": get_args(entry)}
    return how | {"type": _number_or_text if entry is Any else entry}
