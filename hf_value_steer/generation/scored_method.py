"""What methods with a value head have in common."""

from typing import ClassVar

from torch import Tensor

from hf_value_steer.generation.method import Method, Moment
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.scorer import Scorer


class ScoredMethod(Method):
    """A method whose values are those of a head; its hooks ask [`values_at`].

    Args:
        scorer: head and thresholds, bound to the model.
    """

    values_texts = True
    rowwise: ClassVar[tuple[str, ...]] = ("memory",)

    def __init__(self, scorer: Scorer):
        self.scorer, self.reads = scorer, scorer.reads

    @property
    def memory(self) -> Tensor:
        """What the head remembers of each row."""
        return self.scorer.memory

    @memory.setter
    def memory(self, rows: Tensor) -> None:
        self.scorer.memory = rows

    def separate(self, row: int, stops: Stops) -> None:  # noqa: ARG002
        self.scorer = self.scorer.of_row(row)

    def values(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.scorer.values(features, rows)

    def values_at(self, moment: Moment) -> Tensor:
        """Values `(batch,)` of the texts, which the head takes in. Those of prompts set the thresholds after them."""
        values = moment.values_of(self)
        if moment.step == 0:
            self.scorer.start(values)
        self.scorer.remember(moment.features.of(self.reads))
        return values
