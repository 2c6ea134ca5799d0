"""`Directions`: one for every steered layer, how strongly it is added, and where it comes from; saved and loaded."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer.backbone.parts import fingerprint_of, num_layers, refuse_other_backbone, residual_width, underlying
from hf_value_steer.cards.vectors import vectors_card
from hf_value_steer.errors import ArtefactError
from hf_value_steer.files.reading import find, read_object, reading, tensor_shapes
from hf_value_steer.files.upload import push
from hf_value_steer.files.writing import write_atomically, write_json


FORMAT = "hf-value-steer/steering-vectors@1"
_JSON, _TENSORS = "steering_vectors.json", "steering_vectors.safetensors"
_TEXT = str | None
_RECORDED: dict[str, Any] = {
    "attribute": _TEXT,
    "backbone": _TEXT,
    "backbone_fingerprint": _TEXT,
    "num_layers": int | None,
    "provenance": dict,
}


@dataclass(frozen=True, eq=False, repr=False)
class Directions:
    r"""Unit directions of the residual stream, one a layer, and their strengths: what [`SteeringVectors`] are made of.

    What is added behind layer `l` is `multiplier * strengths[l] * directions[l]`.

    Args:
        layers (`tuple` of `int`): the steered layers, counted from 0, ascending.
        directions (`torch.FloatTensor` of shape `(len(layers), width)`): of norm 1.
        strengths (`torch.FloatTensor` of shape `(len(layers),)`): what a multiplier of 1 adds, as a norm.
        norms (`torch.FloatTensor` of shape `(len(layers),)`, *optional*): mean norm of the residual, once they are
            scaled.
        attribute (`str`, *optional*): what a positive multiplier brings more of.
        backbone (`str`, *optional*), backbone_fingerprint (`str`, *optional*), num_layers (`int`, *optional*): the
            model that the directions are of; what is `None` is not checked.
        provenance (`dict`): how they were made, free form, JSON.
        name_or_path (`str`, *optional*): where they were loaded from.

    Raises:
        ValueError: for shapes that do not fit, and for numbers that are NaN, infinite or a zero vector.
    """

    layers: tuple[int, ...]
    directions: Tensor
    strengths: Tensor
    norms: Tensor | None = None
    attribute: str | None = None
    backbone: str | None = None
    backbone_fingerprint: str | None = None
    num_layers: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    name_or_path: str | None = None

    def __post_init__(self) -> None:
        count = len(self.layers)
        if not count or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"`layers` have to be different, ascending and not negative; got {self.layers}.")
        shapes = [("directions", self.directions, 2), ("strengths", self.strengths, 1)]
        shapes += [("norms", self.norms, 1)] if self.norms is not None else []
        for name, tensor, dimensions in shapes:
            if tensor.dim() != dimensions or len(tensor) != count:
                raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, but there are {count} layers.")
            if not tensor.isfinite().all():
                raise ValueError(f"`{name}` hold NaN or infinite numbers.")
        if not torch.allclose(self.directions.norm(dim=-1), torch.ones(count), atol=1e-3):
            raise ValueError("`directions` have to be of norm 1: make them with `SteeringVectors.from_tensors`.")

    @classmethod
    def from_tensors(cls, vectors: Mapping[int, Tensor], **recorded: Any) -> Self:
        """From a vector for each layer, of any length: its length becomes the strength, until it is scaled.

        Args:
            vectors (`dict` from `int` to `torch.Tensor` of shape `(width,)`): by layer.
            recorded: `attribute`, `backbone`, `backbone_fingerprint`, `num_layers`, `provenance`.

        Raises:
            ValueError: for a zero vector, NaN, or vectors of different widths.
        """
        layers = tuple(sorted(vectors))
        rows = [vectors[layer].detach().to("cpu", torch.float32).flatten() for layer in layers]
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"`vectors` have to have one width, got {sorted({len(row) for row in rows})}.")
        stacked = torch.stack(rows)
        if not stacked.isfinite().all():
            raise ValueError("`vectors` hold NaN or infinite numbers.")
        strengths = stacked.norm(dim=-1)
        if zero := [layer for layer, strength in zip(layers, strengths.tolist(), strict=True) if not strength]:
            raise ValueError(f"`vectors` of layers {zero} are zero: they have no direction.")
        return cls(layers, stacked / strengths[:, None], strengths, **recorded)

    def __repr__(self) -> str:
        """Without the numbers, which are many."""
        attribute = f"{self.attribute!r}, " if self.attribute else ""
        scaled = "scaled" if self.norms is not None else "not scaled"
        said = f"{attribute}layers {self.layers[0]} to {self.layers[-1]}, {self.width} wide, {scaled}"
        return f"{type(self).__name__}({said})"

    @property
    def width(self) -> int:
        return self.directions.shape[1]

    @property
    def rho(self) -> Tensor | None:
        """Relative influence of a multiplier of 1: norm of what is added to norm of the residual, `(len(layers),)`."""
        return None if self.norms is None else self.strengths / self.norms

    def only(self, layers: Sequence[int]) -> Self:
        """The same at some of the layers.

        Raises:
            ValueError: if there is no vector for one of them.
        """
        if missing := sorted(set(layers) - set(self.layers)):
            raise ValueError(f"There are no vectors for layers {missing}, only for {list(self.layers)}.")
        rows = [self.layers.index(layer) for layer in sorted(layers)]
        norms = None if self.norms is None else self.norms[rows]
        chosen = tuple(sorted(layers))
        return replace(
            self, layers=chosen, directions=self.directions[rows], strengths=self.strengths[rows], norms=norms
        )

    def scaled_to(self, norms: Tensor, rho: float | None = None, **recorded: Any) -> Self:
        r"""The same directions with strengths that follow the norm of the residual stream.

        Args:
            norms (`torch.FloatTensor` of shape `(all layers,)`): from [`mean_norms`], of every layer of the model.
            rho (`float`, *optional*): relative influence of a multiplier of 1, the same at every layer. By default
                `1 / sqrt(width)`, the share that a random direction has in a vector, so that one multiplier means the
                same in models of any width; `rho=1.0` leaves the root out.
            recorded: what is to be recorded under `provenance["calibration"]`: files of older versions have that name.
        """
        if self.layers[-1] >= len(norms):
            raise ValueError(f"`norms` are of {len(norms)} layers, but layer {self.layers[-1]} is steered.")
        rho = self.width**-0.5 if rho is None else rho
        if not 0 < rho < float("inf"):
            raise ValueError(f"`rho` has to be a positive number, got {rho}.")
        own = norms[list(self.layers)].float()
        provenance = {**self.provenance, "calibration": {"rho": rho, **recorded}}
        return replace(self, strengths=rho * own, norms=own, provenance=provenance)

    def check_fit(self, model: PreTrainedModel, allow_backbone_mismatch: bool = False) -> None:
        """Raise a `ValueError` unless these are vectors of this model, or of the one inside it."""
        model = underlying(model)
        width, depth = residual_width(model), num_layers(model)
        if self.width != width:
            raise ValueError(f"These vectors are {self.width} wide, the residual stream of this model is {width}.")
        if self.layers[-1] >= depth:
            raise ValueError(
                f"These vectors steer layer {self.layers[-1]}, but this model has layers 0 to {depth - 1}."
            )
        if self.num_layers not in (None, depth):
            raise ValueError(f"These vectors are of a model with {self.num_layers} layers, this one has {depth}.")
        if not allow_backbone_mismatch:
            refuse_other_backbone("vectors", self, model)

    def fingerprint(self) -> str:
        """Identity of what a multiplier of 1 adds at which layer."""
        offsets = self.directions * self.strengths[:, None]
        return fingerprint_of((f"layers.{layer}", offset) for layer, offset in zip(self.layers, offsets, strict=True))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `steering_vectors.json`, `steering_vectors.safetensors` and a card, `README.md`.

        In a card that is there, what was generated from the vectors that were there is made anew; what a person wrote
        stays.
        """
        folder = Path(save_directory)
        card = self._card_over(folder)
        tensors = {"directions": self.directions, "strengths": self.strengths}
        if self.norms is not None:
            tensors["norms"] = self.norms
        write_atomically(folder / _TENSORS, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        recorded = {name: getattr(self, name) for name in _RECORDED}
        made_by = {"format": FORMAT, "library_version": version("hf-value-steer")}
        write_json(folder / _JSON, {**made_by, "layers": list(self.layers), **recorded})
        write_atomically(folder / "README.md", card.encode())

    def _card_over(self, folder: Path) -> str:
        """The card of these vectors, as the next one in a folder."""
        path, card = folder / "README.md", str(self.card())
        if not path.is_file():
            return card
        text = path.read_text(encoding="utf-8")
        before, after = _generated_card(folder).split("\n"), card.split("\n")
        for kind, start, stop, first, last in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
            if kind == "replace":
                text = text.replace("\n".join(before[start:stop]), "\n".join(after[first:last]))
        return text

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **hub: Any) -> Self:
        """Load from a folder or the Hub: JSON and safetensors, never a pickle.

        Args:
            source: Hub id or folder.
            hub: `revision`, `token`, `cache_dir`, `subfolder`, ... of the download.

        Raises:
            OSError: if there is nothing there, or the Hub cannot be reached.
            ArtefactError: if these are no steering vectors, or damaged ones: it names the file.
        """
        folder = str(source)
        paths = [find(folder, name, "steering vectors", **hub) for name in (_JSON, _TENSORS)]
        for path, name in zip(paths, (_JSON, _TENSORS), strict=True):
            if path is None:
                raise ArtefactError(f"{folder} holds no steering vectors: there is no {name}.")
        document_file, tensor_file = (path for path in paths if path is not None)
        with reading(document_file, "file of steering vectors"):
            layers, recorded = _checked(read_object(document_file))
        with reading(tensor_file, "file of steering vectors"):
            _refuse_other_tensors(tensor_shapes(tensor_file), len(layers))
            tensors: dict[str, Any] = {name: tensor.float() for name, tensor in load_file(tensor_file).items()}
            return cls(layers, **tensors, **recorded, name_or_path=folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes as one commit; arguments of [`~hf_value_steer.files.upload.push`].

        Returns:
            The URL of the commit.
        """
        return push(self.save_pretrained, repo_id, **options)

    def card(self) -> ModelCard:
        """A model card, generated from what is recorded."""
        rho, recorded = self.rho, {name: getattr(self, name) for name in _RECORDED}
        return vectors_card(recorded, self.layers, self.width, None if rho is None else (100 * rho.mean()).item())


def _checked(document: Mapping[str, Any]) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The layers of a `steering_vectors.json`, and the other fields of [`SteeringVectors`] that it holds."""
    if document.get("format") != FORMAT:
        raise ArtefactError(
            f"the format is {document.get('format')!r}, this version of hf-value-steer reads {FORMAT!r}."
        )
    for name, kind in {"layers": list, **_RECORDED}.items():
        if name not in document or not isinstance(document[name], kind):
            raise ArtefactError(f"damaged: `{name}` is {document.get(name, 'missing')!r}, save the vectors again.")
    layers = tuple(document["layers"])
    if not all(type(layer) is int for layer in layers):
        raise ArtefactError(f"damaged: `layers` have to be integers, got {layers}: save the vectors again.")
    return layers, {name: document[name] for name in _RECORDED}


def _refuse_other_tensors(shapes: Mapping[str, tuple[int, ...]], count: int) -> None:
    """Raise an `ArtefactError` unless these are the tensors of vectors for so many layers."""
    required, optional = {"directions", "strengths"}, {"norms"}
    if not required <= shapes.keys() <= required | optional:
        raise ArtefactError(f"damaged: it holds {sorted(shapes)[:4]}, expected directions, strengths and maybe norms.")
    for name, shape in shapes.items():
        if shape[:1] != (count,) or len(shape) != 1 + (name == "directions"):
            raise ArtefactError(f"damaged: `{name}` has shape {shape}, but {_JSON} names {count} layers.")


def _generated_card(folder: Path) -> str:
    """What was generated for the vectors in a folder; nothing if there are none that can be read."""
    if not (folder / _JSON).is_file():
        return ""
    try:
        return str(Directions.from_pretrained(folder).card())
    except (OSError, ValueError):
        return ""
