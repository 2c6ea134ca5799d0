"""Vectors of other libraries, with the strength that they have there: a multiplier of 1 gives the same logits."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_value_steer.activation.steering_vectors import SteeringVectors
from hf_value_steer.errors import ArtefactError
from hf_value_steer.files.reading import reading


_NAME = re.compile(r"(?:direction|layer)\.(\d+)")


def vectors_from_steering_vectors(vector: Any, **recorded: Any) -> SteeringVectors:
    """From a `SteeringVector` of the package `steering-vectors`.

    Args:
        vector: has `layer_activations` (`dict` from `int` to `torch.Tensor`) and `layer_type`.
        recorded: `attribute`, `backbone`, ... as in [`SteeringVectors.from_tensors`].

    Raises:
        ValueError: if it is not of the layer type `"decoder_block"`, which is what is steered here.
    """
    if vector.layer_type != "decoder_block":
        raise ValueError(f'Only vectors of layer type "decoder_block" can be taken over, got {vector.layer_type!r}.')
    return _imported(vector.layer_activations, "steering-vectors", recorded)


def vectors_from_repeng(vector: Any, **recorded: Any) -> SteeringVectors:
    """From a `ControlVector` of the package `repeng`: `directions` is a `dict` from `int` to `np.ndarray`."""
    directions = {layer: torch.from_numpy(np.array(array)) for layer, array in vector.directions.items()}
    return _imported(directions, "repeng", {"provenance": {"model_type": vector.model_type}, **recorded})


def vectors_from_gguf(path: str | os.PathLike[str], **recorded: Any) -> SteeringVectors:
    """From a GGUF file of control vectors, as `repeng` exports them (`direction.LAYER`).

    Raises:
        ArtefactError: if this is no such file, or a damaged one.
        ImportError: if the package `gguf` is missing.
    """
    from gguf import GGUFReader

    with reading(path, "GGUF file of control vectors"):
        reader = GGUFReader(path)
        architecture = reader.get_field("general.architecture")
        found = architecture.contents() if architecture else None
        if found != "controlvector":
            raise ArtefactError(f"this is no control vector: its architecture is {found!r}.")
        tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
        return _imported(_by_layer(tensors), "gguf", recorded)


def vectors_from_file(path: str | os.PathLike[str], **recorded: Any) -> SteeringVectors:
    """From a `.gguf` file, or a `.safetensors` file with tensors `direction.LAYER` or `layer.LAYER`, one row each.

    Raises:
        OSError: if there is no such file.
        ArtefactError: if it holds something else, or is damaged.
    """
    if Path(path).suffix == ".gguf":
        return vectors_from_gguf(path, **recorded)
    with reading(path, "safetensors file of vectors"):
        return _imported(_by_layer(load_file(path)), "safetensors", recorded)


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    matches = {name: _NAME.fullmatch(name) for name in tensors}
    if not matches or not all(matches.values()):
        raise ArtefactError(f"it should hold tensors named direction.LAYER, it has {sorted(tensors)[:5]}.")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() != tensor.shape[-1:].numel():
            raise ArtefactError(
                f"{name} should be one row of floating-point numbers, it is of shape {tuple(tensor.shape)} and "
                f"{tensor.dtype}: export it anew, not quantised."
            )
    return {int(match[1]): tensors[name] for name, match in matches.items() if match}


def _imported(vectors: Mapping[int, Tensor], source: str, recorded: Mapping[str, Any]) -> SteeringVectors:
    provenance = {"source": source, **recorded.get("provenance", {})}
    return SteeringVectors.from_tensors(vectors, **{**recorded, "provenance": provenance})
