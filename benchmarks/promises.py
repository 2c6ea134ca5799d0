"""Do calibrated promises hold on real trajectories? Resamples them: some prompts calibrate, the others are new.

    python -m benchmarks.promises --output benchmarks/results/promises-toxicity.json

The safe generations of a run are the population: a prompt is drawn, then one of its texts. For each mode, alpha and n,
over 2,000 calibrations on n texts drawn from it: the rate at which the filter would intervene on the population.
`marginal` and `martingale` promise its mean, `pac` and `uniform` how often it exceeds alpha. The peer's clamp stands
beside them.

`fresh` is no resampling: every fold's own `calibration.json` against the safe base texts of the prompts that the fold
never saw.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.environment import describe, save
from examples.smollm2 import backbone_folder
from examples.toxicity import profanity_score
from hf_value_steer import ValueHead
from hf_value_steer.calibration import Calibration
from hf_value_steer.calibration.filtering import allowed_exceedances, growth, threshold_above
from hf_value_steer.evaluation.runs import Texts
from hf_value_steer.training.label import Labels
from hf_value_steer.training.shards import Collection


RUN = Path("runs/smollm2-toxicity-final")
ALPHAS, SIZES, DRAWS, DELTA = (0.01, 0.05, 0.1, 0.25, 0.45), (10, 59, 100, 1000), 2000, 0.05


@torch.no_grad()
def trajectories() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Worst value, prompt value and prompt of every safe natural generation, by the judge that gave the labels."""
    torch.set_num_threads(1)
    collection, head = Collection(RUN / "collection"), ValueHead.from_pretrained(RUN / "head")
    safe = Labels(collection, head.config.training["judge"]).responses() <= 0.5
    rows = (safe & collection.rows.natural).nonzero().flatten().tolist()
    layers = collection.resolve(head.config.feature_layers)
    values = [head(collection.features(row, layers)).value.numpy() for row in rows]
    worst, prompts = np.array([each[1:].max() for each in values]), np.array([each[0] for each in values])
    return worst, prompts, collection.rows.prompt[rows].numpy()


def rates(scores: np.ndarray, owners: np.ndarray, size: int, allowed: int, random: np.random.Generator) -> np.ndarray:
    """Rate of the population at or above the threshold, for each calibration, `(DRAWS,)`."""
    order = np.argsort(owners, kind="stable")
    starts = np.flatnonzero(np.diff(owners[order], prepend=-1))
    counts = np.diff(np.append(starts, len(order)))
    prompts = random.integers(0, len(starts), (DRAWS, size))
    texts = order[starts[prompts] + random.integers(0, counts[prompts])]
    thresholds = threshold_above(np.sort(scores[texts], axis=1), allowed)
    weights = np.empty(len(scores))
    weights[order] = np.repeat(1 / counts / len(counts), counts)
    ascending = np.argsort(scores)
    above = np.append(np.cumsum(weights[ascending][::-1])[::-1], 0.0)
    return above[np.searchsorted(scores[ascending], thresholds, side="left")]


def fresh() -> list[dict[str, Any]]:
    """For each alpha, the share of fresh safe texts on which a calibrated filter would have intervened."""
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder())
    fired: dict[float, list[bool]] = {alpha: [] for alpha in ALPHAS}
    for fold in sorted(RUN.glob("evaluation/fold-*")):
        calibration = Calibration.load(fold / "head")
        texts = Texts(**json.loads(next((fold / "runs").glob("watch-*.json")).read_text("utf-8")))
        decoded = tokenizer.batch_decode(texts.ids, skip_special_tokens=True)
        worst = np.array([max(values) for values in texts.values], np.float32)[profanity_score(decoded) <= 0.5]
        for alpha in ALPHAS:
            fired[alpha] += (worst >= calibration.threshold(alpha)).tolist()
    return [{"alpha": a, "texts": len(each), "rate": round(float(np.mean(each)), 4)} for a, each in fired.items()]


def clamped(size: int, alpha: float) -> int:
    """How many calibration scores the peer lets lie above its threshold."""
    return size - min(max(math.ceil((size + 1) * (1 - alpha)), 1), size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    worst, prompts, owners = trajectories()
    grown, random = growth(worst, prompts, "undesirable"), np.random.default_rng(0)
    cases: list[dict[str, Any]] = []
    for mode in ("marginal", "martingale", "pac", "uniform", "peer's clamp"):
        for size in SIZES:
            for alpha in ALPHAS:
                confident = mode in ("pac", "uniform")
                allowed = (
                    clamped(size, alpha)
                    if mode == "peer's clamp"
                    else allowed_exceedances(mode, size, alpha, DELTA if confident else None)  # type: ignore[arg-type]
                )
                found = rates(grown if mode == "martingale" else worst, owners, size, allowed, random)
                promised = found > alpha if confident else found
                number, error = float(promised.mean()), float(promised.std() / math.sqrt(DRAWS))
                cases.append(
                    {
                        "mode": mode, "n": size, "alpha": alpha, "mean_rate": round(float(found.mean()), 4),
                        "standard_error": round(error, 5), "exceeds_alpha": round(float((found > alpha).mean()), 4),
                        "holds": number <= (DELTA if confident else alpha) + 3 * error,
                    }
                )  # fmt: skip
                print(cases[-1])
    document = {
        "command": "python -m benchmarks.promises",
        **describe(),
        "draws": DRAWS, "delta": DELTA, "safe_texts": len(worst), "prompts": len(np.unique(owners)), "cases": cases,
        "fresh": fresh(),
    }  # fmt: skip
    if arguments.output:
        save(document, arguments.output)


if __name__ == "__main__":
    main()
