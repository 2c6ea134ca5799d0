"""Thresholds computed by hand, what is refused, and `calibration.json`."""

import json
import math
import re
import sys

import numpy as np
import pytest
from scipy.stats import binom

from hf_value_steer.calibration import Calibration, implied_reward, one_per_prompt, selective_threshold
from hf_value_steer.calibration.artefact import CURVE
from hf_value_steer.calibration.filtering import (
    allowed_exceedances,
    binomial_cdf,
    growth,
    row_thresholds,
    value_threshold,
)


ONE, ZERO = np.float32(1), np.float32(0)
TENTHS = np.arange(1, 10, dtype=np.float32) / np.float32(10)


def after(value, towards=ONE):
    return float(np.nextafter(np.float32(value), towards))


@pytest.mark.parametrize(
    ("mode", "n", "alpha", "allowed"),
    [
        ("marginal", 10, 0.45, 3),  # k = ceil(6.05) = 7
        ("marginal", 10, 0.1, 0),  # k = ceil(9.9) = 10
        ("marginal", 10, 0.05, -1),  # k = ceil(10.45) = 11
        ("marginal", 59, 0.05, 2),  # k = ceil(57) = 57
        ("marginal", 19, 0.35, 6),  # k = 13; 20 * (1 - 0.35) is a little more than 13 in binary
        ("martingale", 19, 0.05, 0),
        ("pac", 58, 0.05, -1),
        ("pac", 59, 0.05, 0),
        ("pac", 100, 0.05, 1),
        ("pac", 1000, 0.05, 38),
        ("pac", 2000, 0.05, 83),
        ("pac", 298, 0.01, -1),
        ("pac", 299, 0.01, 0),
        ("uniform", 1000, 0.05, 11),  # 50 - sqrt(1000 ln(20) / 2) = 50 - 38.7
        ("uniform", 10, 0.45, 0),
        ("uniform", 100, 0.1, -3),
    ],
)
def test_ranks(mode, n, alpha, allowed):
    delta = 0.05 if mode in ("pac", "uniform") else None
    assert allowed_exceedances(mode, n, alpha, delta) == allowed


@pytest.mark.parametrize("n", [1, 10, 1000, 50_000])
@pytest.mark.parametrize("rate", [1e-4, 0.05, 0.45, 0.99])
def test_the_binomial_is_scipy_s(n, rate):
    expected = binom.cdf(np.arange(n + 1), n, rate)
    found = binomial_cdf(n, n, rate)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-300)
    assert (found[expected > 1e-300] >= expected[expected > 1e-300]).all()


def test_a_threshold_lies_beyond_the_scores_that_it_spares():
    assert value_threshold(TENTHS, 2, "undesirable") == after(0.7)
    assert value_threshold(TENTHS, 2, "desirable") == after(0.3, ZERO)
    ties = np.array([0.2, 0.7, 0.7, 0.7], dtype=np.float32)
    assert [float(value_threshold(ties, allowed, "undesirable")) for allowed in (0, 1, 3)] == [
        after(0.7), after(0.7), after(0.2),
    ]  # fmt: skip
    assert value_threshold(TENTHS, -1, "undesirable") == value_threshold(TENTHS, -1, "desirable") == math.inf


def test_polarities_mirror_each_other_without_rounding():
    scores = np.random.default_rng(0).random(101).astype(np.float32) / np.float32(1000)
    threshold = float(value_threshold(scores, 40, "desirable"))
    assert threshold == after(np.sort(scores)[40], ZERO)
    assert (scores <= threshold).sum() == 40
    assert threshold != float(1 - value_threshold(1 - scores, 40, "undesirable"))


@pytest.mark.parametrize(
    ("score", "polarity", "expected"),
    [
        (1.0, "undesirable", math.inf),
        (after(1.0, ZERO), "undesirable", math.inf),
        (0.0, "undesirable", after(0.0)),
        (0.0, "desirable", math.inf),
        (after(0.0), "desirable", math.inf),
        (1.0, "desirable", after(1.0, ZERO)),
    ],
)
def test_a_threshold_that_leaves_the_interval_is_none(score, polarity, expected):
    assert value_threshold(np.full(5, score, dtype=np.float32), 0, polarity) == expected


def every_kind_of_value(rng, size):
    values = 1 / (1 + np.exp(-rng.normal(0, 8, size)))
    values[rng.random(size) < 0.1] = 0
    values[rng.random(size) < 0.1] = 1
    tiny = rng.random(size) < 0.1
    values[tiny] = 2.0 ** rng.integers(-149, -1, tiny.sum())
    return values.astype(np.float32)


@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
@pytest.mark.parametrize("least", [-3.0, 1e-6, 0.5, 7.25, 40.0])
def test_row_thresholds_fire_on_the_growth_that_was_calibrated_and_on_nothing_less(polarity, least):
    rng = np.random.default_rng(0)
    prompts, values, least = every_kind_of_value(rng, 20_000), every_kind_of_value(rng, 20_000), np.float32(least)
    rows = row_thresholds(float(least), prompts, polarity)
    fires = values >= rows if polarity == "undesirable" else values <= rows
    grown = growth(values, prompts, polarity)
    assert not fires[grown < least].any()
    assert fires[grown > least + 1e-5 * (1 + abs(least))].all() and 0 < fires.sum() < len(fires)
    edge = row_thresholds(float(grown[0]), prompts[:1], polarity)  # its own growth is reached, one step more is not
    assert edge == values[0] or growth(edge, prompts[:1], polarity) == grown[0]


def test_row_thresholds_are_sigmoids_of_log_odds():
    prompts = np.array([0.1, 0.5, 0.9], dtype=np.float32)
    odds = 4 * prompts.astype(float) / (1 - prompts)
    np.testing.assert_allclose(row_thresholds(math.log(4), prompts, "undesirable"), odds / (1 + odds), rtol=1e-6)
    odds = prompts.astype(float) / (1 - prompts) / 4
    np.testing.assert_allclose(row_thresholds(math.log(4), prompts, "desirable"), odds / (1 + odds), rtol=1e-6)


def test_one_sample_of_each_prompt():
    prompts = ["a", "b", "a", "c", "b", "a"]
    chosen = one_per_prompt(prompts, seed=1)
    assert sorted(prompts[index] for index in chosen) == ["a", "b", "c"] and (np.diff(chosen) > 0).all()
    assert (chosen == one_per_prompt(prompts, seed=1)).all()
    picks = [index for seed in range(300) for index in one_per_prompt(prompts, seed) if prompts[index] == "a"]
    assert {index: picks.count(index) > 70 for index in (0, 2, 5)} == {0: True, 2: True, 5: True}


def test_selective_accuracy_by_hand():
    """40 answers at 0.9 are right, 40 at 0.5 wrong: no wrong one among 40 has probability 0.8**40 = 0.000133."""
    scores = np.array([0.9] * 40 + [0.5] * 40, dtype=np.float32)
    correct, grid = scores > 0.8, (0.2, 0.6, 0.95)
    assert selective_threshold(scores, correct, 0.2, 0.000400, grid=grid) == 0.6  # a third of delta is 0.0001333
    assert selective_threshold(scores, correct, 0.2, 0.000398, grid=grid) == math.inf
    assert selective_threshold(scores, correct, 0.7, 0.05, grid=grid) == 0.2  # 40 of 80 are clearly less than 70 %
    assert selective_threshold(scores, ~correct, 0.2) == math.inf
    assert selective_threshold(1 - scores, correct, 0.2, 0.05, "undesirable", grid=(0.05, 0.4, 0.8)) == 0.4
    ties = np.full(40, 0.6, dtype=np.float32)  # a value at the threshold is not answered
    assert selective_threshold(ties, [True] * 40, 0.2, grid=(float(np.float32(0.6)),)) == math.inf


def test_a_threshold_that_is_shown_to_hold_passes_its_level_on():
    """0.6 lets 44 right answers through; at 0.3, one of 47 is wrong: 0.044, more than one share of delta."""
    scores, correct = np.array([0.7] * 44 + [0.4] * 3, dtype=np.float32), [True] * 46 + [False]
    bound = 0.9**47 + 47 * 0.1 * 0.9**46
    assert selective_threshold(scores, correct, 0.1, bound * 3 / 1.99, grid=(0.9, 0.6, 0.3)) == 0.3
    assert selective_threshold(scores, correct, 0.1, bound * 3 / 2.01, grid=(0.9, 0.6, 0.3)) == 0.6
    assert selective_threshold(scores, correct, 0.1, bound * 3 / 1.99, grid=(0.9, 0.3)) == math.inf


def test_the_implied_reward_by_hand():
    """Texts fall to 0.5 at 0.1, 0.2, 0.3, 0.4 and never; the isotonic means of 0, 1, 0, 1 are 0, 1/2, 1/2, 1."""
    trajectories = [[0.9, 0.1], [0.8, 0.2, 0.0], [0.3], [0.7, 0.6, 0.4, 0.1], [0.9, 0.8]]
    correct = [False, True, False, True, True]
    assert implied_reward(trajectories, correct, 0.5) == 1.0
    assert implied_reward(trajectories, correct, 0.35) == 0.5  # the fourth now falls at 0.1: 1/2 at 0.1, 1, then 0
    mirrored = [[1 - value for value in values] for values in trajectories]
    assert implied_reward(mirrored, correct, 0.5, "undesirable") == 1.0
    with pytest.raises(ValueError, match="no text ever falls to it"):
        implied_reward(trajectories[2:], correct[2:], 0.05)


def calibrated(mode="marginal", n=200, seed=0, **options):
    rng = np.random.default_rng(seed)
    scores = rng.random(n).astype(np.float32)
    if mode == "martingale":
        options["prompt_values"] = rng.random(n).astype(np.float32)
    if mode == "selective":
        options |= {"method": "abstain", "polarity": "desirable", "correct": rng.random(n) < scores}
    return Calibration.from_scores(scores, mode=mode, **options)


EVERY_MODE = ["marginal", "pac", "uniform", "martingale", "selective"]


def test_a_calibration_by_hand():
    calibration = Calibration.from_scores(TENTHS[::-1], groups=list("aaaabbbbb"))
    assert calibration.n == 9 and calibration.delta is None
    assert calibration.threshold(0.1) == after(0.9)
    assert calibration.threshold(0.09) == math.inf
    assert calibration.threshold(0.5) == after(0.5)
    assert calibration.threshold(0.5, "a") == after(0.8)  # of 0.6, 0.7, 0.8, 0.9: k = ceil(2.5) = 3
    assert calibration.threshold(0.5, "b") == after(0.3)
    assert (calibration.smallest_alpha(), calibration.smallest_alpha("a")) == (0.1, 0.2)
    assert calibration.curve[4] == {"alpha": 0.05, "threshold": None}
    assert calibration.curve[9] == {"alpha": 0.1, "threshold": after(0.9)}
    assert [point["alpha"] for point in calibration.curve] == list(CURVE)


def test_the_smallest_alpha_works_and_the_next_does_not():
    for calibration in map(calibrated, EVERY_MODE):
        smallest = calibration.smallest_alpha()
        assert math.isfinite(calibration.threshold(smallest))
        assert math.isinf(calibration.threshold(smallest - 0.0001))
    assert calibrated(n=2000).smallest_alpha() == 0.0005  # 1/2001, rounded up
    assert Calibration.from_scores([1.0, 1.0, 1.0]).smallest_alpha() is None


def test_abstention_is_the_quantile_of_the_paper():
    scores = np.random.default_rng(0).random(999).astype(np.float32)
    calibration = Calibration.from_scores(scores, method="abstain", polarity="desirable")
    for alpha in (0.1, 0.3, 0.9):
        assert (scores <= calibration.threshold(alpha)).sum() == round(1000 * alpha) - 1
        assert calibration.threshold(alpha) == pytest.approx(np.quantile(scores, alpha), abs=0.005)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {},
            "A new safe text is intervened on with probability at most alpha, on average over the draw of the 200 "
            "calibration texts, for one alpha that was chosen beforehand; this covers the first intervention on safe "
            "texts only, neither what follows it nor unsafe texts, and another sampler, head or backbone needs a "
            "calibration of its own.",
        ),
        (
            {"mode": "pac", "delta": 0.1},
            "with confidence 90 % in the draw of the 200 calibration texts, for one",
        ),
        (
            {"mode": "uniform"},
            "with confidence 95 % .* for every alpha at once, so that it may be chosen after",
        ),
        ({"mode": "selective"}, "A new answer that is not ended early is wrong with probability at most alpha, with"),
        ({"method": "abstain"}, "A new answer is ended early with probability at most alpha, on average"),
        ({"groups": ["a"] * 200}, r"beforehand \(and so within each group, under its own threshold\);"),
    ],
)
def test_the_guarantee_is_a_sentence(options, sentence):
    guarantee = calibrated(**options).guarantee
    assert re.search(sentence, guarantee)
    assert guarantee.endswith(".") and guarantee.count(".") == 1


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_json_round_trip(mode, tmp_path):
    provenance = {"data": "sha256:00", "sampling": {"temperature": 1.0}, "kernel": "shared_prefix", "backend": "torch"}
    options = {} if mode == "selective" else {"groups": ["a", "b"] * 100}
    calibration = calibrated(mode, head_fingerprint="0123", **options, **provenance)
    path = calibration.save(tmp_path)
    assert Calibration.load(tmp_path) == calibration
    text = path.read_text()
    record = json.loads(text)
    assert text == json.dumps(record, indent=2, sort_keys=True) + "\n"
    assert set(record) == {
        "format", "mode", "method", "polarity", "n", "delta", "guarantee", "curve", "scores", "data", "sampling",
        "kernel", "backend", "head_fingerprint", "correct" if mode == "selective" else "groups",
    }  # fmt: skip
    assert record["curve"] == calibration.curve and record["guarantee"] == calibration.guarantee
    assert np.array(record["scores"], dtype=np.float32).tolist() == record["scores"] == sorted(record["scores"])
    summary = calibration.to_dict(scores=False)
    assert "scores" not in json.dumps(summary) and summary["curve"] == record["curve"]


def damage(**changes):
    def apply(record):
        record.update(changes)

    return apply


def drop(key):
    return lambda record: record.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage(format="hf-value-steer/calibration@2"), "this version of hf-value-steer reads"),
        (drop("format"), "the format is None"),
        (drop("scores"), "scores"),
        (drop("mode"), "mode"),
        (damage(treshold=0.3), "`treshold` is unknown"),
        (damage(n=3), "`n` is unknown or does not follow from the scores"),
        (damage(mode="pac"), "`delta` has to be a number"),
        (damage(mode="exact"), "`mode` has to be one of marginal, pac"),
        (damage(method="svgt"), "`method` has to be one of filter, abstain"),
        (damage(polarity="bad"), "`polarity` has to be one of undesirable, desirable"),
        (damage(scores=[0.5, 0.25]), "ascending"),
        (damage(scores=[0.25, float("nan")]), "NaN"),
        (damage(scores=[]), "at least one"),
        (damage(scores=None), "one number a text"),
        (damage(scores="abc"), "abc"),
        (damage(scores=[0.1, 0.2]), "does not follow"),
        (lambda record: record["curve"][20].update(threshold=0.5), "`curve` is unknown or does not follow"),
        (lambda record: record["groups"]["a"].update(n=7), "`groups` is unknown or does not follow"),
        (lambda record: record["groups"]["a"].pop("scores"), "scores"),
        (damage(groups=[1]), "groups|attribute"),
        (damage(correct=[True]), "`correct` is for mode 'selective'"),
    ],
)
def test_corrupt_files_are_refused(change, message, tmp_path):
    path = calibrated(groups=["a", "b"] * 100).save(tmp_path)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"calibration.json is no calibration: .*({message})"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"format": ['])
def test_files_that_are_no_json_objects_are_refused(content, tmp_path):
    (tmp_path / "calibration.json").write_bytes(content)
    with pytest.raises(ValueError, match="calibration.json is no calibration"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([], {}, "`scores` has to hold one number a text, at least one"),
        ([[0.1]], {}, r"got shape \(1, 1\)"),
        ([0.1, float("nan")], {}, r"NaN or infinite numbers at \[1\]"),
        ([0.1, 1.5], {}, r"values in \[0, 1\], got 0.1 to 1.5"),
        ([0.1], {"mode": "pac", "delta": 0.6}, r"`delta` has to be a number in \(0, 0.5\]"),
        ([0.1], {"delta": 0.1}, "`delta` does not exist for mode 'marginal'"),
        ([0.1], {"mode": "martingale"}, "`prompt_values` are for mode 'martingale', which needs them"),
        ([0.1], {"prompt_values": [0.1]}, "`prompt_values` are for mode 'martingale'"),
        ([0.1], {"mode": "martingale", "prompt_values": [0.1, 0.2]}, r"`prompt_values` has shape \(2,\)"),
        ([0.1], {"groups": ["a", "b"]}, r"`groups` has shape \(2,\), but `scores` has \(1,\)"),
        ([0.1], {"mode": "martingale", "method": "abstain", "prompt_values": [0.1]}, "does not exist for method"),
        ([0.1], {"mode": "selective", "correct": [1]}, "does not exist for method 'filter'"),
        ([0.1], {"mode": "selective", "method": "abstain"}, "`correct` is for mode 'selective', which needs it"),
        ([0.1], {"mode": "selective", "method": "abstain", "correct": [2]}, "`correct` has to say 0 or 1"),
        ([0.1], {"mode": "selective", "method": "abstain", "correct": [1, 0]}, "each of the 1 texts"),
    ],
)
def test_wrong_scores_are_refused(scores, options, message):
    with pytest.raises(ValueError, match=message):
        Calibration.from_scores(scores, **options)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.2, float("nan"), "0.1", True, None])
def test_wrong_alphas_are_refused(alpha):
    for calibration in map(calibrated, EVERY_MODE):
        with pytest.raises(ValueError, match=r"`alpha` has to be a number in \(0, 1\)"):
            calibration.threshold(alpha)
    with pytest.raises(ValueError, match="`group` 'z' was not calibrated, only a, b"):
        calibrated(groups=["a", "b"] * 100).threshold(0.1, "z")


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_a_saved_calibration_needs_neither_scipy_nor_scikit_learn(mode, tmp_path, monkeypatch):
    calibration = calibrated(mode)
    calibration.save(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("scipy", "sklearn")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert Calibration.load(tmp_path).threshold(0.3) == calibration.threshold(0.3)
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install hf-value-steer\[train\]"):
        implied_reward([[0.1]], [True], 0.5)
