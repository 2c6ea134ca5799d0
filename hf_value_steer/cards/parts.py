"""What the cards of all that is trained here have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_value_steer.cards.document import flat
from hf_value_steer.files.markup import code, literal, plain, table


LIBRARY_NAME = "hf-value-steer"

# What stands in the limits section until a person has written it.
LIMITS_PLACEHOLDER = (
    "This card was generated. Where this head fails, and where it must not be used, is for its author to add here."
)


@dataclass(frozen=True)
class Facts:
    """What a card tells of something trained.

    Args:
        config (`dict`): its `config.json`.
        parameters (`int`): how many it has.
        calibration (`dict`, *optional*): what is in `calibration.json`.
    """

    config: Mapping[str, Any]
    parameters: int
    calibration: Mapping[str, Any] | None = None


def training_markdown(training: Mapping[str, Any] | None) -> str:
    """A table of what is recorded of a training; nothing if nothing is."""
    rows = [[plain(name), plain(text)] for name, text in flat(training or {}).items()]
    return table(["", ""], rows) if rows else ""


def recorded(text: str | None) -> str:
    """What a config says, as a span of code; it may not say it."""
    return code(text or "not recorded")


def filled(template: Path, data: ModelCardData, config: Mapping[str, Any], **texts: Any) -> ModelCard:
    """A card out of a template and what every `config` says of its backbone."""
    backbone = config["backbone"] or "an unnamed backbone"
    card: ModelCard = ModelCard.from_template(
        data,
        str(template),
        backbone=code(backbone),
        backbone_literal=literal(backbone),
        fingerprint=recorded(config["backbone_fingerprint"]),
        **texts,
    )
    return card
