"""From dataclasses of arguments to commands."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import transformers
from transformers import HfArgumentParser


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    function: Callable[..., None],
    *kinds: type[Any],
    description: str | None = None,
    aliases: Sequence[str] = (),
) -> None:
    """Add a command that calls `function` with one dataclass of each of `kinds`, read from the command line.

    It also runs under its `aliases`: names that it had before.
    """
    parser = commands.add_parser(
        name,
        aliases=aliases,
        help=summary,
        description=description or f"{summary[0].upper()}{summary[1:]}.",
        parents=[HfArgumentParser(kinds, add_help=False)],
        formatter_class=Help,
    )

    def run(namespace: argparse.Namespace) -> None:
        given = vars(namespace)
        function(*(kind(**{field.name: given[field.name] for field in fields(kind)}) for kind in kinds))

    parser.set_defaults(run=guarded(run))


def guarded(function: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    """What a user can mend is said in one line."""

    def run(namespace: argparse.Namespace) -> int:
        transformers.logging.set_verbosity_error()
        logging.basicConfig(format="%(message)s")
        logging.getLogger("hf_value_steer").setLevel(logging.INFO)
        try:
            function(namespace)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            print(f"hf-value-steer: {error}", file=sys.stderr)
            return 2
        return 0

    return run
