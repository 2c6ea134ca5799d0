"""`ActivationConfig`: steering by vectors as a method of `generate(..., value_steer=...)`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer.checks import check_choice
from hf_value_steer.choices import VectorMode
from hf_value_steer.configuration.methods import SteeringConfig


Tokens: TypeAlias = Literal["all", "prompt", "generated"]


@runtime_checkable
class Vectors(Protocol):
    """What a config knows of [`SteeringVectors`]: directions, and where they were loaded from."""

    @property
    def directions(self) -> Tensor: ...

    @property
    def strengths(self) -> Tensor: ...

    @property
    def name_or_path(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class ActivationConfig(SteeringConfig):
    r"""Add vectors to the residual stream while a text is generated; always, or only where a value head asks for it.

    With `value_head`, a row is steered from the moment its value is not acceptable until it is acceptable again: the
    value of a text decides how the next token is read. Prompts are read unsteered then. Without one, the arguments
    below that have to do with values have to be left out.

    Takes the arguments of [`SteeringConfig`] and:

    Args:
        vectors ([`SteeringVectors`] or `str`): the vectors, or their Hub id or folder.
        multiplier (`float` or sequence of `float`): how much of them; one for each row of the returned batch, or one
            for all. `hf-value-steer vectors sweep` finds what works, which is often well below 1.
        mode (`str`), tokens (`str`): where they are added, as in [`~hf_value_steer.activation.apply.steered`].
    """

    method: ClassVar[str] = "activate"

    vectors: Vectors | str
    multiplier: float | Sequence[float] = 1.0
    mode: VectorMode = "broadcast"
    tokens: Tokens = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.vectors, Vectors | str):
            raise TypeError(f"`vectors` have to be SteeringVectors, a Hub id or a folder, got {self.vectors!r}.")
        check_choices(self.multiplier, self.mode, self.tokens)
        if self.value_head is None and (self.threshold is not None or self.alpha is not None or self.min_new_tokens):
            raise ValueError(
                "`threshold`, `alpha` and `min_new_tokens` say when a value head acts: pass `value_head`."
            )
        if self.value_head is not None and self.tokens == "prompt":
            raise ValueError(
                '`tokens`="prompt" and `value_head` exclude each other: prompts are read before any value.'
            )

    def with_value_head(self, value_head: PreTrainedModel) -> "ActivationConfig":  # noqa: ARG002
        """This config: vectors without a head steer always, and a default head does not change that."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as of every [`SteeringConfig`].

        Raises:
            ValueError: if `vectors` or `value_head` were not loaded from anywhere, which JSON cannot name.
        """
        name = self.vectors if isinstance(self.vectors, str) else self.vectors.name_or_path
        if not name:
            raise ValueError("`vectors` have no name: save them and pass their folder or Hub id instead.")
        return {**super().to_dict(), "vectors": name}


def check_choices(multiplier: float | Sequence[float], mode: str, tokens: str) -> None:
    """Raise a `ValueError` for arguments of [`~hf_value_steer.activation.apply.steered`] that make no sense."""
    numbers = multiplier if isinstance(multiplier, list | tuple) else [multiplier]
    if not numbers or not all(isinstance(number, int | float) and abs(number) < float("inf") for number in numbers):
        raise ValueError(f"`multiplier` has to be a finite number, or one for each row; got {multiplier!r}.")
    check_choice(mode, VectorMode, "mode")
    check_choice(tokens, Tokens, "tokens")
