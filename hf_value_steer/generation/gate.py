"""A value head that decides, token by token, which rows are steered by vectors."""

import torch
from torch import Tensor

from hf_value_steer.activation.apply import Steering
from hf_value_steer.generation.scorer import Scorer


class Gate:
    """Opens for a row when its value is not acceptable, and closes when it is acceptable again.

    Args:
        scorer: head and thresholds, bound to the model.
        steering: what is let through.
        min_new_tokens (`int`): the gate stays closed for so many new tokens.
    """

    def __init__(self, scorer: Scorer, steering: Steering, min_new_tokens: int):
        self.scorer, self.steering, self.min_new_tokens = scorer, steering, min_new_tokens
        self.steering.gate = torch.zeros_like(scorer.threshold, dtype=torch.bool)

    def start(self, prompt_values: Tensor) -> None:
        """Set thresholds and gate by the values of the prompts, `(batch,)`."""
        self.scorer.start(prompt_values)
        self.observe(prompt_values, 0)

    def observe(self, values: Tensor, step: int) -> None:
        """Set the gate by the values `(batch,)` of the texts with `step` new tokens."""
        needed = ~self.scorer.accepts(values)
        self.steering.gate = needed if step >= self.min_new_tokens else torch.zeros_like(needed)
