"""`TextJudge`: a judge of text in the place of a value head."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_value_steer.calibration import Calibration
from hf_value_steer.checks import check_choice, check_probability
from hf_value_steer.choices import Polarity
from hf_value_steer.configuration.methods import is_function
from hf_value_steer.files.kept import load_once
from hf_value_steer.judges import load_judge
from hf_value_steer.judges.base import Judge
from hf_value_steer.judges.prompt import Prompt


# The judges that need nothing but a text, and are quick enough to be asked about every token.
NAMED = ("lexicon:", "classifier:", "python:")


class _OfTexts(Judge):
    """A function of texts alone."""

    def __init__(self, function: Callable[[list[str]], Any]):
        super().__init__(getattr(function, "__name__", type(function).__name__))
        self.function = function

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:  # noqa: ARG002
        return self.function(list(responses))


@dataclass
class JudgeConfig:
    """What a filter asks of a head's config, said of a judge."""

    polarity: Polarity
    threshold: float
    attribute: str
    operating_point: None = None


class TextJudge:
    r"""A judge of text in the place of a value head: `ValueFilterConfig(value_head=TextJudge("lexicon:words.txt"))`.

    It is asked about candidates before they are forwarded: about the continuation so far, with the candidate at its
    end. What it answers is the value. It is not shown the prompt, so a word that begins there is not found; nor what
    was written up to a dead end, which it would object to for ever. A word is found as soon as all its letters are
    there, though it could have become a longer one. Texts hold no special tokens, and no incomplete character.

    A function of texts, or a name, may be passed as `value_head` as it is: then the other arguments have their
    defaults. `rollback` gives a filter with a judge its way back: a word of several tokens is known at its last one.

    Args:
        judge: a function from a list of `n` texts to `n` numbers in [0, 1]; or `"lexicon:PATH"`,
            `"classifier:MODEL#LABEL"` or `"python:module:function"`, see [`~hf_value_steer.judges`]. A `python:` judge
            is a function of prompts and texts.
        threshold (`float`): in (0, 1), where the config of the call has none.
        polarity (`str`): meaning of a high number.
        last_words (`int`, *optional*): show it so many words at the end only; all by default.
        tokenizer (*optional*): of the model; by default that of the call, or of the model's folder or Hub id.
        calibration ([`Calibration`], *optional*): for configs with `alpha`.

    Raises:
        ValueError: for names that are no judge of a text alone, and for wrong arguments.
    """

    remembers = 0

    def __init__(
        self,
        judge: Callable[[list[str]], Any] | str,
        *,
        threshold: float = 0.5,
        polarity: Polarity = "undesirable",
        last_words: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        calibration: Calibration | None = None,
    ):
        check_probability(threshold, "threshold")
        check_choice(polarity, Polarity, "polarity")
        if last_words is not None and (type(last_words) is not int or last_words < 1):
            raise ValueError(f"`last_words` has to be an integer of at least 1, got {last_words!r}.")
        if isinstance(judge, str) and not names_judge(judge):
            raise ValueError(f"{judge!r} is no judge for the loop: expected one of {', '.join(NAMED)}, or a function.")
        if isinstance(judge, TextJudge):
            raise TypeError("`judge` is a TextJudge already: pass it as it is.")
        named = load_judge(judge) if isinstance(judge, str) else judge
        self.judge: Judge = named if isinstance(named, Judge) else _OfTexts(named)
        self.config = JudgeConfig(polarity, threshold, self.judge.spec)
        self.last_words, self.tokenizer, self.calibration = last_words, tokenizer, calibration

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Values `(n,)` of continuations.

        Raises:
            RuntimeError, ValueError: if the judge fails, or does not answer with numbers in [0, 1].
        """
        return self.judge(prompts, [self._shown(text) for text in texts])

    def _shown(self, text: str) -> str:
        if self.last_words is None:
            return text
        words = list(re.finditer(r"\S+", text))[-self.last_words :]
        return text[words[0].start() :] if words else text

    def memory(self, rows: int) -> Tensor:
        """As a head's: it remembers nothing."""
        return torch.zeros(rows, 0)

    def fingerprint(self) -> str:
        """Identity of the judge: of its name, and of the file that it goes by."""
        return hashlib.sha256(f"{self.judge.spec} {self.judge.digest} {self.last_words}".encode()).hexdigest()[:16]


def names_judge(value_head: Any) -> bool:
    """Whether this is the name of a judge, and not of a head."""
    return isinstance(value_head, str) and value_head.startswith(NAMED)


def text_judge(value_head: Any) -> TextJudge | None:
    """The judge that a config holds in the place of a head; `None` if it holds a head, or names one."""
    if isinstance(value_head, TextJudge):
        return value_head
    if names_judge(value_head):
        return TextJudge(value_head) if value_head.startswith("lexicon:") else load_once(TextJudge, value_head)
    if isinstance(value_head, str) and value_head.startswith(("llm:", "math:", "reward:")):
        raise ValueError(
            f"`value_head`={value_head!r} is a judge that gives labels and cannot steer; those that can begin with "
            f"{', '.join(NAMED)}."
        )
    return TextJudge(value_head) if is_function(value_head) else None
