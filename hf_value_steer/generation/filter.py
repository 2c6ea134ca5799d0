"""Value-filtered decoding (arXiv 2605.14746) as a method: it judges natural samples and proposes alternatives."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation.candidates import (
    another_key,
    likely_alternatives,
    most_likely,
    random_key,
    sampled_alternatives,
    uniforms,
)
from hf_value_steer.generation.method import Call, Method, Moment, ScoredMethod
from hf_value_steer.generation.scorer import Scorer
from hf_value_steer.generation.soft_selection import reweigh, soft_thresholds
from hf_value_steer.generation.state import Draw
from hf_value_steer.generation.validation import eos_token
from hf_value_steer.policy import (
    Candidates,
    Decision,
    acceptable,
    acts,
    decide,
    may_insert,
)


class ValueFilter(ScoredMethod):
    """The filter of one `generate` call. A step asks it; it forwards nothing itself.

    A lazy step asks [`accepts`] about the values of the natural samples, and goes on for the rows that are rejected.
    An eager step goes on for all rows. Then [`propose`] gives candidates, and [`decide`] chooses by their values.

    Args:
        config: runtime configuration.
        scorer: head and thresholds, bound to the model.
        sampled: whether alternatives are drawn, or the next most likely tokens.
        eos (`int`, *optional*): the token that ends a row under `fallback="abstain"`.
    """

    judges = True
    rowwise: ClassVar[tuple[str, ...]] = ("memory", "interventions")

    def __init__(self, config: ValueFilterConfig, scorer: Scorer, sampled: bool, eos: int | None):
        super().__init__(scorer)
        self.config, self.sampled, self.eos = config, sampled, eos
        self.ending = torch.tensor([eos or 0], device=scorer.threshold.device)  # a graph would keep the number itself
        self.evaluation, self.lookahead = config.evaluation, config.lookahead
        self.most = config.num_candidates + (eos is not None)  # the ending is forwarded beside the candidates
        device = scorer.threshold.device
        self.key = random_key(device, config.seed)
        self.luck = None if config.selection == "first" else another_key(self.key)
        self.interventions = torch.zeros(len(scorer.threshold), dtype=torch.long, device=device)

    @classmethod
    def bind(cls, config: ValueFilterConfig, call: Call) -> list[Method]:
        """The filter that `config` asks for."""
        sampled = call.config.do_sample and config.proposal == "sample"
        if config.selection == "soft" and not sampled:
            if config.proposal == "sample":
                raise UnsupportedError('`selection="soft"` draws: it needs `do_sample=True`, or `proposal="topk"`.')
            return [Reweighing(config, call.bind(config), call.config.do_sample)]
        scorer = call.bind(config)
        eos = eos_token(call.config, 'fallback="abstain"') if config.fallback == "abstain" else None
        return [cls(config, scorer, sampled, eos)]

    def acting(self, draw: Draw) -> Tensor:
        config = self.config
        return acts(self.interventions, draw.step, config.min_new_tokens, config.max_interventions)

    def accepts(self, values: Tensor, draw: Draw) -> Tensor:
        if self.luck is None:
            return self.scorer.accepts(values)
        threshold = self._soft(self.scorer.threshold, self._luck(draw, range(len(values)), 1))
        return acceptable(values, threshold[:, 0], self.scorer.polarity)

    def _luck(self, draw: Draw, rows: Sequence[int], count: int) -> Tensor | None:
        """Uniform numbers of the first `count` candidates of some rows in this step, `(rows, count)`."""
        return (
            None if self.luck is None else uniforms(self.luck, rows, draw.step, count).float().to(draw.tokens.device)
        )

    def _soft(self, threshold: Tensor, luck: Tensor | None) -> Tensor:
        """What values have to pass: one threshold a row, or one a candidate."""
        if luck is None:
            return threshold
        return soft_thresholds(threshold, luck, self.config.beta, self.scorer.polarity)

    def propose(self, draw: Draw, rows: Tensor, known: Tensor, acting: Tensor) -> Candidates:
        natural, count, scores = draw.tokens[rows], self.config.num_candidates - 1, draw.scores[rows]
        luck = None
        if self.sampled:
            numbers = _numbers(draw, rows)
            others = sampled_alternatives(scores, uniforms(self.key, numbers, draw.step, count))
            luck = self._luck(draw, numbers, 1 + count)
        else:
            others = likely_alternatives(scores, natural, count)
        others = others.masked_fill(~acting[:, None], -1)
        return Candidates(torch.cat([natural[:, None], others], dim=1), known, self.eos, luck)

    def decide(self, draw: Draw, rows: Tensor, candidates: Candidates, values: Tensor, acting: Tensor) -> Decision:
        config, scorer = self.config, self.scorer
        ends = config.fallback == "abstain"
        may_end = acting & may_insert(draw.permitted[rows].index_select(1, self.ending)) if ends else acting
        probabilities = draw.scores[rows].softmax(dim=-1) if config.fallback == "args" else None
        threshold = self._soft(scorer.threshold[rows], candidates.luck)
        rule = (threshold, scorer.polarity, config.fallback)
        return decide(candidates, values, *rule, may_end, probabilities, config.prob_weight)

    def observe(self, moment: Moment) -> None:
        self.values_at(moment)
        if moment.draw is not None and moment.outcome is not None:
            self.interventions = self.interventions + (moment.outcome.tokens != moment.draw.tokens)

    def record(self, moment: Moment) -> Mapping[str, Tensor]:
        if not self.config.output_candidates or moment.outcome is None or moment.draw is None:
            return {}
        candidates, values, _ = moment.outcome.make_room(moment.draw, self.most)
        count = self.most - (self.eos is not None)
        return {"candidates": candidates[:, :count], "candidate_values": values[:, :count]}


class Reweighing(ValueFilter):
    """Soft selection among the most likely tokens: one of them is drawn by its probability and its value.

    A natural sample is nothing special here: it is kept if it is drawn once more. So every step looks ahead.

    Args:
        draws: whether a token is drawn, or the best one taken.
    """

    def __init__(self, config: ValueFilterConfig, scorer: Scorer, draws: bool):
        super().__init__(config, scorer, sampled=False, eos=None)
        self.most = config.num_candidates + 1  # the natural sample may be none of them
        self.luck = self.luck if draws else None

    def accepts(self, values: Tensor, draw: Draw) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(values, dtype=torch.bool)

    def _soft(self, threshold: Tensor, luck: Tensor | None) -> Tensor:  # noqa: ARG002
        return threshold

    def propose(self, draw: Draw, rows: Tensor, known: Tensor, acting: Tensor) -> Candidates:
        natural, acting = draw.tokens[rows, None], acting[:, None]
        likely = most_likely(draw.scores[rows], self.config.num_candidates)
        again = likely == natural
        luck = None if self.luck is None else self._luck(draw, _numbers(draw, rows), self.most)
        tokens = torch.cat([natural, likely.masked_fill(again | ~acting, -1)], dim=1)
        candidates = Candidates(tokens, known, luck=luck)
        candidates.drawn[:, :1] = again.any(dim=1, keepdim=True) | ~acting
        return candidates

    def decide(self, draw: Draw, rows: Tensor, candidates: Candidates, values: Tensor, acting: Tensor) -> Decision:
        hard = super().decide(draw, rows, candidates, values, acting)
        scores = draw.scores[rows].gather(1, candidates.tokens.clamp(min=0))
        rule = (self.config.beta, self.scorer.polarity, candidates.luck)
        return replace(hard, column=reweigh(values, candidates.drawn, scores, *rule))


def _numbers(draw: Draw, rows: Tensor) -> Sequence[int]:
    """The numbers of these rows. All are in order; of some the host waits for them."""
    return range(len(rows)) if len(rows) == len(draw.tokens) else rows.tolist()
