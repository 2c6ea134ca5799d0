"""What several commands are told: the model, how tokens are drawn, how much is generated; and checks of all of it."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from hf_value_steer.arguments.kinds import check_kind, shown
from hf_value_steer.choices import Dtype


MOST = 1_000_000  # of what is counted: no run that holds, or does, more comes to an end
COUNT = {"least": 1, "most": MOST}
SEED = {"least": -(2**63), "most": 2**63 - 1}  # what torch takes


def renamed(kind: type[Any], given: Mapping[str, Any], place: str | None) -> dict[str, Any]:
    """What a dataclass of arguments is given, each field under its name of today.

    Args:
        kind: the dataclass; the metadata of a field that had another name say it, as `was`.
        given: values by name.
        place (`str`, *optional*): where a person wrote it, whom a warning tells; of our own records there is none.

    Raises:
        ValueError: if a field is given under both names.
    """
    found = dict(given)
    for each in fields(kind):
        was = each.metadata.get("was")
        if was in found:
            if each.name in found:
                raise ValueError(f"`{was}` is the old name of `{each.name}`: pass `{each.name}` alone.")
            if place is not None:
                warnings.warn(f"{place}: `{was}` is `{each.name}` now: say that.", FutureWarning, stacklevel=3)
            found[each.name] = found.pop(was)
    return found


@dataclass(kw_only=True)
class Arguments:
    """What a command, a section of a recipe or a function is told.

    When one is made, each field is checked against its annotation and against `least` and `most` in its metadata, and
    what fields say together by `check`. Tuples, paths and the numbers of numpy become lists, texts and numbers.

    Raises:
        ValueError: names the field, and says what was expected.
    """

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for each in fields(self):
            given = _plain(getattr(self, each.name))
            check_kind(each.name, kinds[each.name], given, in_yaml=True)
            check_bounds(each.name, given, each.metadata)
            setattr(self, each.name, given)
        self.check()

    def check(self) -> None:
        """Raise a `ValueError` for what no field alone is wrong about."""


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    value = _number(value)
    return [_number(each) for each in value] if isinstance(value, list | tuple) else value


def _number(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value  # of numpy or torch


def check_bounds(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for a number, or one in a list, below `bounds["least"]` or above `bounds["most"]`."""
    if value is None or not {"least", "most"} & bounds.keys():
        return
    for number in value if isinstance(value, list) else [value]:
        if "least" in bounds and number < bounds["least"]:
            raise ValueError(f"`{name}` has to be at least {bounds['least']:,}, got {shown(number)}.")
        if "most" in bounds and number > bounds["most"]:
            raise ValueError(f"`{name}` has to be at most {bounds['most']:,}, got {shown(number)}.")


@dataclass(kw_only=True)
class BackboneArguments(Arguments):
    """The model that reads or writes."""

    model: str = field(metadata={"help": "folder or Hub id of the backbone, or python:module:function"})
    dtype: Dtype = field(default="auto", metadata={"help": "of the backbone; auto is that of the checkpoint"})


@dataclass(kw_only=True)
class SamplingArguments(Arguments):
    """How tokens are drawn."""

    do_sample: bool = field(default=True, metadata={"help": "sample; greedy decoding otherwise"})
    temperature: float = field(default=1.0, metadata={"help": "of the sampling", "least": 0})
    top_p: float = field(default=1.0, metadata={"help": "of the sampling", "least": 0, "most": 1})
    top_k: int = field(default=0, metadata={"help": "of the sampling; 0 is off", "least": 0})

    def sampling(self) -> dict[str, Any]:
        """The same as arguments of `generate`."""
        if not self.do_sample:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclass(kw_only=True)
class GenerationArguments(BackboneArguments, SamplingArguments):
    """What several generations of some prompts are made of."""

    limit: int | None = field(default=None, metadata={"help": "take the first so many prompts", "least": 1})
    chat: bool = field(default=False, metadata={"help": "put prompts into the model's chat template"})
    samples: int = field(default=4, metadata={"help": "generations of each prompt", **COUNT})
    max_new_tokens: int = field(default=128, metadata={"help": "length of a generation", **COUNT})
    batch_size: int = field(default=16, metadata={"help": "prompts in one call of generate", **COUNT})
    seed: int = field(default=0, metadata={"help": "of all generation", **SEED})

    def sizes(self) -> dict[str, Any]:
        """Arguments of a [`~hf_value_steer.evaluation.runs.Runner`]."""
        return {name: getattr(self, name) for name in ("samples", "max_new_tokens", "batch_size", "seed")}
