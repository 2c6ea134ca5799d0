"""`AbstentionConfig`: dynamic abstention as a method of `generate(..., value_steer=...)`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hf_value_steer.configuration.methods import SteeringConfig


@dataclass(frozen=True, kw_only=True)
class AbstentionConfig(SteeringConfig):
    r"""Dynamic abstention (arXiv 2604.18419): end a row as soon as its value says that it will not end well.

    Takes the arguments of [`SteeringConfig`] and:

    Args:
        patience (`int`): number of consecutive unacceptable values after which a row stops.
        message_ids (sequence of `int`, *optional*): token ids that are appended before EOS.
    """

    method: ClassVar[str] = "abstain"

    patience: int = 1
    message_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("patience", 1)
        if self.message_ids is not None:
            ids = self.message_ids
            if not isinstance(ids, tuple) or not all(type(token) is int and token >= 0 for token in ids):
                raise ValueError(f"`message_ids` has to be a sequence of token ids, got {ids!r}.")
