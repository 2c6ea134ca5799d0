"""One step of value-filtered decoding (arXiv 2605.14746): check the natural sample, look further, commit one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.generation.candidates import (
    compact,
    first_occurrence,
    likely_alternatives,
    random_key,
    sampled_alternatives,
    uniforms,
)
from hf_value_steer.generation.engine import Engine, Revision, State
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.scorer import Scorer, require_finite
from hf_value_steer.policy import may_insert, select


@dataclass
class Draw:
    """What a step starts from, all of shape `(batch, ...)`.

    Args:
        step (`int`): number of new tokens so far.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the text so far.
        permitted (`torch.FloatTensor` of shape `(batch, vocab)`): scores before anything that only narrows the
            sampling; `-inf` is what the call forbids.
        scores (`torch.FloatTensor` of shape `(batch, vocab)`): processed scores.
        tokens (`torch.LongTensor` of shape `(batch,)`): natural samples, padding and forced tokens put in.
        live (`torch.BoolTensor` of shape `(batch,)`): rows whose token counts.
        forced (`torch.BoolTensor` of shape `(batch,)`): rows whose token is prescribed by abstention.
        impossible (`torch.BoolTensor` of shape `(batch,)`): live rows in which the processors allow no token.
    """

    step: int
    input_ids: Tensor
    permitted: Tensor
    scores: Tensor
    tokens: Tensor
    live: Tensor
    forced: Tensor
    impossible: Tensor

    def refuse_impossible(self) -> None:
        """Raise a `ValueError` if there is a row without any token to draw."""
        if bool(self.impossible.any()):
            rows = self.impossible.nonzero().flatten().tolist()
            raise ValueError(f"The logits processors allow no token at new token {self.step} in row(s) {rows}.")


@dataclass
class Outcome:
    """What a step committed, all of shape `(batch, ...)`; see [`ValueSteerDecoderOnlyOutput`] for the fields."""

    tokens: Tensor
    evaluated: Tensor
    values: Tensor
    candidates: Tensor
    candidate_values: Tensor


@dataclass
class Decision:
    """Which candidate each looked-at row commits.

    Args:
        values (`torch.FloatTensor` of shape `(rows, K)`): value of each candidate, NaN where there is none.
        column (`torch.LongTensor` of shape `(rows,)`): the committed candidate's column.
        found (`torch.BoolTensor` of shape `(rows,)`): whether an acceptable candidate was found.
    """

    values: Tensor
    column: Tensor
    found: Tensor


class ValueFilter:
    """The filter of one `generate` call.

    Args:
        config: runtime configuration.
        scorer: head and thresholds, bound to the model.
        stops: where to note which rows `fallback="abstain"` ended.
        engine: forward passes and cache.
        sampled: whether alternatives are drawn, or the next most likely tokens.
        eos (`int`, *optional*): the token that ends a row under `fallback="abstain"`.
    """

    def __init__(
        self,
        config: ValueFilterConfig,
        scorer: Scorer,
        stops: Stops,
        engine: Engine,
        sampled: bool,
        eos: int | None,
    ):
        self.config, self.scorer, self.stops, self.engine = config, scorer, stops, engine
        self.sampled, self.eos = sampled, eos
        self.most = config.num_candidates + (config.fallback == "abstain")
        device = scorer.threshold.device
        self.key = random_key(device, config.seed)
        self.interventions = torch.zeros(len(scorer.threshold), dtype=torch.long, device=device)

    def step(self, draw: Draw) -> tuple[State, Outcome]:
        """Forward, choose and commit one token a row."""
        checked = draw.live & ~draw.forced
        if draw.step < self.config.min_new_tokens:
            checked = torch.zeros_like(checked)
        if self.config.max_interventions is not None:
            checked = checked & (self.interventions < self.config.max_interventions)
        if self.config.evaluation == "lazy":
            state, outcome = self._lazy(draw, checked)
        else:
            state, outcome = self._eager(draw, checked)
        self.interventions += outcome.tokens != draw.tokens
        return state, outcome

    def _lazy(self, draw: Draw, checked: Tensor) -> tuple[State, Outcome]:
        outcomes: list[Outcome] = []

        def revise(features: Tensor) -> Revision | None:
            values = self.scorer.values(features)
            outcomes.append(self._natural_outcome(draw, values))
            rejected = checked & ~self.scorer.accepts(values)
            if not bool((rejected | draw.impossible | (draw.live & values.isnan())).any()):
                return None
            draw.refuse_impossible()
            require_finite(values, draw.live, draw.step)
            return self._replace_rejected(outcomes[0], draw, rejected.nonzero().squeeze(1))

        state = self.engine.advance(torch.cat([draw.input_ids, draw.tokens[:, None]], dim=-1), revise)
        return state, outcomes[0]

    def _eager(self, draw: Draw, checked: Tensor) -> tuple[State, Outcome]:
        draw.refuse_impossible()
        rows = torch.arange(len(checked), device=checked.device)
        candidates = self._candidates(draw, rows).masked_fill(~checked[:, None], -1)
        candidates[:, 0] = draw.tokens
        known = torch.full((len(rows), 1), torch.nan, device=checked.device)
        look = _Look(self, draw, rows, checked, candidates, known)
        state, lookahead = self.engine.look_ahead(draw.input_ids, look.tokens, look.choose, most=self.most)
        lookahead.append(look.slot())
        outcome = self._natural_outcome(draw, look.decision.values[:, 0])
        self._write(outcome, rows, look)
        return state, outcome

    def _replace_rejected(self, outcome: Outcome, draw: Draw, rows: Tensor) -> Revision | None:
        known = outcome.values[rows, None]
        look = _Look(self, draw, rows, torch.ones_like(rows, dtype=torch.bool), self._candidates(draw, rows), known)
        revision = None
        if look.tokens.shape[1] == 0:
            look.decide(look.known)
        else:
            state, lookahead = self.engine.look_ahead(draw.input_ids, look.tokens, look.choose, rows, self.most)
            revision = Revision(rows, state, look.first_column() > 0)
            lookahead.replace(revision.keep, look.slot())
        self._write(outcome, rows, look)
        return revision

    def _candidates(self, draw: Draw, rows: Tensor) -> Tensor:
        """Natural sample and alternatives of some rows, `(rows, K)`, -1 where there is none."""
        natural, count = draw.tokens[rows], self.config.num_candidates - 1
        scores = draw.scores[rows]
        if self.sampled:
            others = sampled_alternatives(scores, uniforms(self.key, rows.tolist(), draw.step, count))
        else:
            others = likely_alternatives(scores, natural, count)
        return torch.cat([natural[:, None], others], dim=1)

    def _natural_outcome(self, draw: Draw, values: Tensor) -> Outcome:
        shape = (len(draw.tokens), self.config.num_candidates)
        candidates = torch.full(shape, -1, device=draw.tokens.device)
        candidate_values = torch.full(shape, torch.nan, device=draw.tokens.device)
        values = values.masked_fill(~draw.live, torch.nan)
        candidates[:, 0] = draw.tokens.masked_fill(~draw.live, -1)
        candidate_values[:, 0] = values
        return Outcome(draw.tokens, draw.live.long(), values, candidates, candidate_values)

    def _write(self, outcome: Outcome, rows: Tensor, look: "_Look") -> None:
        live = look.draw.live[rows]
        rows, count = rows[live], self.config.num_candidates
        column = look.decision.column[live, None]
        outcome.tokens = outcome.tokens.clone()
        outcome.tokens[rows] = look.candidates[live].gather(1, column).squeeze(1)
        outcome.values[rows] = look.decision.values[live].gather(1, column).squeeze(1)
        outcome.evaluated[rows] = look.distinct[live, :count].sum(dim=-1)
        outcome.candidates[rows] = look.candidates[live, :count]
        outcome.candidate_values[rows] = look.decision.values[live, :count]
        ended = torch.zeros_like(look.draw.live).index_put((rows,), column.squeeze(1) == count)
        self.stops.mark(ended, look.draw.step, outcome.candidate_values[:, 0])


class _Look:
    """The candidates of some rows: which of them to forward, and what is decided once their features are there.

    Under `fallback="abstain"` EOS is forwarded as one more candidate, column K, so that a row that ends has the
    cache of what it says.

    Args:
        owner: the filter.
        draw: the step.
        rows (`torch.LongTensor` of shape `(rows,)`): which rows of the batch these are.
        checked (`torch.BoolTensor` of shape `(rows,)`): rows that may end under `fallback="abstain"`, where the call
            permits it.
        candidates (`torch.LongTensor` of shape `(rows, K)`): token ids, -1 where there is none.
        known (`torch.FloatTensor` of shape `(rows, 1)`): value of the natural sample, NaN where it must be forwarded.
    """

    def __init__(
        self, owner: ValueFilter, draw: Draw, rows: Tensor, checked: Tensor, candidates: Tensor, known: Tensor
    ):
        self.owner, self.draw, self.rows, self.checked, self.known = owner, draw, rows, checked, known
        self.drawn = candidates >= 0
        if owner.config.fallback == "abstain":
            candidates = torch.nn.functional.pad(candidates, (0, 1), value=owner.eos)
        self.candidates = candidates
        self.first = first_occurrence(candidates)
        self.distinct = (candidates >= 0) & (self.first == torch.arange(candidates.shape[1], device=rows.device))
        self.needed = self.distinct.clone()
        self.needed[:, 0] &= known[:, 0].isnan()
        columns, self.slots = compact(self.needed)
        self.tokens = candidates.gather(1, columns).clamp(min=0)

    def choose(self, features: Tensor) -> Tensor:
        """From features `(rows, width, hidden)` of the forwarded tokens to the chosen one's slot `(rows,)`."""
        forwarded = self.owner.scorer.values(features)
        values = forwarded.gather(1, self.slots.clamp(0, forwarded.shape[1] - 1)).masked_fill(~self.needed, torch.nan)
        values[:, :1] = torch.where(self.needed[:, :1], values[:, :1], self.known)
        self.decide(values.gather(1, self.first))
        return self.slot()

    def decide(self, values: Tensor) -> None:
        """Apply the policy to the values of all candidates, `(rows, K)` (duplicates included)."""
        owner, width = self.owner, self.drawn.shape[1]
        values = values.expand(self.candidates.shape).masked_fill(self.candidates < 0, torch.nan)
        live = self.draw.live[self.rows]
        require_finite(values.masked_fill(self.candidates < 0, 0.0), live, self.draw.step)
        column, found = select(
            values[:, :width],
            self.drawn,
            owner.scorer.threshold[self.rows, None],
            owner.scorer.polarity,
            owner.config.fallback,
            self._probabilities() if owner.config.fallback == "args" else None,
            owner.config.prob_weight,
        )
        if owner.config.fallback == "abstain":
            ends = self.checked & may_insert(self.draw.permitted[self.rows, owner.eos, None])
            column = torch.where(found | ~ends, column, width)
        self.decision = Decision(values, column, found)

    def first_column(self) -> Tensor:
        """The column in which the chosen token stands first."""
        return self.first.gather(1, self.decision.column[:, None]).squeeze(1)

    def slot(self) -> Tensor:
        """Where the chosen token stands among the forwarded ones (0 if it was not among them)."""
        return self.slots.gather(1, self.first_column()[:, None]).squeeze(1).clamp(min=0)

    def _probabilities(self) -> Tensor:
        probabilities = self.draw.scores[self.rows].softmax(dim=-1)
        return probabilities.gather(1, self.candidates.clamp(min=0))
