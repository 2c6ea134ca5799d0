"""Value-filtered decoding (arXiv 2605.14746) as a method: it judges natural samples and proposes alternatives."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.candidates import (
    another_key,
    likely_alternatives,
    most_likely,
    random_key,
    sampled_alternatives,
    uniforms,
)
from hf_value_steer.generation.method import Method, Moment
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.scored_method import ScoredMethod
from hf_value_steer.generation.scorer import Scorer, bind
from hf_value_steer.generation.soft_selection import reweigh, soft_thresholds
from hf_value_steer.generation.state import Draw
from hf_value_steer.generation.text_values import TextValues
from hf_value_steer.generation.validation import eos_token
from hf_value_steer.judges.in_the_loop import text_judge
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
        config: runtime configuration, settled.
        scorer: head and thresholds, bound to the model.
        draws: whether natural samples are drawn. If not, or with `proposal="topk"`, alternatives are the next most
            likely tokens.
        eos (`int`, *optional*): the token that ends a row under `fallback="abstain"`.
        texts ([`TextValues`], *optional*): where values come from, if not from a head.
    """

    judges = True
    rowwise: ClassVar[tuple[str, ...]] = ("memory", "interventions", "since")

    def __init__(
        self,
        config: ValueFilterConfig,
        scorer: Scorer,
        draws: bool,
        eos: int | None = None,
        texts: TextValues | None = None,
    ):
        super().__init__(scorer)
        self.texts = texts
        self.config, self.draws, self.eos = config, draws, eos
        self.sampled, self.back = draws and config.proposal == "sample", config.rollback
        self.ending = torch.tensor([eos or 0], device=scorer.threshold.device)  # a graph would keep the number itself
        self.evaluation, self.lookahead = config.evaluation, config.lookahead
        self.most = config.num_candidates + (eos is not None)  # the ending is forwarded beside the candidates
        device = scorer.threshold.device
        self.key = random_key(device, config.seed)
        self.luck = None if config.selection == "first" else another_key(self.key)
        self.interventions = torch.zeros(len(scorer.threshold), dtype=torch.long, device=device)
        self.since = torch.zeros_like(self.interventions)  # of the text that is judged: what was written since then
        self.numbers: Sequence[int] = range(len(scorer.threshold))  # of its rows in the batch

    def separate(self, row: int, stops: Stops) -> None:
        super().separate(row, stops)
        self.numbers = [row]

    @classmethod
    def bind(cls, config: ValueFilterConfig, call: Call) -> list[Method]:
        """The filter that `config` asks for."""
        judge, draws = text_judge(config.value_head), call.config.do_sample
        texts = None if judge is None else TextValues(judge, call)
        scorer = call.bind(config) if judge is None else bind(config, judge, call.rows, call.device, ())
        config = config.settled(scorer.head.config.operating_point)
        if config.reweighs:
            return [Reweighing(config, scorer, draws, texts)]
        if config.selection == "soft" and not draws:
            raise UnsupportedError(
                '`selection="soft"` of the config, or of the head, draws: it needs `do_sample=True`, or '
                '`proposal="topk"`.'
            )
        eos = eos_token(call.config, 'fallback="abstain"') if config.fallback == "abstain" else None
        return [cls(config, scorer, draws, eos, texts)]

    def values_before(self, draw: Draw, rows: Tensor, tokens: Tensor, asked: Tensor) -> Tensor:
        assert self.texts is not None  # or nobody asks
        return self.texts(draw, rows, self._numbers(draw, rows), self.since[rows], tokens, asked)

    def totals(self) -> Mapping[str, Any]:
        return {} if self.texts is None else {"judge_seconds": self.texts.seconds}

    def acting(self, draw: Draw) -> Tensor:
        config = self.config
        return acts(self.interventions, draw.step, config.min_new_tokens, config.max_interventions)

    def accepts(self, values: Tensor, draw: Draw) -> Tensor:
        if self.luck is None:
            return self.scorer.accepts(values)
        threshold = self._soft(self.scorer.threshold, self._luck(draw, self.numbers, 1))
        return acceptable(values, threshold[:, 0], self.scorer.polarity)

    def _luck(self, draw: Draw, rows: Sequence[int], count: int) -> Tensor | None:
        """Uniform numbers of the first `count` candidates of some rows in this step, `(rows, count)`."""
        if self.luck is None:
            return None
        return uniforms(self.luck, rows, draw.step, count, draw.visit).float().to(draw.tokens.device)

    def _soft(self, threshold: Tensor, luck: Tensor | None) -> Tensor:
        """What values have to pass: one threshold a row, or one a candidate."""
        if luck is None:
            return threshold
        return soft_thresholds(threshold, luck, self.config.beta, self.scorer.polarity)

    def propose(self, draw: Draw, rows: Tensor, known: Tensor, acting: Tensor) -> Candidates:
        numbers = self._numbers(draw, rows)
        tokens = self._draw(draw, rows, numbers) if draw.candidates is None else draw.candidates[rows]
        tokens = torch.cat([tokens[:, :1], tokens[:, 1:].masked_fill(~acting[:, None], -1)], dim=1)
        return Candidates(tokens, known, self.eos, self._luck(draw, numbers, tokens.shape[1]))

    def _draw(self, draw: Draw, rows: Tensor, numbers: Sequence[int]) -> Tensor:
        """The natural samples of some rows, and their alternatives, `(rows, K)`."""
        natural, count, scores = draw.tokens[rows], self.config.num_candidates - 1, draw.scores[rows]
        if self.sampled:
            others = sampled_alternatives(scores, uniforms(self.key, numbers, draw.step, count))
        else:
            others = likely_alternatives(scores, natural, count)
        return torch.cat([natural[:, None], others], dim=1)

    def _numbers(self, draw: Draw, rows: Tensor) -> Sequence[int]:
        """The numbers of these rows in the batch. All are in order; of some the host waits for them."""
        return self.numbers if len(rows) == len(draw.tokens) else [self.numbers[row] for row in rows.tolist()]

    def visit(self, draw: Draw) -> Tensor:
        count = self.config.num_candidates
        numbers = uniforms(self.key, self.numbers, draw.step, count if self.sampled else 1, draw.visit)
        if self.sampled:
            return sampled_alternatives(draw.scores, numbers)
        if not self.draws:
            return most_likely(draw.scores, count)
        natural = sampled_alternatives(draw.scores, numbers)
        return torch.cat([natural, likely_alternatives(draw.scores, natural[:, 0], count - 1)], dim=1)

    def decide(self, draw: Draw, rows: Tensor, candidates: Candidates, values: Tensor, acting: Tensor) -> Decision:
        config, scorer = self.config, self.scorer
        ends = config.fallback == "abstain"
        may_end = acting & may_insert(draw.permitted[rows].index_select(1, self.ending)) if ends else acting
        probabilities = draw.scores[rows].softmax(dim=-1) if config.fallback == "args" else None
        threshold = self._soft(scorer.threshold[rows], candidates.luck)
        rule = (threshold, scorer.polarity, config.fallback)
        return decide(candidates, values, *rule, may_end, probabilities, config.prob_weight)

    def observe(self, moment: Moment) -> None:
        if self.texts is None:
            self.values_at(moment)
        if moment.draw is not None and moment.outcome is not None:
            self.interventions = self.interventions + (moment.outcome.tokens != moment.draw.tokens)
            if self.texts is not None and moment.outcome.room is not None:
                self.since = torch.where(moment.outcome.room.dead_ends, moment.step, self.since)

    def record(self, moment: Moment) -> Mapping[str, Tensor]:
        assert moment.draw is not None and moment.outcome is not None  # of a prompt there is no record
        room, count = moment.outcome.room, self.most - (self.eos is not None)
        dead_ends = {"dead_ends": torch.zeros_like(moment.live) if room is None else room.dead_ends}
        if not self.config.output_candidates:
            return dead_ends
        room = moment.outcome.make_room(moment.draw, self.most)
        return {**dead_ends, "candidates": room.candidates[:, :count], "candidate_values": room.values[:, :count]}


class Reweighing(ValueFilter):
    """Soft selection among the most likely tokens: one of them is drawn by its probability and its value.

    A natural sample is nothing special here: it is kept if it is drawn once more. So every step looks ahead.
    """

    def __init__(self, config: ValueFilterConfig, scorer: Scorer, draws: bool, texts: TextValues | None = None):
        super().__init__(config, scorer, draws, texts=texts)
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
        luck = self._luck(draw, self._numbers(draw, rows), self.most)
        tokens = torch.cat([natural, likely.masked_fill(again | ~acting, -1)], dim=1)
        candidates = Candidates(tokens, known, luck=luck)
        candidates.drawn[:, :1] = again.any(dim=1, keepdim=True) | ~acting
        return candidates

    def decide(self, draw: Draw, rows: Tensor, candidates: Candidates, values: Tensor, acting: Tensor) -> Decision:
        hard = super().decide(draw, rows, candidates, values, acting)
        scores = draw.scores[rows].gather(1, candidates.tokens.clamp(min=0))
        rule = (self.config.beta, self.scorer.polarity, candidates.luck)
        column = reweigh(values, candidates.drawn, scores, *rule)
        return replace(hard, column=column, found=torch.ones_like(hard.found))
