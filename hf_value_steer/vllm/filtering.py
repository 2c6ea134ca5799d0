"""One step of value-filtered decoding for the requests of a batch, whatever model runner forwards the candidates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from vllm.logger import init_logger

from hf_value_steer.generation.candidates import likely_alternatives, sampled_alternatives, uniforms
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.policy import Candidates, acceptable, acts, decide, may_insert
from hf_value_steer.vllm.judge import values_of
from hf_value_steer.vllm.request import Filtering, stack_thresholds


logger = init_logger(__name__)
NOT_FINITE = "the value head has no finite answer"
NO_LOOKAHEAD = "the look-ahead failed"
MOST = 2**62  # interventions, where they are not limited


@dataclass
class Pending:
    """A token that was drawn and forwarded, but not emitted. The runner makes one for a row, and [`check`] judges it.

    Args:
        filtering: the filter of its request.
        row (`int`): row of the batch.
        position (`int`): position in the text.
        token (`int`): the natural sample, or a token that abstention prescribed.
        step (`int`): number of new tokens before it.
        forced (`bool`): whether it was prescribed.
    """

    filtering: Filtering
    row: int
    position: int
    token: int
    step: int
    forced: bool

    @property
    def permitted(self) -> Tensor:
        """Scores `(1, tokens)` of the ending in its place."""
        assert self.filtering.permitted is not None  # kept from the draw
        return self.filtering.permitted(self.filtering.ending)

    def candidates(self) -> Tensor:
        """The natural sample and its alternatives, `(K,)`, -1 where there is none."""
        natural = torch.tensor([[self.token]], device=self.scores.device)
        count = self.filtering.config.num_candidates - 1
        if self.filtering.sampled:
            numbers = uniforms(self.filtering.key, [0], self.step, count)
            others = sampled_alternatives(self.scores[None], numbers)
        else:
            others = likely_alternatives(self.scores[None], natural[0], count)
        return torch.cat([natural, others], dim=1).squeeze(0).cpu()

    @property
    def scores(self) -> Tensor:
        assert self.filtering.scores is not None  # kept from the draw
        return self.filtering.scores


@dataclass
class Winner:
    """An alternative that takes the place of a natural sample; part of a [`Verdict`].

    Args:
        job (`int`): which of the forwarded alternatives it is.
        feature (`torch.FloatTensor` of shape `(width,)`): its feature.
    """

    job: int
    feature: Tensor


@dataclass
class Verdict:
    """What becomes of a pending token. [`check`] returns one for each, and the runner carries it out.

    Args:
        token (`int`, *optional*): what to emit; `None` for EOS under `fallback="abstain"`.
        value (`float`): value of the emitted token; under `fallback="abstain"` that of the natural sample.
        candidates (`int`): distinct candidates that were forwarded.
        found (`bool`): whether the emitted token is acceptable.
        winner ([`Winner`], *optional*): the alternative that is emitted, if it is one.
        error (`str`, *optional*): why nothing may be emitted.
    """

    token: int | None
    value: float
    candidates: int = 1
    found: bool = True
    winner: Winner | None = None
    error: str | None = None


class Forward(Protocol):
    """Forwards alternatives of pending tokens, `(pending, token)` each; returns features `(jobs, width)`."""

    def __call__(self, jobs: Sequence[tuple[Pending, int]]) -> Tensor: ...


def check(pending: Sequence[Pending], features: Tensor, head: ValueHead, forward: Forward) -> list[Verdict]:
    """Check pending tokens, and choose among alternatives for those that are not acceptable.

    Args:
        pending: of n requests, each with its own threshold and number of candidates.
        features (`torch.FloatTensor` of shape `(n, width)`): of the pending tokens.
        head: the filter's head.
        forward: called once with all alternatives, or not at all if there are none.
    """
    config = pending[0].filtering.config
    values = values_of(head, features)
    accepted = acceptable(values, _thresholds(pending), head.config.polarity)
    looked_at = (_acting(pending) & ~values.isnan() & (~accepted | (config.evaluation == "eager"))).nonzero().flatten()
    # Most tokens stay as they are: their verdict is the token itself.
    verdicts = [
        Verdict(each.token, value, found=found, error=NOT_FINITE if math.isnan(value) else None)
        for each, value, found in zip(pending, values.tolist(), accepted.tolist(), strict=True)
    ]
    if len(looked_at):
        indices = looked_at.tolist()
        try:
            chosen = _choose([pending[index] for index in indices], values[looked_at], head, forward)
        except Exception:
            logger.exception("The look-ahead failed; the requests in question end with an error.")
            chosen = [Verdict(None, float("nan"), error=NO_LOOKAHEAD) for _ in indices]
        for index, verdict in zip(indices, chosen, strict=True):
            verdicts[index] = verdict
    return verdicts


def _acting(pending: Sequence[Pending]) -> Tensor:
    """Which of the tokens may be replaced, `(n,)`."""
    filters = [each.filtering for each in pending]
    most = [MOST if (limit := each.config.max_interventions) is None else limit for each in filters]
    numbers = (
        [each.interventions for each in filters],
        [each.step for each in pending],
        [each.config.min_new_tokens for each in filters],
        most,
    )
    return acts(*map(torch.tensor, numbers)) & ~torch.tensor([each.forced for each in pending])


def _thresholds(pending: Sequence[Pending]) -> Tensor:
    return stack_thresholds([each.filtering.scorer for each in pending])


def _choose(pending: Sequence[Pending], natural: Tensor, head: ValueHead, forward: Forward) -> list[Verdict]:
    """Verdicts on tokens of value `natural` `(rows,)`, from the values of their alternatives."""
    config = pending[0].filtering.config
    drawn = pad_sequence([each.candidates() for each in pending], batch_first=True, padding_value=-1)
    candidates = Candidates(drawn, known=torch.ones(len(drawn), dtype=torch.bool))
    rows, columns = candidates.needed.nonzero(as_tuple=True)
    jobs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    forwarded, features = torch.full(drawn.shape, torch.nan), torch.empty(0)
    if jobs:
        features = forward([(pending[row], int(drawn[row, column])) for row, column in jobs])
        forwarded[rows, candidates.slots[rows, columns]] = values_of(head, features)
    may_end = torch.zeros(len(drawn), dtype=torch.bool)
    if config.fallback == "abstain":
        may_end = may_insert(torch.cat([each.permitted for each in pending]).cpu())
    decision = decide(
        candidates,
        candidates.spread(forwarded, natural),
        _thresholds(pending),
        head.config.polarity,
        config.fallback,
        may_end,
        torch.stack([each.scores.softmax(dim=-1).cpu() for each in pending]) if config.fallback == "args" else None,
        config.prob_weight,
    )
    verdicts = []
    for row, broken in enumerate(decision.broken.tolist()):
        winner = int(candidates.first[row, decision.column[row]])
        count = int(candidates.distinct[row].sum())
        found = bool(decision.found[row])
        verdict = Verdict(int(drawn[row, winner]), float(decision.values[row, winner]), count, found)
        if broken:
            verdict.error = NOT_FINITE
        elif bool(decision.ends[row]):
            verdict.token, verdict.value = None, float(natural[row])
        elif winner > 0:
            job = jobs.index((row, winner))
            verdict.winner = Winner(job, features[job])
        verdicts.append(verdict)
    return verdicts
