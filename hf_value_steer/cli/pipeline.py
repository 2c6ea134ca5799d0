"""`hf-value-steer collect | train | calibrate | evaluate | push | run`: from prompts to a head, one command a step."""

import argparse
import json
from pathlib import Path

from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.arguments.collect import CollectArguments, LabelArguments
from hf_value_steer.arguments.evaluate import EvaluateArguments
from hf_value_steer.arguments.train import TrainArguments
from hf_value_steer.cards.results import results_markdown
from hf_value_steer.cli.command import add_command, guarded
from hf_value_steer.evaluation.evaluate import evaluate
from hf_value_steer.hub import push_head
from hf_value_steer.recipe import run_recipe
from hf_value_steer.training.calibrate import calibrate
from hf_value_steer.training.collect import collect
from hf_value_steer.training.train import train
from hf_value_steer.vllm.start import vllm_engine


def add_pipeline(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    summary = "continue prompts, keep the features, and let judges label them"
    add_command(commands, "collect", summary, _collect, CollectArguments, LabelArguments)
    add_command(commands, "train", "train a value head on a labelled collection", _train, TrainArguments)
    summary = "thresholds from generations that training never saw"
    add_command(commands, "calibrate", summary, _calibrate, CalibrateArguments)
    summary = "base against steered, on unseen prompts, by other judges"
    add_command(commands, "evaluate", summary, _evaluate, EvaluateArguments)
    _add_push(commands)
    parser = commands.add_parser("run", help="all of it from one recipe", description=run_recipe.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("recipe", help="a YAML file")
    parser.set_defaults(run=guarded(lambda arguments: print(run_recipe(arguments.recipe))))


def _add_push(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "upload a head with its card, calibration and evaluation"
    parser = commands.add_parser("push", help=summary, description=push_head.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", help="folder of the head")
    parser.add_argument("repo_id", help="repository on the Hub")
    parser.add_argument("--evaluation", help="folder with evaluation.json and report.html")
    parser.add_argument("--limits", help="where the head fails, for the card")
    parser.add_argument("--accept-limits", action="store_true", help="publish without a word on limits")
    parser.add_argument("--datasets", nargs="+", help="Hub ids of the data sets behind it, for the card")
    parser.add_argument("--license", help="of the head, for the card")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private")
    parser.add_argument("--dry-run", action="store_true", help="show every file and the card, upload nothing")
    parser.set_defaults(run=guarded(_push))


def _push(arguments: argparse.Namespace) -> None:
    options = {name: choice for name, choice in vars(arguments).items() if name != "run"}
    print(push_head(options.pop("folder"), options.pop("repo_id"), **options))


def _collect(arguments: CollectArguments, labels: LabelArguments) -> None:
    collection = collect(arguments, labels, vllm_engine)
    tokens = int((collection.rows.stop - collection.rows.start).sum())
    counts = f"{len(collection.rows)} generations of {len(collection.prompts)} prompts, {tokens} tokens"
    print(f"{collection.folder}: {counts}")
    print((collection.folder / "labels" / "report.json").read_text(encoding="utf-8"), end="")


def _train(arguments: TrainArguments) -> None:
    head = train(arguments)
    print(f"{arguments.output}: {json.dumps(head.config.training['metrics'])}")


def _calibrate(arguments: CalibrateArguments) -> None:
    calibration = calibrate(arguments)
    print(calibration.guarantee)
    for point in calibration.curve:
        print(f"alpha {point['alpha']:<6}threshold {point['threshold']}")
    config = json.loads((Path(arguments.value_head) / "config.json").read_text(encoding="utf-8"))
    print(f"default threshold: {config.get('threshold')}")


def _evaluate(arguments: EvaluateArguments) -> None:
    print(results_markdown(evaluate(arguments)))
