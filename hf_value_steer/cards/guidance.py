"""The model card of a guidance module, generated from its config."""

from huggingface_hub import ModelCard, ModelCardData

from hf_value_steer.cards.parts import (
    LIBRARY_NAME,
    LIMITS_PLACEHOLDER,
    NOT_RECORDED,
    UNNAMED,
    Facts,
    training_markdown,
)
from hf_value_steer.files.markup import code, literal, plain


_CARD = """---
{{ card_data }}
---

# {{ title }}

A guidance module (SVGT, arXiv 2605.11712) for {{ backbone }}: {{ parameters }} parameters beside the frozen
backbone. It values the output of decoder layer {{ layer }} (counted from 0), and turns its correction into
{{ guides }}.
A high value is **undesirable**; at values below {{ threshold }} it is content.

## How to use

```python
from transformers import AutoModelForCausalLM
from hf_value_steer import GuidanceConfig, enable_value_steer

model = enable_value_steer(AutoModelForCausalLM.from_pretrained({{ backbone_literal }}))
cfg = GuidanceConfig(module={{ repo_id }}, momentum=0.0)  # as in training
out = model.generate(**inputs, value_steer=cfg, do_sample=True)
```

Backbone fingerprint: {{ fingerprint }}. Prompt format: {{ chat_template }}.
{% if training %}
## Training

{{ training }}
{% endif %}
## Limits

{{ limits }}
"""


def guidance_card(facts: Facts, limits: str | None = None, repo_id: str = "org/module") -> ModelCard:
    """A model card.

    Args:
        facts: of the module.
        limits (`str`, *optional*): results and where it fails, in Markdown, by a person. A placeholder stands for it.
        repo_id (`str`): where the module can be loaded from.
    """
    config = facts.config
    backbone, attribute = config["backbone"], config["attribute"]
    data = ModelCardData(
        library_name=LIBRARY_NAME,
        base_model=backbone,
        base_model_relation="adapter" if backbone else None,
        tags=["value-guidance", "value-steering", *([attribute] if attribute else [])],
    )
    bridges = f"{config['num_bridges']} bridge tokens, which later layers attend to"
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=_CARD,
        title=plain(f"Value guidance: {attribute or 'unnamed attribute'}"),
        backbone=code(backbone or UNNAMED),
        backbone_literal=literal(backbone or UNNAMED),
        parameters=f"{facts.parameters:,}",
        layer=config["layer"],
        guides=bridges if config["injection"] == "bridge" else "a vector that is added to the state",
        threshold=f"{config['threshold']:.4g}",
        repo_id=literal(repo_id),
        fingerprint=code(config["backbone_fingerprint"] or NOT_RECORDED),
        chat_template=code(config["chat_template"] or NOT_RECORDED),
        training=training_markdown(config["training"]),
        limits=limits or LIMITS_PLACEHOLDER,
    )
    return card
