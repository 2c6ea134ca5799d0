"""`score`: values of texts that are there already, a line of JSON for each."""

import json
from typing import Any

import torch
from accelerate import PartialState

from hf_value_steer.arguments.score import ScoreArguments
from hf_value_steer.errors import FieldError
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.policy import undesirability
from hf_value_steer.scoring import ScoredText, score_text
from hf_value_steer.training.collect import load_backbone
from hf_value_steer.training.prompts import Prompt, load_prompts


def score(arguments: ScoreArguments) -> None:
    """Print a line for each text: its worst value, and the first token that is not acceptable."""
    texts = load_prompts(arguments.texts, arguments.text_column, arguments.split, arguments.limit, argument="texts")
    prompts = None if arguments.prompt_column is None else _column(texts, arguments.prompt_column)
    head = ValueHead.from_pretrained(arguments.value_head)
    model, tokenizer = load_backbone(arguments.model, arguments.dtype, PartialState().device)
    found = score_text(
        model,
        head,
        (each.text for each in texts),
        prompts,
        tokenizer=tokenizer,
        threshold=arguments.threshold,
        alpha=arguments.alpha,
        batch_size=arguments.batch_size,
    )
    for number, each in enumerate(found):
        pieces = [tokenizer.decode([token]) for token in each.tokens]
        print(json.dumps({"text": number, **_line(each, pieces, head, arguments.values)}, ensure_ascii=False))


def _column(texts: list[Prompt], column: str) -> list[str]:
    for number, each in enumerate(texts):
        if not isinstance(each.columns.get(column), str):
            raise FieldError(
                "prompt_column", f"`prompt_column`: text {number} has no text {column!r}, only {sorted(each.columns)}."
            )
    return [each.columns[column] for each in texts]


def _line(scored: ScoredText, pieces: list[str], head: ValueHead, values: bool) -> dict[str, Any]:
    worst, first = None, scored.first_unacceptable
    if scored.values:
        worst = scored.values[int(undesirability(torch.tensor(scored.values), head.config.polarity).argmax())]
    line: dict[str, Any] = {"worst_value": worst, "acceptable": first is None, "first_unacceptable": first}
    if first is not None:
        line["token"] = pieces[first]
    return line | ({"values": list(zip(pieces, scored.values, strict=True))} if values else {})
