"""A prompt, with what is known of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        text (`str`): what the user wrote; for plain continuations the text itself.
        columns (`dict`): the other columns of its record, for instance the right answer.
        messages (sequence of `dict`, *optional*): the conversation that `text` ends, if there is more of it.
    """

    text: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Mapping[str, str]] | None = None
