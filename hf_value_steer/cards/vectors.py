"""The card of steering vectors, generated from what is recorded of them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_value_steer.cards.parts import LIBRARY_NAME, NOT_RECORDED, UNNAMED
from hf_value_steer.files.markup import code, literal, plain


_CARD = """---
{{ card_data }}
---

# Steering vectors: {{ attribute }}

A direction of the residual stream of {{ backbone }} behind layers {{ first }} to {{ last }}, {{ width }} wide.
A positive multiplier brings more of it, a negative one less. {{ calibration }}

```python
from transformers import AutoModelForCausalLM
from hf_value_steer import SteeringVectors

model = AutoModelForCausalLM.from_pretrained({{ backbone_literal }})
vectors = SteeringVectors.from_pretrained("org/these-vectors")
with vectors.apply(model, multiplier=-0.25):  # how far it can go: `hf-value-steer vectors sweep`
    out = model.generate(**inputs)
```

Backbone fingerprint: {{ fingerprint }}. Where it comes from: {{ provenance }}.

## Limits

These vectors mean nothing in another backbone. What they change beside the attribute is for their author to add here.
"""


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
    backbone = recorded["backbone"]
    data = ModelCardData(
        library_name=LIBRARY_NAME, base_model=backbone, tags=["steering-vector", "activation-steering"]
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=_CARD,
        attribute=plain(recorded["attribute"] or "unnamed attribute"),
        backbone=code(backbone or UNNAMED),
        backbone_literal=literal(backbone or UNNAMED),
        first=layers[0],
        last=layers[-1],
        width=width,
        calibration=strength,
        fingerprint=code(recorded["backbone_fingerprint"] or NOT_RECORDED),
        provenance=code(json.dumps(recorded["provenance"], sort_keys=True)),
    )
    return card
