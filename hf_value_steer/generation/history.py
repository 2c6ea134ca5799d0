"""The last steps of a generation: what the methods were told, and the state in which each of them left the methods."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_value_steer.backbone.features import Features
from hf_value_steer.generation.method import Method, Moment
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.state import Outcome, of_row, put_row, with_row


@dataclass
class Past:
    """What [`History`] has kept of one step, or of the prompt.

    Args:
        moment: what the methods were told.
        states (`list` of `dict`): after that, for each method its tensors, which have an entry a row.
        stops: which rows had been ended then.
    """

    moment: Moment
    states: list[Mapping[str, Tensor]]
    stops: Stops

    def of_row(self, row: int) -> "Past":
        """The same of one row."""
        moment, draw, outcome = self.moment, self.moment.draw, self.moment.outcome
        one = replace(
            of_row(moment, row),
            features=moment.features.each(lambda states: states[row : row + 1]),
            draw=None if draw is None else of_row(draw, row),
            outcome=None if outcome is None else _outcome_of_row(outcome, row),
        )
        return Past(one, [entries(state, row) for state in self.states], of_row(self.stops, row))

    def with_row(self, row: int, one: "Past") -> "Past":
        """The same with one row as in `one`."""
        moment, other = self.moment, one.moment
        assert moment.draw is not None and moment.outcome is not None
        assert other.draw is not None and other.outcome is not None
        _make_alike(moment, other)
        features = {layer: put_row(mine, row, other.features[layer]) for layer, mine in moment.features.items()}
        merged = replace(
            with_row(moment, row, other),
            features=Features(features),
            draw=with_row(moment.draw, row, other.draw),
            outcome=_outcome_with_row(moment.outcome, row, other.outcome),
        )
        pairs = zip(self.states, one.states, strict=True)
        states = [_with_entries(mine, row, own, len(moment.live)) for mine, own in pairs]
        return Past(merged, states, with_row(self.stops, row, one.stops))


class History:
    """Keeps the last steps, as many as may be taken back. The loop calls [`keep`] after each step.

    Args:
        methods: whose state is kept.
        stops: which rows were ended.
        back (`int`): how many tokens can be taken back, beside the last one; with 0 nothing is kept.
    """

    def __init__(self, methods: Sequence[Method], stops: Stops, back: int):
        self.methods, self.stops, self.back = methods, stops, back
        self.pasts = deque[Past](maxlen=back + 2)

    def keep(self, moment: Moment) -> None:
        """Remember the present state, if tokens may be taken back."""
        if self.back:
            if len(self.pasts) > 1 and (draw := self.pasts[-2].moment.draw) is not None:
                draw.logits = draw.scores  # only those of the last two steps are asked for again, and they are large
            self.pasts.append(Past(moment, [method.snapshot() for method in self.methods], self.stops.copy()))

    def of_row(self, row: int, methods: Sequence[Method], stops: Stops) -> "History":
        """That of one row alone, with copies of the methods."""
        one = History(methods, stops, self.back)
        one.pasts = deque(past.of_row(row) for past in self.pasts)
        return one

    def take_back(self) -> Past:
        """Take the last token back, in all rows, and return what was known of it."""
        last = self.pasts.pop()
        self.restore()
        return last

    def restore(self) -> None:
        """Let the methods be as after the last token."""
        for method, state in zip(self.methods, self.pasts[-1].states, strict=True):
            method.restore(slice(None), state)
        self.stops.become(self.pasts[-1].stops)

    def over(self) -> int:
        """How many of the last steps have no token that counts."""
        steps = [bool(past.moment.live.any()) for past in self.pasts]
        return steps[::-1].index(True) if True in steps else 0

    def put(self, row: int, one: "History", changed: int) -> None:
        """Let one row be as in a history of its own, which is as long, and differs in the last `changed` steps."""
        known = [(id(mine), id(own)) for mine, own in zip(self.methods, one.methods, strict=True)]
        for ago in range(1, changed + 1):
            past, other = self.pasts[-ago], one.pasts[-ago]
            merged = self.pasts[-ago] = past.with_row(row, other)
            for mine, own in known:
                if mine in past.moment.known and own in other.moment.known:
                    merged.moment.known[mine] = put_row(past.moment.known[mine], row, other.moment.known[own])
        self.stops.become(with_row(self.stops, row, one.stops))
        for method, copied in zip(self.methods, one.methods, strict=True):
            method.restore(torch.tensor([row]), copied.snapshot())

    def restore_row(self, row: int) -> None:
        """The same in one row: a search may have moved what copies of the methods share with them."""
        for method, state in zip(self.methods, self.pasts[-1].states, strict=True):
            method.restore(torch.tensor([row]), entries(state, row))


def entries(state: Mapping[str, Tensor], row: int) -> Mapping[str, Tensor]:
    """Those of one row, `(1, ...)` each."""
    return {name: each[row : row + 1] for name, each in state.items()}


def _with_entries(state: Mapping[str, Tensor], row: int, one: Mapping[str, Tensor], rows: int) -> Mapping[str, Tensor]:
    """A state with one row as in `one`; what only one of the two has was never used in the other."""
    new = {name: torch.zeros_like(own).repeat(rows, *[1] * (own.dim() - 1)) for name, own in one.items()}
    return {name: put_row(mine, row, one[name]) if name in one else mine for name, mine in {**new, **state}.items()}


def _outcome_of_row(outcome: Outcome, row: int) -> Outcome:
    return replace(of_row(outcome, row), room=None if outcome.room is None else of_row(outcome.room, row))


def _outcome_with_row(outcome: Outcome, row: int, one: Outcome) -> Outcome:
    room = None if outcome.room is None or one.room is None else with_row(outcome.room, row, one.room)
    return replace(with_row(outcome, row, one), room=room)


def _make_alike(moment: Moment, other: Moment) -> None:
    """Give both outcomes room for candidates, if one has it."""
    outcomes: list[tuple[Moment, Outcome]] = [(each, each.outcome) for each in (moment, other) if each.outcome]
    widths = [outcome.room.candidates.shape[1] for _, outcome in outcomes if outcome.room is not None]
    for each, outcome in outcomes:
        if widths and each.draw is not None:
            outcome.make_room(each.draw, max(widths))
