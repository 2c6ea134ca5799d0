"""`hf-value-steer svgt train`: a guidance module from a labelled collection."""

import argparse
import json
from dataclasses import fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from hf_value_steer.cli.pipeline import Help, guarded
from hf_value_steer.svgt.train import GuidanceTrainArguments, train_guidance


def add_svgt(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    summary = "stable value guidance: a value module and its bridge tokens"
    parser = commands.add_parser("svgt", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    steps = parser.add_subparsers(title="steps", metavar="STEP", required=True)
    train = steps.add_parser(
        "train",
        help="train a module on a labelled collection, in three stages",
        description="Train a module on a labelled collection, in three stages.",
        parents=[HfArgumentParser(GuidanceTrainArguments, add_help=False)],
        formatter_class=Help,
    )
    train.set_defaults(run=guarded(lambda given: _train(_from_options(given))))
    recipe = steps.add_parser("run", help="the same with the arguments of a YAML file")
    recipe.add_argument("recipe", help="a YAML file")
    recipe.set_defaults(run=guarded(lambda given: _train(_from_recipe(Path(given.recipe)))))


def _from_options(given: argparse.Namespace) -> GuidanceTrainArguments:
    return GuidanceTrainArguments(**{each.name: getattr(given, each.name) for each in fields(GuidanceTrainArguments)})


def _from_recipe(path: Path) -> GuidanceTrainArguments:
    try:
        return GuidanceTrainArguments(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except TypeError as error:
        raise ValueError(f"{path}: {error}.") from error


def _train(arguments: GuidanceTrainArguments) -> None:
    module = train_guidance(arguments)
    print(f"{arguments.output}: {json.dumps(module.config.training['stages'])}")
