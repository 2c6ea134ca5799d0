"""Docstrings in the reference: sections become lists, references links, and help of commands docstrings."""

import ast
import re
import textwrap
from typing import Any

import griffe


REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):\n((?: +\S.*\n?|\n)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Makes Markdown of docstrings, which they are but for their sections and for references like [`Name`]."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        _rewrite(pkg, pkg)


def _rewrite(pkg: griffe.Module, obj: griffe.Object) -> None:
    if isinstance(obj, griffe.Attribute) and "metadata=" in str(obj.value):
        _tell_help(obj)
    if obj.docstring is not None:
        linked = REFERENCE.sub(lambda match: _link(pkg, obj, match[1]), obj.docstring.value)
        obj.docstring.value = SECTION.sub(_section, linked)
    for member in obj.members.values():
        if not member.is_alias:
            _rewrite(pkg, member)


def _tell_help(field: griffe.Attribute) -> None:
    """A field of what a command is told: its docstring is the command's help."""
    call = ast.parse(str(field.value), mode="eval").body
    said = {keyword.arg: keyword.value for keyword in call.keywords} if isinstance(call, ast.Call) else {}
    field.value = ast.unparse(said["default"]) if "default" in said else None
    if isinstance(metadata := said.get("metadata"), ast.Dict):
        told = {ast.unparse(key): value for key, value in zip(metadata.keys, metadata.values, strict=True) if key}
        parts = getattr(told["'help'"], "values", [told["'help'"]])  # of an f-string
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)
        field.docstring = griffe.Docstring(text, parent=field)


def _section(match: re.Match[str]) -> str:
    body = textwrap.dedent(match[2])
    if match[1] in ("Args", "Attributes", "Raises"):
        body = re.sub(r"^(\w+(?:, \w+)*)", r"- `\1`", body, flags=re.MULTILINE)
    return f"**{match[1]}**\n\n{body}"


def _link(pkg: griffe.Module, obj: griffe.Object, name: str) -> str:
    """A link where the reference has a place for this name, else code."""
    try:
        target = obj.resolve(name)
    except griffe.NameResolutionError:
        target = f"{pkg.path}.{name}" if name in pkg.members else name
    return f'<autoref identifier="{target}" optional><code>{name.rsplit(".", 1)[-1]}</code></autoref>'
