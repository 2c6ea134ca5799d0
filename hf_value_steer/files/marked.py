"""Plans that a person wrote, as YAML or in Python: their content, and where in a file each key of it stands."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_value_steer.errors import SteeringError
from hf_value_steer.files.writing import read_utf8


MOST_LEVELS, MOST_VALUES = 20, 10_000  # in each other, and in all; aliases count as what they stand for
_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


@dataclass(frozen=True)
class Marked:
    """A plan: sections with keys.

    Args:
        content: what was written: if all is well, a mapping of mappings.
        name (`str`): of the file, or what errors call the plan otherwise.
        lines: at which line, counted from 1, each key stands, by the keys that lead to it.
    """

    content: Any
    name: str = "The recipe"
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)

    def place(self, *path: str) -> str:
        """Where a key stands, for errors: file, line and key, as far as there are."""
        known = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in self.lines), None)
        line = [] if known is None else [f"line {self.lines[known]}"]
        return ", ".join([self.name, *line, *([".".join(path)] if path else [])])

    @contextmanager
    def blaming(self, *section: str) -> Iterator[None]:
        """Let a `ValueError` inside the block say where in this section that stands which it names first.

        Errors of our own kinds, which are about other files, stay as they are.
        """
        try:
            yield
        except SteeringError:
            raise
        except ValueError as error:
            said, own = str(error), self.content.get(section[0]) if section else self.content
            named = re.findall(r"`([^`]+?)(?:\[\d+\])?`", said)
            key = next((name for name in named if name in (own or ())), None)
            if key is not None:  # is said by the place
                said = re.sub(rf"^`{re.escape(key)}`(: | (?=has to ))", "", said)
            place = self.place(*section, *([] if key is None else [key]))
            raise ValueError(" ".join(f"{place}: {said}".split())) from error


def read_marked(path: Path) -> Marked:
    """Read a YAML file. Nothing in it is executed, and nothing in it can grow.

    Raises:
        OSError: if it is not there.
        ValueError: if it is no YAML in UTF-8, holds a key twice, or more than a person would write; names the line.
    """
    text = read_utf8(path)
    try:
        _refuse_growth(yaml.parse(text, Loader=yaml.SafeLoader))
        reader = _Reader(yaml.SafeLoader(text))
        content = reader.document()
    except yaml.YAMLError as error:
        raise ValueError(f"{path}{_said(error, text)}") from error
    return Marked(content, str(path), reader.lines)


def _said(error: yaml.YAMLError, text: str) -> str:
    """Line and reason of an error of PyYAML, whose own text has many lines."""
    if isinstance(error, yaml.reader.ReaderError):
        line, reason = text.count("\n", 0, error.position), f"the character {chr(error.character)!r} is not allowed"
    else:
        mark = error.problem_mark or error.context_mark
        line, reason = mark.line, ", ".join(filter(None, (error.context, error.problem)))
    return f", line {line + 1}: " + " ".join(f"{reason}.".split())


def _fault(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _refuse_growth(events: Iterable[yaml.Event]) -> None:
    """Refuse what is nested too deeply, holds itself, or is too much once aliases are what they stand for."""
    sizes: dict[str | None, int] = {}
    around: list[tuple[str | None, int]] = []  # anchors of what has not ended, and how much is in it so far
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            around.append((event.anchor, 1))
            if len(around) > MOST_LEVELS:
                raise _fault(f"more than {MOST_LEVELS} levels in each other", event.start_mark)
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = around.pop()
            sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in around):
                raise _fault(f"*{event.anchor} stands inside of what it stands for", event.start_mark)
            size = sizes.get(event.anchor, 1)
        else:
            size = int(isinstance(event, yaml.ScalarEvent))
        if around:
            around[-1] = (around[-1][0], around[-1][1] + size)
            if around[-1][1] > MOST_VALUES:
                raise _fault(f"more than {MOST_VALUES:,} values", event.start_mark)


class _Reader:
    """From nodes to values. Keys stay as they are written: `no` is a key, too."""

    def __init__(self, loader: yaml.SafeLoader):
        self.loader = loader
        self.lines: dict[tuple[str, ...], int] = {}
        self._own_keys: set[int] = set()  # nodes whose keys were looked at, before others were merged into them

    def document(self) -> Any:
        node = self.loader.get_single_node()
        return None if node is None else self._value(node, ())

    def _value(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if node.tag not in _PLAIN_TAGS:
            raise _fault(f"a value with the tag {node.tag!r} is not read", node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        return [self._value(each, path) for each in node.value]

    def _scalar(self, node: yaml.ScalarNode, path: tuple[str, ...]) -> Any:
        try:
            return self.loader.construct_object(node)
        except yaml.YAMLError:
            raise
        except Exception as error:  # a 31st of February, a number of thousands of digits, `!!int x`
            kind, key = node.tag.rpartition(":")[2], ".".join(path)
            raise _fault(f"{key}: {node.value[:80]!r} cannot be read as {kind}", node.start_mark) from error

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Any]:
        self._refuse_twice(node, path)
        self.loader.flatten_mapping(node)
        content = {}
        for key, value in node.value:
            here = (*path, key.value)
            self.lines[here] = key.start_mark.line + 1
            content[key.value] = self._value(value, here)
        return content

    def _refuse_twice(self, node: yaml.MappingNode, path: tuple[str, ...]) -> None:
        if id(node) in self._own_keys:
            return
        self._own_keys.add(id(node))
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _fault("a key has to be a text", key.start_mark)
            if key.value in lines:
                whole = ".".join((*path, key.value))
                raise _fault(f"{whole} is there already, at line {lines[key.value]}", key.start_mark)
            lines[key.value] = key.start_mark.line + 1
