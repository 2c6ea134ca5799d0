"""What several commands are told: the model, how tokens are drawn, how much is generated; and checks of all of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_type_hints

from annotated_types import Gt, Le

from hf_value_steer.arguments.kinds import Amount, Count, Limit, Positive, Seed, check_kind
from hf_value_steer.checks import as_python
from hf_value_steer.choices import Dtype
from hf_value_steer.errors import FieldError


def old_names(kind: type[Any], given: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a dataclass of arguments that are given under another name, and that name.

    Args:
        kind: the dataclass; the metadata of a field that had another name say it, as `was`.
        given: values by name.

    Raises:
        FieldError: if a field is given under both names.
    """
    found = {each.name: each.metadata["was"] for each in fields(kind) if each.metadata.get("was") in given}
    for name, was in found.items():
        if name in given:
            raise FieldError(was, f"`{was}` is the old name of `{name}`: pass `{name}` alone.")
    return found


def renamed(kind: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, each field under its name of today; errors are those of [`old_names`]."""
    today = {was: name for name, was in old_names(kind, given).items()}
    return {today.get(name, name): value for name, value in given.items()}


@dataclass(kw_only=True)
class Arguments:
    """What a command, a section of a recipe or a function is told.

    When one is made, each field is checked against its annotation, and what fields say together by `check`. Tuples,
    paths and the numbers of numpy become lists, texts and numbers.

    Raises:
        FieldError: names the field that is wrong, and says what was expected.
        ValueError: for fields that do not go together.
    """

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self), include_extras=True)
        for each in fields(self):
            given = getattr(self, each.name)
            given = os.fspath(given) if isinstance(given, os.PathLike) else as_python(given, list)
            check_kind(each.name, kinds[each.name], given, in_yaml=True)
            setattr(self, each.name, given)
        self.check()

    def check(self) -> None:
        """Raise a `ValueError` for what no field alone is wrong about."""


@dataclass(kw_only=True)
class BackboneArguments(Arguments):
    """The model that reads or writes."""

    model: str = field(metadata={"help": "folder or Hub id of the backbone, or python:module:function"})
    dtype: Dtype = field(default="auto", metadata={"help": "dtype of the backbone; auto: that of the checkpoint"})


@dataclass(kw_only=True)
class SamplingArguments(Arguments):
    """How tokens are drawn."""

    do_sample: bool = field(default=True, metadata={"help": "draw tokens at random; greedy decoding otherwise"})
    temperature: Positive = field(default=1.0, metadata={"help": "temperature of the sampling"})
    top_p: Annotated[float, Gt(0), Le(1)] = field(
        default=1.0, metadata={"help": "draw from the likeliest tokens with this share, in (0, 1]"}
    )
    top_k: Amount = field(default=0, metadata={"help": "draw from this many likeliest tokens; 0: from all"})

    def sampling(self) -> dict[str, Any]:
        """The same as arguments of `generate`."""
        if not self.do_sample:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclass(kw_only=True)
class GenerationArguments(BackboneArguments, SamplingArguments):
    """What several generations of some prompts are made of."""

    limit: Limit | None = field(default=None, metadata={"help": "take the first so many prompts"})
    chat: bool = field(default=False, metadata={"help": "put prompts into the model's chat template"})
    samples: Count = field(default=4, metadata={"help": "generations of each prompt"})
    max_new_tokens: Count = field(default=128, metadata={"help": "the most tokens in a generation"})
    batch_size: Count = field(default=16, metadata={"help": "prompts in one call of generate"})
    seed: Seed = field(default=0, metadata={"help": "seed of all draws"})

    def sizes(self) -> dict[str, Any]:
        """Arguments of a [`~hf_value_steer.evaluation.runs.Runner`]."""
        return {name: getattr(self, name) for name in ("samples", "max_new_tokens", "batch_size", "seed")}
