"""What configs and documents say, as text in Markdown and in the Python that readers copy: never as markup or code."""

import json
import re
from collections.abc import Sequence


# What Markdown takes for more than itself. An underscore within a word is one, and so is a "#" behind one.
_SPECIAL = re.compile(r"[\\`*\[\]~$]|(?<![^\W_])_|_(?![^\W_])|(?<!\S)#")


def plain(text: str) -> str:
    """As one line of Markdown that shows the text as it is."""
    escaped = _SPECIAL.sub(r"\\\g<0>", _one_line(text))
    return re.sub(r"&(?=#?\w+;)", "&amp;", escaped).replace("<", "&lt;")


def code(text: str) -> str:
    """As a span of code, in Markdown outside tables: between more backticks than the text has in a row."""
    line = _one_line(text) or " "
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def literal(text: str) -> str:
    """As a string of Python, on one line."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in line) + " |" for line in lines
    )


def _one_line(text: str) -> str:
    """Without line breaks, control characters, and what turns the direction of text around."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())
