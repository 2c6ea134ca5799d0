"""Whether values know more than chance: how well they tell texts apart, and how sure that is from so few of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


CHANCE = 0.5  # the AUROC of values that know nothing
_Z = 1.6448536269514722  # the normal quantile of a one-sided 95 %
_AUROC, _INTERVAL, _POSITIVE, _NEGATIVE = METRICS = (
    "text_auroc", "text_interval", "positive_texts", "negative_texts"
)  # fmt: skip


@dataclass(frozen=True)
class Discrimination:
    """How well the values of texts tell those with an attribute from those without.

    Args:
        positive, negative (`int`): how many texts there are of either class.
        auroc (`float`, *optional*): in [0, 1]; none where one class is empty.
        lower (`float`): what it is above, with 95 % confidence.
    """

    positive: int
    negative: int
    auroc: float | None = None
    lower: float = 0.0

    def metrics(self) -> dict[str, Any]:
        """The AUROC with its one-sided 95 % interval, if there is one, and the counts, under names of `METRICS`."""
        counts = {_POSITIVE: self.positive, _NEGATIVE: self.negative}
        if self.auroc is None:
            return counts
        return {_AUROC: round(self.auroc, 4), _INTERVAL: [round(self.lower, 4), 1.0], **counts}


def discrimination(
    values: npt.NDArray[np.floating], positive: npt.NDArray[np.bool_], prompts: npt.NDArray[np.integer]
) -> Discrimination:
    """AUROC of texts, with a bound that holds for few of them, too, also where they are told apart without an error.

    The bound is the score interval of Newcombe (Statistics in Medicine 25:559, 2006) over the variance of Hanley and
    McNeil (1982), times how much more alike texts of one prompt are than others.

    Args:
        values (`np.ndarray` of shape `(texts,)`): one of each text.
        positive (`np.ndarray` of shape `(texts,)`): whether it has the attribute.
        prompts (`np.ndarray` of shape `(texts,)`): which prompt it continues.
    """
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return Discrimination(count, others)
    _, place, ties = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (ties.cumsum() - (ties - 1) / 2)[place]
    auroc = float(ranks[positive].sum() - count * (count + 1) / 2) / (count * others)
    lower = _lower_bound(auroc, count, others, _design_effect(ranks, positive, prompts))
    return Discrimination(count, others, auroc, lower)


def can_be_told(positive: int, negative: int) -> bool:
    """Whether so many texts of either class are enough to tell a head without an error from chance."""
    return positive > 0 and negative > 0 and _lower_bound(1.0, positive, negative, 1.0) > CHANCE


def at_chance(metrics: Mapping[str, Any]) -> list[str]:
    """Which values the metrics of a head do not show to be better than chance: `""`, or `"_name"` of an attribute."""
    intervals = {name: bounds for name, bounds in metrics.items() if name.startswith(_INTERVAL)}
    return [
        name.removeprefix(_INTERVAL) for name, bounds in intervals.items() if bounds is None or bounds[0] <= CHANCE
    ]


def chance_report(training: Mapping[str, Any] | None) -> str:
    """What the record of a head's training says of values at chance; nothing if it says nothing of that kind."""
    metrics = (training or {}).get("metrics") or {}
    return "; ".join(_said(metrics, suffix) for suffix in at_chance(metrics))


def _said(metrics: Mapping[str, Any], suffix: str) -> str:
    auroc, interval, positive, negative = (metrics[f"{name}{suffix}"] for name in METRICS)
    found = f"{auroc:.2f} (one-sided 95 % interval [{interval[0]:.2f}, 1])" if interval else "unknown"
    about = f"attribute {suffix[1:]}, " if suffix else ""
    return f"{about}AUROC {found} of {positive} validation texts that its judge scores above 0.5 and {negative} others"


def _lower_bound(auroc: float, positive: int, negative: int, effect: float) -> float:
    """The smallest AUROC from which the one that was found is not further away than chance allows."""
    low, high = 0.0, auroc
    for _ in range(40):
        middle = (low + high) / 2
        far = auroc - middle > _Z * math.sqrt(effect * _variance(middle, positive, negative))
        low, high = (middle, high) if far else (low, middle)
    return low


def _variance(auroc: float, positive: int, negative: int) -> float:
    """Of an AUROC, for exponential scores (Hanley and McNeil 1982)."""
    of_positive = (positive - 1) * (1 - auroc) / (2 - auroc)
    of_negative = (negative - 1) * auroc / (1 + auroc)
    return auroc * (1 - auroc) * (1 + of_positive + of_negative) / (positive * negative)


def _design_effect(
    ranks: npt.NDArray[np.floating], positive: npt.NDArray[np.bool_], prompts: npt.NDArray[np.integer]
) -> float:
    """How many times the variance is that of as many independent texts; at least 1."""
    pull = np.empty(len(ranks))  # of each text on the AUROC
    for chosen, sign in ((positive, 1), (~positive, -1)):
        pull[chosen] = sign * (ranks[chosen] - ranks[chosen].mean()) / chosen.sum()
    found, owner = np.unique(prompts, return_inverse=True)
    alone, together = np.square(pull).sum(), np.square(np.bincount(owner, weights=pull)).sum()
    return max(1.0, float(together / alone)) if alone else len(ranks) / len(found)
