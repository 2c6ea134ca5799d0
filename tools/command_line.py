"""Write the page of all commands, `docs/reference/command-line.md`: `python -m tools.command_line`."""

import os
from pathlib import Path
from pkgutil import resolve_name
from unittest.mock import patch

from hf_value_steer.cli import PROGRAM
from hf_value_steer.cli.commands import COMMANDS, Command
from hf_value_steer.cli.options import parser_of


PAGE = Path(__file__).parents[1] / "docs" / "reference" / "command-line.md"
WIDTH = 102
HEAD = f"""# Command line

What `{PROGRAM} COMMAND --help` shows for each command. Options may be written with `-` or `_`. The exit status is 0;
1 if `doctor` found something; 2 if a command could not do its work; 130 after Ctrl-C. `{PROGRAM} run recipe.yaml` does
several commands in turn: the sections of a recipe are commands, and its keys are options, written with `_`.
"""


def page() -> str:
    """The whole page."""
    with patch.dict(os.environ, COLUMNS=str(WIDTH)):
        return "\n".join([HEAD, *(_section(name, command) for name, command in COMMANDS.items())])


def _section(name: str, command: Command) -> str:
    kinds = [resolve_name(kind) for kind in command.arguments]
    shown = parser_of(f"{PROGRAM} {name}", command.summary, command.example, kinds).format_help()
    return f"## {name}\n\n```text\n{shown.strip()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
