"""Collected generations on disk: safetensors files that appear whole or not at all, and are read by offset.

Reading by offset, instead of mapping a file into memory, keeps the resident memory flat however large the data is.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from hf_value_steer.files.writing import write_atomically
from hf_value_steer.training.prompts import Prompt, load_prompts


FORMAT = "hf-value-steer/collection@1"
_DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically, with a digest of its content."""
    unknown = "0" * 64
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = save(contiguous, metadata={"sha256": unknown})
    write_atomically(path, content.replace(unknown.encode(), _digest(content).encode(), 1))


def _digest(file: bytes) -> str:
    """Digest of the data of a safetensors file, which stand after its header."""
    return hashlib.sha256(file[8 + int.from_bytes(file[:8], "little") :]).hexdigest()


class TensorFile:
    """A safetensors file of which only the header is in memory.

    Raises:
        ValueError: if the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self.header = json.loads(file.read(length))
            self.start = 8 + length
            self.metadata = self.header.pop("__metadata__")
            complete = path.stat().st_size == self.start + max(e["data_offsets"][1] for e in self.header.values())
        except (ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
            raise self._damaged() from error
        if not complete:
            raise self._damaged()

    def _damaged(self) -> ValueError:
        return ValueError(f"{self.path} is damaged: delete it and run `collect` again, which makes it anew.")

    def verify(self) -> None:
        """Compare the content with its digest; reads the whole file."""
        if _digest(self.path.read_bytes()) != self.metadata["sha256"]:
            raise self._damaged()

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Entries `first` to `last` (exclusive) of a tensor, along its first dimension."""
        entry = self.header[name]
        shape, dtype = list(entry["shape"]), _DTYPES[entry["dtype"]]
        shape[0] = (shape[0] if last is None else last) - first
        tensor = torch.empty(shape, dtype=dtype)
        stride = dtype.itemsize * tensor[:1].numel()
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + entry["data_offsets"][0] + first * stride)
            buffer = tensor.view(torch.uint8).numpy().reshape(-1) if shape[0] else np.empty(0, np.uint8)
            if file.readinto(buffer.data) != len(buffer):
                raise self._damaged()
        return tensor


@dataclass
class Rows:
    """All generations of a collection, one entry each: `(rows,)`.

    Args:
        shard, start, stop: where the tokens of a row lie.
        prompt: index of its prompt.
        natural (`torch.BoolTensor`): whether nothing was forced into it.
    """

    shard: Tensor
    start: Tensor
    stop: Tensor
    prompt: Tensor
    natural: Tensor

    def __len__(self) -> int:
        return len(self.prompt)


class Collection:
    """What [`~hf_value_steer.training.collect`] left in a folder.

    Args:
        folder: of the collection.

    Attributes:
        manifest (`dict`): how the generations were made.

    Raises:
        ValueError: if this is no collection, shards are missing or damaged, or there is no token in them.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        path = self.folder / "collection.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no collection: there is no {path.name}.")
        self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{path} has the format {self.manifest.get('format')!r}, expected {FORMAT!r}.")
        paths = [shard_path(self.folder, index) for index in range(self.manifest["shards"])]
        if missing := sum(not path.exists() for path in paths):
            raise ValueError(f"{missing} of {len(paths)} shards of {folder} are missing: run `collect` again.")
        self.shards = [TensorFile(path) for path in paths]

    @cached_property
    def prompts(self) -> list[Prompt]:
        return load_prompts(str(self.folder / "prompts.jsonl"))

    @cached_property
    def rows(self) -> Rows:
        parts = []
        for index, shard in enumerate(self.shards):
            offsets = shard.read("offsets")
            here = torch.full((len(offsets) - 1,), index)
            parts.append((here, offsets[:-1], offsets[1:], shard.read("prompts"), shard.read("natural")))
        rows = Rows(*(torch.cat(column) for column in zip(*parts, strict=True)))
        if not len(rows):
            raise ValueError(f"{self.folder} holds no generation.")
        return rows

    def read(self, name: str, row: int) -> Tensor:
        """A tensor of the row's tokens, `(tokens, ...)`: `"features"`, `"tokens"`, `"next_tokens"`, ..."""
        return self.read_from(self.shards, name, row)

    def length(self, row: int) -> int:
        """How many tokens a row has."""
        return int(self.rows.stop[row] - self.rows.start[row])

    def digest(self) -> str:
        """What tells this collection from others: its manifest, with the digest of its prompts."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def prompt_feature(self, row: int) -> Tensor:
        """The feature of the last token of the row's prompt, `(width,)`."""
        shard = int(self.rows.shard[row])
        place = row - int(torch.searchsorted(self.rows.shard, shard))
        return self.shards[shard].read("prompt_features", place, place + 1)[0]

    def read_from(self, files: list[TensorFile], name: str, row: int) -> Tensor:
        """The same out of files that lie beside the shards, one each."""
        rows = self.rows
        return files[int(rows.shard[row])].read(name, int(rows.start[row]), int(rows.stop[row]))


def shard_path(folder: Path, index: int) -> Path:
    return folder / "shards" / f"{index:05d}.safetensors"
