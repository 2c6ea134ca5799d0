"""Texts that are watched while they are written: every token with its value, as soon as it is committed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_value_steer.configuration.methods import MethodConfig, SteeringConfig
from hf_value_steer.evaluation.trace import Colours, Pieces, TokenTrace
from hf_value_steer.generate import generate
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.method import Method, Moment
from hf_value_steer.generation.scorer import Scorer


@dataclass
class Side:
    """One text, as far as it is written.

    Args:
        name (`str`): `"base"` or `"steered"`.
        tokens (`list` of [`TokenTrace`]): what was committed so far.
        ended (`bool`): whether steering has ended it.
    """

    name: str
    tokens: list[TokenTrace] = field(default_factory=list)
    ended: bool = False

    @property
    def replaced(self) -> int:
        """Number of tokens that took the place of the natural sample."""
        return sum(token.intervened for token in self.tokens)


class Watch(Method):
    """A method that changes nothing: it shows each token, and its value if a head is there.

    Args:
        config (*optional*): names the head, and the threshold that values are compared with.
        tokenizer: of the backbone.

    Attributes:
        side: the text that is written.
        show: called with it after each token; what it raises ends the call.
    """

    method = "watch"

    def __init__(self, config: SteeringConfig | None, tokenizer: PreTrainedTokenizerBase):
        self.config, self.pieces = config, Pieces(tokenizer)
        self.scorer: Scorer | None = None
        self.side = Side("")
        self.show: Callable[[Side], None] = lambda _: None

    def bind(self, call: Call) -> Sequence[Method]:
        if self.config is not None:
            self.scorer = call.bind(self.config)
            self.reads = self.scorer.reads
        return [self]

    def values(self, features: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        assert self.scorer is not None  # or nobody asks
        return self.scorer.values(features, rows)

    def observe(self, moment: Moment) -> None:
        value = math.nan if self.scorer is None else float(moment.values_of(self))
        if self.scorer is not None:
            self.scorer.remember(moment.features.of(self.reads))
        if moment.draw is None or moment.outcome is None:
            if self.scorer is not None:
                self.scorer.start(moment.values_of(self))
            return
        token, natural = int(moment.outcome.tokens), int(moment.draw.tokens)
        before = moment.draw.input_ids[0].tolist()
        candidates: tuple[tuple[str, float], ...] = ()
        if moment.outcome.candidates is not None and moment.outcome.candidate_values is not None:
            ids, values = moment.outcome.candidates[0].tolist(), moment.outcome.candidate_values[0].tolist()
            candidates = self.pieces.of_candidates(before, ids, values)
        self.side.tokens.append(TokenTrace(self.pieces(before, token), value, token != natural, candidates))
        self.show(self.side)

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
    output = generate(model, **inputs, **options, return_dict_in_generate=True, value_steer=[*steering, watch])
    side.ended = bool(output.abstained.any())
