"""What does a head find, if it may touch a share of the safe texts? Detection alone: nothing is steered.

    hf-value-steer run examples/recipes/smollm2-toxicity.yaml      # its collection is read
    python -m benchmarks.onset_heads --output benchmarks/results/onset-heads.json

For each fold of the prompts, and each choice of layers, memory and target, a head is trained without that fold. On the
fold's texts its threshold is what a share of the safe texts reaches; the table says which share of the texts that a
judge objects to reaches it, too. Safe: no judge objects, the one that gave the labels included. Intervals are
bootstraps over prompts.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.environment import command, describe, save
from benchmarks.going_back import JUDGES
from hf_value_steer.arguments.train import TrainArguments
from hf_value_steer.backbone.features import Layer
from hf_value_steer.evaluation.crossfit import without_fold
from hf_value_steer.files.writing import write_json
from hf_value_steer.training.bootstrap import Bootstrap, interval
from hf_value_steer.training.calibrate import row_values
from hf_value_steer.training.label import tokenizer_of
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.splits import split_rows
from hf_value_steer.training.train import train


LABELS = "python:examples.toxicity:profanity"
FOLDS, SHARES = 5, (0.05, 0.1, 0.2)


class Choice(NamedTuple):
    """What is tried."""

    layers: tuple[Layer, ...]
    target: str = "onset"
    temporal: str = "none"
    prompts: float = 1.0  # share of those to train on
    forced: bool = True

    @property
    def name(self) -> str:
        where = ", ".join(map(str, self.layers))
        parts = [f"{self.target}, layer {where}"]
        parts += [self.temporal] * (self.temporal != "none")
        parts += [f"{100 * self.prompts:.0f} % of the prompts"] * (self.prompts < 1)
        return ", ".join(parts + ["no forced words"] * (not self.forced))


CHOICES = [
    *(Choice((layer,)) for layer in (3, 7, 11, 19, 27, "final")),
    Choice((3, 7, 11)),
    Choice((3, 11, 19, 27)),
    Choice((3,), temporal="mean"),
    *(Choice((layer,), "hazard") for layer in (3, 11, "final")),
    Choice((3, 7, 11), "hazard"),
    Choice((3, 7, 11), temporal="ema"),
    Choice((3, 7, 11), prompts=0.5),
    Choice((3, 7, 11), prompts=0.25),
    Choice((3, 7, 11), forced=False),
]


def arguments_of(collection: Collection, choice: Choice, fold: int, output: str) -> TrainArguments:
    """The recipe's, with what is tried; prompts that are not trained on validate."""
    training = TrainArguments(
        collection=str(collection.folder), output=output, judge=LABELS, attribute="toxicity", preset="onset",
        target=choice.target, feature_layers=list(choice.layers), temporal=choice.temporal, projection_size=256,
        validation=1 - 0.9 * choice.prompts, calibration=0,
    )  # fmt: skip
    return without_fold(training, output, fold, FOLDS)


def without_forced_words(collection: Collection, folder: Path) -> Collection:
    """The first half of the shards: into the texts of the others words were forced."""
    folder.mkdir()
    for name in ("shards", "labels", "prompts.jsonl"):
        (folder / name).symlink_to((collection.folder / name).resolve())
    manifest = collection.manifest | {"shards": len(collection.shards) // 2}
    write_json(folder / "collection.json", manifest)
    part = Collection(folder)
    assert part.rows.natural.all() and int(collection.rows.natural.sum()) == len(part.rows)
    return part


def examine(collection: Collection, choice: Choice, fold: int) -> dict[str, Any]:
    """Values of the held-out texts by a head that never saw their prompts."""
    with tempfile.TemporaryDirectory() as folder:
        if not choice.forced:
            collection = without_forced_words(collection, Path(folder) / "collection")
        arguments = arguments_of(collection, choice, fold, f"{folder}/head")
        start = time.perf_counter()
        head = train(arguments)
        seconds = time.perf_counter() - start
        rows = split_rows(collection, arguments)["held_out"]
        values = row_values(collection, head, rows, "filter").worst.tolist()
    return {"rows": rows, "values": values, "seconds": round(seconds, 1)}


def verdicts(collection: Collection) -> dict[str, np.ndarray]:
    """What each judge says of each text, `(rows,)` of 0 and 1."""
    tokenizer = tokenizer_of(collection)
    ids = [collection.read("tokens", row).tolist() for row in range(len(collection.rows))]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return {name: (judge(texts, texts) > 0.5).astype(float) for name, judge in JUDGES.items()}


def summarised(collection: Collection, known: dict[str, Any], judged: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a choice finds at each share of the safe texts; thresholds are those of each fold's own texts."""
    rows = np.array(list(itertools.chain.from_iterable(each["rows"] for each in known.values())))
    bad = {name: verdict[rows] for name, verdict in judged.items()}
    safe = 1 - np.max(list(bad.values()), axis=0)
    bootstrap = Bootstrap(collection.rows.prompt.numpy()[rows])
    found: dict[str, Any] = {
        "folds": len(known),
        "seconds_to_train": round(float(np.median([e["seconds"] for e in known.values()])), 1),
    }
    for share in SHARES:
        reached, start = np.zeros(len(rows)), 0
        for each in known.values():
            part = slice(start, start + len(each["rows"]))
            values = np.array(each["values"])
            reached[part] = values > np.quantile(values[safe[part] > 0], 1 - share)
            start = part.stop
        found[str(share)] = {
            name: {
                "found": round(float((reached * each).sum() / each.sum()), 4),
                "interval": interval(bootstrap.ratio(reached * each, each)),
            }
            for name, each in bad.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", default="runs/smollm2-toxicity/collection")
    parser.add_argument("--folds", type=int, default=FOLDS, help="so many of the five, to try it")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    collection = Collection(arguments.collection)
    values_file = collection.folder.parent / "onset-heads.json"  # a run that was stopped goes on from here
    values = json.loads(values_file.read_text(encoding="utf-8")) if values_file.exists() else {}
    for fold, choice in itertools.product(range(arguments.folds), CHOICES):
        if str(fold) not in values.setdefault(choice.name, {}):
            values[choice.name][str(fold)] = examine(collection, choice, fold)
            save(values, values_file)
    judged = verdicts(collection)
    choices = {name: summarised(collection, folds, judged) for name, folds in values.items()}
    save({"command": command(), **describe(), "choices": choices}, arguments.output)


if __name__ == "__main__":
    main()
