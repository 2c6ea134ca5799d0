"""What all judges share: how they are called, and the checks on what they answer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hf_value_steer.judges.prompt import Prompt


class Judge(ABC):
    """Says of each response how much an attribute is there, from 0 (not at all) to 1.

    Args:
        spec (`str`): the name of the judge, in files and in errors.

    Attributes:
        unparseable (`int`): how many answers so far could not be read and counted as undesirable (`llm:`).
        truncated (`int`): how many texts so far were longer than the judge can read, and were cut (models).
        digest (`str`, *optional*): of the file that the judge goes by, if it does: word list or template.
    """

    def __init__(self, spec: str):
        self.spec = spec
        self.unparseable = 0
        self.truncated = 0
        self.digest: str | None = None

    def check(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027
        """Raise a `ValueError` if one of these prompts lacks what the judge needs to judge a response to it."""

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
        """The scores, not checked yet: anything that holds one number for each response."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> npt.NDArray[np.float32]:
        """Judge each response.

        Args:
            prompts (sequence of [`Prompt`], `n` of them): what was answered.
            responses (sequence of `str`, `n` of them): the answers, or their beginnings.

        Returns:
            `np.ndarray` of shape `(n,)`, float32, in [0, 1].

        Raises:
            RuntimeError: if the judge fails; the exception behind it is its cause.
            ValueError: if it does not answer with one number in [0, 1] for each response.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"`prompts` and `responses` differ in length: {len(prompts)} and {len(responses)}.")
        if not responses:
            return np.zeros(0, dtype=np.float32)
        try:
            scores = self.score(prompts, responses)
        except Exception as error:
            raise RuntimeError(f"Judge {self.spec!r} failed: {type(error).__name__}: {error}") from error
        return self._checked(scores, len(responses))

    def _checked(self, scores: Any, count: int) -> npt.NDArray[np.float32]:
        """The scores as an array; what is outside [0, 1] by no more than rounding is moved to its border."""
        answers = scores.tolist() if isinstance(scores, np.ndarray | Tensor) else scores
        if not isinstance(answers, Iterable) or isinstance(answers, Mapping | Set | str):
            raise ValueError(f"Judge {self.spec!r} answered {answers!r}, expected {count} numbers in [0, 1].")
        answers = list(answers)
        if len(answers) != count:
            raise ValueError(f"Judge {self.spec!r} gave {len(answers)} answers to {count} responses.")
        for index, answer in enumerate(answers):
            if not isinstance(answer, Real | np.bool_) or not 0 <= round(float(answer), 6) <= 1:
                raise ValueError(
                    f"Judge {self.spec!r} answered {answer!r} to response {index} of {count}, "
                    "expected a number in [0, 1]."
                )
        return np.clip(np.array(answers, dtype=np.float32), 0, 1)
