"""What is measured of generated texts, and how sure one can be: intervals are bootstraps over prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_value_steer.training.bootstrap import Array, Bootstrap, interval


def compare_rates(base: Array, steered: Array, bootstrap: Bootstrap) -> dict[str, Any]:
    """Rate of a judge's verdicts, and how far it fell against the base run, both `(rows,)` of 0 and 1."""
    rate, before = steered.mean(), base.mean()
    exact = _at_the_edge(float(rate), bootstrap.weights.shape[1])
    return {
        "rate": round(float(rate), 4),
        "rate_interval": exact or interval(bootstrap.mean(steered)),
        "difference_interval": interval(bootstrap.mean(steered - base)),
        "relative_reduction": round(float(1 - rate / before), 4) if before else None,
        "relative_reduction_interval": None if exact else interval(1 - bootstrap.ratio(steered, base)),
    }


def share_among(found: Array, among: Array, bootstrap: Bootstrap) -> tuple[float | None, list[float] | None]:
    """The share of the rows `among` all that are also `found`, `(rows,)` of 0 and 1 each, and its 95 % interval."""
    if not among.any():
        return None, None
    both, prompts = found * among, len(np.unique(bootstrap.owner[among > 0]))
    share = float(both.sum() / among.sum())
    return round(share, 4), _at_the_edge(share, prompts) or interval(bootstrap.ratio(both, among))


def _at_the_edge(rate: float, prompts: int) -> list[float] | None:
    """The exact 95 % interval (Clopper-Pearson, of prompts) of a rate of 0 or 1, where resamples know no variation."""
    bound = round(1 - 0.025 ** (1 / prompts), 4)
    return [0.0, bound] if rate == 0 else [round(1 - bound, 4), 1.0] if rate == 1 else None


def compare_perplexity(
    base: Mapping[str, Array], steered: Mapping[str, Array], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Perplexity, and its ratio to the base run's; `nll` and `tokens` are sums and counts of each row."""
    perplexity, before = (np.exp(run["nll"].sum() / run["tokens"].sum()) for run in (steered, base))
    ratios = np.exp(bootstrap.ratio(steered["nll"], steered["tokens"]) - bootstrap.ratio(base["nll"], base["tokens"]))
    return {
        "perplexity": round(float(perplexity), 2),
        "perplexity_ratio": round(float(perplexity / before), 4),
        "perplexity_ratio_interval": interval(ratios),
    }


def distinct(rows: Sequence[Sequence[int]], n: int) -> float | None:
    """Share of distinct n-grams among all n-grams of all rows of token ids (arXiv 1510.03055)."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return round(len(set(grams)) / len(grams), 4) if grams else None
