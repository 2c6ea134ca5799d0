"""Dynamic abstention (arXiv 2604.18419): watch the value of the text, and prescribe the end of rows that go wrong."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.scorer import Scorer
from hf_value_steer.policy import advance_streak, may_insert


class Abstention:
    """The state of abstention in one `generate` call; every tensor has one entry a row.

    Args:
        config: runtime configuration.
        scorer: head and thresholds, bound to the model.
        stops: where to note which rows stopped.
        ending (sequence of `int`): the tokens that end a row: the message and EOS.
    """

    def __init__(self, config: AbstentionConfig, scorer: Scorer, stops: Stops, ending: Sequence[int]):
        self.config, self.scorer, self.stops = config, scorer, stops
        threshold = scorer.threshold
        self.ending = torch.tensor(ending, device=threshold.device)
        self.streak = torch.zeros(len(threshold), dtype=torch.long, device=threshold.device)
        self.position = torch.full_like(self.streak, -1)
        self.due = torch.zeros_like(self.streak, dtype=torch.bool)

    def observe(self, values: Tensor, step: int, unfinished: Tensor) -> None:
        """Decide which rows are to stop.

        Args:
            values (`torch.FloatTensor` of shape `(batch,)`): value of the text so far.
            step (`int`): number of new tokens in it; 0 is the prompt.
            unfinished (`torch.BoolTensor` of shape `(batch,)`): rows that have not ended by themselves.
        """
        self.step, self.values = step, values
        if step < self.config.min_new_tokens:
            return
        self.streak = advance_streak(self.streak, values, self.scorer.threshold, self.scorer.polarity)
        self.due = unfinished & (self.position < 0) & (self.streak >= self.config.patience)

    def prescribe(self, tokens: Tensor, permitted: Tensor) -> tuple[Tensor, Tensor]:
        """Put the message and EOS in place of the natural samples of rows that stop.

        A row that is to stop waits as long as the call forbids a token of its ending.

        Args:
            tokens (`torch.LongTensor` of shape `(batch,)`): natural samples.
            permitted (`torch.FloatTensor` of shape `(batch, vocab)`): as in [`~hf_value_steer.policy.may_insert`], of
                all tokens.

        Returns:
            `(tokens, forced)`, and which of them are prescribed, both of shape `(batch,)`.
        """
        stops = self.due & may_insert(permitted[:, self.ending])
        self.position = self.position.masked_fill(stops, 0)
        self.stops.mark(stops, self.step, self.values)
        prescribed = self.ending[self.position.clamp(0, len(self.ending) - 1)]
        forced = (self.position >= 0) & may_insert(permitted.gather(1, prescribed[:, None]))
        self.position = self.position + forced.long()
        return torch.where(forced, prescribed, tokens), forced

    def reorder(self, parents: Tensor) -> None:
        """Row `i` continues what was row `parents[i]`, as after a step of beam search."""
        self.streak, self.position = self.streak[parents], self.position[parents]
