"""What the cards of all that is trained here have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_value_steer.cards.document import flat
from hf_value_steer.files.markup import plain, table


LIBRARY_NAME = "hf-value-steer"

# What stands in the limits section until a person has written it.
LIMITS_PLACEHOLDER = (
    "This card was generated. Where this head fails, and where it must not be used, is for its author to add here."
)
# What stands for what a config does not say.
UNNAMED, NOT_RECORDED = "an unnamed backbone", "not recorded"


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
