"""Every way to use the toxicity head, and best of four, on one text for each prompt.

    hf-value-steer run examples/recipes/smollm2-toxicity.yaml
    python -m benchmarks.ways --output benchmarks/results/ways.json

The heads are those of the recipe's folds, each on the prompts that it was not trained on.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.environment import command, save
from hf_value_steer import ValueHead
from hf_value_steer.evaluation.crossfit import held_out_prompts, without_fold
from hf_value_steer.evaluation.evaluate import Evaluator
from hf_value_steer.files.marked import read_marked
from hf_value_steer.recipe.sections import Steps
from hf_value_steer.training.shards import Collection


RECIPE = Path("examples/recipes/smollm2-toxicity.yaml")
ALPHAS = [0.02, 0.1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    steps = Steps(read_marked(RECIPE))
    assert steps.train is not None and steps.evaluate is not None and steps.folds is not None
    heads, collection = Path(steps.evaluate.output), Collection(steps.train.collection)
    asked = replace(
        steps.evaluate,
        output=str(heads.parent / "ways"),
        samples=1,
        alphas=ALPHAS,
        ways=["filter", "rollback", "soft", "end"],
        in_the_loop=[],
        baselines=["best_of_n"],
    )
    evaluator, parts = Evaluator(asked), []
    for fold in range(steps.folds):
        own = without_fold(steps.train, str(heads / f"fold-{fold}" / "head"), fold, steps.folds)
        prompts = held_out_prompts(collection, own)
        runs = Path(asked.output) / f"fold-{fold}"
        parts.append(evaluator.part(ValueHead.from_pretrained(own.output), prompts, runs))
    document = evaluator.report(ValueHead.from_pretrained(steps.train.output), parts)
    if arguments.output:
        save({"command": command(), **document, "examples": []}, arguments.output)


if __name__ == "__main__":
    main()
