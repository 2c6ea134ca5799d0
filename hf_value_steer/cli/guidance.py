"""`hf-value-steer guidance train`: a guidance module from a labelled collection."""

import argparse
import json

from hf_value_steer.arguments.guidance import GuidanceTrainArguments
from hf_value_steer.cli.command import add_command
from hf_value_steer.training.guidance.train import train_guidance


def add_guidance(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    summary = "stable value guidance: a value module and its bridge tokens"
    parser = commands.add_parser(
        "guidance", aliases=["svgt"], help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    steps = parser.add_subparsers(title="steps", metavar="STEP", required=True)
    summary = "train a module on a labelled collection, in three stages"
    add_command(steps, "train", summary, _train, GuidanceTrainArguments)


def _train(arguments: GuidanceTrainArguments) -> None:
    module = train_guidance(arguments)
    print(f"{arguments.output}: {json.dumps(module.config.training['stages'])}")
