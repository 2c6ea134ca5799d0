"""What `generate`, `play` and `serve` are told: which head steers, and when it acts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Le

from hf_value_steer.arguments.base import Arguments, SamplingArguments
from hf_value_steer.arguments.kinds import Candidates, Count, Probability, Rollback, Seed
from hf_value_steer.choices import Dtype, HeadMethod


Port = Annotated[int, Ge(1), Le(65535)]


@dataclass(kw_only=True)
class HeadArguments(Arguments):
    """The head that steers, and when it acts."""

    value_head: str | None = field(default=None, metadata={"help": "folder or Hub id of a value head"})
    method: HeadMethod | None = field(default=None, metadata={"help": "what the head is for; filter by default"})
    threshold: Probability | None = field(default=None, metadata={"help": "in (0, 1); that of the head by default"})
    alpha: Probability | None = field(
        default=None, metadata={"help": "in place of a threshold: the promise of the head's calibration, in (0, 1)"}
    )
    num_candidates: Candidates | None = field(
        default=None, metadata={"help": "candidates of the filter; by default as the head says, else 8"}
    )
    rollback: Rollback | None = field(
        default=None,
        metadata={"help": "tokens that the filter may take back at a dead end; by default as the head says, else 0"},
    )

    def check(self) -> None:
        self.configuration()

    def configuration(self) -> Any:
        """The argument `value_steer` of `generate` that the options spell.

        Raises:
            ValueError: if they spell none.
        """
        if self.value_head is None:
            raise ValueError("Pass `value_head`, or `value_steer`.")
        return {"method": "filter", **self.given()}

    def given(self) -> Mapping[str, Any]:
        """What the user has said of the head."""
        names = ("value_head", "method", "threshold", "alpha", "num_candidates", "rollback")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(kw_only=True)
class SteeringArguments(HeadArguments):
    """What steers, if it is not a head alone."""

    value_steer: str | None = field(
        default=None, metadata={"help": "in the place of a head: a configuration, or a list of them, as JSON"}
    )

    def configuration(self) -> Any:
        """The same, where the options may spell anything that `generate` takes.

        Raises:
            ValueError: if they spell nothing, or two things.
        """
        if self.value_steer is None:
            return super().configuration()
        if given := self.given():
            raise ValueError(f"`value_steer` says it all: leave out {', '.join(f'`{name}`' for name in given)}.")
        try:
            found = json.loads(self.value_steer)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`value_steer` has to be JSON, got {self.value_steer!r} ({error}).") from error
        if not isinstance(found, dict | list):
            raise ValueError(f"`value_steer` has to be an object or a list, got {self.value_steer!r}.")
        return found


@dataclass(kw_only=True)
class GenerateArguments(SteeringArguments, SamplingArguments):
    """What is continued, and how it is shown."""

    prompt: str = field(metadata={"help": "the text to continue, or the message to answer", "positional": True})
    model: str | None = field(
        default=None, metadata={"help": "folder or Hub id of the backbone; that which the head names by default"}
    )
    dtype: Dtype = field(default="auto", metadata={"help": "dtype of the backbone; auto: that of the checkpoint"})
    chat: bool | None = field(
        default=None, metadata={"help": "put the prompt into the model's chat template; as in training by default"}
    )
    max_new_tokens: Count = field(default=64, metadata={"help": "the most tokens in the text"})
    seed: Seed = field(default=0, metadata={"help": "seed of sampling; both texts are drawn from it"})
    color: bool = field(default=True, metadata={"help": "colour tokens by their values, where the terminal can"})

    def check(self) -> None:
        super().check()
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:  # a terminal's bytes that are none of UTF-8
            raise ValueError("`prompt` has to be a text in UTF-8.") from error


@dataclass(kw_only=True)
class PlayArguments(HeadArguments):
    """What is played with, and where."""

    model: str = field(metadata={"help": "folder or Hub id of the backbone", "positional": True})
    value_head: str = field(metadata=HeadArguments.__dataclass_fields__["value_head"].metadata)
    vectors: str | None = field(default=None, metadata={"help": "folder or Hub id of steering vectors"})
    dtype: Dtype = field(default="auto", metadata={"help": "dtype of the backbone; auto: that of the checkpoint"})
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 lets others in"})
    port: Port | None = field(default=None, metadata={"help": "the first free one from 7860 on by default"})


@dataclass(kw_only=True)
class ServeArguments(SteeringArguments):
    """What is served."""

    model: str = field(metadata={"help": "Hub id or folder of a causal language model", "positional": True})
