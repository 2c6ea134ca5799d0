"""`hf-value-steer svgt train`: a guidance module from a labelled collection."""

import argparse
import json
from pathlib import Path

import yaml

from hf_value_steer.cli.command import add_command, guarded
from hf_value_steer.svgt.train import GuidanceTrainArguments, train_guidance


def add_svgt(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    summary = "stable value guidance: a value module and its bridge tokens"
    parser = commands.add_parser("svgt", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    steps = parser.add_subparsers(title="steps", metavar="STEP", required=True)
    summary = "train a module on a labelled collection, in three stages"
    add_command(steps, "train", summary, _train, GuidanceTrainArguments)
    recipe = steps.add_parser("run", help="the same with the arguments of a YAML file")
    recipe.add_argument("recipe", help="a YAML file")
    recipe.set_defaults(run=guarded(lambda given: _train(_from_recipe(Path(given.recipe)))))


def _from_recipe(path: Path) -> GuidanceTrainArguments:
    try:
        return GuidanceTrainArguments(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except TypeError as error:
        raise ValueError(f"{path}: {error}.") from error


def _train(arguments: GuidanceTrainArguments) -> None:
    module = train_guidance(arguments)
    print(f"{arguments.output}: {json.dumps(module.config.training['stages'])}")
