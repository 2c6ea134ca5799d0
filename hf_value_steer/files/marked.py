"""Plans that a person wrote, as YAML or in Python: their content, and where in a file each key of it stands.

PyYAML forgets the lines of keys, and takes the last of two equal ones: hence a loader of our own.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_value_steer.errors import FieldError, SteeringError
from hf_value_steer.files.writing import read_utf8


@dataclass(frozen=True)
class Marked:
    """A plan: sections with keys.

    Args:
        content: what was written: if all is well, a mapping of mappings.
        name (`str`): of the file, or what errors call the plan otherwise.
    """

    content: Any
    name: str = "The recipe"

    def place(self, *path: str) -> str:
        """Where a key stands, for errors: file, line and key, as far as there are."""
        inside, line = self.content, None
        for key in path:
            line = inside.lines.get(key, line) if isinstance(inside, _Mapping) else line
            inside = inside.get(key) if isinstance(inside, Mapping) else None
        known = [] if line is None else [f"line {line}"]
        return ", ".join([self.name, *known, *([".".join(path)] if path else [])])

    @contextmanager
    def blaming(self, *section: str, names: Mapping[str, str] | None = None) -> Iterator[None]:
        """Let a `ValueError` inside the block say where the section stands, and a `FieldError` where its field does.

        Errors of our own kinds, which are about other files, stay as they are.

        Args:
            section (`str`): its name; none for the sections themselves.
            names: how the section calls fields that it does not call by their names.
        """
        try:
            yield
        except SteeringError:
            raise
        except ValueError as error:
            said, own = str(error), self.content.get(section[0]) if section else self.content
            field = error.field if isinstance(error, FieldError) else ""
            key = (names or {}).get(field, field)
            if own and key in own:  # is said by the place
                said, section = re.sub(rf"^`{re.escape(field)}`(: | (?=has to ))", "", said), (*section, key)
            place = self.place(*section)
            raise ValueError(" ".join(f"{place}: {said}".split())) from error


def read_marked(path: Path) -> Marked:
    """Read a YAML file. Nothing in it is executed.

    Raises:
        OSError: if it is not there.
        ValueError: if it is no YAML in UTF-8, or holds a key twice; names the line.
    """
    text = read_utf8(path)
    try:
        return Marked(yaml.load(text, Loader=_Loader), str(path))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{path}, line {line}: the character {chr(error.character)!r} is not allowed.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(", ".join(filter(None, (error.context, error.problem))).split())
        raise ValueError(f"{path}, line {mark.line + 1}: {reason}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply: a recipe has sections, and they have keys.") from error


class _Mapping(dict[str, Any]):
    """A mapping that knows at which line, counted from 1, each of its keys stands."""

    lines: dict[str, int]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Remembers lines, refuses keys that are there twice, and keeps keys as they are written: `no` is one, too."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # a 31st of February, a number of thousands of digits, `!!int x`
            kind = node.tag.rpartition(":")[2]
            raise _fault(f"{str(node.value)[:80]!r} cannot be read as {kind}", node) from error

    def mapping(self, node: yaml.MappingNode) -> _Mapping:
        """What a node of a mapping stands for."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _fault("a key has to be a text", key)
            if key.value in lines:
                raise _fault(f"{key.value} is there already, at line {lines[key.value]}", key)
            lines[key.value] = key.start_mark.line + 1
        self.flatten_mapping(node)
        found = _Mapping((key.value, self.construct_object(value, deep=True)) for key, value in node.value)
        found.lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}
        return found


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)


def _fault(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
