"""The loop and the logits processor decide as they did when the decisions were recorded."""

import pytest
import torch
from torch import Tensor

from hf_value_steer import ScoringError, ValueFilterConfig, ValueFilterLogitsProcessor
from tests.decisions import PROMPT, Group, Scores, decide_in_generate, parrot, recorded


@pytest.fixture(scope="module")
def model():
    return parrot()


def test_two_thousand_decisions_are_recorded():
    found = [outcome for _, outcome in recorded()]
    rows = [len(outcome[0]) for outcome in found if outcome is not None]
    assert sum(rows) + found.count(None) == 2000 and found.count(None) > 40


def test_the_loop_decides_as_recorded(model):
    for group, expected in recorded():
        outcome = decide_in_generate(model, group)
        if expected is None:
            assert isinstance(outcome, str) and "not finite at new token 0 in row(s) [0]" in outcome, group.index
            continue
        for name, each, before in zip(("candidates", "tokens", "ended"), outcome, expected, strict=True):
            assert torch.equal(each, before), (group.index, name)


class Replayed(ValueFilterLogitsProcessor):
    """The processor with the candidates that the loop had."""

    def __init__(self, model, config: ValueFilterConfig, candidates: Tensor):
        super().__init__(model, config)
        self.candidates = candidates

    def _candidates(self, *_):
        return self.candidates


def kept_by(model, group: Group, candidates: Tensor) -> Tensor:
    """Which tokens `(rows, vocab)` the processor leaves."""
    (head, config), rows = (group.head, group.config), len(group.scores)
    config = ValueFilterConfig(value_head=head, threshold=group.thresholds.tolist(), **config)
    processors = [Scores(group.scores), Replayed(model, config, candidates)]
    arguments = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    out = model.generate(torch.full((rows, 2), PROMPT), logits_processor=processors, **arguments)
    return out.scores[0] > -torch.inf


def test_the_processor_keeps_what_the_loop_accepts(model):
    dead = 0
    for group, expected in recorded():
        if expected is None or "max_interventions" in group.config:
            continue
        candidates, tokens, _ = expected
        if "min_new_tokens" in group.config:
            assert torch.equal(kept_by(model, group, candidates), group.scores > -torch.inf), group.index
            continue
        values, limit = group.table[candidates.clamp(min=0)], group.thresholds[:, None]
        passed = (values < limit if group.polarity == "undesirable" else values > limit) & (candidates >= 0)
        chosen = torch.where(passed.any(dim=-1, keepdim=True), candidates.masked_fill(~passed, -1), tokens[:, None])
        wanted = torch.zeros(*group.scores.shape[:1], group.scores.shape[1] + 1, dtype=torch.bool)
        wanted.scatter_(1, chosen % wanted.shape[1], True)
        assert torch.equal(kept_by(model, group, candidates), wanted[:, :-1]), group.index
        dead += int((~passed.any(dim=-1)).sum())
    assert dead > 200


def test_a_value_that_is_not_finite_is_the_same_error(model):
    for group, expected in recorded():
        if expected is None:
            broken = group.table.isnan().nonzero()[:4].T
            with pytest.raises(ScoringError) as error:
                kept_by(model, group, broken)
            assert str(error.value) == decide_in_generate(model, group)
