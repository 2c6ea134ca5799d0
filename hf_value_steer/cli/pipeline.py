"""`collect`, `label`, `layers`, `train`, `calibrate`, `evaluate`, `push`, `run`, `export`: from prompts to a head."""

import json
import random
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.arguments.collect import CollectArguments, LabelArguments, LabelCommandArguments
from hf_value_steer.arguments.evaluate import EvaluateArguments
from hf_value_steer.arguments.hub import ExportArguments, PushArguments, RunArguments
from hf_value_steer.arguments.layers import LayersArguments
from hf_value_steer.arguments.train import TrainArguments
from hf_value_steer.cards.results import results_markdown
from hf_value_steer.evaluation.evaluate import evaluate
from hf_value_steer.files.writing import write_atomically
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.hub import export_custom_generate, push_head, renew_card
from hf_value_steer.judges import check_judges
from hf_value_steer.recipe import run_recipe
from hf_value_steer.training.calibrate import calibrate
from hf_value_steer.training.collect import collect
from hf_value_steer.training.label import Labels, label, tokenizer_of
from hf_value_steer.training.layers import suggest_feature_layers
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.splits import split_rows
from hf_value_steer.training.train import train
from hf_value_steer.vllm.start import vllm_engine


def collect_command(arguments: CollectArguments, labels: LabelArguments) -> None:
    """Collect and label, and say how much there is."""
    _report(collect(arguments, labels, vllm_engine))


def label_command(arguments: LabelCommandArguments) -> None:
    """Label what is collected, and say what judges found."""
    collection = Collection(arguments.collection)
    check_judges(arguments.judges, collection.prompts)
    tokenizer = tokenizer_of(collection)
    label(collection, tokenizer, arguments)
    _report(collection)
    if arguments.show:
        _show(collection, tokenizer, arguments)


def _show(collection: Collection, tokenizer: PreTrainedTokenizerBase, arguments: LabelCommandArguments) -> None:
    """Print some texts, drawn at random, with their scores."""
    scores = {judge: Labels(collection, judge).responses() for judge in arguments.judges}
    for row in random.Random(0).sample(range(len(collection.rows)), min(arguments.show, len(collection.rows))):
        prompt = collection.prompts[int(collection.rows.prompt[row])].text
        text = tokenizer.decode(collection.read("tokens", row), skip_special_tokens=True)
        said = ", ".join(f"{judge} {float(each[row]):.2f}" for judge, each in scores.items())
        print(f"\n{said}\n{prompt!r} … {text!r}")


def _report(collection: Collection) -> None:
    tokens = int((collection.rows.stop - collection.rows.start).sum())
    counts = f"{len(collection.rows)} generations of {len(collection.prompts)} prompts, {tokens} tokens"
    print(f"{collection.folder}: {counts}")
    print((collection.folder / "labels" / "report.json").read_text(encoding="utf-8"), end="")


def layers_command(arguments: LayersArguments) -> None:
    """Probe the layers, and say with which a head is trained best."""
    collection, judge = Collection(arguments.collection), arguments.judge
    split = split_rows(collection, arguments)
    rows = [*split["train"], *split["validation"]]
    found = suggest_feature_layers(
        collection, judge, rows, target=arguments.target, folds=arguments.folds, limit=arguments.limit
    )
    print(found)
    print(f"\nNext: hf-value-steer train --feature-layers {found.best.layer} --temporal {found.best.temporal} ...")


def train_command(arguments: TrainArguments) -> None:
    """Train, and say how well the head tells validation texts apart."""
    head = train(arguments)
    print(f"{arguments.output}: {json.dumps(head.config.training['metrics'])}")


def calibrate_command(arguments: CalibrateArguments) -> None:
    """Calibrate, and say what is promised, from which alpha on, and which threshold is the default."""
    calibration = calibrate(arguments)
    print(calibration.guarantee)
    kept = [point for point in calibration.curve if point["threshold"] is not None]
    for point in kept:
        print(f"alpha {point['alpha']:<6}threshold {point['threshold']}")
    if beyond := len(calibration.curve) - len(kept):
        print(f"{beyond} smaller alphas cannot be promised from so few texts.")
    head, card = ValueHead.from_pretrained(arguments.value_head), Path(arguments.value_head) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if "model-index" in text:
        print(f"{card} holds results of before: evaluate again.")
    elif text:  # it says which thresholds there are
        write_atomically(card, renew_card(head, text).encode())
    print(f"default threshold: {head.config.threshold}")


def evaluate_command(arguments: EvaluateArguments) -> None:
    """Evaluate, and print the table of the card."""
    print(results_markdown(evaluate(arguments)))


def push(arguments: PushArguments) -> None:
    """Upload a head, or show what would be uploaded."""
    print(push_head(**asdict(arguments)))


def run(arguments: RunArguments) -> None:
    """Do what a recipe says, and say where the result lies."""
    print(run_recipe(arguments.recipe))


def export(arguments: ExportArguments) -> None:
    """Write a repository for the Hub."""
    folder = export_custom_generate(arguments.folder)
    print(f"{folder}: upload it with `hf upload org/value-steer {folder}`")
