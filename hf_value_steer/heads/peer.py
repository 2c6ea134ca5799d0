"""The files of the value-steer package: a state dict of its MLP, and a sidecar that says what it reads."""

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_value_steer.checks import check_threshold
from hf_value_steer.errors import ArtefactError


# The feature contract of value-steer 0.2.0, as its sidecar spells it.
FEATURE = {"layer": "final", "norm": "post", "pooling": "none", "dtype": "fp32"}


def state_in(path: str | os.PathLike[str]) -> Any:
    """What is in the file of a head, whatever it is; nothing in it is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text advises to execute it
        raise ArtefactError(
            "this pickle is damaged, or asks for more than tensors, and is not executed: pass the file that "
            "value-steer wrote."
        ) from error


def width_of(state: Any, size: int) -> int:
    """Width of the head whose state dict this is, as it was read from a file of `size` bytes.

    Raises:
        ArtefactError: if it is none of value-steer's.
    """
    expected = {f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
    if not isinstance(state, Mapping) or set(state) != expected:
        found = sorted(map(str, state))[:6] if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise ArtefactError(f"this is no value-steer head: expected keys {sorted(expected)}, got {found}.")
    if wrong := [name for name, entry in state.items() if not _is_plain(entry)]:
        raise ArtefactError(f"{', '.join(wrong)} should be dense tensors of floating-point numbers: save it again.")
    width = state["4.weight"].shape[-1] if state["4.weight"].dim() else 0
    shapes = {"0": (width, width), "2": (width, width), "4": (1, width)}
    for name, entry in state.items():
        shape = shapes[name[0]] if name.endswith("weight") else shapes[name[0]][:1]
        if entry.shape != shape:
            raise ArtefactError(f"{name} has shape {tuple(entry.shape)} in a head of width {width}, expected {shape}.")
    if size < sum(entry.numel() * entry.element_size() for entry in state.values()):
        raise ArtefactError(f"a head of width {width} does not fit into a file of {size} bytes: save it again.")
    return int(width)


def _is_plain(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.is_floating_point() and entry.layout is torch.strided


def fields_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a [`ValueHeadConfig`] that value-steer's sidecar holds."""
    if missing := {"feature_spec", "threshold", "meta"} - meta.keys():
        raise ArtefactError(f"{', '.join(sorted(missing))} is missing: delete this file to read the weights alone.")
    if meta["feature_spec"] != FEATURE:
        raise ArtefactError(f"feature_spec {meta['feature_spec']} is not {FEATURE}: no head here reads that.")
    if not isinstance(meta["meta"], dict | None):
        raise ArtefactError(f"meta should be a JSON object, got {meta['meta']!r}.")
    check_threshold(meta["threshold"])
    return {"threshold": meta["threshold"], "training": meta["meta"]}
