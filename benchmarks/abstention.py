"""Is abstention by the arithmetic head worth it? On unseen problems, against a table that knows no model.

    python -m benchmarks.abstention --output benchmarks/results/abstention-arithmetic.json

Reads what `hf-value-steer run examples/recipes/smollm2-arithmetic.yaml` left. The table answers the problems whose
operator and number of digits went best among the training problems, all of them. Intervals are 95 % bootstraps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks.environment import describe, save
from examples.arithmetic import accuracy_at_coverage, accuracy_table, cell, correct, eval_problems
from examples.smollm2 import backbone_folder
from hf_value_steer import ValueHead
from hf_value_steer.evaluation.runs import Texts
from hf_value_steer.training.bootstrap import interval
from hf_value_steer.training.label import Labels
from hf_value_steer.training.prompts import load_prompts
from hf_value_steer.training.shards import Collection


RUN = Path("runs/smollm2-arithmetic")
COVERAGES, DRAWS, JUDGE = (0.1, 0.2, 0.3, 0.5), 2000, "python:examples.arithmetic:correct"


def promises(head: ValueHead, worst: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """Each promise of the selective calibration that there is, and what became of it."""
    kept = []
    for point in head.calibration.curve:
        answered = worst > point["threshold"] if point["threshold"] else np.zeros(0)
        if answered.any():
            accuracy, share = right[answered].mean(), answered.mean()
            promised = round(1 - point["alpha"], 2)
            kept.append({"accuracy_promised": promised, "accuracy": round(accuracy, 4), "answered": round(share, 4)})
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    collection, head = Collection(RUN / "collection"), ValueHead.from_pretrained(RUN / "head")
    watched = Texts(**json.loads((RUN / "evaluation" / "runs" / "watch.json").read_text("utf-8")))
    problems = load_prompts("python:examples.arithmetic:eval_problems")
    assert len(problems) == len(eval_problems()) == len(watched.ids)
    texts = AutoTokenizer.from_pretrained(backbone_folder()).batch_decode(watched.ids, skip_special_tokens=True)
    right = correct(problems, texts)
    pairs = zip(watched.prompt_values, watched.values, strict=True)
    worst = np.array([min(first, *values[:-1]) for first, values in pairs])
    known = [collection.prompts[index] for index in collection.rows.prompt.tolist()]
    table = accuracy_table(known, Labels(collection, JUDGE).responses().tolist())
    scores = np.array([table[cell(problem.columns)] for problem in problems])
    random, draws = np.random.default_rng(0), []
    for _ in range(DRAWS):
        rows = random.integers(0, len(right), len(right))
        draws.append([accuracy_at_coverage(each[rows], right[rows], 0.2) for each in (worst, scores)])
        draws[-1].append(right[rows].mean())
    by_head, by_table, base = np.array(draws).T
    document = {
        "command": "python -m benchmarks.abstention",
        **describe(),
        "problems": len(right),
        "accuracy": round(right.mean(), 4),
        "at_coverage": [
            {
                "coverage": coverage,
                "head": round(accuracy_at_coverage(worst, right, coverage), 4),
                "table": round(accuracy_at_coverage(scores, right, coverage), 4),
            }
            for coverage in COVERAGES
        ],
        "head_to_base_at_0.2_interval": interval(by_head / base),
        "head_minus_table_at_0.2_interval": interval(by_head - by_table),
        "selective_promises": promises(head, worst, right),
    }
    print(json.dumps(document, indent=2))
    if arguments.output:
        save(document, arguments.output)


if __name__ == "__main__":
    main()
