"""Every promise of a calibration, over 2,000 repeated draws of the calibration set.

Draws come from a population of scores that is known, so the rate at which a threshold fires on new scores is known
exactly and only the draw of the calibration set is random. Two kinds of promise:

- on average: the mean rate over the draws is at most alpha. Its standard error is estimated from the draws, and the
  test allows `Z` of them.
- with confidence: the number of draws whose rate exceeds alpha is at most binomial with rate delta; the test allows
  its quantile at `TAIL`.

About 250 comparisons are made and `TAIL` is 1e-7, so that a correct implementation fails with probability below 3e-5.
That wrong ones fail is shown with them.
"""

import math
from functools import cache

import numpy as np
import pytest
from scipy.stats import binom, norm

from hf_value_steer.calibration import selective_threshold
from hf_value_steer.calibration.abstention import GRID
from hf_value_steer.calibration.filtering import (
    allowed_exceedances,
    binomial_cdf,
    growth,
    row_thresholds,
    threshold_above,
    value_threshold,
)


DRAWS, DELTA, TAIL = 2_000, 0.05, 1e-7
Z = norm.isf(TAIL)
ALPHAS, SIZES = (0.01, 0.05, 0.1, 0.25, 0.45), (10, 59, 100, 1000)


@cache
def trajectories():
    """Prompt values and the highest later value of 400,000 made-up safe texts: logits that wander, 12 steps each."""
    rng = np.random.default_rng(5)
    start = rng.normal(-2, 1.5, 400_000)
    steps = rng.normal(-0.2, 0.6, (12, len(start))) + rng.standard_t(2, len(start)) * 0.05
    highest = start + np.cumsum(steps, axis=0).max(axis=0)
    return tuple((1 / (1 + np.exp(-logit))).astype(np.float32) for logit in (start, highest))


def continuous(values):
    return values


def rounded(values):
    return values.round(2)


def saturated(values):
    """As from a sigmoid in float16 of logits that are six times too large: many 0 and 1."""
    values = values.astype(np.float64).clip(1e-7, 1 - 1e-7)
    logits = 6 * np.log(values / (1 - values))
    return (1 / (1 + np.exp(-logits))).astype(np.float16).astype(np.float32)


KINDS = (continuous, rounded, saturated)


@cache
def scores_of(kind):
    return np.sort(kind(trajectories()[1]))


def draw(population, n):
    return np.random.default_rng(n).choice(population, (DRAWS, n))


def firing_rate(population, thresholds):
    """How often a score of the population, in ascending order, reaches each threshold."""
    return 1 - np.searchsorted(population, thresholds, side="left") / len(population)


def mean_is_at_most(rates, alpha):
    return rates.mean() <= alpha + Z * rates.std() / math.sqrt(DRAWS)


def seldom(failures):
    return failures.sum() <= binom.isf(TAIL, len(failures), DELTA)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def population(request):
    return scores_of(request.param)


@pytest.mark.parametrize("n", SIZES)
def test_marginal(population, n):
    scores = draw(population, n)
    for alpha in ALPHAS:
        allowed = allowed_exceedances("marginal", n, alpha)
        rates = firing_rate(population, value_threshold(scores, allowed, "undesirable"))
        assert mean_is_at_most(rates, alpha)
        if alpha < 1 / (n + 1):
            assert not rates.any()


@pytest.mark.parametrize("n", SIZES)
def test_marginal_wastes_less_than_one_rank(n):
    population = scores_of(continuous)
    scores = draw(population, n)
    for alpha in ALPHAS:
        allowed = allowed_exceedances("marginal", n, alpha)
        rates = firing_rate(population, value_threshold(scores, allowed, "undesirable"))
        assert rates.mean() >= alpha - 1 / (n + 1) - Z * rates.std() / math.sqrt(DRAWS)


def test_desirable_values_mirror(population):
    mirrored = np.sort((1 - population).astype(np.float32))
    scores = draw(mirrored, 100)
    for alpha in ALPHAS:
        thresholds = value_threshold(scores, allowed_exceedances("marginal", 100, alpha), "desirable")
        finite = np.isfinite(thresholds)  # without a threshold nothing fires
        rates = np.where(finite, np.searchsorted(mirrored, thresholds, side="right") / len(mirrored), 0)
        assert mean_is_at_most(rates, alpha)


def peer_thresholds(scores, alpha):
    """value-steer 0.2.0: rank `k` clamped into [1, n], and a filter that fires at `>=` that order statistic."""
    n = scores.shape[-1]
    k = min(max(math.ceil((n + 1) * (1 - alpha)), 1), n)
    return np.sort(scores, axis=-1)[:, k - 1]


def test_the_clamp_of_the_peer_breaks_the_promise():
    population = scores_of(continuous)
    rates = firing_rate(population, peer_thresholds(draw(population, 10), 0.05))
    assert not mean_is_at_most(rates, 0.05)
    assert abs(rates.mean() - 1 / 11) < Z * rates.std() / math.sqrt(DRAWS)


@pytest.mark.parametrize(("kind", "alpha"), [(rounded, 0.45), (saturated, 0.025)])
def test_firing_at_a_tie_breaks_the_promise(kind, alpha):
    population = scores_of(kind)
    rates = firing_rate(population, peer_thresholds(draw(population, 1000), alpha))
    assert not mean_is_at_most(rates, alpha)


@pytest.mark.parametrize("n", SIZES)
def test_pac(population, n):
    scores = draw(population, n)
    for alpha in ALPHAS:
        thresholds = value_threshold(scores, allowed_exceedances("pac", n, alpha, DELTA), "undesirable")
        assert seldom(firing_rate(population, thresholds) > alpha)


def test_the_marginal_rank_breaks_the_promise_of_pac():
    population = scores_of(continuous)
    thresholds = value_threshold(draw(population, 1000), allowed_exceedances("marginal", 1000, 0.1), "undesirable")
    assert not seldom(firing_rate(population, thresholds) > 0.1)


@pytest.mark.parametrize("n", SIZES)
def test_uniform_holds_at_every_alpha_at_once(population, n):
    scores, failed = draw(population, n), np.zeros(DRAWS, dtype=bool)
    for alpha in np.arange(1, 20) / 20:
        thresholds = value_threshold(scores, allowed_exceedances("uniform", n, float(alpha), DELTA), "undesirable")
        failed |= firing_rate(population, thresholds) > alpha
    assert seldom(failed)


def test_choosing_alpha_afterwards_breaks_the_promise_of_pac():
    population = scores_of(continuous)
    scores, failed = draw(population, 1000), np.zeros(DRAWS, dtype=bool)
    for alpha in np.arange(1, 20) / 20:
        thresholds = value_threshold(scores, allowed_exceedances("pac", 1000, float(alpha), DELTA), "undesirable")
        failed |= firing_rate(population, thresholds) > alpha
    assert not seldom(failed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_martingale(kind, n):
    prompts, values = map(kind, trajectories())
    population = np.sort(growth(values, prompts, "undesirable"))
    scores = draw(population, n)
    for alpha in ALPHAS:
        thresholds = threshold_above(scores, allowed_exceedances("martingale", n, alpha))
        assert mean_is_at_most(firing_rate(population, thresholds), alpha)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
def test_martingale_thresholds_of_rows_fire_no_more_often(kind, polarity):
    """The comparison that the engine makes, `p >= sigmoid(log c + logit(p_0))`, against that of the scores."""
    prompts, values = map(kind, trajectories())
    if polarity == "desirable":
        prompts, values = (1 - prompts).astype(np.float32), (1 - values).astype(np.float32)
    population = growth(values, prompts, polarity)
    for alpha in ALPHAS:
        for least in threshold_above(draw(population, 100)[:3], allowed_exceedances("martingale", 100, alpha)):
            if np.isfinite(least):
                rows = row_thresholds(float(least), prompts, polarity)
                fires = values >= rows if polarity == "undesirable" else values <= rows
                assert not (fires & (population < least)).any()
                assert fires.mean() >= (population >= least).mean() - 0.001


def correctness(kind):
    """P(correct | value), and the share of wrong answers above a threshold, for values uniform in (0, 1)."""
    value = (np.arange(100_000) + 0.5) / 100_000
    curves = {
        "calibrated": value,
        "flat": np.full_like(value, 0.795),  # every threshold misses the target of 0.8, if only just
        "worst_at_the_top": np.where(value > 0.9, 0.5, 0.9),
    }
    wrong_above = np.cumsum((1 - curves[kind])[::-1])[::-1] / np.arange(len(value), 0, -1)
    return curves[kind], lambda threshold: wrong_above[int(threshold * len(value))]


def most_lenient_that_looks_right(scores, correct, alpha):
    """Without the correction for choosing among many thresholds."""
    passed = [
        threshold
        for threshold in GRID
        if (answered := scores > threshold).any()
        and binomial_cdf(int((answered & ~correct).sum()), int(answered.sum()), alpha)[-1] <= DELTA
    ]
    return min(passed, default=math.inf)


def selective_failures(choose, kind, n, alpha=0.2, draws=DRAWS):
    """In which draws the chosen threshold lets through more than alpha wrong answers; and the thresholds."""
    rng = np.random.default_rng(n)
    probability, error = correctness(kind)
    scores = rng.random((draws, n)).astype(np.float32)
    correct = rng.random((draws, n)) < probability[(scores * len(probability)).astype(int)]
    chosen = [choose(row, answers, alpha) for row, answers in zip(scores, correct, strict=True)]
    return np.array([c < math.inf and error(c) > alpha for c in chosen]), np.array(chosen)


@pytest.mark.parametrize("kind", ["calibrated", "flat", "worst_at_the_top"])
@pytest.mark.parametrize("n", [59, 300])
def test_selective_accuracy(kind, n):
    failures, _ = selective_failures(selective_threshold, kind, n)
    assert seldom(failures)


def test_selective_accuracy_is_found_where_there_is_some():
    _, chosen = selective_failures(selective_threshold, "calibrated", 1000, draws=200)
    assert np.median(chosen) < 0.75 and np.isfinite(chosen).mean() > 0.9  # 0.6 answers right four times in five


def test_choosing_among_thresholds_without_correction_breaks_the_promise():
    failures, _ = selective_failures(most_lenient_that_looks_right, "flat", 300, draws=500)
    assert not seldom(failures)
