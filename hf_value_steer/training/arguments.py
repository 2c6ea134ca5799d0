"""What can be said to `collect`, and how tokens are drawn."""

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


@dataclass(kw_only=True)
class CollectArguments(GenerationArguments):
    """What to generate. Every field is recorded; a folder holds one collection for good."""

    output: str = field(metadata={"help": "folder of the collection; a collection that is there is completed"})
    backbone: str | None = field(default=None, metadata={"help": "Hub id to record, if `model` is not it"})
    prompts: str = field(
        metadata={"help": "a .txt file (one prompt a line), a .jsonl file, a data set, or python:module:function"}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "column with a text or a list of chat messages"})
    prompt_split: str = field(default="train", metadata={"help": "split of a data set"})
    max_new_tokens: int = field(default=128, metadata={"help": "tokens kept of each generation, at most"})
    forced_samples: int = field(
        default=0, metadata={"help": "further generations of each prompt, for training only, with words forced in"}
    )
    force_words: str | None = field(
        default=None, metadata={"help": "a .txt file (one word a line) or python:module:function: words to force in"}
    )
    next_tokens: int = field(default=0, metadata={"help": "keep so many most likely next tokens of every step"})
    batch_size: int = field(default=16, metadata={"help": "prompts in one call of generate, and in one shard"})
    seed: int = field(default=0, metadata={"help": "of sampling and forcing"})
    engine: str = field(default="generate", metadata={"help": "what continues the prompts: generate, or vllm"})
    engine_args: str | None = field(
        default=None, metadata={"help": "further arguments of vllm.LLM as JSON, with `engine` vllm"}
    )

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.engine not in ("generate", "vllm"):
            raise ValueError(f'`engine` is "generate" or "vllm", got {self.engine!r}.')
        if self.engine_args is not None and self.engine != "vllm":
            raise ValueError('`engine_args` are those of vLLM: pass `engine="vllm"`, too.')
        if self.force_words and self.engine == "vllm":
            raise ValueError('`force_words` needs `engine="generate"`: under vLLM no word is forced.')
        check_least(self, 1, "samples", "max_new_tokens", "batch_size", "limit")
        check_least(self, 0, "forced_samples", "next_tokens")
        if bool(self.forced_samples) != bool(self.force_words):
            raise ValueError("`forced_samples` and `force_words` go together: pass both or none.")
