"""Bootstraps over prompts: how sure one can be of what was measured on texts that continue them."""

from typing import Any

import numpy as np
import numpy.typing as npt


Array = npt.NDArray[Any]
DRAWS = 2000


class Bootstrap:
    """Resamples of the prompts; all rows of a prompt stay together.

    Args:
        prompts (`np.ndarray` of shape `(rows,)`): prompt of each row.
    """

    def __init__(self, prompts: Array):
        random = np.random.default_rng(0)
        unique, self.owner = np.unique(prompts, return_inverse=True)
        count = len(unique)
        drawn = random.integers(0, count, (DRAWS, count))
        # How often each prompt was drawn, (draws, prompts): sums over rows become products with this matrix.
        self.weights = np.stack([np.bincount(row, minlength=count) for row in drawn])

    def sums(self, numbers: Array) -> Array:
        """Sum of `(rows,)` over each resample, `(draws,)`."""
        by_prompt = np.bincount(self.owner, weights=numbers, minlength=self.weights.shape[1])
        return self.weights @ by_prompt

    def ratio(self, numerator: Array, denominator: Array) -> Array:
        """Ratio of two sums over each resample, `(draws,)`; NaN where the second is 0."""
        below = self.sums(denominator)
        quotient: Array = np.divide(self.sums(numerator), below, out=np.full(DRAWS, np.nan), where=below != 0)
        return quotient

    def mean(self, numbers: Array) -> Array:
        """Mean of `(rows,)` over each resample, `(draws,)`."""
        return self.ratio(numbers, np.ones_like(numbers, dtype=float))

    def auroc(self, values: Array, positive: Array) -> tuple[float, Array]:
        """AUROC of all rows, and over each resample, `(draws,)`; NaN where one class is empty.

        Args:
            values (`np.ndarray` of shape `(rows,)`): one of each row.
            positive (`np.ndarray` of shape `(rows,)`): whether it should be high.
        """
        count = self.weights.shape[1]
        above, owner = values[positive], self.owner[positive]
        wins = np.empty((count, count))  # of positive rows of one prompt over negative rows of another
        for prompt in range(count):
            below = np.sort(values[~positive & (self.owner == prompt)])
            places = np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")
            wins[:, prompt] = np.bincount(owner, weights=places / 2, minlength=count)
        pairs = self.sums(positive) * self.sums(~positive)
        won = ((self.weights @ wins) * self.weights).sum(axis=1)
        draws = np.divide(won, pairs, out=np.full(DRAWS, np.nan), where=pairs != 0)
        return float(wins.sum() / max(positive.sum() * (~positive).sum(), 1)), draws


def interval(draws: Array) -> list[float] | None:
    """The central 95 % of resamples; `None` if none could be computed."""
    if np.isnan(draws).all():
        return None
    return [round(float(bound), 4) for bound in np.nanquantile(draws, [0.025, 0.975])]
