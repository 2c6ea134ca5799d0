"""vLLM's filter decides as the loop of `generate` did when the decisions were recorded."""

from types import SimpleNamespace

import pytest
import torch

from hf_value_steer import ValueFilterConfig
from hf_value_steer.generation.candidates import natural_sample, random_key
from hf_value_steer.generation.scorer import Scorer
from hf_value_steer.vllm.filtering import NOT_FINITE, Filtering, Pending, Verdict, check
from tests.decisions import EOS, Group, feature, recorded


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr("hf_value_steer.vllm.judge.get_tp_group", lambda: SimpleNamespace(world_size=1))


class Replayed(Pending):
    """A pending token with the candidates that the loop had."""

    def __init__(self, pending: Pending, drawn: torch.Tensor):
        super().__init__(**vars(pending))
        self.drawn = drawn

    def candidates(self) -> torch.Tensor:
        return self.drawn


def pending_of(group: Group, row: int, token: int) -> Pending:
    config = ValueFilterConfig(**group.config)
    ending = [EOS] if config.fallback == "abstain" else []
    scorer = Scorer(group.head, group.thresholds[row : row + 1])
    filtering = Filtering(config, scorer, group.sampled, ending, random_key(torch.device("cpu"), config.seed))
    filtering.scores = group.scores[row]
    filtering.permitted = lambda tokens: group.scores[row, list(tokens)][None]
    return Pending(filtering, row, 2, token, 0, False)


def verdicts_of(group: Group, pending: list[Pending]) -> list[Verdict]:
    features = feature(torch.tensor([each.token for each in pending]))
    return check(pending, features, group.head, lambda jobs: feature(torch.tensor([token for _, token in jobs])))


def test_the_filter_decides_as_recorded():
    for group, expected in recorded():
        if expected is None:
            continue
        candidates, tokens, ended = expected
        pending = [Replayed(pending_of(group, row, int(own[0])), own) for row, own in enumerate(candidates)]
        for row, verdict in enumerate(verdicts_of(group, pending)):
            assert verdict.error is None
            assert (EOS if verdict.token is None else verdict.token) == tokens[row], (group.index, row)
            assert (verdict.token is None) == bool(ended[row]), (group.index, row)


def test_a_value_that_is_not_finite_is_an_error():
    for group, expected in recorded():
        if expected is None:
            torch.manual_seed(group.index)
            token = int(natural_sample(group.scores, group.sampled)[0])
            (verdict,) = verdicts_of(group, [pending_of(group, 0, token)])
            assert verdict.error == NOT_FINITE, group.index
