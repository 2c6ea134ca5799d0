"""The law of whole texts, of the filter that goes back, against an enumeration that knows nothing of the library."""

import ast
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_value_steer import ValueFilterConfig
from tests.rollback_oracle import GoingBack
from tests.theory import draws, laws
from tests.theory.draws import BETA, GRID, LENGTH, TEXTS, THRESHOLD, Case, drawn, expected, p_value, toy


@pytest.mark.parametrize("case", GRID, ids=str)
def test_texts_follow_the_law(case):
    counts, searched, found = drawn(case, 4, 1000)
    assert searched > 0.1 and found > 0.05
    assert p_value(counts, expected(case)) > 0.001
    other = "soft" if case.selection == "first" else "first"
    for wrong in (case._replace(rollback=0), case._replace(selection=other)):
        assert p_value(counts, expected(wrong)) < 0.001


@pytest.mark.parametrize("case", GRID, ids=str)
def test_single_calls_follow_the_same_law(case):
    counts, *_ = drawn(case, 150, 1)
    assert p_value(counts, expected(case)) > 0.001


@pytest.mark.parametrize("selection", ["first", "soft"])
@pytest.mark.parametrize("rollback", [0, 1, 2])
def test_laws_sum_to_one(rollback, selection):
    assert abs(expected(Case(rollback, selection)).sum() - 1) < 1e-12


@pytest.mark.parametrize("selection", ["first", "soft"])
def test_without_going_back_each_token_follows_the_law_of_one_step(selection):
    _, _, probabilities, values = toy()
    accept = laws.hard(THRESHOLD) if selection == "first" else laws.soft(THRESHOLD, BETA)

    def step(text, token):
        """Two candidates: the first is accepted, or only the second, or the better one falls back."""
        law = probabilities[text]
        value = np.array([values[(*text, other)] for other in range(len(law))])
        accepted = np.array([accept(each) for each in value])
        refused = law * (1 - accepted)
        own = law[token] * accepted[token]
        worse = refused[value > value[token]].sum()
        return own + refused.sum() * own + refused[token] ** 2 + 2 * refused[token] * worse

    texts = [np.prod([step(text[:place], text[place]) for place in range(LENGTH)]) for text in TEXTS]
    np.testing.assert_allclose(expected(Case(0, selection)), texts, atol=1e-12)


def test_going_back_by_hand():
    """Two tokens, one candidate, one place back: after 0 nothing is acceptable, after 1 everything is."""
    half = {text: np.array([0.5, 0.5]) for length in range(2) for text in itertools.product((0, 1), repeat=length)}
    values = {(0,): 0.1, (1,): 0.1, (0, 0): 0.9, (0, 1): 0.8, (1, 0): 0.1, (1, 1): 0.1}
    rule = laws.Rule(half, values, laws.hard(0.5), num_candidates=1, rollback=1)
    assert laws.law(rule, 2) == {(0, 0): 0.0, (0, 1): 0.0, (1, 0): 0.5, (1, 1): 0.5}
    assert laws.law(rule._replace(rollback=0), 2) == dict.fromkeys(itertools.product((0, 1), repeat=2), 0.25)


def test_the_law_imports_nothing_of_the_library():
    tree = ast.parse(Path(laws.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"itertools", "collections.abc", "functools", "typing", "numpy"}


def test_a_token_that_was_refused_and_drawn_again_is_taken_at_its_second_place():
    """Of `[0, 3, 0]` the second 0 is accepted; at the dead end after it 3 is not tried again."""
    model, head, *_ = toy(seed=1)
    ids = torch.tensor([draws.PROMPT]).expand(400, -1)
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "do_sample": True, "top_k": 0}
    rule = {"threshold": 0.2, "num_candidates": 3, "rollback": 1, "selection": "soft", "beta": 0.5, "seed": 0}
    config = ValueFilterConfig(value_head=head, **rule)
    texts, oracle = [], GoingBack(config)
    for steering in ({"value_steer": config}, {"custom_generate": oracle}):
        torch.manual_seed(0)
        texts.append(model.generate(ids, **call, **steering))
    assert torch.equal(*texts) and oracle.seen["drawn again"]
