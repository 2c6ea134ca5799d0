"""Judges without a model: word lists, answers that are known, and functions."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_value_steer.checks import import_optional
from hf_value_steer.files.references import resolve
from hf_value_steer.files.writing import read_utf8
from hf_value_steer.judges.base import Judge
from hf_value_steer.judges.prompt import Prompt


class LexiconJudge(Judge):
    """`lexicon:PATH`: 1.0 for a response in which an entry of the list is found, else 0.0; case does not matter.

    A line of the file (UTF-8) holds one word or phrase, which is found as whole words and with any white space between
    them, or a regular expression `/between slashes/`, which is searched as it stands. Empty lines say nothing.

    Args:
        spec (`str`): name of the judge.
        path (`str`): the file.

    Raises:
        ValueError: if there is no such file or no entry in it, or a regular expression is broken or matches all.
    """

    def __init__(self, spec: str, path: str):
        super().__init__(spec)
        if not Path(path).is_file():
            raise ValueError(f"Judge {spec!r}: there is no file {path!r} in {Path.cwd()}.")
        self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        lines = [line.strip() for line in read_utf8(Path(path)).split("\n")]
        entries = {number: line for number, line in enumerate(lines, start=1) if line}
        if not entries:
            raise ValueError(f"Judge {spec!r}: {path} holds no word.")
        expressions = {number: line[1:-1] for number, line in entries.items() if re.fullmatch("/.*/", line)}
        phrases = [line for number, line in entries.items() if number not in expressions]
        self.patterns = [self._expression(path, number, source) for number, source in expressions.items()]
        if phrases:
            alternatives = "|".join(r"\s+".join(map(re.escape, phrase.split())) for phrase in phrases)
            self.patterns.append(re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE))

    def _expression(self, path: str, number: int, source: str) -> re.Pattern[str]:
        try:
            pattern = re.compile(source, re.IGNORECASE)
        except re.error as error:
            raise ValueError(
                f"Judge {self.spec!r}: line {number} of {path} is no regular expression: {error}."
            ) from error
        if pattern.search(""):
            raise ValueError(f"Judge {self.spec!r}: line {number} of {path} matches the empty text, so all.")
        return pattern

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[bool]:  # noqa: ARG002
        return [any(pattern.search(response) for pattern in self.patterns) for response in responses]


class PythonJudge(Judge):
    """`python:module:function`: what `function(prompts, responses)` answers, `n` numbers in [0, 1].

    Modules of the working directory can be imported. The numbers may come as list, array or tensor.

    Args:
        spec (`str`): name of the judge, and of the function.

    Raises:
        ValueError: if there is no such function.
    """

    def __init__(self, spec: str):
        super().__init__(spec)
        self.function = resolve(spec)
        if not callable(self.function):
            raise ValueError(f"Judge {spec!r} is no function, but {self.function!r}.")

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
        return self.function(prompts, responses)


class MathJudge(Judge):
    r"""`math:COLUMN`: 1.0 for a response whose final answer equals the right one, by the `math-verify` package.

    The column holds a number or a formula in LaTeX, with or without `$`; of a text with `####` (GSM8K) what follows.
    A response that holds no answer, or one that takes longer than 5 s to compare, is wrong. Call it from the main
    thread, where `math-verify` can set its alarm.

    Args:
        spec (`str`): name of the judge.
        column (`str`): of the prompts' records.

    Raises:
        ImportError: if `math-verify` is not installed.
    """

    def __init__(self, spec: str, column: str):
        super().__init__(spec)
        self.column = column
        self.library = import_optional("math_verify", f"Judge {spec!r}")

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            try:
                self._right(prompt)
            except ValueError as error:
                raise ValueError(f"Judge {self.spec!r}: {error}.") from error

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[bool]:
        pairs = zip(prompts, responses, strict=True)
        return [self.library.verify(self._right(prompt), self.library.parse(response)) for prompt, response in pairs]

    def _right(self, prompt: Prompt) -> Any:
        """The right answer as `math-verify` reads it."""
        if self.column not in prompt.columns:
            raise ValueError(f"prompt {prompt.text!r} has no column {self.column!r}, only {sorted(prompt.columns)}")
        answer = prompt.columns[self.column]
        # `1e-05` would be read as a product.
        text = np.format_float_positional(answer, trim="-") if isinstance(answer, float) else str(answer)
        text = text.rpartition("####")[2].strip()
        # Without `$` only the first number of a formula would be read.
        formula = text if "$" in text or r"\boxed" in text else f"${text}$"
        right = self.library.parse(formula, fallback_mode="no_fallback")
        if not right:
            raise ValueError(f"column {self.column!r} of prompt {prompt.text!r} is no number or formula: {answer!r}")
        return right
