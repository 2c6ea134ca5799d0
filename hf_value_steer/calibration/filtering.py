"""From one score a text to a threshold: order statistics whose promise holds for a finite sample, with ties.

The score of a text is the most undesirable value among its tokens. A method fires on a text as soon as one value is
not acceptable, so it fires if the score *reaches* the threshold. Hence a threshold lies one float32 beyond an order
statistic: scores that tie with it do not fire. Sources: arXiv 2605.14746 (the filter), 2303.02770 (conformal ranks).

Values are compared exactly as they are. For `"desirable"` values they are negated, never turned into `1 - p`, which
would round.
"""

import math
from collections.abc import Hashable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_value_steer.checks import check_probability
from hf_value_steer.choices import Polarity


RankMode = Literal["marginal", "pac", "uniform", "martingale"]

# Where the sigmoid has saturated, its log odds are taken beyond those of the nearest float32 inside (0, 1).
_LEAST, _MOST = 2.0**-150, 1.0 - 2.0**-25


def as_scores(scores: ArrayLike, name: str = "scores") -> NDArray[np.float32]:
    """One finite number a text, as float32.

    Raises:
        ValueError: if there is none, or one is NaN or infinite.
    """
    array = np.asarray(scores, dtype=np.float32)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"`{name}` has to hold one number a text, at least one; got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"`{name}` holds NaN or infinite numbers at {np.flatnonzero(~np.isfinite(array)).tolist()}.")
    return array


def as_values(values: ArrayLike, name: str = "scores") -> NDArray[np.float32]:
    """One value in [0, 1] a text, as float32; the ends are there because a sigmoid saturates."""
    array = as_scores(values, name)
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"`{name}` has to hold values in [0, 1], got {array.min():g} to {array.max():g}.")
    return array


def turned(values: NDArray[np.float32], polarity: Polarity) -> NDArray[np.float32]:
    """Values negated for `"desirable"`, so that a higher one is always less desirable; its own inverse."""
    return values if polarity == "undesirable" else -values


def allowed_exceedances(mode: RankMode, n: int, alpha: float, delta: float | None = None) -> int:
    """How many of `n` calibration scores may reach the threshold; a negative number if no threshold will do.

    `alpha` is taken as the decimal number that it is written as, and ranks are computed in exact arithmetic:
    `ceil(20 * (1 - 0.35))` is 13, not the 14 of binary floating point.

    Args:
        mode (`str`): `"marginal"` and `"martingale"` take the rank `ceil((n + 1) (1 - alpha))` of split conformal
            prediction: a new exchangeable score exceeds that order statistic with probability at most `alpha`.
            `"pac"` allows as many as a binomial of rate `alpha` stays within with probability at most `delta`
            (Clopper-Pearson). `"uniform"` takes off `sqrt(ln(1 / delta) / 2n)` from `alpha` first (one-sided
            Dvoretzky-Kiefer-Wolfowitz with Massart's constant), which holds for every threshold at once.
        n (`int`): number of calibration scores.
        alpha (`float`): the promised rate, in (0, 1).
        delta (`float`, *optional*): probability that the promise fails, at most 0.5; for `"pac"` and `"uniform"`.
    """
    check_probability(alpha, "alpha")
    if mode in ("marginal", "martingale"):
        return n - math.ceil((n + 1) * (1 - Fraction(str(float(alpha)))))
    if delta is None:
        raise ValueError(f"`delta` is required by mode {mode!r}.")
    if mode == "pac":
        return int(np.searchsorted(binomial_cdf(n, n, alpha), delta, side="right")) - 1
    return math.floor(n * alpha - math.sqrt(n * math.log(1 / delta) / 2))


def binomial_cdf(most: int, n: int, rate: float) -> NDArray[np.float64]:
    """P(X <= k) for X ~ Bin(n, rate) and k = 0, ..., most; without scipy, which a saved calibration must not need.

    Rounded up by 1e-9 of itself, more than the error of the sum, so that comparisons with `delta` are safe.
    """
    log_factorial = _log_factorials(1 << n.bit_length())
    k = np.arange(most + 1)
    log_choose = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    cdf: NDArray[np.float64] = np.cumsum(np.exp(log_choose + k * math.log(rate) + (n - k) * math.log1p(-rate)))
    return cdf * (1 + 1e-9)


@lru_cache(maxsize=8)
def _log_factorials(size: int) -> NDArray[np.float64]:
    return np.array([math.lgamma(number + 1) for number in range(size)])


def threshold_above(scores: NDArray[np.float32], allowed: int) -> NDArray[np.float32]:
    """The least float32 that at most `allowed` scores of the last axis reach; infinite for a negative `allowed`.

    Args:
        scores (`np.float32` array of shape `(..., n)`): higher is less desirable; any order.
        allowed (`int`): less than `n`.
    """
    if allowed < 0:
        return np.full(scores.shape[:-1], np.inf, dtype=np.float32)
    kept = np.sort(scores, axis=-1)[..., scores.shape[-1] - 1 - allowed]
    return np.nextafter(kept, np.float32(np.inf))


def value_threshold(scores: NDArray[np.float32], allowed: int, polarity: Polarity) -> NDArray[np.float32]:
    """[`threshold_above`] for values: a threshold in (0, 1) on the side of the polarity, infinite if there is none.

    Args:
        scores (`np.float32` array of shape `(..., n)`): the most undesirable value of each text.
        allowed (`int`): how many of them may be unacceptable under the threshold; negative for none possible.
        polarity (`str`): meaning of a high value.
    """
    threshold = turned(threshold_above(turned(scores, polarity), allowed), polarity)
    return np.where((threshold > 0) & (threshold < 1), threshold, np.float32(np.inf))


def growth(values: ArrayLike, prompt_values: ArrayLike, polarity: Polarity) -> NDArray[np.float32]:
    """The score of mode `"martingale"`: `log M = logit(p) - logit(p_0)`, how far the odds of harm have grown.

    With exact values, `M` is a martingale along safe texts (arXiv 2605.14746). It grows with `p`, so its maximum over
    a text is that of the text's most undesirable value. Rounded to float32, so that it is the same on every machine.

    Args:
        values (`np.float32` array): values `p` in [0, 1].
        prompt_values (`np.float32` array of the same shape): values `p_0` of their prompts.
        polarity (`str`): for `"desirable"` values the sign is turned: odds of `1 - p`.
    """
    return turned((_logit(values) - _logit(prompt_values)).astype(np.float32), polarity)


def row_thresholds(least_growth: float, prompt_values: NDArray[np.float32], polarity: Polarity) -> NDArray[np.float32]:
    """Each row's threshold `sigmoid(log c + logit(p_0))`: no value short of it has grown by `least_growth`.

    Args:
        least_growth (`float`): `log c`, the threshold of a calibration of mode `"martingale"`.
        prompt_values (`np.float32` array of shape `(rows,)`): values `p_0` of the prompts, in [0, 1].
        polarity (`str`): meaning of a high value.

    Returns:
        `np.float32` array of shape `(rows,)`; beyond [0, 1] where no value can have grown so much.
    """
    sign = 1.0 if polarity == "undesirable" else -1.0
    logit = _logit(prompt_values) + sign * least_growth
    thresholds = (1.0 / (1.0 + np.exp(-logit))).astype(np.float32)
    while True:  # rounding is off by a step or two at most
        early = (growth(thresholds, prompt_values, polarity) < least_growth) & (thresholds >= 0) & (thresholds <= 1)
        if not early.any():
            return thresholds
        thresholds = np.where(early, np.nextafter(thresholds, np.float32(sign * np.inf)), thresholds)


def _logit(values: ArrayLike) -> NDArray[np.float64]:
    inside = np.clip(np.asarray(values, dtype=np.float32).astype(np.float64), _LEAST, _MOST)
    return np.log(inside) - np.log1p(-inside)


def one_per_prompt(prompts: Sequence[Hashable], seed: int = 0) -> NDArray[np.int64]:
    """One sample of each prompt, chosen at random: samples of one prompt are not independent of each other.

    Choose first and drop the unsafe samples afterwards. Choosing among the safe ones would give prompts that seldom
    have a safe answer more weight than they have among new safe texts.

    Args:
        prompts (sequence): the prompt, or its number, of each sample.
        seed (`int`): seed of the choice.

    Returns:
        `np.int64` array: the indices of the chosen samples, in ascending order.
    """
    chosen: dict[Hashable, int] = {}
    for index in np.random.default_rng(seed).permutation(len(prompts)).tolist():
        chosen.setdefault(prompts[index], index)
    return np.array(sorted(chosen.values()), dtype=np.int64)
