"""One row that goes back and on by itself, as a batch of one, while the other rows of the batch wait."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from hf_value_steer.backbone.features import Features
from hf_value_steer.generation.engine import Engine
from hf_value_steer.generation.history import History, Past
from hf_value_steer.generation.method import Method, Moment, around, recorded
from hf_value_steer.generation.output import Record
from hf_value_steer.generation.row_engine import RowEngine
from hf_value_steer.generation.scores import Scores
from hf_value_steer.generation.state import Draw, Outcome, State, of_row, put_row, with_row
from hf_value_steer.generation.steps import DeadEnd, Plain, Step


@dataclass
class Scene:
    """What is the same for all searches of a call.

    Args:
        engine, record, history: of the call; the history knows the methods.
        judge: the method that decides which tokens are kept.
        scores: of the call.
        criteria: of the call.
        step: makes the steps of a row, from an engine and a judge.
        pad (`torch.LongTensor` of shape `()`, *optional*): what fills rows that have ended, where a row can end before
            the others.
    """

    engine: Engine
    record: Record
    history: History
    judge: Method
    scores: Scores
    criteria: StoppingCriteriaList
    step: Callable[[Engine, Method], Step]
    pad: Tensor | None


@dataclass
class Written:
    """One token that a trail has committed.

    Args:
        fields (`dict`): what is recorded of it, `(1, ...)` each.
        before ([`State`], *optional*): from what it was drawn, where that is not what the batch had.
    """

    fields: dict[str, Any]
    before: State | None


class Trail:
    """The text of one row from some earlier token on. A search calls its methods, see [`Rollback`].

    Args:
        scene: of the call.
        row (`int`): of the batch.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the text, as the batch has it.
        state: of the batch, after the last token.
    """

    def __init__(self, scene: Scene, row: int, input_ids: Tensor, state: State):
        self.scene, self.row, self.input_ids, self.batch_state = scene, row, input_ids.clone(), state
        batch = scene.history
        stops = of_row(batch.stops, row)
        self.methods = [method.of_row(row, stops) for method in batch.methods]
        self.history = batch.of_row(row, self.methods, stops)
        self.judge = self.methods[batch.methods.index(scene.judge)]
        self.engine = RowEngine(scene.engine, row, partial(around, self.methods))
        self.step = scene.step(self.engine, self.judge)
        self.length = input_ids.shape[1]
        self.state: State | None = None  # after the last token, if it was written here
        self.written: list[Written] = []

    @property
    def text(self) -> Tensor:
        """Of this row, `(1, length)`."""
        return self.input_ids[self.row : self.row + 1, : self.length]

    @property
    def place(self) -> int:
        """Number of new tokens."""
        return self.history.pasts[-1].moment.step

    @property
    def column(self) -> int:
        """Which of its candidates the last token was."""
        outcome = self.history.pasts[-1].moment.outcome
        assert outcome is not None
        return 0 if outcome.room is None else int(outcome.room.columns)

    @property
    def goes_on(self) -> bool:
        return bool(self.history.pasts[-1].moment.unfinished)

    def take_back(self) -> Past:
        """Take the last token back, and return what was known of it."""
        self.length -= 1
        self.engine.live.take_back()
        self.state = self.written.pop().before if self.written else None
        return self.history.take_back()

    def draw(self) -> Draw:
        """From what the token after one that was written here is drawn; it is not drawn yet."""
        assert self.state is not None
        logits = put_row(self.batch_state.logits, self.row, self.state.logits)  # of the others nobody asks
        both = self.scene.scores(self.input_ids[:, : self.length], logits)
        permitted, scores = (each[self.row : self.row + 1] for each in both)
        unfinished = self.history.pasts[-1].moment.unfinished
        live = torch.ones_like(unfinished) if self.scene.pad is None else unfinished
        nobody, token = torch.zeros_like(live), torch.zeros_like(self.text[:, -1])
        return Draw(self.place, self.text, self.state.logits, permitted, scores, token, live, nobody, nobody)

    def prescribe(self, draw: Draw) -> None:
        """Let methods put tokens in."""
        for method in self.methods:
            method.prescribe(draw)

    def take(self, draw: Draw, natural: Tensor, evaluated: Tensor) -> bool:
        """Commit the token of `draw`, or another one of its candidates; `False` if none of them is acceptable.

        Args:
            natural (`torch.LongTensor` of shape `(1,)`): what counts as the natural sample.
            evaluated (`torch.LongTensor` of shape `(1,)`): how many candidates of this place were looked at before.
        """
        self.engine.at(self.length + 1)
        before = self.engine.live.length  # not that of the text, if there are recurrent states only
        try:
            state, outcome = self.step(draw)
        except DeadEnd:
            if self.engine.live.length > before:  # it has gone in before it was judged
                self.engine.live.take_back()
            self.history.restore()
            return False
        outcome.make_room(draw, self.judge.most)  # what it was chosen from; below, the natural sample is another one
        outcome.evaluated = outcome.evaluated + evaluated
        self._commit(replace(draw, tokens=natural, visit=0, candidates=None), outcome, state)
        return True

    def fill(self) -> None:
        """Commit a token that does not count, after the end of the row."""
        assert self.scene.pad is not None
        draw = self.draw()
        draw.tokens = self.scene.pad.to(draw.tokens).expand_as(draw.tokens)
        self.engine.at(self.length + 1)
        state, outcome = Plain(self.engine, None)(draw)
        self._commit(draw, outcome, state)

    def _commit(self, draw: Draw, outcome: Outcome, state: State) -> None:
        self.input_ids[self.row, self.length] = outcome.tokens[0]
        self.length += 1
        scores = self.scene.record.scores
        given = (self.input_ids[:, : self.length], None if scores is None else scores[: draw.step + 1])
        ended = self.scene.criteria(*given)[self.row : self.row + 1]
        unfinished = self.history.pasts[-1].moment.unfinished & ~ended
        moment = Moment(draw.step + 1, state.features, draw.live, unfinished, draw, outcome)
        moment.know(self.judge, outcome.values)
        for method in self.methods:
            method.observe(moment)
        self.history.keep(moment)
        self.written.append(Written(recorded(self.methods, moment), self.state))
        self.state = state

    def keep(self) -> State:
        """Let the batch have this text, its cache, methods and record. Returns the state that it goes on from."""
        self.engine.live.keep()
        self.scene.history.put(self.row, self.history, len(self.written))
        record, row = self.scene.record, self.row
        for ago, written in zip(range(len(self.written), 0, -1), self.written, strict=True):
            fields = written.fields
            if written.before is not None:
                draw = self.history.pasts[-ago].moment.draw
                assert draw is not None
                fields = fields | {"scores": draw.scores, "logits": written.before.logits}
                record.rewrite_states(row, ago, written.before.hidden_states or ())
            record.rewrite(row, ago, **{name: entry[0] for name, entry in fields.items()})
        assert self.state is not None
        return _with_row(self.batch_state, row, self.state)

    def leave(self) -> None:
        """Let the batch be as it was."""
        self.engine.live.undo()
        self.scene.history.restore_row(self.row)


def _with_row(state: State, row: int, one: State) -> State:
    """`state` with one row as in `one`."""
    features = {layer: put_row(mine, row, one.features[layer]) for layer, mine in state.features.items()}
    pairs = zip(state.hidden_states or (), one.hidden_states or (), strict=True)
    hidden = tuple(put_row(mine, row, own) for mine, own in pairs)
    return replace(with_row(state, row, one), features=Features(features), hidden_states=hidden or None)
