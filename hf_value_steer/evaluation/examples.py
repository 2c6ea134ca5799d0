"""Generations to look at: every token with its value, offensive words masked before anything is written."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_value_steer.cards.document import OUTCOMES
from hf_value_steer.configuration.operating_point import PLAIN
from hf_value_steer.evaluation.runs import Runner, Setting, Texts
from hf_value_steer.evaluation.trace import PromptTrace, mask_trace, trace_tokens
from hf_value_steer.files.references import resolve
from hf_value_steer.judges import Judge
from hf_value_steer.judges.text import LexiconJudge
from hf_value_steer.progress import progress


logger = logging.getLogger(__name__)

OF_EACH = 3  # of each outcome
UNMASKED = "none"
Mask = Callable[[str], str]


def masking(reference: str | None, judges: Mapping[str, Judge]) -> Mask:
    """What hides words of a text without changing its length: a `python:` function, or all `lexicon:` judges."""
    if reference == UNMASKED:
        return str
    if reference:
        return resolve(reference)  # type: ignore[no-any-return]
    patterns = [p for judge in judges.values() if isinstance(judge, LexiconJudge) for p in judge.patterns]

    def mask(text: str) -> str:
        for pattern in patterns:
            text = pattern.sub(lambda match: "*" * len(match.group()), text)
        return text

    return mask


@dataclass(frozen=True)
class FilterRun:
    """What a filter, and the model without it, wrote for the same prompts, and what became of each text.

    Args:
        runner: made the runs.
        setting: of the filter.
        base, steered: the runs.
        outcomes: of each row, see [`~hf_value_steer.cards.document.OUTCOMES`].
    """

    runner: Runner
    setting: Setting
    base: Texts
    steered: Texts
    outcomes: Sequence[str]

    def examples(self, mask: Mask) -> list[dict[str, Any]]:
        """Texts of each outcome that there is, words masked; generated once more, to learn of their candidates."""
        chosen = [row for name in OUTCOMES for row in self._rows(name)[:OF_EACH]]
        size = self.runner.batch_size * self.runner.samples
        firsts = sorted({row // size * size for row in chosen})
        traces = {
            row: trace
            for first in progress(firsts, "examples", "batch")
            for row, trace in self._traces(first, [row for row in chosen if first <= row < first + size])
        }
        return [
            {**asdict(mask_trace(traces[row], mask)), "outcome": self.outcomes[row]} for row in chosen if row in traces
        ]

    def _rows(self, name: str) -> list[int]:
        rows = len(self.runner.prompts) * self.runner.samples  # of the part that the runner generates for
        found = [row for row, outcome in enumerate(self.outcomes[:rows]) if outcome == name]
        of_prompts = {row // self.runner.samples: row for row in reversed(found)}
        first = set(of_prompts.values())  # one text of each prompt comes before its others
        return sorted(found, key=lambda row: row not in first)

    def _traces(self, first: int, rows: Sequence[int]) -> Iterator[tuple[int, PromptTrace]]:
        """Some rows of a batch, but for those that come out otherwise than before: runs may be of another machine."""
        assert self.setting.value_steer is not None
        steered, samples = replace(self.setting.value_steer, output_candidates=True), self.runner.samples
        sides = []
        for config in (replace(steered, num_candidates=1, **PLAIN), steered):
            setting = replace(self.setting, value_steer=config)
            sides.append(self.runner.batch(setting, first // samples, samples))
        for row in rows:
            found = [
                trace_tokens(output, self.runner.formatter.tokenizer, row - first, length) for output, length in sides
            ]
            new = [output.sequences[row - first, length:].tolist() for output, length in sides]
            before = [texts.ids[row] for texts in (self.base, self.steered)]
            if any(ids[: len(old)] != old for ids, old in zip(new, before, strict=True)):
                logger.warning(f"Text {row} is not shown: it was generated otherwise this time.")
            else:
                yield row, PromptTrace(self.runner.prompts[row // samples].text, *found)
