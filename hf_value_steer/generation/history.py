"""The last steps of a generation, and how to take one row back to an earlier step."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_value_steer.generation.method import Method, Moment
from hf_value_steer.generation.output import Stops


@dataclass
class Past:
    """What [`History`] has kept of one step, or of the prompt.

    Args:
        moment: what the methods were told.
        states (`list` of `dict`): for each method its tensors, which have an entry a row.
        stops: which rows had been ended then.
    """

    moment: Moment
    states: list[Mapping[str, Tensor]]
    stops: Stops


class History:
    """Keeps the last steps, as many as may be taken back.

    The loop calls [`keep`] after each step. The rewriting of tokens calls [`undo`] for a row, and then [`replay`] for
    each of its new tokens.

    Args:
        methods: whose state is kept.
        stops: which rows were ended.
        back (`int`): how many steps can be taken back; with 0 nothing is kept.
    """

    def __init__(self, methods: Sequence[Method], stops: Stops, back: int):
        self.methods, self.stops, self.back = methods, stops, back
        self.pasts = deque[Past](maxlen=back + 1)

    def keep(self, moment: Moment) -> None:
        """Remember the present state, if steps may be taken back."""
        if self.back:
            self.pasts.append(self._now(moment))

    def _now(self, moment: Moment) -> Past:
        return Past(moment, [method.snapshot() for method in self.methods], self.stops.copy())

    def refuse_beyond(self, row: int, tokens: int) -> None:
        """Raise a `ValueError` unless the last `tokens` tokens of a row can be taken back: drawn ones, which count."""
        known = list(self.pasts)[-1 - tokens :]
        if not 0 < tokens < len(self.pasts) or not all(_can_go(past.moment, row) for past in known[1:]):
            raise ValueError(
                f"{tokens} token(s) of row {row} cannot be taken back: of its text, the last {len(self.pasts) - 1} "
                "are remembered; none after its end can, and none that a method has prescribed."
            )

    def undo(self, row: int, tokens: int) -> None:
        """Put one row of every method back to where it was `tokens` tokens ago."""
        self._put(torch.tensor([row]), self.pasts[-1 - tokens])

    def replay(self, row: int, ago: int, moment: Moment) -> None:
        """Tell the methods of another token in one row.

        Args:
            ago (`int`): 1 is the last token, 2 the one before it.
            moment: what there is to tell of it; its other rows do not count.
        """
        past = self.pasts[-ago]
        others = torch.arange(len(moment.live)) != row
        for method in self.methods:  # which observe the whole batch: the other rows are put back after it
            method.observe(moment)
        self._put(others.nonzero().squeeze(1), past)
        self.pasts[-ago] = self._now(moment)

    def _put(self, rows: Tensor, past: Past) -> None:
        for method, state in zip(self.methods, past.states, strict=True):
            method.undo(rows, state)
        self.stops.put(rows, past.stops)


def _can_go(moment: Moment, row: int) -> bool:
    """Whether the token of a row can be taken back."""
    assert moment.draw is not None and moment.outcome is not None
    ended = moment.outcome.ended
    return bool(moment.live[row] & ~moment.draw.forced[row]) and not (ended is not None and bool(ended[row]))
