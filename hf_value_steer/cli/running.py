"""Runs one command: reads its arguments, imports what it needs, and says in one line what a user can mend."""

import os
import sys
from collections.abc import Callable, Sequence
from pkgutil import resolve_name

from hf_value_steer.cli.commands import Command
from hf_value_steer.cli.options import Kinds, as_options, parser_of, read


COMPOUND = r"\w+_\w+"
STOPPED = 130  # as a shell says of a program that was ended by Ctrl-C


def run(name: str, command: Command, words: Sequence[str]) -> int:
    """Run the command of this full name with the words behind it, and return its exit status."""
    kinds: Kinds = ()
    try:
        kinds = [resolve_name(kind) for kind in command.arguments]
        parser = parser_of(name, command.summary, command.example, kinds)
        given, others = read(parser, kinds, words, command.passes_on)
        if not command.passes_on:  # vLLM has a logging of its own
            _quieten()
        function: Callable[..., int | None] = resolve_name(command.function)
        return function(*given, *([others] if command.passes_on else [])) or 0
    except KeyboardInterrupt:
        print(f"\n{name}: stopped.", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # who read our output, `head` for instance, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        # A single word may be about something else than the option of that name.
        print(f"{name}: {as_options(str(error), kinds, words=COMPOUND)}", file=sys.stderr)
        return 2


def _quieten() -> None:
    """Let our own progress be seen, and of transformers' messages errors only."""
    import logging

    import transformers

    transformers.logging.set_verbosity_error()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_value_steer").setLevel(logging.INFO)
