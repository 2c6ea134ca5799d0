"""Puts other tokens in the place of the last tokens of a row.

Cache, methods, record and stream are then as if these tokens had been committed from the start.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import StoppingCriteriaList

from hf_value_steer.backbone.features import Features
from hf_value_steer.generation.branches import Chain
from hf_value_steer.generation.engine import Engine
from hf_value_steer.generation.history import History
from hf_value_steer.generation.method import Method, Moment
from hf_value_steer.generation.output import Record
from hf_value_steer.generation.state import Draw, State
from hf_value_steer.generation.streaming import LaggingStream


@dataclass
class Rewriting:
    """Takes tokens of one row back and commits others. Called by the loop between two steps.

    Args:
        engine, history, record, stream: of the call.
        reporter (*optional*): the method whose values are recorded.
        scores: from a text `(batch, length)` and raw logits `(batch, vocab)` to what the call permits and to processed
            scores, `(batch, vocab)` each.
        criteria: of the call.
        pads (`bool`): whether a row can end before the others.
    """

    engine: Engine
    history: History
    record: Record
    stream: LaggingStream
    reporter: Method | None
    scores: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    criteria: StoppingCriteriaList
    pads: bool

    def __call__(self, row: int, tokens: Tensor, input_ids: Tensor, state: State) -> tuple[Tensor, Moment]:
        """Rewrite, and return the text and the moment that it has come to.

        Args:
            row (`int`): of the batch.
            tokens (`torch.LongTensor` of shape `(n,)`): they take the place of the last n tokens of the row.
            input_ids (`torch.LongTensor` of shape `(batch, length)`): the text; it is left alone.
            state: what the last tokens have left behind. In this row it is overwritten.
        """
        count, length = len(tokens), input_ids.shape[1]
        self.history.refuse_beyond(row, count)
        input_ids = input_ids.clone()
        same = input_ids[row, -count:] == tokens
        input_ids[row, -count:] = tokens
        chain = self.engine.chain(input_ids, row, count)
        chain.overwrite()
        self.history.undo(row, count)
        for place in range(count):
            ago = count - place
            moment = self._moment(chain, place, ago, input_ids[:, : length - ago + 1], bool(same[:place].all()))
            self.history.replay(row, ago, moment)
            self._write(moment, chain, place, ago)
        chain.put_last(state)
        self.stream.rewrite(row, tokens)
        return input_ids, self.history.pasts[-1].moment

    def _moment(self, chain: Chain, place: int, ago: int, text: Tensor, same: bool) -> Moment:
        """What the methods are told of one token of the chain; other rows are as they were.

        Args:
            place (`int`), ago (`int`): of the token, counted in the chain, and from the end of the text.
            text (`torch.LongTensor` of shape `(batch, length)`): up to this token.
            same (`bool`): whether the row reads as before up to the token before it.
        """
        was, row = self.history.pasts[-ago].moment, chain.row
        assert was.draw is not None and was.outcome is not None
        unfinished_before = self.history.pasts[-ago - 1].moment.unfinished[row]
        draw, outcome = copy.copy(was.draw), copy.copy(was.outcome)
        draw.input_ids, outcome.tokens = text[:, :-1], text[:, -1]
        if not same:
            draw.tokens = _with(draw.tokens, row, text[row, -1])
        if place > 0:
            self._score(draw, chain, place)
        features = Features(
            {
                layer: _with(state, row, chain.reached.features[layer][0, place])
                for layer, state in was.features.items()
            }
        )
        live = _with(was.live, row, unfinished_before) if self.pads else was.live
        if not bool(live[row]):
            raise ValueError(
                f"Row {row} cannot go on after its end: of the tokens that take others' place, one ends it."
            )
        ended = self.criteria(text, self.record.scores)[row]
        unfinished = _with(was.unfinished, row, unfinished_before & ~ended)
        moment = Moment(was.step, features, live, unfinished, draw, outcome)
        if self.reporter is not None:
            outcome.values = _with(outcome.values, row, moment.values_of(self.reporter)[row])
        return moment

    def _score(self, draw: Draw, chain: Chain, place: int) -> None:
        """The scores that a token is drawn from after other tokens, in the row of the chain."""
        draw.logits = logits = _with(draw.logits, chain.row, chain.logits[place - 1].to(draw.logits))
        permitted, scores = self.scores(draw.input_ids, logits)
        draw.permitted = _with(draw.permitted, chain.row, permitted[chain.row])
        draw.scores = _with(draw.scores, chain.row, scores[chain.row])

    def _write(self, moment: Moment, chain: Chain, place: int, ago: int) -> None:
        """Put one token of the chain into the record."""
        draw, outcome, row = moment.draw, moment.outcome, chain.row
        assert draw is not None and outcome is not None
        fields = {
            "token_values": outcome.values[row],
            "interventions": outcome.tokens[row] != draw.tokens[row],
        }
        if place > 0:  # scores and states of the token before it: those before the first one have not changed
            fields |= {"scores": draw.scores[row], "logits": chain.logits[place - 1]}
            self.record.rewrite_states(row, ago, chain.hidden_states(place - 1))
        self.record.rewrite(row, ago, **fields)


def _with(tensor: Tensor, row: int, entry: Tensor) -> Tensor:
    """`tensor` `(batch, ...)` with another entry in one row."""
    changed = tensor.clone()
    changed[row] = entry
    return changed
