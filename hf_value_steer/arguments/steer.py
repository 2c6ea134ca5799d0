"""What `generate` and `serve` are told: which head steers, and when it acts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_value_steer.arguments.base import Arguments, BackboneArguments, SamplingArguments
from hf_value_steer.arguments.kinds import Candidates, Count, Probability, Seed
from hf_value_steer.choices import HeadMethod


@dataclass(kw_only=True)
class SteeringArguments(Arguments):
    """What steers."""

    value_head: str | None = field(default=None, metadata={"help": "folder or Hub id of a value head"})
    method: HeadMethod = field(default="filter", metadata={"help": "what the head is for"})
    threshold: Probability | None = field(default=None, metadata={"help": "in (0, 1); that of the head by default"})
    alpha: Probability | None = field(
        default=None, metadata={"help": "instead: what the head's calibration is to promise"}
    )
    num_candidates: Candidates | None = field(
        default=None, metadata={"help": "candidates of the filter; 8 by default"}
    )
    value_steer: str | None = field(
        default=None, metadata={"help": "instead of all these: a configuration, or a list of them, as JSON"}
    )

    def configuration(self) -> Any:
        """The argument `value_steer` of `generate` that the options spell.

        Raises:
            ValueError: if they spell none, or two.
        """
        names = ("value_head", "threshold", "alpha", "num_candidates")
        given: Mapping[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.value_steer is None:
            if self.value_head is None:
                raise ValueError("Pass `value_head`, or `value_steer`.")
            return {"method": self.method, **given}
        if given:
            raise ValueError(f"`value_steer` says it all: leave out {', '.join(f'`{name}`' for name in given)}.")
        try:
            return json.loads(self.value_steer)
        except ValueError as error:
            raise ValueError(f"`value_steer` has to be JSON, got {self.value_steer!r} ({error}).") from error


@dataclass(kw_only=True)
class GenerateArguments(SteeringArguments, SamplingArguments):
    """What is continued, and how it is shown."""

    prompt: str = field(metadata={"help": "the text to continue, or the message to answer", "positional": True})
    model: str | None = field(
        default=None, metadata={"help": "folder or Hub id of the backbone; that which the head names by default"}
    )
    dtype: str = field(default="auto", metadata=BackboneArguments.__dataclass_fields__["dtype"].metadata)
    chat: bool | None = field(
        default=None, metadata={"help": "put the prompt into the model's chat template; as in training by default"}
    )
    max_new_tokens: Count = field(default=64, metadata={"help": "length of the text"})
    seed: Seed = field(default=0, metadata={"help": "of sampling; both texts are drawn from it"})
    color: bool = field(default=True, metadata={"help": "colour tokens by their values, where the terminal can"})


@dataclass(kw_only=True)
class ServeArguments(SteeringArguments):
    """What is served."""

    model: str = field(metadata={"help": "Hub id or folder of a causal language model", "positional": True})
