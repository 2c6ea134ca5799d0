"""Values of texts that are there already: for audits, for filtering data, for moderation."""

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hf_value_steer.backbone.features import FINAL, Layer, deepest
from hf_value_steer.backbone.parts import underlying, vocabulary_size
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.errors import ScoringError, UnsupportedError
from hf_value_steer.generation.depth import AtDepth, can_judge_at_depth
from hf_value_steer.generation.forwards import Reached
from hf_value_steer.generation.prepared import PreparedModel
from hf_value_steer.generation.scorer import Scorer, bind, layers_read, load_head
from hf_value_steer.generation.validation import refuse_adapters
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.hosts.transformers import CACHE
from hf_value_steer.policy import acceptable


Text: TypeAlias = str | Sequence[int]


@dataclass(frozen=True)
class ScoredText:
    """The values of one text.

    Args:
        tokens (`list` of `int`): its token ids, without those of its prompt.
        values (`list` of `float`): value in (0, 1) of what stands there up to each of them, that token included; NaN
            for the first token of all, where there is no prompt.
        prompt_value (`float`, *optional*): value of the prompt, if there is one.
        first_unacceptable (`int`, *optional*): which of the tokens is the first that is not acceptable, from 0.
    """

    tokens: list[int]
    values: list[float]
    prompt_value: float | None
    first_unacceptable: int | None


def score_text(
    model: PreTrainedModel,
    value_head: ValueHead | str,
    texts: Iterable[Text],
    prompts: Iterable[Text] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    threshold: float | None = None,
    alpha: float | None = None,
    batch_size: int = 8,
    chunk: int = 1024,
    allow_backbone_mismatch: bool = False,
) -> Iterator[ScoredText]:
    """Values of every token of texts that are there already, one forward for each batch, in the order of the texts.

    They are the values that the same tokens have while they are generated. So the first token of a text without a
    prompt has none: generation never judges it, no head has learned from one, and its states are like no others (up to
    140 times their norm in SmolLM2-135M). Neither logits nor a cache are kept, and texts are read as they are asked
    for: memory does not grow with their number. What is on the model by then, vectors say, has to be there from the
    call on until the last text is read.

    Args:
        model: the backbone.
        value_head: of this backbone, or its folder or Hub id.
        texts (iterable of `str` or of sequences of `int`): texts, or token ids. A text behind a prompt gets no special
            tokens. Token ids are exact; a text may be cut into other tokens than those it was generated in.
        prompts (iterable, *optional*): what stands before each text, in the same form.
        tokenizer: of the backbone; needed for texts.
        threshold (`float`, *optional*), alpha (`float`, *optional*): what is acceptable, as in [`ValueFilterConfig`];
            by default the threshold of the head.
        batch_size (`int`): texts in one forward, at least 1.
        chunk (`int`): longer texts are read in so many tokens at a time, with a cache; at least 1.
        allow_backbone_mismatch (`bool`): use a head that was made for another backbone of this shape.

    Raises:
        ValueError: before anything is read, for a head that does not fit; then for a text without a tokenizer, one of
            more tokens than the model has positions, or more prompts than texts, or fewer.
        UnsupportedError: for texts longer than `chunk` in a model with recurrent state, and for a PEFT adapter of
            virtual tokens.
        ScoringError: if a value is no number.
    """
    if isinstance(texts, str) or isinstance(prompts, str):
        raise ValueError("`texts` and `prompts` have to be lists, or others that give one text after the other.")
    if batch_size < 1 or chunk < 1:
        raise ValueError(f"`batch_size` and `chunk` have to be at least 1, got {batch_size} and {chunk}.")
    if isinstance(threshold, tuple | list):
        raise ValueError("`threshold` has to be one number: it is that of all texts.")
    refuse_adapters(model)
    model = underlying(model)
    refuse_adapters(model)
    config = ValueFilterConfig(
        value_head=value_head, threshold=threshold, alpha=alpha, allow_backbone_mismatch=allow_backbone_mismatch
    )
    reader = _Reader(PreparedModel(model), config, load_head(config, model), chunk)
    pairs = ((None, text) for text in texts) if prompts is None else zip(prompts, texts, strict=True)
    vocabulary = vocabulary_size(model)
    rows = (_ids(prompt, text, tokenizer, vocabulary) for prompt, text in pairs)
    # Where position embeddings follow the longest row, a text would be read otherwise beside a longer one.
    return reader.read_all(rows, 1 if reader.prepared.longest_row.modules else batch_size)


def _ids(
    prompt: Text | None, text: Text, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, none if there is none, and of a text."""

    def ids(given: Text, first: bool) -> list[int]:
        if not isinstance(given, str):
            return _checked(given, vocabulary)
        if tokenizer is None:
            raise ValueError("`tokenizer` is needed for texts: pass it, or token ids.")
        return list(tokenizer(given, add_special_tokens=first)["input_ids"])

    return ([] if prompt is None else ids(prompt, True)), ids(text, prompt is None)


def _checked(given: Any, vocabulary: int) -> list[int]:
    """Token ids as they are."""
    try:
        ids = [] if isinstance(given, bytes) else [operator.index(token) for token in given]
    except TypeError:
        ids = [-1]
    if isinstance(given, bytes) or any(not 0 <= token < vocabulary for token in ids):
        raise ValueError(
            f"A text has to be a `str`, or a sequence of token ids below {vocabulary}, got {repr(given)[:80]}. "
            "Messages need the chat template."
        )
    return ids


@dataclass(frozen=True)
class _Reader:
    """Reads batches of texts with one head."""

    prepared: PreparedModel
    config: ValueFilterConfig
    head: ValueHead
    chunk: int

    @torch.no_grad()
    def read_all(self, rows: Iterator[tuple[list[int], list[int]]], batch_size: int) -> Iterator[ScoredText]:
        """Values of all texts, batch by batch."""
        limit, done = getattr(self.prepared.model.config.get_text_config(), "max_position_embeddings", None), 0
        while batch := list(itertools.islice(rows, batch_size)):
            for number, (prompt, text) in enumerate(batch, done):
                if limit is not None and len(prompt) + len(text) > limit:
                    long = len(prompt) + len(text)
                    raise ValueError(f"Text {number} is {long} tokens long with its prompt; this model reads {limit}.")
            yield from self.read(batch)
            done += len(batch)

    def read(self, batch: Sequence[tuple[list[int], list[int]]]) -> Iterator[ScoredText]:
        """Values of some prompts and texts, given as token ids."""
        scorer = bind(self.config, self.head, len(batch), torch.device("cpu"), self.layers)
        starts = [len(prompt) for prompt, _ in batch]
        rows = [torch.tensor(prompt + text, dtype=torch.long) for prompt, text in batch]
        values = self._values(scorer, rows, [start - 1 if start else 1 for start in starts])
        if scorer.least_growth is not None:
            if not all(starts):
                raise ValueError("This alpha compares values with that of the prompt: pass `prompts`.")
            scorer.start(values[torch.arange(len(batch)), torch.tensor(starts) - 1])
        failing = ~acceptable(values, scorer.threshold[:, None], scorer.polarity) & ~values.isnan()
        for row, ((_, text), start) in enumerate(zip(batch, starts, strict=True)):
            mine = slice(start, start + len(text))
            failed = failing[row, mine].nonzero().flatten().tolist()
            prompt_value = float(values[row, start - 1]) if start else None
            yield ScoredText(text, values[row, mine].tolist(), prompt_value, failed[0] if failed else None)

    def _values(self, scorer: Scorer, rows: list[Tensor], begins: list[int]) -> Tensor:
        """Value of every position, `(rows, positions)`; NaN before `begins`, and behind the end of a row.

        Args:
            begins (`list` of `int`): the position of each row from which on the head remembers: its prompt's last.
        """
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        model, length = self.prepared.model, ids.shape[1]
        if not length:
            return torch.zeros(len(rows), 0)
        cache = None if length <= self.chunk else self._cache(length)
        found = []
        for first in range(0, length, self.chunk):
            last = first + self.chunk
            inputs: dict[str, Any] = {"input_ids": ids[:, first:last], "attention_mask": mask[:, :last]}
            if model.device.type != "meta":  # else `accelerate` keeps the weights elsewhere, and moves the inputs
                inputs = {name: each.to(model.device) for name, each in inputs.items()}
            inputs |= {"use_cache": cache is not None, **({CACHE: cache} if cache is not None else {})}
            features = self.forward(inputs).features.of(self.layers)
            found.append(scorer.values_of_tokens(features, [max(begin - first, 0) for begin in begins]))
        values = torch.cat(found, dim=1)
        counted = mask.bool() & (torch.arange(length) >= torch.tensor(begins)[:, None])
        if bool((values.isnan() & counted).any()):
            raise ScoringError("A value is no number in [0, 1]: the head or the model gave NaN or an infinity.")
        return values.masked_fill(~counted, torch.nan)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Those that the head reads."""
        return layers_read(self.head, self.prepared.model)

    @cached_property
    def forward(self) -> Callable[[dict[str, Any]], Reached]:
        """A forward that ends at the deepest layer that the head reads, where it may end there."""
        points, layer = self.prepared.points(self.layers), deepest(self.layers)
        if layer != FINAL and can_judge_at_depth(self.prepared):
            return AtDepth(self.prepared.model, points, layer).run_below
        return partial(self.prepared.forwards.run_to, points)

    def _cache(self, length: int) -> DynamicCache:
        model = self.prepared.model
        if model._is_stateful:
            raise UnsupportedError(
                f"{type(model).__name__} has recurrent state, so that a text of {length} tokens is not read in parts: "
                f"pass `chunk={length}`, or shorter texts."
            )
        return DynamicCache(config=model.config)
