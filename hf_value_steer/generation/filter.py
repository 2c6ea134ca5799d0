"""Value-filtered decoding (arXiv 2605.14746) as a method: it judges natural samples and proposes alternatives."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation.candidates import (
    another_key,
    likely_alternatives,
    random_key,
    sampled_alternatives,
    uniforms,
)
from hf_value_steer.generation.method import Call, Method, Moment, ScoredMethod
from hf_value_steer.generation.scorer import Scorer
from hf_value_steer.generation.state import Draw
from hf_value_steer.generation.validation import eos_token
from hf_value_steer.policy import Candidates, Decision, acceptable, acts, decide, may_insert, soft_thresholds


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
        self.evaluation, self.lookahead = config.evaluation, config.lookahead
        self.most = config.num_candidates + (eos is not None)  # the ending is forwarded beside the candidates
        device = scorer.threshold.device
        self.key = random_key(device, config.seed)
        self.luck = None if config.selection == "first" else another_key(self.key)
        self.interventions = torch.zeros(len(scorer.threshold), dtype=torch.long, device=device)

    @classmethod
    def bind(cls, config: ValueFilterConfig, call: Call) -> list[Method]:
        """The filter that `config` asks for."""
        if config.selection == "soft" and not call.config.do_sample:
            raise UnsupportedError('`selection="soft"` accepts draws: it needs `do_sample=True`.')
        scorer = call.bind(config)
        eos = eos_token(call.config, 'fallback="abstain"') if config.fallback == "abstain" else None
        return [cls(config, scorer, call.config.do_sample and config.proposal == "sample", eos)]

    def acting(self, draw: Draw) -> Tensor:
        config = self.config
        return acts(self.interventions, draw.step, config.min_new_tokens, config.max_interventions)

    def accepts(self, values: Tensor, draw: Draw) -> Tensor:
        if self.luck is None:
            return self.scorer.accepts(values)
        thresholds = self._thresholds(self.luck, draw, range(len(values)), 1)
        return acceptable(values, thresholds[:, 0], self.scorer.polarity)

    def _thresholds(self, luck: bytes, draw: Draw, rows: Sequence[int], count: int) -> Tensor:
        """What the values of the first `count` candidates of some rows have to pass in this step, `(rows, count)`."""
        of_all = self.scorer.threshold
        threshold = of_all if len(rows) == len(of_all) else of_all[list(rows)]
        drawn = uniforms(luck, rows, draw.step, count).to(threshold.device)
        return soft_thresholds(threshold, drawn, self.config.beta, self.scorer.polarity)

    def propose(self, draw: Draw, rows: Tensor, known: Tensor, acting: Tensor) -> Candidates:
        natural, count, scores = draw.tokens[rows], self.config.num_candidates - 1, draw.scores[rows]
        whole = len(rows) == len(draw.tokens)  # rows are in order; else the host waits for their numbers
        numbers = range(len(rows)) if whole or not self.sampled else rows.tolist()
        if self.sampled:
            others = sampled_alternatives(scores, uniforms(self.key, numbers, draw.step, count))
        else:
            others = likely_alternatives(scores, natural, count)
        others = others.masked_fill(~acting[:, None], -1)
        thresholds = None if self.luck is None else self._thresholds(self.luck, draw, numbers, 1 + count)
        return Candidates(torch.cat([natural[:, None], others], dim=1), known, self.eos, thresholds)

    def decide(self, draw: Draw, rows: Tensor, candidates: Candidates, values: Tensor, acting: Tensor) -> Decision:
        config, scorer = self.config, self.scorer
        may_end = acting if self.eos is None else acting & may_insert(draw.permitted[rows, self.eos, None])
        probabilities = draw.scores[rows].softmax(dim=-1) if config.fallback == "args" else None
        rule = (scorer.threshold[rows], scorer.polarity, config.fallback)
        return decide(candidates, values, *rule, may_end, probabilities, config.prob_weight)

    def observe(self, moment: Moment) -> None:
        self.values_at(moment)
        if moment.draw is not None and moment.outcome is not None:
            self.interventions = self.interventions + (moment.outcome.tokens != moment.draw.tokens)

    def record(self, moment: Moment) -> Mapping[str, Tensor]:
        if not self.config.output_candidates or moment.outcome is None or moment.draw is None:
            return {}
        candidates, values, _ = moment.outcome.make_room(moment.draw, self.most)
        count = self.config.num_candidates
        return {"candidates": candidates[:, :count], "candidate_values": values[:, :count]}
