"""The rules on hand-made tensors."""

import pytest
import torch

from hf_value_steer.policy import acceptable, advance_streak, select


NAN = torch.nan


def values(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def everything(like):
    return torch.ones_like(like, dtype=torch.bool)


def threshold(*numbers):
    return torch.tensor(numbers)[:, None]


def test_acceptance_is_strict_and_follows_polarity():
    p, c = torch.tensor([0.2, 0.3, 0.4, NAN]), torch.tensor(0.3)
    assert acceptable(p, c, "undesirable").tolist() == [True, False, False, False]
    assert acceptable(p, c, "desirable").tolist() == [False, False, True, False]


def test_the_first_acceptable_candidate_wins_not_the_best():
    p = values([0.9, 0.2, 0.1], [0.1, 0.0, 0.0])
    choice, found = select(p, everything(p), threshold(0.3, 0.3), "undesirable")
    assert choice.tolist() == [1, 0] and found.all()


def test_thresholds_are_a_row_s_own():
    p = values([0.5, 0.2], [0.5, 0.2])
    assert select(p, everything(p), threshold(0.6, 0.3), "undesirable")[0].tolist() == [0, 1]


@pytest.mark.parametrize(("polarity", "expected"), [("undesirable", 2), ("desirable", 0)])
def test_the_fallback_takes_the_most_acceptable(polarity, expected):
    p = values([0.7, 0.6, 0.5])
    c = threshold(0.1) if polarity == "undesirable" else threshold(0.9)
    choice, found = select(p, everything(p), c, polarity)
    assert choice.item() == expected and not found.item()


def test_args_weighs_the_probability():
    p, probabilities = values([0.6, 0.5]), values([0.9, 0.1])
    arguments = (p, everything(p), threshold(0.1), "undesirable", "args", probabilities)
    assert select(*arguments, prob_weight=1.0)[0].item() == 0  # -0.3 against 0.4
    assert select(*arguments, prob_weight=0.1)[0].item() == 1  # 0.51 against 0.49


def test_args_needs_probabilities():
    p = values([0.6, 0.5])
    with pytest.raises(ValueError, match="`probabilities` is required"):
        select(p, everything(p), threshold(0.1), "undesirable", "args")


@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
def test_nan_is_never_chosen_while_there_is_another(polarity):
    p = values([NAN, 0.5])
    c = threshold(0.1) if polarity == "undesirable" else threshold(0.9)
    assert select(p, everything(p), c, polarity)[0].item() == 1


def test_candidates_that_were_not_drawn_are_not_chosen():
    p = values([0.9, 0.0, 0.5])
    drawn = torch.tensor([[True, False, True]])
    assert select(p, drawn, threshold(0.1), "undesirable")[0].item() == 2
    assert select(p, drawn, threshold(0.3), "undesirable")[1].item() is False


def test_a_streak_grows_and_is_broken():
    streak, c = torch.tensor([0, 2, 2]), torch.full((3,), 0.5)
    grown = advance_streak(streak, torch.tensor([0.4, 0.4, 0.6]), c, "desirable")
    assert grown.tolist() == [1, 3, 0]
    assert advance_streak(streak, torch.tensor([0.4, 0.4, NAN]), c, "undesirable").tolist() == [0, 0, 3]
