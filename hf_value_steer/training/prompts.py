"""Prompts: where they come from, how the model reads them, and which split they belong to."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic_core import from_json
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from hf_value_steer.arguments.kinds import check_kind, shown
from hf_value_steer.checks import import_optional
from hf_value_steer.errors import FieldError
from hf_value_steer.files.references import PREFIX, resolve
from hf_value_steer.files.writing import read_utf8
from hf_value_steer.judges.prompt import Prompt as Prompt


def load_prompts(
    source: str,
    column: str = "prompt",
    split: str = "train",
    limit: int | None = None,
    *,
    argument: str = "prompts",
) -> list[Prompt]:
    """Read prompts.

    Args:
        source (`str`): a `.txt` file (one prompt a line), a `.jsonl` file, both in UTF-8, `python:module:function`
            (which returns texts or records), or a Hub id or folder for `datasets.load_dataset`.
        column (`str`): the column of a record that holds the prompt: a text, or a list of chat messages that ends
            with the user's.
        split (`str`): split of a data set.
        limit (`int`, *optional*): take the first so many.
        argument (`str`): what errors call the source.

    Raises:
        FieldError: if there is no prompt, or a record is neither a text nor holds one, or chat messages, in `column`;
            names file, line and key. The same for a file that is not in UTF-8.
        ImportError: for a data set, if `datasets` is not installed.
    """
    # What a collection keeps was looked at when it was collected, by the rules of that day.
    kept = source.endswith(".jsonl") and (Path(source).parent / "collection.json").is_file()
    prompts = []
    for place, record in read_records(source, split, argument, kept):
        try:
            prompts.append(_prompt(record, column, kept))
        except ValueError as error:
            raise FieldError(argument, f"`{argument}`: {place}: {error}") from error
    if not prompts[:limit]:
        raise FieldError(argument, f"`{argument}`: {source} holds no prompt.")
    return prompts[:limit]


def read_records(
    source: str, split: str = "train", argument: str = "prompts", kept: bool = False
) -> Iterator[tuple[str, Any]]:
    """Where each record of a source of [`load_prompts`] stands, and the record, not looked at yet.

    Args:
        kept (`bool`): whether a collection keeps them: it knows NaN.
    """
    path = Path(source)
    if source.startswith(PREFIX) or path.suffix not in (".txt", ".jsonl"):
        records = resolve(source)() if source.startswith(PREFIX) else _dataset(source, split, argument)
        if isinstance(records, str | Mapping) or not (hasattr(records, "__iter__") or hasattr(records, "__getitem__")):
            raise FieldError(
                argument, f"`{argument}`: {source} has to give a list of texts or records, got {shown(records)}."
            )
        yield from ((f"{source}, record {number}", record) for number, record in enumerate(records, 1))
        return
    if not path.is_file():
        raise FieldError(argument, f"`{argument}`: there is no file {source}.")
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if line.strip():
            place = f"{source}, line {number}"
            yield place, line if path.suffix == ".txt" else _json(line, place, argument, kept)


def _json(line: str, place: str, argument: str, kept: bool) -> Any:
    try:
        return from_json(line, allow_inf_nan=kept)
    except ValueError as error:
        reason = str(error).replace(" at line 1 ", " at ")
        raise FieldError(argument, f"`{argument}`: {place}: this is no JSON: {reason}.") from error


def _dataset(source: str, split: str, argument: str) -> Iterable[Any]:
    datasets = import_optional("datasets", f"`{argument}`: {source}")
    return datasets.load_dataset(source, split=split)  # type: ignore[no-any-return]


def _prompt(record: Any, column: str, kept: bool) -> Prompt:
    columns = {column: record} if isinstance(record, str) else record
    if not isinstance(columns, Mapping):
        raise ValueError(f"a record has to be a text, or an object with `{column}`, got {shown(record)}.")
    if column not in columns:
        raise ValueError(f"the record has no column {column!r}, only {shown(sorted(map(str, columns)))}.")
    given, others = columns[column], {name: entry for name, entry in columns.items() if name != column}
    if isinstance(given, list | tuple):
        _check_messages(column, given)
        if given[-1]["role"] != "user" and not kept:
            raise ValueError(f"`{column}` has to end with a message of the role user, got {shown(given[-1]['role'])}.")
        return Prompt(given[-1]["content"], others, list(given))
    if not isinstance(given, str):
        raise ValueError(f"`{column}` has to be a text, or a list of chat messages, got {shown(given)}.")
    _check_text(column, given)
    return Prompt(given.strip(), others)


def _check_text(name: str, text: Any) -> None:
    check_kind(name, str, text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` holds half a character (a lone surrogate), at {error.start}: mend it.") from error


def _check_messages(column: str, messages: Sequence[Any]) -> None:
    """Raise a `ValueError` unless each has a role and a content; where tools are called the content may be missing."""
    if not messages:
        raise ValueError(f"`{column}` has to hold chat messages, but is an empty list.")
    for index, message in enumerate(messages):
        name = f"{column}[{index}]"
        check_kind(name, dict, message)
        tools = message is not messages[-1] and message.get("tool_calls") and message.get("content") is None
        for key in ("role",) if tools else ("role", "content"):
            if key not in message:
                raise ValueError(f"`{name}` has no {key!r}, only {shown(sorted(map(str, message)))}.")
            _check_text(f"{name}.{key}", message[key])


def write_prompts(prompts: Sequence[Prompt], path: Path) -> None:
    """Write `prompts` as JSON lines, which [`load_prompts`] reads."""
    path.write_bytes(_as_json_lines(prompts))


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts with all their columns."""
    return hashlib.sha256(_as_json_lines(prompts)).hexdigest()


def _as_json_lines(prompts: Sequence[Prompt]) -> bytes:
    return b"".join(_as_json_line(number, prompt) for number, prompt in enumerate(prompts, 1))


def _as_json_line(number: int, prompt: Prompt) -> bytes:
    record = {"prompt": prompt.messages or prompt.text, **prompt.columns}
    try:
        return f"{json.dumps(record, ensure_ascii=False, sort_keys=True)}\n".encode()
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"record {number} of the prompts cannot be kept as JSON: {error}.") from error


class Formatter:
    """From prompts to a left-padded batch.

    Args:
        tokenizer: of the backbone.
        chat (`bool`): put prompts into the tokenizer's chat template; otherwise they are plain text to continue.
        system_prompt (`str`, *optional*): a system message before them.

    Raises:
        ValueError: if there is no chat template, or a system prompt without one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool, system_prompt: str | None = None):
        if chat and tokenizer.chat_template is None:
            raise ValueError("`chat`: this tokenizer has no chat template; collect plain continuations instead.")
        if system_prompt and not chat:
            raise ValueError("`system_prompt` needs `chat`: plain continuations have no system message.")
        self.tokenizer, self.chat, self.system_prompt = tokenizer, chat, system_prompt
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @property
    def name(self) -> str:
        """`"none"`, or a digest of the chat template: what `ValueHeadConfig.chat_template` records."""
        template = str(self.tokenizer.chat_template)
        return "sha256:" + hashlib.sha256(template.encode()).hexdigest()[:16] if self.chat else "none"

    def __call__(self, prompts: Sequence[Prompt], device: torch.device | str = "cpu") -> BatchEncoding:
        """`input_ids` and `attention_mask`, `(prompts, length)` each."""
        texts = [self._chat(prompt) if self.chat else prompt.text for prompt in prompts]
        options = {"padding": True, "return_tensors": "pt", "add_special_tokens": not self.chat}
        return self.tokenizer(texts, **options).to(device)

    def _chat(self, prompt: Prompt) -> str:
        messages = list(prompt.messages or [{"role": "user", "content": prompt.text}])
        if self.system_prompt:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def join(formatter: Formatter, prompts: Sequence[Prompt], responses: Sequence[Tensor]) -> dict[str, Tensor]:
    """Prompts and their responses as one batch: prompts padded on the left, responses on the right.

    Args:
        responses (sequence of `torch.LongTensor` of shape `(tokens,)`): one for each prompt.

    Returns:
        `input_ids`, `attention_mask` and `position_ids`, `(rows, length)` each, and `prompt_length`, `()`.
    """
    inputs = formatter(prompts)
    new = nn.utils.rnn.pad_sequence([response.long() for response in responses], batch_first=True)
    real = nn.utils.rnn.pad_sequence([torch.ones(len(response)).long() for response in responses], batch_first=True)
    mask = torch.cat([inputs["attention_mask"], real], dim=1)
    return {
        "input_ids": torch.cat([inputs["input_ids"], new], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "prompt_length": torch.tensor(inputs["input_ids"].shape[1]),
    }


def share(text: str) -> float:
    """Where a prompt falls in [0, 1), by its text alone: the same prompt is in the same split for good."""
    return int(hashlib.sha256(text.strip().encode()).hexdigest()[-12:], 16) / 16**12
