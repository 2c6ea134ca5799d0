"""Texts that are watched while they are written: every token with its value, as soon as it is committed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_value_steer.configuration.methods import MethodConfig, SteeringConfig
from hf_value_steer.evaluation.trace import Colours, Pieces, TokenTrace, count_taken_back, with_taken_back
from hf_value_steer.generate import generate
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.method import Method, Moment
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.scorer import Scorer
from hf_value_steer.generation.state import TakenBack


@dataclass
class Side:
    """One text, as far as it is written.

    Args:
        name (`str`): `"base"` or `"steered"`.
        tokens (`list` of [`TokenTrace`]): what was committed so far.
        ended (`bool`): whether steering has ended it.
        unsettled (`int`): how many of the last tokens may be others later, while it is written.
    """

    name: str
    tokens: list[TokenTrace] = field(default_factory=list)
    ended: bool = False
    unsettled: int = 0

    @property
    def replaced(self) -> int:
        """Number of tokens that took the place of the natural sample."""
        return sum(token.intervened for token in self.tokens)

    @property
    def taken_back(self) -> int:
        """Number of tokens that were taken back."""
        return count_taken_back(self.tokens)


class Watch(Method):
    """A method that changes nothing: it shows each token, and its value if a head is there.

    Args:
        config (*optional*): names the head, and the threshold that values are compared with.
        tokenizer: of the backbone.

    Attributes:
        side: the text that is written.
        show: called with it after each token, and when its last tokens are others; what it raises ends the call.
        taken: what was taken back of this text, in order.
    """

    method = "watch"
    rowwise = ("memory",)

    def __init__(self, config: SteeringConfig | None, tokenizer: PreTrainedTokenizerBase):
        self.config, self.pieces = config, Pieces(tokenizer)
        self.scorer: Scorer | None = None
        self.side = Side("")
        self.show: Callable[[Side], None] = lambda _: None
        self.taken: list[TakenBack] = []

    @property
    def memory(self) -> torch.Tensor:
        """What the head remembers of the text; of no width without a head."""
        return torch.zeros(1, 0) if self.scorer is None else self.scorer.memory

    @memory.setter
    def memory(self, rows: torch.Tensor) -> None:
        if self.scorer is not None:
            self.scorer.memory = rows

    def separate(self, row: int, stops: Stops) -> None:  # noqa: ARG002
        """In a search nothing is shown: it may fail."""
        self.side, self.show = Side(""), lambda _: None
        if self.scorer is not None:
            self.scorer = self.scorer.of_row(row)

    def bind(self, call: Call) -> Sequence[Method]:
        if self.config is not None:
            self.scorer = call.bind(self.config)
            self.reads = self.scorer.reads
        return [self]

    def values(self, features: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        assert self.scorer is not None  # or nobody asks
        return self.scorer.values(features, rows)

    def observe(self, moment: Moment) -> None:
        if self.scorer is not None:
            values = moment.values_of(self)
            self.scorer.remember(moment.features.of(self.reads))
            if moment.draw is None:
                self.scorer.start(values)
        if moment.draw is None:
            self.taken = []
            return
        self.side.tokens.append(self._trace(moment))
        self.show(self.side)

    def rewritten(self, row: int, moments: Sequence[Moment], taken: Sequence[TakenBack]) -> None:  # noqa: ARG002
        draw, outcome = moments[-1].draw, moments[-1].outcome
        assert draw is not None and outcome is not None  # it is no prompt
        text = [*draw.input_ids[0].tolist(), int(outcome.tokens)]
        tokens = self.side.tokens[: -len(moments)] + [self._trace(each) for each in moments if bool(each.live)]
        self.taken += taken
        # A list of its own: who reads the one before in another thread never sees half of the change.
        self.side.tokens = with_taken_back(tokens, self.pieces, text, len(text) - moments[-1].step, self.taken)
        self.show(self.side)

    def _trace(self, moment: Moment) -> TokenTrace:
        """The token that was committed."""
        assert moment.draw is not None and moment.outcome is not None  # it is no prompt
        value = float(moment.outcome.values if self.scorer is None else moment.values_of(self))
        token, natural = int(moment.outcome.tokens), int(moment.draw.tokens)
        before = moment.draw.input_ids[0].tolist()
        candidates: tuple[tuple[str, float], ...] = ()
        if (room := moment.outcome.room) is not None:
            candidates = self.pieces.of_candidates(before, room.candidates[0].tolist(), room.values[0].tolist())
        return TokenTrace(self.pieces(before, token), value, token != natural, candidates)

    @property
    def colours(self) -> Colours | None:
        """Of values, relative to the threshold of the call."""
        return None if self.scorer is None else Colours(float(self.scorer.threshold), self.scorer.polarity)


def write(
    side: Side,
    steering: Sequence[MethodConfig],
    watch: Watch,
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    seed: int,
    **options: Any,
) -> None:
    """Continue one prompt, and show the text while it is written.

    Args:
        side: is filled with tokens.
        steering: what steers; nothing writes what the model itself says.
        watch: looks on.
        model: the backbone.
        inputs: the prompt, `(1, length)` each.
        seed (`int`): of PyTorch's global generator.
        options: arguments of `generate`.
    """
    watch.side = side
    torch.manual_seed(seed)
    asked = {"value_steer": [*steering, watch], "tokenizer": watch.pieces.tokenizer}
    output = generate(model, **inputs, **options, **asked, return_dict_in_generate=True)
    side.ended = bool(output.abstained.any())
