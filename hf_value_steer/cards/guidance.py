"""The model card of a guidance module, generated from its config."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from hf_value_steer.cards.parts import LIBRARY_NAME, LIMITS_PLACEHOLDER, Facts, filled, recorded, training_markdown
from hf_value_steer.files.markup import literal, plain


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
    return filled(
        Path(__file__).with_suffix(".md"),
        data,
        config,
        title=plain(f"Value guidance: {attribute or 'unnamed attribute'}"),
        parameters=f"{facts.parameters:,}",
        layer=config["layer"],
        guides=bridges if config["injection"] == "bridge" else "a vector that is added to the state",
        threshold=f"{config['threshold']:.4g}",
        repo_id=literal(repo_id),
        chat_template=recorded(config["chat_template"]),
        training=training_markdown(config["training"]),
        limits=limits or LIMITS_PLACEHOLDER,
    )
