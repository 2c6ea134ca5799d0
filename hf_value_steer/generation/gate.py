"""A gate before steering vectors as a method: a value head decides, token by token, which rows are steered."""

from typing import ClassVar

import torch
from torch import Tensor

from hf_value_steer.activation.apply import Injection
from hf_value_steer.generation.method import Moment, ScoredMethod
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

    follows = False  # a chain of tokens is read in one forward, which has one gate a row
    rowwise: ClassVar[tuple[str, ...]] = ("memory", "open")

    def __init__(self, scorer: Scorer, injection: Injection, min_new_tokens: int):
        super().__init__(scorer)
        self.injection, self.min_new_tokens = injection, min_new_tokens
        self.open = torch.zeros_like(scorer.threshold, dtype=torch.bool)

    @property
    def open(self) -> Tensor:
        """The rows `(batch,)` that are steered when their next token is read."""
        assert self.injection.gate is not None
        return self.injection.gate

    @open.setter
    def open(self, rows: Tensor) -> None:
        self.injection.gate = rows

    def observe(self, moment: Moment) -> None:
        """Set thresholds by the prompts' values, and the gate by the values of the texts."""
        needed = ~self.scorer.accepts(self.values_at(moment))
        self.open = needed if has_begun(moment.step, self.min_new_tokens) else torch.zeros_like(needed)
