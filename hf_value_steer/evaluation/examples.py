"""Generations to look at: every token with its value, offensive words masked before anything is written."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from hf_value_steer.evaluation.runs import Runner, Setting
from hf_value_steer.evaluation.trace import PromptTrace, mask_trace, trace_tokens
from hf_value_steer.training.judges import Judge
from hf_value_steer.training.judges.text import LexiconJudge
from hf_value_steer.training.references import resolve


COUNT = 12
Mask = Callable[[str], str]


def masking(reference: str | None, judges: Mapping[str, Judge]) -> Mask:
    """What hides words of a text without changing its length: a `python:` function, or all `lexicon:` judges."""
    if reference:
        return resolve(reference)  # type: ignore[no-any-return]
    patterns = [p for judge in judges.values() if isinstance(judge, LexiconJudge) for p in judge.patterns]

    def mask(text: str) -> str:
        for pattern in patterns:
            text = pattern.sub(lambda match: "*" * len(match.group()), text)
        return text

    return mask


def examples(runner: Runner, setting: Setting, mask: Mask) -> list[dict[str, Any]]:
    """One generation of some prompts, as the model would and under a filter `setting`, words masked."""
    assert setting.value_steer is not None
    steered = replace(setting.value_steer, output_candidates=True)
    prompts = runner.prompts[:COUNT]
    columns = []
    for config in (replace(steered, num_candidates=1), steered):
        output, length = runner.generate(replace(setting, value_steer=config), prompts, 1, runner.seed)
        columns.append([trace_tokens(output, runner.formatter.tokenizer, row, length) for row in range(len(prompts))])
    traces = (PromptTrace(prompt.text, *row) for prompt, *row in zip(prompts, *columns, strict=True))
    return [asdict(mask_trace(trace, mask)) for trace in traces]
