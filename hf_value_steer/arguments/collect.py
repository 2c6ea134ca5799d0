"""What `collect` and `label` are told."""

import json
from dataclasses import dataclass, field
from typing import Literal

from hf_value_steer.arguments.base import Arguments, GenerationArguments
from hf_value_steer.arguments.kinds import Amount, Count, Layers, Limit, Seed, Texts, shown
from hf_value_steer.checks import check_layers
from hf_value_steer.errors import FieldError


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
    max_new_tokens: Count = field(default=128, metadata={"help": "tokens kept of each generation, at most"})
    forced_samples: Amount = field(
        default=0, metadata={"help": "further generations of each prompt, for training only, with words forced in"}
    )
    force_words: str | None = field(
        default=None, metadata={"help": "a .txt file (one word a line) or python:module:function: words to force in"}
    )
    next_tokens: Amount = field(default=0, metadata={"help": "keep so many most likely next tokens of every step"})
    feature_layers: Layers = field(
        default_factory=lambda: ["final"],
        metadata={
            "help": "layers whose states are kept: numbers, from 0 or negative from the end; fractions of the depth, "
            "with a point; final; or all"
        },
    )
    batch_size: Count = field(default=16, metadata={"help": "prompts in one call of generate, and in one shard"})
    seed: Seed = field(default=0, metadata={"help": "seed of sampling and forcing"})
    engine: Literal["generate", "vllm"] = field(default="generate", metadata={"help": "what continues the prompts"})
    engine_args: str | None = field(
        default=None, metadata={"help": "further arguments of vllm.LLM as JSON, with `engine` vllm"}
    )

    def check(self) -> None:
        if self.engine_args is not None and self.engine != "vllm":
            raise ValueError('`engine_args` are those of vLLM: pass `engine="vllm"`, too.')
        if self.engine_args is not None and not _is_json_object(self.engine_args):
            raise FieldError(
                "engine_args", f"`engine_args` has to be a JSON object in a text, got {shown(self.engine_args)}."
            )
        if self.feature_layers != ["all"]:
            check_layers(self.feature_layers)
        if self.engine == "vllm" and self.feature_layers != ["final"]:
            raise ValueError(
                f'`feature_layers` {self.feature_layers} need `engine="generate"`: under vLLM only the final state is '
                "seen."
            )
        if self.force_words and self.engine == "vllm":
            raise ValueError('`force_words` needs `engine="generate"`: under vLLM no word is forced.')
        if bool(self.forced_samples) != bool(self.force_words):
            raise ValueError("`forced_samples` and `force_words` go together: pass both or none.")


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (RecursionError, ValueError):
        return False


@dataclass(kw_only=True)
class LabelArguments(Arguments):
    """Who reads the generations, and how much of them."""

    judges: Texts = field(metadata={"help": "lexicon:, classifier:, reward:, llm:, math: or python: judges"})
    prefixes: bool = field(default=False, metadata={"help": "let judges score every prefix, not whole texts only"})
    prefix_words: Limit | None = field(
        default=None, metadata={"help": "a prefix is its last so many words; the whole of it by default"}
    )


@dataclass(kw_only=True)
class LabelCommandArguments(LabelArguments):
    """What is labelled."""

    collection: str = field(metadata={"help": "folder of the collection; labels that are there already are kept"})
    show: Amount = field(default=0, metadata={"help": "print so many texts, drawn at random, with their scores"})
