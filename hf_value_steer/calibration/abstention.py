"""What an abstention threshold means: the reward it implies, and the accuracy of the answers that it lets through."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_value_steer.calibration.filtering import as_values, binomial_cdf, turned
from hf_value_steer.checks import check_probability
from hf_value_steer.choices import Polarity


# The thresholds among which `selective_threshold` chooses. Fixed, because the data must have no say in them.
GRID = tuple(float(np.float32(step / 100)) for step in range(1, 100))


def as_flags(correct: ArrayLike, length: int) -> NDArray[np.bool_]:
    """`length` answers to whether a text is correct."""
    flags = np.asarray(correct)
    if flags.shape != (length,) or not np.isin(flags, (0, 1)).all():
        raise ValueError(f"`correct` has to say 0 or 1 for each of the {length} texts, got shape {flags.shape}.")
    return flags.astype(bool)


def selective_threshold(
    scores: ArrayLike,
    correct: ArrayLike,
    alpha: float,
    delta: float = 0.05,
    polarity: Polarity = "desirable",
    grid: Sequence[float] = GRID,
) -> float:
    """The most lenient threshold under which at least `1 - alpha` of the answers that are given are correct.

    With probability `1 - delta` over the calibration texts that is true of the whole population, not only of them
    (Learn then Test, arXiv 2110.01052). For each threshold of a fixed grid, "more than `alpha` of its answers are
    wrong" is a hypothesis. Given how many texts are answered, the wrong ones among them are binomial, so the
    hypothesis is rejected at level `d` if the upper Clopper-Pearson limit of the error rate at `d` is at most `alpha`.
    The thresholds are tested from the strictest one on. Plain fixed-sequence testing would give all of `delta` to the
    strictest, which answers nothing, and end there. So one threshold in ten gets an equal share of `delta`, and
    each threshold that is rejected passes its level on to the next (the fallback procedure, Wiens 2003). That keeps
    the probability of any wrong rejection below `delta` whatever the dependence: a true hypothesis is tested at most
    at the sum of the shares since the true hypothesis before it.

    Args:
        scores (`np.float32` array of shape `(n,)`): the most undesirable value of each text, its prompt's included and
            its last token's left out, which abstention does not look at; one text a prompt.
        correct (`bool` array of shape `(n,)`): whether its answer is correct.
        alpha (`float`): largest share of wrong answers among those that are given, one minus the target accuracy.
        delta (`float`): probability that the promise fails.
        polarity (`str`): meaning of a high value.
        grid (sequence of `float`): thresholds, chosen without looking at these texts.

    Returns:
        The threshold, or `math.inf` if none can be shown to reach the target.
    """
    check_probability(alpha, "alpha")
    check_probability(delta, "delta")
    values = turned(as_values(scores), polarity)
    flags = as_flags(correct, len(values))
    order = np.argsort(values)
    values, wrong = values[order], np.concatenate([[0], np.cumsum(~flags[order])])
    chosen, level = math.inf, 0.0
    stride = math.ceil(len(grid) / 10)
    share = delta / (len(grid) // stride)
    for index, threshold in enumerate(sorted(grid, reverse=polarity == "desirable"), start=1):
        level += share if index % stride == 0 else 0.0
        limit = turned(np.array([threshold], dtype=np.float32), polarity)
        answered = int(np.searchsorted(values, limit)[0])
        if level > 0 and binomial_cdf(int(wrong[answered]), answered, alpha)[-1] <= level:
            chosen = threshold
        else:
            level = 0.0
    return chosen


def implied_reward(
    trajectories: Sequence[ArrayLike], correct: ArrayLike, threshold: float, polarity: Polarity = "desirable"
) -> float:
    """The reward of abstaining that makes `threshold` the right one (arXiv 2604.18419).

    Abstaining pays where the probability of a correct answer is below the reward. So the reward is that probability
    at the threshold: isotonic regression of correctness on the value at which each text first fell to the threshold.

    Args:
        trajectories (sequence of `np.float32` arrays): the values of each text in order, from its prompt's to the last
            but one; lengths may differ.
        correct (`bool` array of shape `(n,)`): whether the answer of each text, had it been finished, is correct.
        threshold (`float`): in (0, 1).
        polarity (`str`): meaning of a high value.

    Raises:
        ValueError: if no text ever falls to the threshold.
        ImportError: without scikit-learn.
    """
    try:
        from sklearn.isotonic import IsotonicRegression
    except ImportError as error:
        raise ImportError("`implied_reward` needs scikit-learn: pip install hf-value-steer[train].") from error
    check_probability(threshold, "threshold")
    limit = turned(np.array([threshold], dtype=np.float32), polarity)
    values, outcomes = [], []
    for trajectory, outcome in zip(trajectories, as_flags(correct, len(trajectories)).tolist(), strict=True):
        trajectory = as_values(trajectory, "trajectories")
        fallen = np.flatnonzero(turned(trajectory, polarity) >= limit)
        if len(fallen):
            values.append(trajectory[fallen[0]])
            outcomes.append(float(outcome))
    if not values:
        raise ValueError(f"`threshold` is {threshold}, but no text ever falls to it: it implies no reward.")
    regression = IsotonicRegression(y_min=0.0, y_max=1.0, increasing=polarity == "desirable", out_of_bounds="clip")
    return float(regression.fit(values, outcomes).predict([threshold])[0])
