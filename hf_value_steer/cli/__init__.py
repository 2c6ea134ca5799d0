"""The command line: `hf-value-steer COMMAND`. What is heavy is imported when a command runs, and not before."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from hf_value_steer.checks import closest
from hf_value_steer.cli.commands import COMMANDS, GROUPS, RENAMED
from hf_value_steer.cli.options import Help, Parser
from hf_value_steer.cli.running import run


PROGRAM = "hf-value-steer"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words behind the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 if something was found, 2 if it could not be done, 130 if the user stopped it.
    """
    words = _renewed(list(sys.argv[1:] if argv is None else argv))
    for count in (1, 2):
        name = " ".join(words[:count])
        if name in COMMANDS:
            return run(f"{PROGRAM} {name}", COMMANDS[name], words[count:])
    return _overview(words)


def _renewed(words: list[str]) -> list[str]:
    """The words, with the command under its name of today."""
    for old, new in RENAMED.items():
        count = len(old.split())
        if " ".join(words[:count]) == old:
            print(f"{PROGRAM} {old} is {PROGRAM} {new} now.", file=sys.stderr)
            return [*new.split(), *words[count:]]
    return words


def _overview(words: list[str]) -> int:
    """Say which commands there are: all of them, or those of one group."""
    group = words[0] if words and words[0] in GROUPS else ""
    names = [name for name in COMMANDS if name.startswith(f"{group} ")] if group else list(COMMANDS)
    parser = Parser(
        prog=f"{PROGRAM} {group}".rstrip(),
        usage="%(prog)s COMMAND [options]",
        description=GROUPS.get(group, "Value steering for language models."),
        epilog=_listing(names),
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version(PROGRAM)}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help=argparse.SUPPRESS)
    asked, _ = parser.parse_known_args(words[bool(group) :])
    if asked.command is None:
        parser.print_help()
        return 2
    wanted = f"{group} {asked.command}".lstrip()
    if wanted in COMMANDS:
        parser.error(f"options of {wanted!r} stand behind it.")
    close = closest(wanted, names)
    parser.error(f"there is no command {wanted!r}" + (f"; did you mean {close!r}?" if close else "."))


def _listing(names: Sequence[str]) -> str:
    width = max(map(len, names)) + 2
    lines = [f"  {name:<{width}}{COMMANDS[name].summary}" for name in names]
    return "\n".join(["commands:", *lines, "", f"example:\n  {COMMANDS[names[0]].example}"])
