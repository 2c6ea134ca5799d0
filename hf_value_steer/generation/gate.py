"""A gate before steering vectors as a method: a value head decides, token by token, which rows are steered."""

from typing import ClassVar

import torch
from torch import Tensor

from hf_value_steer.activation.apply import Steering
from hf_value_steer.generation.method import Method, Moment
from hf_value_steer.generation.scorer import Scorer
from hf_value_steer.policy import acts


class Gate(Method):
    """Opens for a row when its value is not acceptable, and closes when it is acceptable again.

    Args:
        scorer: head and thresholds, bound to the model.
        steering: what is let through.
        min_new_tokens (`int`): the gate stays closed for so many new tokens.
    """

    values_texts = True
    follows = False  # several tokens that are read at once have one gate
    rowwise: ClassVar[tuple[str, ...]] = ("open",)

    def __init__(self, scorer: Scorer, steering: Steering, min_new_tokens: int):
        self.scorer, self.steering, self.min_new_tokens = scorer, steering, min_new_tokens
        self.open = torch.zeros_like(scorer.threshold, dtype=torch.bool)

    @property
    def open(self) -> Tensor:
        """The rows `(batch,)` that are steered when their next token is read."""
        assert self.steering.gate is not None
        return self.steering.gate

    @open.setter
    def open(self, rows: Tensor) -> None:
        self.steering.gate = rows

    def values(self, features: Tensor) -> Tensor:
        return self.scorer.values(features)

    def observe(self, moment: Moment) -> None:
        """Set thresholds by the prompts' values, and the gate by the values of the texts."""
        values = moment.values_of(self)
        if moment.step == 0:
            self.scorer.start(values)
        acting = acts(torch.zeros_like(values, dtype=torch.long), moment.step, self.min_new_tokens)
        self.open = acting & ~self.scorer.accepts(values)
