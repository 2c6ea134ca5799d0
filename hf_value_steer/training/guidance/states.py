"""States of a collection: what a guidance module reads, computed once from the tokens that `collect` kept."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer.backbone.points import layer_point
from hf_value_steer.files.writing import claim
from hf_value_steer.progress import progress
from hf_value_steer.training.prompts import Formatter, join
from hf_value_steer.training.shards import Collection, TensorFile, write_tensors


ROWS = 32  # in one forward pass


class _Enough(Exception):
    """The layers above are not needed."""


@contextmanager
def _kept_state(model: PreTrainedModel, layer: int) -> Iterator[list[Tensor]]:
    """Keep the output of a layer, and leave the forward there."""
    kept: list[Tensor] = []

    def keep(state: Tensor) -> None:
        kept.append(state)
        raise _Enough

    with layer_point(model, layer).watched(keep), suppress(_Enough):
        yield kept


@torch.no_grad()
def states(model: PreTrainedModel, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """The output of decoder layer `layer`, `(rows, length, hidden_size)`; layers above it are not computed."""
    given = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask", "position_ids")}
    with _kept_state(model, layer) as kept:
        model(**given, use_cache=False)
    return kept[0]


class States:
    """The states of a collection at one layer, in a folder of its own, beside nothing of the collection's.

    Args:
        collection: whose tokens are read.
        folder: where the states are; shards that are there are kept.
        model, formatter: the backbone, and how prompts become its input.
        layer (`int`): decoder layer, counted from 0.
    """

    def __init__(self, collection: Collection, folder: Path, model: PreTrainedModel, formatter: Formatter, layer: int):
        self.collection, self.folder, self.layer = collection, folder, layer
        claim(folder / "states.json", {"collection_sha256": collection.digest(), "layer": layer})
        writer = _Writer(collection, model, formatter, layer)
        for index in progress(range(len(collection.shards)), f"states of layer {layer}", "shard"):
            if not self._path(index).exists():
                write_tensors(self._path(index), writer.shard(index))
        if not (folder / "prompts.safetensors").exists():
            write_tensors(folder / "prompts.safetensors", writer.prompts())
        self.files = [TensorFile(self._path(index)) for index in range(len(collection.shards))]

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    @cached_property
    def _prompts(self) -> tuple[Tensor, ...]:
        file = TensorFile(self.folder / "prompts.safetensors")
        return torch.split(file.read("states"), file.read("lengths").tolist())

    def response(self, row: int) -> Tensor:
        """States of a row's tokens, `(tokens, hidden_size)`."""
        return self.collection.read_from(self.files, "states", row)

    def prompt(self, row: int) -> Tensor:
        """States of its prompt, `(length, hidden_size)`."""
        return self._prompts[int(self.collection.rows.prompt[row])]


class _Writer:
    def __init__(self, collection: Collection, model: PreTrainedModel, formatter: Formatter, layer: int):
        self.collection, self.model, self.formatter, self.layer = collection, model, formatter, layer

    def shard(self, index: int) -> dict[str, Tensor]:
        shard = self.collection.shards[index]
        responses = torch.split(shard.read("tokens"), shard.read("offsets").diff().tolist())
        owners = [self.collection.prompts[prompt] for prompt in shard.read("prompts").tolist()]
        parts = []
        for first in range(0, len(owners), ROWS):
            inputs = join(self.formatter, owners[first : first + ROWS], responses[first : first + ROWS])
            length = int(inputs["prompt_length"])
            read = states(self.model, inputs, self.layer)[:, length:].cpu()
            parts.append(read[inputs["attention_mask"][:, length:].bool()])
        return {"states": torch.cat(parts)}

    def prompts(self) -> dict[str, Tensor]:
        parts, nothing = [], torch.empty(0)
        for prompt in self.collection.prompts:
            parts.append(states(self.model, join(self.formatter, [prompt], [nothing]), self.layer)[0].cpu())
        return {"states": torch.cat(parts), "lengths": torch.tensor([len(part) for part in parts])}
