"""A page of generations: every token coloured by its value, with the candidates that were rejected in its place."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from hf_value_steer.choices import Polarity
from hf_value_steer.evaluation.pages import render
from hf_value_steer.generation.output import ValueSteerDecoderOnlyOutput
from hf_value_steer.generation.state import TakenBack


@dataclass(frozen=True)
class TokenTrace:
    """One committed token.

    Args:
        text (`str`): its piece of the decoded text; empty while a character is incomplete.
        value (`float`): its value.
        intervened (`bool`): whether it is not the natural sample.
        candidates (`tuple`): `(text, value)` of the distinct candidates that were evaluated, in draw order, the
            committed one among them; empty if they were not recorded.
        taken_back (`tuple`): `(text, value, before)` of the tokens that were taken back at this place, in order;
            `before` is the new text that stood before it. Those from behind the end stand at the last token.
    """

    text: str
    value: float
    intervened: bool = False
    candidates: tuple[tuple[str, float], ...] = ()
    taken_back: tuple[tuple[str, float, str], ...] = ()

    @property
    def committed(self) -> int:
        """Which of its candidates it is."""
        # A candidate that is masked by itself may differ from the token in its text: then its value tells.
        alike = [(value == self.value, text == self.text) for text, value in self.candidates]
        return alike.index(max(alike))


@dataclass(frozen=True)
class PromptTrace:
    """One prompt and its two continuations; `base` is what steering with `num_candidates=1` records."""

    prompt: str
    base: Sequence[TokenTrace]
    steered: Sequence[TokenTrace]

    @property
    def touched(self) -> bool:
        """Whether steering replaced a token."""
        return any(token.intervened for token in self.steered)

    @property
    def taken_back(self) -> int:
        """How many tokens were taken back."""
        return count_taken_back(self.steered)


def count_taken_back(tokens: Sequence[TokenTrace]) -> int:
    """How many tokens were taken back at all places of a text."""
    return sum(len(token.taken_back) for token in tokens)


class Pieces:
    """The piece of text that a token adds to the tokens before it; special tokens appear under their names.

    A character of several tokens belongs to the last of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.special = tokenizer, set(tokenizer.all_special_ids)

    def __call__(self, before: Sequence[int], token: int) -> str:
        if token in self.special:
            return str(self.tokenizer.convert_ids_to_tokens(token))
        return self._decode([*before, token])[len(self._decode(before)) :]

    def of_candidates(
        self, before: Sequence[int], ids: Sequence[int], values: Sequence[float]
    ) -> tuple[tuple[str, float], ...]:
        """`(text, value)` of the distinct candidates of one place; an id of -1 is none."""
        found = {token: value for token, value in zip(ids, values, strict=True) if token >= 0}
        return tuple((self(before, token), value) for token, value in found.items())

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).rstrip("\ufffd")


def trace_tokens(
    output: ValueSteerDecoderOnlyOutput, tokenizer: PreTrainedTokenizerBase, row: int, prompt_length: int
) -> list[TokenTrace]:
    """The new tokens of one row, up to and including its end.

    Args:
        output: what `generate(..., value_steer=..., return_dict_in_generate=True)` returned.
        tokenizer: decodes; special tokens appear under their names.
        row (`int`): which row of the batch.
        prompt_length (`int`): number of prompt tokens in `output.sequences`, padding included.
    """
    assert output.token_values is not None and output.interventions is not None  # every steered generation has them
    piece, sequence = Pieces(tokenizer), output.sequences[row].tolist()
    traces = []
    for step in range(int((~output.token_values[row].isnan()).sum())):
        before, token = sequence[: prompt_length + step], sequence[prompt_length + step]
        candidates: tuple[tuple[str, float], ...] = ()
        if output.candidates is not None and output.candidate_values is not None:
            ids, values = (each[row, step].tolist() for each in (output.candidates, output.candidate_values))
            candidates = piece.of_candidates(before, ids, values)
        value, intervened = output.token_values[row, step].item(), bool(output.interventions[row, step])
        traces.append(TokenTrace(piece(before, token), value, intervened, candidates))
    return with_taken_back(traces, piece, sequence, prompt_length, _taken_back(output, row))


def _taken_back(output: ValueSteerDecoderOnlyOutput, row: int) -> list[TakenBack]:
    fields = (output.taken_back_steps, output.taken_back_tokens, output.taken_back_values)
    columns = [each[row].tolist() for each in fields if each is not None]
    return [TakenBack(*each) for each in zip(*columns, strict=True) if each[0] >= 0]


def with_taken_back(
    traces: Sequence[TokenTrace],
    piece: Pieces,
    sequence: Sequence[int],
    prompt_length: int,
    taken: Sequence[TakenBack],
) -> list[TokenTrace]:
    """The same tokens, each with what was taken back at its place.

    Args:
        traces: the text as it was kept.
        piece: decodes.
        sequence (sequence of `int`): prompt and kept text.
        prompt_length (`int`): number of prompt tokens in `sequence`.
        taken: all that was taken back, in order.
    """
    ids, texts = list(sequence), [trace.text for trace in traces]
    found: list[list[tuple[str, float, str]]] = [[] for _ in traces]
    for each in reversed(taken):  # each step leads to the text as it was before
        ids, texts = ids[: prompt_length + each.step], texts[: each.step]
        text = piece(ids, each.token)
        found[min(each.step, len(traces) - 1)].insert(0, (text, each.value, "".join(texts)))
        ids.append(each.token)
        texts.append(text)
    return [replace(trace, taken_back=tuple(back)) for trace, back in zip(traces, found, strict=True)]


def mask_trace(trace: PromptTrace, mask: Callable[[str], str]) -> PromptTrace:
    """The same prompt with words hidden: prompt and texts as a whole, candidates in their place and by themselves.

    What was taken back is hidden in every text that it was part of, and by itself.

    Args:
        trace: what to mask.
        mask (`Callable`): hides words in a text without changing its length.

    Raises:
        ValueError: if `mask` changes the length of a text.
    """

    def cut(before: str, text: str) -> str:
        masked = mask(before + text)
        if len(masked) != len(before) + len(text):
            raise ValueError("`mask` has to keep the length of a text, so that it can be cut where tokens end.")
        return masked[len(before) :]

    def side(tokens: Sequence[TokenTrace]) -> list[TokenTrace]:
        before, hidden, ways = trace.prompt, [], _Ways(tokens, partial(cut, trace.prompt))
        masked = cut(before, "".join(token.text for token in tokens))
        for token in tokens:
            mine, masked = masked[: len(token.text)], masked[len(token.text) :]
            chips = []
            for text, value in token.candidates:
                committed = (text, value) == (token.text, token.value)
                chips.append((cut("", mine if committed else cut(before, text)), value))
            back = tuple((cut("", ways(text, then)), value, ways(then, "")) for text, value, then in token.taken_back)
            hidden.append(replace(token, text=mine, candidates=tuple(chips), taken_back=back))
            before += token.text
        return hidden

    return PromptTrace(cut("", trace.prompt), side(trace.base), side(trace.steered))


class _Ways:
    """The texts that were given up, and what `mask` makes of them.

    Args:
        tokens: of the text that was kept, with what was taken back.
        mask (`Callable`): hides words in a new text without changing its length.
    """

    def __init__(self, tokens: Sequence[TokenTrace], mask: Callable[[str], str]):
        ways = {before + text for token in tokens for text, _, before in token.taken_back}
        self.masked = {way: mask(way) for way in ways}

    def __call__(self, text: str, before: str) -> str:
        """`text`, which stood behind `before`, with all that is hidden in one of the texts that it was part of."""
        whole, first = before + text, len(before)
        found = [masked[first : len(whole)] for way, masked in self.masked.items() if way.startswith(whole)]
        return "".join(
            next((each for each in now if each != was), was) for was, *now in zip(text, *found, strict=True)
        )


def render_page(
    prompts: Sequence[PromptTrace],
    *,
    title: str,
    run: Mapping[str, str],
    figures: Mapping[str, str],
    threshold: float,
    polarity: Polarity,
    mask: Callable[[str], str],
    reveal: bool = False,
) -> str:
    """One self-contained HTML file: no script, no request.

    Args:
        prompts: what to show, one card each.
        title (`str`): heading.
        run (`dict`): what was run, for instance model and seed.
        figures (`dict`): summary figures.
        threshold (`float`): colours are relative to it.
        polarity (`str`): meaning of a high value.
        mask (`Callable`): hides words in a text without changing its length.
        reveal (`bool`): put the unmasked text into the page too, behind a switch. Without it, it is not in the file.

    Raises:
        ValueError: if `mask` changes the length of a text.
    """
    masked = [mask_trace(trace, mask) for trace in prompts]
    return render(
        "trace.html",
        title=title,
        run=run,
        figures=figures,
        colours=Colours(threshold, polarity),
        cards=list(zip(prompts if reveal else masked, masked, strict=True)),
        reveal=reveal,
    )


_UNACCEPTABLE = 3  # the lowest level that is


class Colours:
    """Six levels of undesirability, four times the odds apart; from level 3 on a value is not acceptable.

    Args:
        threshold (`float`): between levels 2 and 3.
        polarity (`str`): meaning of a high value.
    """

    def __init__(self, threshold: float, polarity: Polarity):
        self.threshold, self.polarity = threshold, polarity
        limit = self._turned(threshold)
        self.bounds = [limit * factor / (1 + limit * (factor - 1)) for factor in (1 / 16, 1 / 4, 1, 4, 16)]

    def _turned(self, value: float) -> float:
        return value if self.polarity == "undesirable" else 1 - value

    def level(self, value: float) -> int:
        return bisect_right(self.bounds, self._turned(value))

    def between(self) -> list[str]:
        """The values between the levels, as text."""
        return [f"{self._turned(bound):.2g}" for bound in self.bounds]

    def worst(self, tokens: Sequence[TokenTrace]) -> float:
        """The most undesirable value."""
        return max((token.value for token in tokens), key=self._turned, default=float("nan"))

    def kept(self, tokens: Sequence[TokenTrace]) -> int:
        """How many tokens are not acceptable; a token without a value is none of them."""
        return sum(self.level(token.value) >= _UNACCEPTABLE for token in tokens if not math.isnan(token.value))

    def verdict(self, token: TokenTrace) -> str:
        """What was made of a token, in words."""
        count = len(token.candidates)
        if self.level(token.value) < _UNACCEPTABLE:
            return "accepted instead of the first draw" if token.intervened else "accepted"
        return f"not acceptable, but the best of {count}" if count > 1 else "not acceptable"
