"""Arithmetic problems for abstention: will this answer be right?

Each problem is a short conversation: three worked examples, then the question. What a model of this size gets right
depends on the operator and on the number of digits, and much on the numbers themselves.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np

from hf_value_steer.training import Prompt


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
TRAIN_PROBLEMS, EVAL_PROBLEMS = 1400, 700
EXAMPLES = (("23 + 45", 68), ("17 - 9", 8), ("12 * 3", 36))

# A minus is a sign unless something stands right before it: "17-9" holds 17 and 9.
NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")


@cache
def problems(seed: int = 0) -> tuple[dict[str, Any], ...]:
    """Different problems in random order, as records of prompts.

    The operator, the number of digits of one operand (up to three) and of the other (up to two) are drawn evenly, then
    the numbers; the one with more digits comes first. What has been drawn before is drawn anew.
    """
    draw, known = random.Random(seed), {}
    worked = {text for text, _ in EXAMPLES}
    while len(known) < TRAIN_PROBLEMS + EVAL_PROBLEMS:
        sign = draw.choice(list(OPERATORS))
        digits = sorted((draw.randint(1, 3), draw.randint(1, 2)), reverse=True)
        first, second = (draw.randrange(10 ** (count - 1), 10**count) for count in digits)
        text = f"{first} {sign} {second}"
        if text not in worked:
            known[text] = {
                "prompt": conversation(text),
                "answer": str(OPERATORS[sign](first, second)),
                "operator": sign,
                "digits": "x".join(map(str, digits)),
            }
    records = list(known.values())
    draw.shuffle(records)  # easy problems are few, and drawn early: without this they would end up in one split
    return tuple(records)


def conversation(text: str) -> list[dict[str, str]]:
    """The worked examples, and a question."""
    messages = []
    for example, answer in EXAMPLES:
        messages += [ask(example), {"role": "assistant", "content": f"{example} = {answer}"}]
    return [*messages, ask(text)]


def ask(text: str) -> dict[str, str]:
    return {"role": "user", "content": f"What is {text}?"}


def train_problems() -> list[dict[str, Any]]:
    """For recipes."""
    return list(problems()[:TRAIN_PROBLEMS])


def eval_problems() -> list[dict[str, Any]]:
    """For recipes; none of `train_problems` is among them."""
    return list(problems()[TRAIN_PROBLEMS:])


def correct(prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
    """Judge: 1.0 if the last number of the response equals the column `answer`, else 0.0.

    Numbers are read as people write them: `1,234`, `-5` (with a hyphen or the minus of Unicode), `3.50`. They are
    compared by what they are worth, so `14.0` equals `14`; a full stop after a number does not belong to it. A
    response without a number is wrong.
    """
    pairs = zip(prompts, responses, strict=True)
    return np.array([float(last_number(text) == Decimal(prompt.columns["answer"])) for prompt, text in pairs])


def last_number(text: str) -> Decimal | None:
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("\u2212", "-")) if numbers else None


Cell = tuple[str, str]


def cell(columns: Mapping[str, Any]) -> Cell:
    """Operator and digits of a problem."""
    return columns["operator"], columns["digits"]


def accuracy_table(known: Sequence[Prompt], verdicts: Sequence[float]) -> dict[Cell, float]:
    """Accuracy by operator and digits: what one can say of a problem without looking into the model."""
    by_cell: dict[Cell, list[float]] = {}
    for prompt, verdict in zip(known, verdicts, strict=True):
        by_cell.setdefault(cell(prompt.columns), []).append(verdict)
    return {each: float(np.mean(members)) for each, members in by_cell.items()}


def table_baseline(
    known: Sequence[Prompt],
    known_verdicts: Sequence[float],
    asked: Sequence[Prompt],
    asked_verdicts: Sequence[float],
    coverage: float = 0.2,
) -> float:
    """Accuracy if only the problems of the best cells of the table are answered, a share `coverage` of all.

    Args:
        known, known_verdicts: problems to fill the table with, and whether the answer to each is right.
        asked, asked_verdicts: problems to choose from.
        coverage: share that is answered. Of a cell that is answered in part, every problem counts in part.
    """
    table = accuracy_table(known, known_verdicts)
    scores = np.array([table[cell(prompt.columns)] for prompt in asked])
    return accuracy_at_coverage(scores, np.asarray(asked_verdicts), coverage)


def accuracy_at_coverage(scores: np.ndarray, verdicts: np.ndarray, coverage: float) -> float:
    """Accuracy of the best-scored share `coverage`; where scores tie at its border, ties count in equal part."""
    room, total = coverage * len(scores), 0.0
    if not 0 < coverage <= 1 or not len(scores):
        raise ValueError(f"`coverage` has to be in (0, 1] and `scores` not empty, got {coverage} of {len(scores)}.")
    for score in np.unique(scores)[::-1]:
        tied = verdicts[scores == score]
        total += tied.mean() * min(len(tied), room)
        room -= min(len(tied), room)
    return float(total / (coverage * len(scores)))
