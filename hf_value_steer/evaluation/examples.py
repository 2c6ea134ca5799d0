"""Generations to look at: every token with its value, offensive words masked before anything is written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from hf_value_steer.cards.document import OUTCOMES
from hf_value_steer.evaluation.measures import outcome
from hf_value_steer.evaluation.metrics import Array
from hf_value_steer.evaluation.runs import Runner, Setting
from hf_value_steer.evaluation.trace import PromptTrace, mask_trace, trace_tokens
from hf_value_steer.training.judges import Judge
from hf_value_steer.training.judges.text import LexiconJudge
from hf_value_steer.training.prompts import Prompt
from hf_value_steer.training.references import resolve


OF_EACH = 3  # of each outcome
PROMPTS, BATCH = 96, 16  # that are tried to find them
Mask = Callable[[str], str]
FindBad = Callable[[Sequence[Prompt], Sequence[str]], Array]  # 1 for each text that is bad, else 0


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


def examples(runner: Runner, setting: Setting, mask: Mask, find_bad: FindBad) -> list[dict[str, Any]]:
    """Texts of each outcome that the first prompts have, without and with a filter `setting`, words masked."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in OUTCOMES}
    for first in range(0, min(len(runner.prompts), PROMPTS), BATCH):
        for name, trace in _batch(runner, setting, runner.prompts[first : first + BATCH], find_bad):
            if len(found[name]) < OF_EACH:
                found[name].append({**asdict(mask_trace(trace, mask)), "outcome": name})
        if all(len(held) == OF_EACH for held in found.values()):
            break
    return [example for held in found.values() for example in held]


def _batch(
    runner: Runner, setting: Setting, prompts: Sequence[Prompt], find_bad: FindBad
) -> Iterator[tuple[str, PromptTrace]]:
    """The outcome of each prompt, and its two texts."""
    assert setting.value_steer is not None
    tokenizer, steered = runner.formatter.tokenizer, replace(setting.value_steer, output_candidates=True)
    traces, bad = [], []
    for config in (replace(steered, num_candidates=1), steered):
        output, length = runner.generate(replace(setting, value_steer=config), prompts, 1, runner.seed)
        traces.append([trace_tokens(output, tokenizer, row, length) for row in range(len(prompts))])
        texts = tokenizer.batch_decode(output.sequences[:, length:], skip_special_tokens=True)
        bad.append(find_bad(prompts, texts).tolist())
    for prompt, base, steered_text, before, after in zip(prompts, *traces, *bad, strict=True):
        trace = PromptTrace(prompt.text, base, steered_text)
        yield outcome(before, after, trace.touched), trace
