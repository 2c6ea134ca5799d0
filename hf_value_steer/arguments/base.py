"""What several commands are told: the model, how tokens are drawn, how much is generated; and checks of all of it."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin


def check_kinds(arguments: Any) -> None:
    """Refuse what is none of the choices, or of another kind than is due: a recipe may hold anything.

    Raises:
        ValueError: names the field of the dataclass `arguments`.
    """
    for each in fields(arguments):
        choice, origin, options = getattr(arguments, each.name), get_origin(each.type), get_args(each.type)
        if choice is None:
            continue
        if origin is Literal and choice not in options:
            raise ValueError(f"`{each.name}` has to be one of {', '.join(options)}; got {choice!r}.")
        if origin is list and not isinstance(choice, list | tuple):
            raise ValueError(f"`{each.name}` has to be a list, got {choice!r}.")
        if each.type is bool and not isinstance(choice, bool):
            raise ValueError(f"`{each.name}` has to be true or false, got {choice!r}.")
        if {int, float} & {each.type, *options}:
            for number in choice if origin is list else [choice]:
                _check_number(each.name, number)


def _check_number(name: str, number: Any) -> None:
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise ValueError(f"`{name}` has to be a number, got {number!r} (in YAML 1.0e-3, not 1e-3).")
    if not math.isfinite(number):
        raise ValueError(f"`{name}` has to be a finite number, got {number!r}.")


def check_least(arguments: Any, least: int, *names: str) -> None:
    """Refuse numbers below `least`; fields that are `None` are passed over."""
    for name in names:
        number = getattr(arguments, name)
        if number is not None and number < least:
            raise ValueError(f"`{name}` has to be at least {least}, got {number}.")


@dataclass(kw_only=True)
class BackboneArguments:
    """The model that reads or writes."""

    model: str = field(metadata={"help": "folder or Hub id of the backbone, or python:module:function"})
    dtype: str = field(default="auto", metadata={"help": "dtype of the backbone: auto, float32, bfloat16, float16"})


@dataclass(kw_only=True)
class SamplingArguments:
    """How tokens are drawn, in `collect` and in `evaluate`."""

    do_sample: bool = field(default=True, metadata={"help": "sample; greedy decoding otherwise"})
    temperature: float = field(default=1.0, metadata={"help": "of the sampling"})
    top_p: float = field(default=1.0, metadata={"help": "of the sampling"})
    top_k: int = field(default=0, metadata={"help": "of the sampling; 0 is off"})

    def sampling(self) -> dict[str, Any]:
        """The same as arguments of `generate`."""
        if not self.do_sample:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclass(kw_only=True)
class GenerationArguments(BackboneArguments, SamplingArguments):
    """What several generations of some prompts are made of."""

    limit: int | None = field(default=None, metadata={"help": "take the first so many prompts"})
    chat: bool = field(default=False, metadata={"help": "put prompts into the model's chat template"})
    samples: int = field(default=4, metadata={"help": "generations of each prompt"})
    max_new_tokens: int = field(default=128, metadata={"help": "length of a generation"})
    batch_size: int = field(default=16, metadata={"help": "prompts in one call of generate"})
    seed: int = field(default=0, metadata={"help": "of all generation"})

    def sizes(self) -> dict[str, Any]:
        """Arguments of a [`~hf_value_steer.evaluation.runs.Runner`]."""
        return {name: getattr(self, name) for name in ("samples", "max_new_tokens", "batch_size", "seed")}
