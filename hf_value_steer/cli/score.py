"""`score`: values of texts that are there already, a line of JSON for each."""

import json
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from hf_value_steer.arguments.score import ScoreArguments
from hf_value_steer.errors import FieldError
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.policy import undesirability
from hf_value_steer.scoring import ScoredText, Text, score_text
from hf_value_steer.training.collect import load_backbone
from hf_value_steer.training.prompts import Formatter, load_prompts, read_records


def score(arguments: ScoreArguments) -> None:
    """Print a line for each text: its worst value, and the first token that is not acceptable."""
    texts = list(islice(_texts(arguments), arguments.limit))
    if not texts:
        raise FieldError("texts", f"`texts`: {arguments.texts} holds no text.")
    head = ValueHead.from_pretrained(arguments.value_head)
    model, tokenizer = load_backbone(arguments.model, arguments.dtype, PartialState().device)
    found = score_text(
        model,
        head,
        texts,
        _prompts(arguments, head, tokenizer),
        tokenizer=tokenizer,
        threshold=arguments.threshold,
        alpha=arguments.alpha,
        batch_size=arguments.batch_size,
    )
    for number, each in enumerate(found):
        line = _line(each, tokenizer, head, arguments.values)
        print(json.dumps({"text": number, **line}, ensure_ascii=False))


def _texts(arguments: ScoreArguments) -> Iterator[str]:
    """The texts as they are, white space and all."""
    column = arguments.text_column
    for place, record in read_records(arguments.texts, arguments.split, "texts"):
        if arguments.prompt_column is not None and isinstance(record, str):
            asked = arguments.prompt_column
            raise FieldError("prompt_column", f"`prompt_column`: {place} is a text without the column {asked!r}.")
        text = record.get(column) if isinstance(record, Mapping) else record
        if not isinstance(text, str):
            held = sorted(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
            raise FieldError(
                "texts", f"`texts`: {place}: expected a text in `{column}`, got {type(text).__name__}; {held}."
            )
        yield text


def _prompts(arguments: ScoreArguments, head: ValueHead, tokenizer: PreTrainedTokenizerBase) -> list[Text] | None:
    """Token ids of what stands before the texts, in the form in which the head has learned, if there is anything."""
    if arguments.prompt_column is None:
        return None
    prompts = load_prompts(
        arguments.texts, arguments.prompt_column, arguments.split, arguments.limit, argument="texts"
    )
    formatter = Formatter(tokenizer, head.config.trained_on_chats if arguments.chat is None else arguments.chat)
    return [formatter([prompt])["input_ids"][0].tolist() for prompt in prompts]


def _line(scored: ScoredText, tokenizer: PreTrainedTokenizerBase, head: ValueHead, values: bool) -> dict[str, Any]:
    worst, first = None, scored.first_unacceptable
    known = [None if math.isnan(value) else value for value in scored.values]  # as JSON has it
    if there := [value for value in known if value is not None]:
        worst = there[int(undesirability(torch.tensor(there), head.config.polarity).argmax())]
    line: dict[str, Any] = {"worst_value": worst, "acceptable": first is None, "first_unacceptable": first}
    if first is not None:
        line["token"] = tokenizer.decode([scored.tokens[first]])
    if values:
        line["values"] = [
            (tokenizer.decode([token]), value) for token, value in zip(scored.tokens, known, strict=True)
        ]
    return line
