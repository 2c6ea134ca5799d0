"""Dynamic abstention (arXiv 2604.18419) as a method: it watches the value of a text, and prescribes its end."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.method import Method, Moment
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.scored_method import ScoredMethod
from hf_value_steer.generation.scorer import Scorer
from hf_value_steer.generation.state import Draw
from hf_value_steer.generation.validation import ending_tokens, eos_token
from hf_value_steer.policy import acts, advance_patience, next_of_ending


class Abstention(ScoredMethod):
    """The state of abstention in one `generate` call; every tensor has one entry a row.

    The loop calls [`observe`] after each token, which changes the counts. Then it calls [`prescribe`]: in rows that
    are to end, a token of the ending takes the place of the natural sample. The logits processor calls
    [`observe_values`] and [`next_tokens`] instead.

    Args:
        config: runtime configuration.
        scorer: head and thresholds, bound to the model.
        stops: where to note which rows stopped.
        ending (sequence of `int`): the tokens that end a row: the message and EOS.

    Attributes:
        streak (`torch.LongTensor`): consecutive unacceptable values.
        written (`torch.LongTensor`): tokens of the ending that are there, -1 before it has begun.
        due (`torch.BoolTensor`): rows that are to end.
        latest (`torch.FloatTensor`): values that were observed last.
    """

    rowwise: ClassVar[tuple[str, ...]] = ("memory", "streak", "written", "due", "latest")

    def __init__(self, config: AbstentionConfig, scorer: Scorer, stops: Stops, ending: Sequence[int]):
        super().__init__(scorer)
        self.config, self.stops = config, stops
        threshold = scorer.threshold
        self.ending = torch.tensor(ending, device=threshold.device)
        self.streak = torch.zeros(len(threshold), dtype=torch.long, device=threshold.device)
        self.written = torch.full_like(self.streak, -1)
        self.due = torch.zeros_like(self.streak, dtype=torch.bool)
        self.latest = torch.full_like(threshold, torch.nan)

    @classmethod
    def bind(cls, config: AbstentionConfig, call: Call) -> list[Method]:
        """The abstention that `config` asks for."""
        scorer = call.bind(config)
        ending = ending_tokens(config, eos_token(call.config, "Abstention"), call.model)
        return [cls(config, scorer, call.stops, ending)]

    def separate(self, row: int, stops: Stops) -> None:
        super().separate(row, stops)
        self.stops = stops

    def observe(self, moment: Moment) -> None:
        """Decide which rows are to stop."""
        self.observe_values(self.values_at(moment), moment.step, moment.unfinished)

    def observe_values(self, values: Tensor, step: int, unfinished: Tensor) -> None:
        """Decide it from the values `(batch,)` of texts with `step` new tokens.

        Rows that are not `unfinished` `(batch,)` do not begin to end.
        """
        self.step, self.latest = step, values
        threshold, polarity, config = self.scorer.threshold, self.scorer.polarity, self.config
        acting = acts(self.streak, step, config.min_new_tokens)
        self.streak, due = advance_patience(self.streak, values, threshold, polarity, acting, config.patience)
        self.due = due & unfinished & (self.written < 0)  # an ending that has begun goes on by itself

    def prescribe(self, draw: Draw) -> None:
        """Put the message and EOS in place of the natural samples of rows that stop."""
        draw.tokens, forced = self.next_tokens(draw.tokens, draw.permitted)
        draw.forced = draw.forced | forced

    def next_tokens(self, tokens: Tensor, permitted: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens to write, and which of them are prescribed; `(batch,)` each.

        Args:
            tokens (`torch.LongTensor` of shape `(batch,)`): natural samples.
            permitted (`torch.FloatTensor` of shape `(batch, vocab)`): scores of what the call permits.
        """
        begins, place, forced = next_of_ending(self.due, self.written, permitted[:, self.ending])
        self.stops.mark(begins, self.step, self.latest)
        self.written = self.written.masked_fill(begins, 0) + forced
        return torch.where(forced, self.ending[place], tokens), forced

    def reorder(self, parents: Tensor) -> None:
        """Row `i` continues what was row `parents[i]`, as after a step of beam search."""
        # `due` is made anew before it is read again.
        self.streak, self.written = self.streak[parents], self.written[parents]
        self.memory = self.memory[parents.to(self.memory.device)]
