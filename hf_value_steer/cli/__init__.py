"""The command line: `hf-value-steer COMMAND`."""

import argparse
from collections.abc import Sequence

from hf_value_steer.cli.doctor import add_doctor
from hf_value_steer.cli.guidance import add_guidance
from hf_value_steer.cli.pipeline import add_pipeline
from hf_value_steer.cli.serve import add_serve
from hf_value_steer.cli.vectors import add_vectors


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 if something was found, 2 if it could not be done."""
    parser = argparse.ArgumentParser(prog="hf-value-steer", description="Value steering for language models.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_doctor(commands)
    add_pipeline(commands)
    add_guidance(commands)
    add_vectors(commands)
    add_serve(commands)
    arguments, others = parser.parse_known_args(argv)
    if "others" in arguments:
        arguments.others = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return int(arguments.run(arguments))
