"""The rules on hand-made tensors."""

import pytest
import torch

from hf_value_steer.policy import (
    Candidates,
    acceptable,
    acts,
    advance_patience,
    advance_streak,
    decide,
    next_of_ending,
    select,
)


NAN, INF = torch.nan, torch.inf


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


def candidates(*rows, known=False, ending=None):
    return Candidates(torch.tensor(rows), torch.full((len(rows),), known), ending)


def decided(found, values, fallback="argmin", may_end=True, limit=0.3, **args):
    """The decision about undesirable candidates, with one threshold for all rows."""
    rows = torch.full((len(values),), limit), torch.full((len(values),), may_end)
    return decide(found, values, rows[0], "undesirable", fallback, rows[1], **args)


def test_equal_candidates_are_forwarded_once_and_a_known_one_never():
    found = Candidates(torch.tensor([[5, 7, 5, 9], [4, 4, 4, -1]]), known=torch.tensor([True, False]))
    assert found.first.tolist() == [[0, 1, 0, 3], [0, 0, 0, 3]]
    assert found.distinct.int().tolist() == [[1, 1, 0, 1], [1, 0, 0, 0]]
    assert found.needed.int().tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]
    forwarded = found.to_forward(2)
    assert forwarded[0].tolist() == [7, 9] and forwarded[1, 0] == 4
    assert found.slot(torch.tensor([3, 2])).tolist() == [1, 0]  # the second row has its duplicate in the first slot


def test_equal_candidates_have_equal_values_and_places_without_a_token_none():
    found = Candidates(torch.tensor([[5, 7, 5, 9], [4, 4, 4, -1]]), known=torch.tensor([True, False]))
    spread = found.spread(values([0.7, 0.9], [0.4, 0.1]), known=torch.tensor([0.5, NAN]))
    expected = values([0.5, 0.7, 0.5, 0.9], [0.4, 0.4, 0.4, NAN])
    torch.testing.assert_close(spread, expected, equal_nan=True)


def test_nothing_is_forwarded_where_all_candidates_are_the_known_one():
    found = candidates([5, 5, -1], known=True)
    assert not found.needed.any() and found.to_forward(0).shape == (1, 0)
    spread = found.spread(torch.empty(1, 0), known=torch.tensor([0.2]))
    torch.testing.assert_close(spread, values([0.2, 0.2, NAN]), equal_nan=True)


def test_places_without_a_token_are_not_needed_and_are_filled_with_some_token():
    found = candidates([5, -1, -1])
    assert found.drawn.tolist() == [[True, False, False]]
    assert found.needed.tolist() == [[True, False, False]]
    assert found.to_forward(3).min() >= 0


def test_the_ending_is_forwarded_and_is_no_candidate():
    found = candidates([5, 9], [5, -1], ending=9)
    assert found.tokens.tolist() == [[5, 9, 9], [5, -1, 9]] and found.drawn.shape == (2, 2)
    assert found.needed.int().tolist() == [[1, 1, 0], [1, 0, 1]]  # the first row has drawn it anyway
    spread = found.spread(values([0.5, 0.9], [0.5, 0.8]), known=torch.tensor([NAN, NAN]))
    torch.testing.assert_close(spread, values([0.5, 0.9, 0.9], [0.5, NAN, 0.8]), equal_nan=True)


def test_a_decision_takes_the_first_acceptable_candidate():
    decision = decided(candidates([5, 6, 7], [5, 6, 7]), values([0.9, 0.2, 0.1], [0.9, 0.8, 0.7]))
    assert decision.column.tolist() == [1, 2] and decision.found.tolist() == [True, False]
    assert decision.passed.int().tolist() == [[0, 1, 1], [0, 0, 0]]
    assert not decision.ends.any() and not decision.broken.any()


@pytest.mark.parametrize(
    ("fallback", "may_end", "ends"), [("abstain", True, True), ("abstain", False, False), ("argmin", True, False)]
)
def test_a_row_without_an_acceptable_candidate_ends_where_it_may(fallback, may_end, ends):
    found, p = candidates([5, 6], [5, 6], ending=9), values([0.9, 0.8, 0.0], [0.9, 0.1, 0.9])
    decision = decided(found, p, fallback, may_end)
    assert decision.ends.tolist() == [ends, False]
    assert decision.column.tolist() == [1, 1]  # never the ending, whatever its value


def test_a_candidate_without_a_value_breaks_its_row():
    found = candidates([5, 6], [5, -1], [5, 6], ending=9)
    decision = decided(found, values([0.1, NAN, 0.1], [0.1, NAN, 0.1], [0.1, 0.1, NAN]))
    assert decision.broken.tolist() == [True, False, True]


def test_a_place_without_a_token_is_never_decided_for():
    decision = decided(candidates([5, -1]), values([0.9, 0.0]))
    assert decision.column.item() == 0 and not decision.found.item()


@pytest.mark.parametrize(("prob_weight", "column"), [(1.0, 0), (0.1, 1)])
def test_args_weighs_the_probabilities_of_the_candidates_tokens(prob_weight, column):
    probabilities = torch.zeros(1, 10)
    probabilities[0, [5, 6]] = torch.tensor([0.9, 0.1])
    how = {"probabilities": probabilities, "prob_weight": prob_weight}
    assert decided(candidates([5, 6]), values([0.6, 0.5]), "args", **how).column.item() == column


def test_a_method_acts_from_a_step_on_and_so_often():
    interventions = torch.tensor([0, 1, 2])
    assert acts(interventions, 2, 3).tolist() == [False, False, False]
    assert acts(interventions, 3, 3).tolist() == [True, True, True]
    assert acts(interventions, 3, 3, most=2).tolist() == [True, True, False]
    assert acts(interventions, torch.tensor([4, 1, 4]), 2, torch.tensor([0, 9, 9])).tolist() == [False, False, True]


def test_abstention_is_due_when_its_patience_is_over():
    streak, acting = torch.tensor([0, 1, 1, 7]), torch.tensor([True, True, True, False])
    p, c = torch.tensor([0.9, NAN, 0.1, 0.9]), torch.full((4,), 0.5)
    grown, due = advance_patience(streak, p, c, "undesirable", acting, 2)
    assert grown.tolist() == [1, 2, 0, 7]  # where it does not act, the count stays
    assert due.tolist() == [False, True, False, False]
    assert advance_patience(streak, p, c, "undesirable", acting, torch.tensor([1, 3, 1, 1]))[1].tolist() == [
        True
    ] + 3 * [False]


def test_an_ending_begins_goes_on_and_repeats_its_last_token():
    due, written = torch.tensor([True, True, False, False, False]), torch.tensor([-1, 1, 2, 5, -1])
    begins, place, forced = next_of_ending(due, written, torch.zeros(5, 3))
    assert begins.tolist() == [True, False, False, False, False]
    assert place[:4].tolist() == [0, 1, 2, 2]
    assert forced.tolist() == [True, True, True, True, False]


def test_an_ending_waits_for_what_is_forbidden():
    permitted = values([0.0, 0.0, -INF], [0.0, -INF, 0.0], [-INF, 0.0, 0.0])
    due, written = torch.tensor([True, False, False]), torch.tensor([-1, 1, 1])
    begins, _, forced = next_of_ending(due, written, permitted)
    assert not begins.any()  # none of it is begun before all of it is permitted
    assert forced.tolist() == [False, False, True]  # once begun, only the next token counts
