"""One step of value-filtered decoding for the requests of a batch, whatever model runner forwards the candidates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from vllm.logger import init_logger

from hf_value_steer.generation.candidates import first_occurrence, likely_alternatives, sampled_alternatives, uniforms
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.policy import acceptable, select
from hf_value_steer.vllm.judge import values_of
from hf_value_steer.vllm.request import Filtering, stack_thresholds


logger = init_logger(__name__)
NOT_FINITE = "the value head has no finite answer"
NO_LOOKAHEAD = "the look-ahead failed"


@dataclass
class Pending:
    """A token that was drawn and forwarded, but not emitted.

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

    def may_end(self) -> bool:
        """Whether the request permits the ending in its place."""
        assert self.filtering.permits is not None  # kept from the draw
        return self.filtering.permits(self.filtering.ending)

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
    """An alternative that takes the place of a natural sample.

    Args:
        job (`int`): which of the forwarded alternatives it is.
        feature (`torch.FloatTensor` of shape `(width,)`): its feature.
    """

    job: int
    feature: Tensor


@dataclass
class Verdict:
    """What becomes of a pending token.

    Args:
        token (`int`, *optional*): what to emit; `None` for EOS under `fallback="abstain"`.
        value (`float`): value of the emitted token; under `fallback="abstain"` that of the natural sample.
        candidates (`int`): distinct candidates that were forwarded.
        winner ([`Winner`], *optional*): the alternative that is emitted, if it is one.
        error (`str`, *optional*): why nothing may be emitted.
    """

    token: int | None
    value: float
    candidates: int = 1
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
        forward: called once, if there are alternatives to forward.
    """
    config = pending[0].filtering.config
    values = values_of(head, features)
    thresholds = stack_thresholds([each.filtering.scorer for each in pending])
    accepted = acceptable(values, thresholds, head.config.polarity).tolist()
    verdicts = [Verdict(each.token, value) for each, value in zip(pending, values.tolist(), strict=True)]
    looked_at = []
    for index, each in enumerate(pending):
        if math.isnan(verdicts[index].value):
            verdicts[index].error = NOT_FINITE
        elif not each.forced and each.filtering.checks(each.step):
            if not accepted[index] or config.evaluation == "eager":
                looked_at.append(index)
    if looked_at:
        try:
            chosen = _choose([pending[index] for index in looked_at], values[looked_at], head, forward)
        except Exception:
            logger.exception("The look-ahead failed; the requests in question end with an error.")
            chosen = [Verdict(None, float("nan"), error=NO_LOOKAHEAD) for _ in looked_at]
        for index, verdict in zip(looked_at, chosen, strict=True):
            verdicts[index] = verdict
    return verdicts


def _choose(pending: Sequence[Pending], natural: Tensor, head: ValueHead, forward: Forward) -> list[Verdict]:
    """Verdicts on tokens of value `natural` `(rows,)` after a look at their alternatives."""
    config = pending[0].filtering.config
    candidates = pad_sequence([each.candidates() for each in pending], batch_first=True, padding_value=-1)
    first, columns = first_occurrence(candidates), torch.arange(candidates.shape[1])
    drawn = candidates >= 0
    needed = drawn & (first == columns) & (columns > 0)
    jobs = needed.nonzero().tolist()
    values = torch.full(candidates.shape, torch.nan)
    values[:, 0] = natural
    features = None
    if jobs:
        features = forward([(pending[row], int(candidates[row, column])) for row, column in jobs])
        values[needed] = values_of(head, features)
    values = values.gather(1, first).masked_fill(~drawn, torch.nan)
    broken = (values.isnan() & drawn).any(dim=1).tolist()
    column, found = select(
        values,
        drawn,
        stack_thresholds([each.filtering.scorer for each in pending])[:, None],
        head.config.polarity,
        config.fallback,
        _probabilities(pending, candidates) if config.fallback == "args" else None,
        config.prob_weight,
    )
    verdicts = []
    for row in range(len(pending)):
        winner = int(first[row, column[row]])
        count = 1 + int(needed[row].sum())
        verdict = Verdict(int(candidates[row, winner]), float(values[row, winner]), count)
        if broken[row]:
            verdict.error = NOT_FINITE
        elif not found[row] and config.fallback == "abstain" and pending[row].may_end():
            verdict.token, verdict.value = None, float(natural[row])
        elif winner > 0 and features is not None:
            job = jobs.index([row, winner])
            verdict.winner = Winner(job, features[job])
        verdicts.append(verdict)
    return verdicts


def _probabilities(pending: Sequence[Pending], candidates: Tensor) -> Tensor:
    rows = torch.stack([each.scores.softmax(dim=-1).cpu() for each in pending])
    return rows.gather(1, candidates.clamp(min=0))
