"""Whether an answer will be right: a middle layer against the final state, the first token's probability, and a table.

    hf-value-steer run examples/recipes/smollm2-arithmetic.yaml
    python -m benchmarks.abstention --output benchmarks/results/abstention-arithmetic.json

On the problems of the recipe's evaluation, which no head has seen. Each way to choose gives every problem a score;
those with the highest are answered. A head gives two: the value after the prompt alone, before anything is written,
and the least value until the answer's end, which abstention acts on. The first token's probability is the model's own.
The table knows only the operator and the number of digits. AURC: the share of wrong answers among those that are
given, averaged over all shares that can be given; less is better. Intervals are 95 % bootstraps over problems.

`decisions`: abstention at the head's threshold, token by token. A token is saved if plain `generate` writes it and
abstention does not.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.environment import command, describe, save
from examples.arithmetic import accuracy_at_coverage, accuracy_table, cell
from examples.smollm2 import load_backbone
from hf_value_steer import ValueHead
from hf_value_steer.files.marked import read_marked
from hf_value_steer.recipe.sections import Steps
from hf_value_steer.training.bootstrap import interval
from hf_value_steer.training.collect import collect
from hf_value_steer.training.label import Labels
from hf_value_steer.training.prompts import Formatter
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.train import train


RECIPE = Path("examples/recipes/smollm2-arithmetic.yaml")
COVERAGES, DRAWS = (0.1, 0.2, 0.3, 0.5), 2000
Array = NDArray[np.float64]


def aurc(scores: Array, right: Array) -> float:
    """Area under the risk-coverage curve; problems whose scores tie count as their mean."""
    _, tied = np.unique(-scores, return_inverse=True)
    expected = (np.bincount(tied, right) / np.bincount(tied))[np.sort(tied)]
    return float((1 - np.cumsum(expected) / np.arange(1, len(right) + 1)).mean())


@torch.no_grad()
def trajectories(collection: Collection, head: ValueHead) -> list[Array]:
    """Values of each answer: after the prompt, and after each token but the last one."""
    layers = collection.resolve(head.config.feature_layers)
    rows = range(len(collection.rows))
    return [head(collection.features(row, layers)).value[:-1].double().numpy() for row in rows]


@torch.no_grad()
def first_probabilities(collection: Collection) -> Array:
    """Probability of the likeliest first token, `(problems,)`."""
    model, tokenizer = load_backbone(torch.float32)
    formatter, found = Formatter(tokenizer, chat=True), []
    for first in range(0, len(collection.prompts), 50):
        inputs = formatter(collection.prompts[first : first + 50], model.device)
        found.append(model(**inputs, logits_to_keep=1).logits[:, -1].softmax(-1).amax(-1))
    return torch.cat(found).double().numpy()


def decisions(values: list[Array], threshold: float, right: Array) -> dict[str, Any]:
    """What abstention does at a threshold: a text ends at its first value that is not above it."""
    ends = [int(np.argmax(each <= threshold)) if (each <= threshold).any() else None for each in values]
    lengths = np.array([len(each) for each in values])  # tokens of the answer
    kept = np.array([end is None for end in ends])
    written = np.array([length if end is None else end for end, length in zip(ends, lengths, strict=True)])
    return {
        "threshold": round(threshold, 4),
        "answered": round(float(kept.mean()), 4),
        "accuracy": round(float(right[kept].mean()), 4) if kept.any() else None,
        "ended": int((~kept).sum()),
        "ended_before_the_first_token": sum(end == 0 for end in ends),
        "tokens_saved": round(float(1 - written.sum() / lengths.sum()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    steps = Steps(read_marked(RECIPE))
    assert steps.train is not None and steps.evaluate is not None
    judge, folder = str(steps.train.judge), Path(steps.train.output).parent
    unseen = collect(
        replace(steps.collect, prompts=steps.evaluate.prompts, output=str(folder / "unseen")), steps.label
    )
    right = Labels(unseen, judge).responses().double().numpy()
    final = train(replace(steps.train, feature_layers=["final"], temporal="none", output=str(folder / "final")))
    head = ValueHead.from_pretrained(steps.train.output)
    known = Collection(steps.train.collection)
    table = accuracy_table(
        [known.prompts[index] for index in known.rows.prompt.tolist()], Labels(known, judge).responses().tolist()
    )
    values = {"head": trajectories(unseen, head), "final state": trajectories(unseen, final)}
    scores = {
        **{name: np.array([each.min() for each in of]) for name, of in values.items()},
        **{f"{name}, prompt alone": np.array([each[0] for each in of]) for name, of in values.items()},
        "first token's probability": first_probabilities(unseen),
        "operator and digits": np.array([table[cell(prompt.columns)] for prompt in unseen.prompts]),
    }
    random = np.random.default_rng(0)
    draws = random.integers(0, len(right), (DRAWS, len(right)))
    areas = {name: np.array([aurc(each[rows], right[rows]) for rows in draws]) for name, each in scores.items()}
    document = {
        "command": command(),
        **describe(),
        "problems": len(right),
        "accuracy": round(float(right.mean()), 4),
        "feature_layers": head.config.feature_layers,
        "temporal": head.config.temporal,
        "coverages": COVERAGES,
        "ways": [
            {
                "name": name,
                "aurc": round(aurc(each, right), 4),
                "aurc_interval": interval(areas[name]),
                "more_than_head_interval": interval(areas[name] - areas["head"]),
                "accuracy": [round(accuracy_at_coverage(each, right, share), 4) for share in COVERAGES],
            }
            for name, each in scores.items()
        ],
        "decisions": decisions(values["head"], float(head.config.threshold), right),
    }
    print(*(f"{way['name']}: {way}" for way in document["ways"]), document["decisions"], sep="\n")
    if arguments.output:
        save(document, arguments.output)


if __name__ == "__main__":
    main()
