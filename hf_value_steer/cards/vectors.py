"""The card of steering vectors, generated from what is recorded of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_value_steer.cards.parts import LIBRARY_NAME, filled
from hf_value_steer.files.markup import code, plain


def vectors_card(recorded: Mapping[str, Any], layers: Sequence[int], width: int, percent: float | None) -> ModelCard:
    """A model card.

    Args:
        recorded (`dict`): what `steering_vectors.json` says of them.
        layers (sequence of `int`): the steered layers, ascending.
        width (`int`): of the residual stream.
        percent (`float`, *optional*): of the residual's norm, what a multiplier of 1 adds, once calibrated.
    """
    strength = "They are not calibrated: their strengths are the lengths of the vectors they were made of."
    if percent is not None:
        strength = f"At multiplier 1, what is added is {percent:.3g} % of the residual's norm at every layer."
    tags = ["steering-vector", "activation-steering"]
    return filled(
        Path(__file__).with_suffix(".md"),
        ModelCardData(library_name=LIBRARY_NAME, base_model=recorded["backbone"], tags=tags),
        recorded,
        attribute=plain(recorded["attribute"] or "unnamed attribute"),
        first=layers[0],
        last=layers[-1],
        width=width,
        calibration=strength,
        provenance=code(json.dumps(recorded["provenance"], sort_keys=True)),
    )
