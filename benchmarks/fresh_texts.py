"""Does the shipped toxicity head keep what its alpha promises, on fresh texts of prompts with no other use?

    hf-value-steer run examples/recipes/smollm2-toxicity.yaml
    python -m benchmarks.fresh_texts --output benchmarks/results/fresh-texts.json

One text for each of 640 openings of film reviews, of the part that no head and no threshold has seen. For each alpha:
the share of the safe ones (by the judge that gave the labels) that the filter would touch, its one-sided upper 95 %
bound (Clopper-Pearson), and the p-value of the exact binomial test that the share is no more than alpha.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from benchmarks.environment import command, describe, save
from examples.sentiment import openings
from hf_value_steer import ValueHead
from hf_value_steer.files.marked import read_marked
from hf_value_steer.recipe.sections import Steps
from hf_value_steer.training.calibrate import row_values
from hf_value_steer.training.collect import collect
from hf_value_steer.training.label import Labels


RECIPE = Path("examples/recipes/smollm2-toxicity.yaml")
ALPHAS, OPENINGS = (0.01, 0.02, 0.05, 0.1, 0.2), 640


def fresh_openings() -> list[str]:
    """Openings of the reviews that only a sentiment judge knows."""
    known = {*openings("train"), *openings("eval")}
    return [opening for opening in openings("other judge") if opening not in known][:OPENINGS]


def kept(alpha: float, threshold: float, touched: int, texts: int) -> dict[str, Any]:
    """What became of a promise."""
    test = binomtest(touched, texts, alpha, alternative="greater")
    upper = binomtest(touched, texts, alpha, alternative="less").proportion_ci(0.95, method="exact").high
    return {
        "alpha": alpha,
        "threshold": threshold,
        "touched": touched,
        "share": round(touched / texts, 4),
        "upper_bound": round(float(upper), 4),
        "p_value": round(float(test.pvalue), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    steps = Steps(read_marked(RECIPE))
    assert steps.train is not None and steps.fresh is not None
    head = ValueHead.from_pretrained(steps.train.output)
    assert head.calibration is not None
    layers = list(head.config.feature_layers or ("final",))
    asked = replace(
        steps.fresh,
        prompts="python:benchmarks.fresh_texts:fresh_openings",
        output=str(Path(steps.train.output).parent / "fresh"),
        feature_layers=layers,
    )
    fresh = collect(asked, replace(steps.label, prefixes=False))
    safe = (Labels(fresh, str(steps.train.judge)).responses() <= 0.5).nonzero().flatten().tolist()
    worst = row_values(fresh, head, safe, "filter").worst.numpy()
    promised = {alpha: head.calibration.promised_threshold(alpha) for alpha in ALPHAS}
    document = {
        "command": command(),
        **describe(),
        "head": head.fingerprint(),
        "calibration_texts": head.calibration.n,
        "safe_texts": len(safe),
        "promises": [kept(alpha, each, int((worst >= each).sum()), len(safe)) for alpha, each in promised.items()],
    }
    print(*document["promises"], sep="\n")
    if arguments.output:
        save(document, arguments.output)


if __name__ == "__main__":
    main()
