"""One step of a steered generation: forward, judge, and say which tokens are kept.

Lazy and eager steps keep the same tokens. The live cache holds tokens that are kept, and for a part of a lazy step the
natural samples; those that are not kept are overwritten.
"""

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from hf_value_steer.backbone.features import Features
from hf_value_steer.generation.engine import Engine
from hf_value_steer.generation.forwards import Reached
from hf_value_steer.generation.method import Method, Moment
from hf_value_steer.generation.scorer import refuse_broken, require_finite
from hf_value_steer.generation.state import Chosen, Draw, Outcome, State
from hf_value_steer.policy import Candidates, Decision


# Before a text has shown how much is rejected: this share of natural samples, which counts as so many steps.
EXPECTED_RATE, EXPECTED_FOR = 0.05, 16


class DeadEnd(Exception):
    """No candidate is acceptable, where a search has asked for one: the step is left in the middle."""


class Step(Protocol):
    """Takes the [`Draw`] of a step; returns the [`State`] after it and the [`Outcome`]. The loop calls it."""

    def __call__(self, draw: Draw) -> tuple[State, Outcome]: ...


def choose_step(engine: Engine, judge: Method | None, reporter: Method | None, break_even: float = 1.0) -> Step:
    """The way in which this call takes its steps.

    Args:
        engine: forward passes and cache.
        judge (*optional*): the method that decides which tokens are kept.
        reporter (*optional*): the method whose values are reported.
        break_even (`float`): for `evaluation="auto"`, see [`Cheaper`].
    """
    if judge is None:
        return Plain(engine, reporter)
    if not judge.reads:
        return Beforehand(engine, judge)
    if judge.evaluation == "auto":
        return Cheaper(Lazy(engine, judge), Eager(engine, judge), break_even)
    return Eager(engine, judge) if judge.evaluation == "eager" else Lazy(engine, judge)


class Plain:
    """Forwards the drawn tokens and keeps them: for calls without a method that judges."""

    def __init__(self, engine: Engine, reporter: Method | None):
        self.engine, self.reporter = engine, reporter

    def __call__(self, draw: Draw) -> tuple[State, Outcome]:
        draw.refuse_impossible()
        state = self.engine.compute_state(self.engine.read(draw.text()), draw.tokens.device)
        values = torch.full(draw.live.shape, torch.nan, device=draw.live.device)
        if self.reporter is not None:
            values = Moment(draw.step + 1, state.features, draw.live, draw.live).values_of(self.reporter)
        return state, _natural(draw, values)


class Lazy:
    """Forwards the drawn tokens, and alternatives only in rows where one is not acceptable."""

    def __init__(self, engine: Engine, judge: Method):
        self.engine, self.judge = engine, judge

    def __call__(self, draw: Draw) -> tuple[State, Outcome]:
        outcomes: list[Outcome] = []
        reached = self.engine.read(draw.text(), lambda reached: outcomes.append(self._judge(draw, reached)))
        return self.engine.compute_state(reached, draw.tokens.device), outcomes[-1]

    def _judge(self, draw: Draw, reached: Reached) -> Outcome:
        """Keep the natural samples, or let rows go on with others."""
        values = self.judge.values(reached.features.of(self.judge.reads)[:, -1])
        outcome = _natural(draw, values)
        rejected = _acting(self.judge, draw) & ~self.judge.accepts(values, draw)
        # Here the host waits for the device. All that is rare is behind this test.
        if bool((rejected | draw.impossible | (draw.live & values.isnan())).any()):
            draw.refuse_impossible()
            require_finite(values, draw.live, draw.step)
            self._replace(draw, reached, outcome, rejected.nonzero().squeeze(1))
        return outcome

    def _replace(self, draw: Draw, reached: Reached, outcome: Outcome, rows: Tensor) -> None:
        """Look ahead in rows `(n,)`, and let them go on with the candidates that are chosen."""
        everywhere = torch.ones_like(rows, dtype=torch.bool)
        candidates = self.judge.propose(draw, rows, known=everywhere, acting=everywhere)
        ahead, width = None, _width(candidates, asked=True)
        if width > 0:  # some candidate has no value yet
            ahead = self.engine.look_ahead(draw.input_ids, candidates.to_forward(width), rows, self.judge.most)
        forwarded = None if ahead is None else self.judge.values(ahead.features.of(self.judge.reads), rows)
        decision = _decide(self.judge, draw, rows, candidates, forwarded, outcome.values[rows], everywhere)
        _refuse(decision, draw, rows)
        column = _committed_columns(candidates, decision)
        if ahead is not None:
            changed, slot = candidates.first.gather(1, column[:, None]).squeeze(1) > 0, candidates.slot(column)
            ahead.replace(changed, slot)
            self.engine.put(reached, rows, changed, ahead.chosen(slot))
        _write(outcome, draw, rows, candidates, decision, everywhere, self.judge.most)


class Beforehand:
    """Asks about tokens before they are forwarded, for judges that read text and no states: it never looks ahead."""

    def __init__(self, engine: Engine, judge: Method):
        self.engine, self.judge = engine, judge

    def __call__(self, draw: Draw) -> tuple[State, Outcome]:
        draw.refuse_impossible()
        outcome = self._judge(draw)
        text = torch.cat([draw.input_ids, outcome.tokens[:, None]], dim=-1)
        return self.engine.compute_state(self.engine.read(text), draw.tokens.device), outcome

    def _judge(self, draw: Draw) -> Outcome:
        """Keep the natural samples, or take others."""
        rows = torch.arange(len(draw.live), device=draw.live.device)
        values = self.judge.values_before(draw, rows, draw.tokens[:, None], draw.live[:, None])[:, 0]
        outcome = _natural(draw, values)
        rows = (_acting(self.judge, draw) & ~self.judge.accepts(values, draw)).nonzero().squeeze(1)
        if len(rows) > 0:
            everywhere = torch.ones_like(rows, dtype=torch.bool)
            candidates = self.judge.propose(draw, rows, known=everywhere, acting=everywhere)
            width = _width(candidates, asked=True)
            needed = torch.arange(width, device=rows.device) < candidates.needed.sum(dim=-1, keepdim=True)
            asked = self.judge.values_before(draw, rows, candidates.to_forward(width), needed)
            decision = _decide(self.judge, draw, rows, candidates, asked, values[rows], everywhere)
            _refuse(decision, draw, rows)
            _write(outcome, draw, rows, candidates, decision, everywhere, self.judge.most)
        return outcome


class Eager:
    """Forwards all candidates of every row in one pass, and adds the chosen ones to the live cache.

    Nothing depends on what the host would have to wait for.
    """

    def __init__(self, engine: Engine, judge: Method):
        self.engine, self.judge = engine, judge

    def __call__(self, draw: Draw) -> tuple[State, Outcome]:
        acting = _acting(self.judge, draw)
        rows = torch.arange(len(acting), device=acting.device)
        candidates = self.judge.propose(draw, rows, known=torch.zeros_like(acting), acting=acting)
        tokens = candidates.to_forward(_width(candidates, draw.tokens.device.type == "cpu"))
        choose = partial(self._choose, draw, rows, candidates, acting)
        reached, chosen = self.engine.go_on(draw.input_ids, tokens, self.judge.most, choose)
        decision = chosen.decision
        outcome, broken = _natural(draw, decision.values[:, 0]), decision.broken & draw.live
        outcome.refusals = [
            (draw.impossible.any(), draw.refuse_impossible),
            (broken.any(), partial(refuse_broken, broken, rows, draw.step)),
        ]
        _write(outcome, draw, rows, candidates, decision, acting, self.judge.most)
        return self.engine.compute_state(reached, draw.tokens.device), outcome

    def _choose(self, draw: Draw, rows: Tensor, candidates: Candidates, acting: Tensor, features: Features) -> Chosen:
        """The judge's choice. It may be a part of a graph: nothing here depends on what is on the device."""
        unknown = torch.full(rows.shape, torch.nan, device=rows.device)
        forwarded = self.judge.values(features.of(self.judge.reads), rows)
        decision = _decide(self.judge, draw, rows, candidates, forwarded, unknown, acting)
        column = _committed_columns(candidates, decision)
        return Chosen(candidates.slot(column), candidates.tokens.gather(1, column[:, None]).squeeze(1), decision)


class Cheaper:
    """Takes lazy steps, and eager ones from the moment on when they are expected to be cheaper.

    What is expected follows the steps so far, the more the longer the text is.

    Args:
        lazy, eager: the two kinds.
        break_even (`float`): the share of lazy steps that look at alternatives from which on eager ones are cheaper.
    """

    def __init__(self, lazy: Lazy, eager: Eager, break_even: float):
        self.lazy, self.eager, self.break_even = lazy, eager, break_even
        self.steps, self.looks = 0, 0

    def __call__(self, draw: Draw) -> tuple[State, Outcome]:
        unseen = EXPECTED_FOR * (1 - (1 - EXPECTED_RATE) ** len(draw.tokens))
        if self.looks + unseen > self.break_even * (self.steps + EXPECTED_FOR):
            return self.eager(draw)  # which counts nothing: it stays so
        state, outcome = self.lazy(draw)
        self.steps, self.looks = self.steps + 1, self.looks + (outcome.room is not None)
        return state, outcome


def _acting(judge: Method, draw: Draw) -> Tensor:
    """Rows `(batch,)` in which the natural sample may be replaced: it counts, and no method has prescribed it."""
    return judge.acting(draw) & draw.live & ~draw.forced


def _width(candidates: Candidates, asked: bool) -> int:
    """How many tokens of each row are forwarded: all columns, or as few as may be if the host is `asked` to wait."""
    return int(candidates.needed.sum(dim=-1).max()) if asked else candidates.tokens.shape[1]


def _decide(
    judge: Method,
    draw: Draw,
    rows: Tensor,
    candidates: Candidates,
    forwarded: Tensor | None,
    natural: Tensor,
    acting: Tensor,
) -> Decision:
    """The judge's decision in rows `(n,)`.

    Args:
        forwarded (`torch.FloatTensor` of shape `(n, width)`, *optional*): values of candidates, if any were asked for.
        natural (`torch.FloatTensor` of shape `(n,)`): values of natural samples that are none of them.
    """
    values = natural.new_empty(len(rows), 0) if forwarded is None else forwarded
    return judge.decide(draw, rows, candidates, candidates.spread(values, natural), acting)


def _refuse(decision: Decision, draw: Draw, rows: Tensor) -> None:
    """Raise a `ScoringError` if a candidate has no value, and in a search [`DeadEnd`] if none is acceptable."""
    refuse_broken(decision.broken & draw.live[rows], rows, draw.step)
    if draw.candidates is not None and not bool(decision.found.all()):
        raise DeadEnd


def _committed_columns(candidates: Candidates, decision: Decision) -> Tensor:
    """The columns `(n,)` of the committed tokens; that of the ending token where a row ends."""
    return torch.where(decision.ends, candidates.tokens.shape[1] - 1, decision.column)


def _natural(draw: Draw, values: Tensor) -> Outcome:
    """The outcome if all natural samples are kept."""
    values = values.masked_fill(~draw.live, torch.nan)
    return Outcome(draw.tokens, draw.live.long(), values, values)


def _write(
    outcome: Outcome,
    draw: Draw,
    rows: Tensor,
    candidates: Candidates,
    decision: Decision,
    acting: Tensor,
    most: int,
) -> None:
    """Put what was decided in rows `(n,)` into the outcome, except in rows whose token does not count."""
    count, column = candidates.drawn.shape[1], _committed_columns(candidates, decision)[:, None]
    # Until now these are the natural samples, which stay as they are.
    outcome.tokens, outcome.values = outcome.tokens.clone(), outcome.values.clone()
    room = outcome.make_room(draw, most)
    for mine, decided in (
        (outcome.tokens, candidates.tokens.gather(1, column).squeeze(1)),
        (outcome.values, decision.values.gather(1, column).squeeze(1)),
        (outcome.evaluated, candidates.distinct[:, :count].sum(dim=-1)),
        (room.candidates[:, :count], candidates.tokens[:, :count]),
        (room.values[:, :count], decision.values[:, :count]),
        (room.columns, decision.column),
        (room.ended, decision.ends),
        (room.dead_ends, acting & ~decision.found),
    ):
        live = draw.live[rows].view(-1, *[1] * (mine.dim() - 1))
        mine[rows] = torch.where(live, decided, mine[rows])
