"""A gate before steering vectors as a method: a value head decides, token by token, which rows are steered."""

from typing import ClassVar

import torch
from torch import Tensor

from hf_value_steer.activation.apply import Injection
from hf_value_steer.generation.method import Moment
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.scored_method import ScoredMethod
from hf_value_steer.generation.scorer import Scorer
from hf_value_steer.policy import has_begun


class Gate(ScoredMethod):
    """Opens for a row when its value is not acceptable, and closes when it is acceptable again.

    The loop calls [`observe`] with the values of the texts. The injection reads the gate in the next forward.

    Args:
        scorer: head and thresholds, bound to the model.
        injection: the vectors on the model, which the gate holds back or lets through.
        min_new_tokens (`int`): number of new tokens for which the gate stays closed.
    """

    rowwise: ClassVar[tuple[str, ...]] = ("memory", "open")

    def __init__(self, scorer: Scorer, injection: Injection, min_new_tokens: int):
        super().__init__(scorer)
        self.injection, self.min_new_tokens, self.rows = injection, min_new_tokens, slice(None)
        injection.gate = torch.zeros_like(scorer.threshold, dtype=torch.bool)

    @property
    def open(self) -> Tensor:
        """The rows `(batch,)` that are steered when their next token is read."""
        assert self.injection.gate is not None
        return self.injection.gate[self.rows]

    @open.setter
    def open(self, rows: Tensor) -> None:
        assert self.injection.gate is not None
        gate = self.injection.gate.clone()
        gate[self.rows] = rows
        self.injection.gate = gate

    def separate(self, row: int, stops: Stops) -> None:
        super().separate(row, stops)
        self.rows = slice(row, row + 1)

    def observe(self, moment: Moment) -> None:
        """Set thresholds by the prompts' values, and the gate by the values of the texts."""
        needed = ~self.scorer.accepts(self.values_at(moment))
        self.open = needed if has_begun(moment.step, self.min_new_tokens) else torch.zeros_like(needed)
