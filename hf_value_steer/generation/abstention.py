"""Dynamic abstention (arXiv 2604.18419): watch the value of the text, and prescribe the end of rows that go wrong."""

import torch
from torch import Tensor

from hf_value_steer.configuration import AbstentionConfig
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.scorer import Scorer
from hf_value_steer.policy import advance_streak


class Abstention:
    """The state of abstention in one `generate` call; every tensor has one entry a row.

    Args:
        config: runtime configuration.
        scorer: head and thresholds, bound to the model.
        stops: where to note which rows stopped.
        eos (`int`): the token that ends a row.
        min_new_tokens (`int`): no row is ended before; the larger of the config's and the call's.
    """

    def __init__(self, config: AbstentionConfig, scorer: Scorer, stops: Stops, eos: int, min_new_tokens: int):
        self.config, self.scorer, self.stops, self.min_new_tokens = config, scorer, stops, min_new_tokens
        threshold = scorer.threshold
        self.ending = torch.tensor([*(config.message_ids or ()), eos], device=threshold.device)
        self.streak = torch.zeros(len(threshold), dtype=torch.long, device=threshold.device)
        self.position = torch.full_like(self.streak, -1)

    def observe(self, values: Tensor, step: int, unfinished: Tensor) -> None:
        """Decide which rows stop.

        Args:
            values (`torch.FloatTensor` of shape `(batch,)`): value of the text so far.
            step (`int`): number of new tokens in it; 0 is the prompt.
            unfinished (`torch.BoolTensor` of shape `(batch,)`): rows that have not ended by themselves.
        """
        if step < self.min_new_tokens:
            return
        self.streak = advance_streak(self.streak, values, self.scorer.threshold, self.scorer.polarity)
        stops = unfinished & (self.position < 0) & (self.streak >= self.config.patience)
        self.position = self.position.masked_fill(stops, 0)
        self.stops.mark(stops, step, values)

    def prescribe(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Put the message and EOS in place of the natural samples of rows that stop; `(tokens, forced)`."""
        forced = self.position >= 0
        prescribed = self.ending[self.position.clamp(0, len(self.ending) - 1)]
        self.position = self.position + forced.long()
        return torch.where(forced, prescribed, tokens), forced

    def reorder(self, parents: Tensor) -> None:
        """Row `i` continues what was row `parents[i]`, as after a step of beam search."""
        self.streak, self.position = self.streak[parents], self.position[parents]
