"""Collected generations on disk: safetensors files that appear whole or not at all, and are read by offset.

Why not by `safe_open(...).get_slice`: rows of features in random order come from a disk at 0.26 of the speed, 0.31 if
files are kept open, and then what was read stays resident (`python -m benchmarks.large_collection --readers`).
Headers are read by `safe_open`, which refuses damaged ones.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hf_value_steer.backbone.features import FINAL, Layer, layers_of
from hf_value_steer.errors import ArtefactError, MismatchError
from hf_value_steer.files.reading import read_record, reading
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
_FACTS = ("backbone", "backbone_fingerprint", "chat_template", "feature_dtype", "hidden_size", "shards")


def tensor_name(kind: str, layer: Layer) -> str:
    """What the states of a layer are called in a shard; `kind` is `"features"` or `"prompt_features"`."""
    return kind if layer == FINAL else f"{kind}.{layer}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically, with a digest of its content."""
    unknown = "0" * 64
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = save(contiguous, metadata={"sha256": unknown})
    write_atomically(path, content.replace(unknown.encode(), _digest(content).encode(), 1))


def _digest(file: bytes) -> str:
    """Digest of the data of a safetensors file, which stand after its header."""
    return hashlib.sha256(file[8 + int.from_bytes(file[:8], "little") :]).hexdigest()


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies in its file, in bytes, and what it is."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def stride(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])


class TensorFile:
    """A safetensors file of which only the header is in memory.

    Attributes:
        tensors (`dict`): what it holds, by name.
        sha256 (`str`): digest of its content.

    Raises:
        ArtefactError: if the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.is_dir():
            raise self.damaged("it is a folder")
        self.tensors: dict[str, _Entry] = {}
        try:  # the library compares the header with itself and with the size of the file
            with safe_open(path, "numpy") as file:
                self.sha256: str = (file.metadata() or {}).get("sha256", "")
                for name in file.offset_keys():
                    self._add(name, file.get_slice(name))
        except SafetensorError as error:
            raise self.damaged(str(error)) from error
        if not self.sha256:
            raise self.damaged("it has no `sha256` in its metadata")
        self.start = path.stat().st_size - self._size

    @property
    def _size(self) -> int:
        """Bytes of all tensors known so far, which lie one after the other to the end of the file."""
        return sum(entry.stride * entry.shape[0] for entry in self.tensors.values())

    def _add(self, name: str, found: Any) -> None:
        dtype, shape = _DTYPES.get(found.get_dtype()), tuple(found.get_shape())
        if dtype is None:
            raise self.damaged(f"{name!r} is of {found.get_dtype()}, expected one of {', '.join(_DTYPES)}")
        if not shape or math.prod(max(length, 1) for length in shape) >= 2**63:
            raise self.damaged(f"{name!r} has the shape {list(shape)}, expected rows")
        self.tensors[name] = _Entry(self._size, dtype, shape)

    def damaged(self, why: str) -> ArtefactError:
        """An error that says what is wrong with the file."""
        return ArtefactError(
            f"{self.path} is damaged: delete it and run what made it, such as `collect`, again ({why})."
        )

    def verify(self) -> None:
        """Compare the content with its digest; reads the whole file.

        Raises:
            ArtefactError: if it differs.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                raise self.damaged("its content is not that of its digest")

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Entries `first` to `last` (exclusive) of a tensor, along its first dimension.

        Raises:
            ArtefactError: if the file has no such tensor, or not so many rows of it.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise self.damaged(f"it holds no {name!r}, only {', '.join(self.tensors) or 'nothing'}")
        last = entry.shape[0] if last is None else last
        if not 0 <= first <= last <= entry.shape[0]:
            raise self.damaged(f"it holds {entry.shape[0]} rows of {name!r}, where {first} to {last} are asked for")
        tensor = torch.empty((last - first, *entry.shape[1:]), dtype=entry.dtype)
        with self.path.open("rb") as file:
            file.seek(self.start + entry.offset + first * entry.stride)
            if file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
                raise self.damaged(f"it ends before the end of {name!r}")
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
        ArtefactError: if this is no collection, or files of it are missing or damaged.
        ValueError: if there is no generation in it.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        path = self.folder / "collection.json"
        if not path.is_file():
            raise ArtefactError(f"{folder} holds no collection: there is no {path.name}.")
        self.manifest: dict[str, Any] = read_record(path, remedy="Delete it and run `collect` again")
        self._check(path)
        self.shards = [TensorFile(shard_path(self.folder, index)) for index in range(self.manifest["shards"])]

    def _check(self, path: Path) -> None:
        if self.manifest.get("format") != FORMAT:
            raise ArtefactError(f"{path} has the format {self.manifest.get('format')!r}, expected {FORMAT!r}.")
        if lacking := [name for name in _FACTS if name not in self.manifest]:
            raise ArtefactError(f"{path} lacks {', '.join(lacking)}: delete it and run `collect` again.")
        if "feature_layers" in self.manifest:
            with reading(path, "record of a collection", "Put the original back, or run `collect` again"):
                layers_of(self.manifest["feature_layers"], self.manifest["num_layers"])
        shards = self.manifest["shards"]
        if type(shards) is not int or shards < 1:
            raise ArtefactError(f"`shards` of {path} is {shards!r}, expected a whole number of at least 1.")
        names = [found.stem for found in shard_path(self.folder, 0).parent.glob("*.safetensors")]
        if missing := shards - sum(name.isdecimal() and int(name) < shards for name in names):
            raise ArtefactError(
                f"{missing} of {shards} shards of {self.folder} are missing: wait for `collect`, or run it again."
            )

    @cached_property
    def prompts(self) -> list[Prompt]:
        path = self.folder / "prompts.jsonl"
        if not path.is_file():
            raise ArtefactError(f"{path} is missing: run `collect` again, which writes it.")
        return load_prompts(str(path))

    @cached_property
    def rows(self) -> Rows:
        parts = []
        for index, shard in enumerate(self.shards):
            offsets, prompts, natural = _columns(shard)
            parts.append((torch.full((len(prompts),), index), offsets[:-1], offsets[1:], prompts, natural))
        rows = Rows(*(torch.cat(column) for column in zip(*parts, strict=True)))
        if not len(rows):
            raise ValueError(f"{self.folder} holds no generation.")
        return rows

    def read(self, name: str, row: int) -> Tensor:
        """A tensor of the row's tokens, `(tokens, ...)`: `"tokens"`, `"next_tokens"`, ..."""
        return self.read_from(self.shards, name, row)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers whose states are kept, in the order in which they were asked for."""
        return tuple(self.manifest.get("feature_layers", [FINAL]))

    def resolve(self, places: Sequence[int | float | str] | None) -> tuple[Layer, ...]:
        """The kept layers that `feature_layers` means, see [`ValueHeadConfig`]; all of them for `None`.

        Raises:
            MismatchError: for a layer that is not kept.
        """
        if places is None:
            return self.layers
        layers = layers_of(places, depth) if (depth := self.manifest.get("num_layers")) else tuple(places)
        if lacking := [layer for layer in layers if layer not in self.layers]:
            raise MismatchError(
                f"`feature_layers` {list(places)}: {self.folder} keeps the states of {list(self.layers)}, not of "
                f"{lacking}. Collect them, too, in another folder, or choose among those that are kept."
            )
        return layers  # type: ignore[return-value]  # all of them are kept layers

    def width(self, layers: Sequence[Layer]) -> int:
        """Width of the states of these layers side by side."""
        return sum(self.shards[0].read(tensor_name("features", layer), 0, 0).shape[-1] for layer in layers)

    def features(self, row: int, layers: Sequence[Layer]) -> Tensor:
        """What a head on these layers reads of the prompt's last token and of a row, `(1 + tokens, width)`."""
        prompt = torch.cat([self.prompt_feature(row, layer) for layer in layers])
        tokens = [self.read(tensor_name("features", layer), row) for layer in layers]
        return torch.cat([prompt[None], torch.cat(tokens, dim=-1)])

    def length(self, row: int) -> int:
        """How many tokens a row has."""
        return int(self.rows.stop[row] - self.rows.start[row])

    def digest(self) -> str:
        """What tells this collection from others: its manifest, with the digest of its prompts."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def prompt_feature(self, row: int, layer: Layer = FINAL) -> Tensor:
        """The state of the last token of the row's prompt at a layer, `(width,)`."""
        shard = int(self.rows.shard[row])
        place = row - int(torch.searchsorted(self.rows.shard, shard))
        return self.shards[shard].read(tensor_name("prompt_features", layer), place, place + 1)[0]

    def read_from(self, files: list[TensorFile], name: str, row: int) -> Tensor:
        """The same out of files that lie beside the shards, one each."""
        rows = self.rows
        return files[int(rows.shard[row])].read(name, int(rows.start[row]), int(rows.stop[row]))


def _columns(shard: TensorFile) -> tuple[Tensor, Tensor, Tensor]:
    """Where the rows of a shard lie, their prompts, and whether nothing was forced into them."""
    offsets, prompts, natural = (shard.read(name) for name in ("offsets", "prompts", "natural"))
    tokens, rows = len(shard.read("tokens")), (len(offsets) - 1,)
    if not (
        (offsets.dtype, prompts.dtype, natural.dtype) == (torch.int64, torch.int64, torch.bool)
        and (offsets.ndim, prompts.shape, natural.shape) == (1, rows, rows)
        and offsets[[0, -1]].tolist() == [0, tokens]
        and (offsets.diff() >= 0).all()
        and (prompts >= 0).all()
    ):
        raise shard.damaged(f"'offsets', 'prompts' and 'natural' are not those of rows of {tokens} tokens")
    return offsets, prompts, natural


def shard_path(folder: Path, index: int) -> Path:
    return folder / "shards" / f"{index:05d}.safetensors"
