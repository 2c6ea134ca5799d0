"""From raw logits to what is drawn from: the logits processors of a call, in two parts."""

from torch import Tensor
from transformers import LogitsProcessorList

from hf_value_steer.hosts.transformers import bans_and_warpers


class Scores:
    """From a text `(batch, length)` and its raw logits to what is drawn from. The loop and a search call it.

    Args:
        processors: of the call.
    """

    def __init__(self, processors: LogitsProcessorList):
        self.processors = processors
        self.bans, self.warpers, self.late = bans_and_warpers(processors)

    def __call__(self, input_ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What the call permits, and processed scores, `(batch, vocab)` each."""
        permitted = self.bans(input_ids, logits)
        scores = self.warpers(input_ids, permitted)
        return self.late(input_ids, permitted), scores
