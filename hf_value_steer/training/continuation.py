"""What continues prompts for `collect`: `generate`, or a serving engine. And what a shard is made of."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from hf_value_steer.arguments.collect import CollectArguments
from hf_value_steer.backbone.features import Layer
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.prompts import Formatter
from hf_value_steer.training.shards import tensor_name


@dataclass(frozen=True)
class Batch:
    """The work of one shard."""

    index: int
    prompts: Sequence[Prompt]
    first_prompt: int
    samples: int
    forced: bool


class Continuation(Protocol):
    """What continues prompts, and keeps the features that it sees.

    Attributes:
        formatter: how prompts become its input.
        facts (`dict`): what of the manifest depends on it.
    """

    formatter: Formatter
    facts: dict[str, Any]

    def tensors(self, batch: Batch) -> dict[str, Tensor]:
        """A shard: of each token its feature and id; of each row its prompt and where its tokens lie."""


# Makes what continues the prompts of a collection from what is asked for and all that will be continued.
Start: TypeAlias = Callable[[CollectArguments, Sequence[Prompt]], Continuation]


def shard_tensors(
    batch: Batch,
    keep: Tensor,
    columns: Mapping[str, Tensor],
    features: Mapping[Layer, Tensor],
    prompt_features: Mapping[Layer, Tensor],
) -> dict[str, Tensor]:
    """A shard as it is written.

    Args:
        batch: whose shard it is.
        keep (`torch.BoolTensor` of shape `(rows, steps)`): which new tokens belong to their text.
        columns (`dict`): `(rows, steps, ...)` each, `"tokens"` among them.
        features (`dict`): of each layer, `(rows, steps, width)`.
        prompt_features (`dict`): the same of the last token of each prompt, `(rows, width)`.
    """
    counts = keep.sum(dim=1)
    owner = torch.arange(batch.first_prompt, batch.first_prompt + len(batch.prompts))
    return {
        **{name: column[keep] for name, column in columns.items()},
        **{tensor_name("features", layer): states[keep] for layer, states in features.items()},
        **{tensor_name("prompt_features", layer): states for layer, states in prompt_features.items()},
        "offsets": torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        "prompts": owner.repeat_interleave(batch.samples),
        "natural": torch.full((len(keep),), not batch.forced),
    }


def seed_of(seed: int, index: int) -> int:
    """The seed of one shard."""
    return int.from_bytes(hashlib.blake2b(f"{seed}-{index}".encode(), digest_size=6).digest(), "little")


def until_end(tokens: Tensor, eos_token_id: int | list[int] | None) -> Tensor:
    """Mask `(rows, steps)` of each row's new tokens up to and including its first end of sequence."""
    if eos_token_id is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    ended = torch.isin(tokens, torch.tensor(eos_token_id)).long()
    return ended.cumsum(1) == ended
