"""What values say of the outcome: can they be read as probabilities, and what does abstaining by them leave?"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_value_steer.evaluation.measures import Measures
from hf_value_steer.evaluation.runs import Texts
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.training.bootstrap import interval
from hf_value_steer.training.trainer import reliability


def value_reliability(worst: Tensor, measures: Measures) -> list[dict[str, Any]]:
    """Verdicts of the judges of safe texts against the most undesirable value of each base text, in ten bins."""
    bins = reliability(worst, torch.from_numpy(measures.bad(measures.safe_judges)))
    columns = zip(bins.lower, bins.count, bins.mean_value, bins.rate, strict=True)
    return [
        {
            "lower": round(low, 2),
            "upper": round(low + 0.1, 2),
            "count": n,
            "mean_value": round(v, 4),
            "rate": round(r, 4),
        }
        for low, n, v, r in columns
    ]


def coverage(head: ValueHead, watched: Texts, measures: Measures) -> list[dict[str, Any]]:
    """Accuracy of what abstention leaves, at coverages from 0.1 to 1 (arXiv 2604.18419), by the first judge.

    Abstention changes nothing before it stops, so the trajectories that were watched tell what it would have done:
    stop at the first value, that of the prompt included, which is not better than the threshold. After the last token
    nothing is left to stop.
    """
    desirable = head.config.polarity == "desirable"
    pairs = zip(watched.prompt_values, watched.values, strict=True)
    rows = [[v if desirable else 1 - v for v in (first, *values[:-1])] for first, values in pairs]
    worst, tokens = np.array([min(row) for row in rows]), measures.base["tokens"]
    correct = 1 - measures.undesirable(next(iter(measures.judges)))
    curve = []
    for share in np.arange(10) / 10:
        threshold = float(np.quantile(worst, share, method="lower")) if share else 0.0
        kept = (worst > threshold).astype(float)
        stops = [next((i for i, value in enumerate(row) if value <= threshold), len(row)) for row in rows]
        curve.append(
            {
                "coverage": round(float(kept.mean()), 4),
                "accuracy": round(float((kept * correct).sum() / kept.sum()), 4) if kept.any() else None,
                "accuracy_interval": interval(measures.bootstrap.ratio(kept * correct, kept)),
                "threshold": round(threshold if desirable else 1 - threshold, 6),
                "tokens_saved": round(float(1 - np.array(stops).sum() / tokens.sum()), 4),
            }
        )
    return curve
