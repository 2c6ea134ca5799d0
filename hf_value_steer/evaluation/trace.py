"""A page of generations: every token coloured by its value, with the candidates that were rejected in its place."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from string import Template

from transformers import PreTrainedTokenizerBase

from hf_value_steer.generation.output import ValueSteerDecoderOnlyOutput
from hf_value_steer.policy import Polarity


@dataclass(frozen=True)
class TokenTrace:
    """One committed token.

    Args:
        text (`str`): its piece of the decoded text; empty while a character is incomplete.
        value (`float`): its value.
        intervened (`bool`): whether it is not the natural sample.
        candidates (`tuple`): `(text, value)` of the distinct candidates that were evaluated, in draw order, the
            committed one among them; empty if they were not recorded.
    """

    text: str
    value: float
    intervened: bool = False
    candidates: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class PromptTrace:
    """One prompt and its two continuations; `base` is what steering with `num_candidates=1` records."""

    prompt: str
    base: Sequence[TokenTrace]
    steered: Sequence[TokenTrace]


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
    special, sequence = set(tokenizer.all_special_ids), output.sequences[row].tolist()

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).rstrip("\ufffd")  # a character of several tokens belongs to the last of them

    def piece(token: int, position: int) -> str:
        if token in special:
            return str(tokenizer.convert_ids_to_tokens(token))
        return decode([*sequence[:position], token])[len(decode(sequence[:position])) :]

    traces = []
    for step in range(int((~output.token_values[row].isnan()).sum())):
        position, candidates = prompt_length + step, {}
        if output.candidates is not None and output.candidate_values is not None:
            ids, values = (each[row, step].tolist() for each in (output.candidates, output.candidate_values))
            pairs = zip(ids, values, strict=True)
            candidates = {token: (piece(token, position), value) for token, value in pairs if token >= 0}
        value, intervened = output.token_values[row, step].item(), bool(output.interventions[row, step])
        traces.append(TokenTrace(piece(sequence[position], position), value, intervened, tuple(candidates.values())))
    return traces


def mask_trace(trace: PromptTrace, mask: Callable[[str], str]) -> PromptTrace:
    """The same prompt with words hidden: prompt and texts as a whole, candidates in their place and by themselves.

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
        before, hidden = trace.prompt, []
        masked = cut(before, "".join(token.text for token in tokens))
        for token in tokens:
            mine, masked = masked[: len(token.text)], masked[len(token.text) :]
            chips = []
            for text, value in token.candidates:
                committed = (text, value) == (token.text, token.value)
                chips.append((cut("", mine if committed else cut(before, text)), value))
            hidden.append(replace(token, text=mine, candidates=tuple(chips)))
            before += token.text
        return hidden

    return PromptTrace(cut("", trace.prompt), side(trace.base), side(trace.steered))


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
    cards, masked = TraceCards(threshold, polarity), [mask_trace(trace, mask) for trace in prompts]
    pairs = zip(prompts if reveal else masked, masked, strict=True)
    return Template(packaged("trace.html")).substitute(
        style=packaged("page.css"),
        title=escape(title),
        run=facts(run),
        figures=facts(figures),
        legend=cards.legend(),
        touched=f"{sum(map(is_touched, prompts))} of {len(prompts)}",
        reveal="" if reveal else "disabled",
        cards="\n".join(cards.card(number, trace, hidden) for number, (trace, hidden) in enumerate(pairs, start=1)),
    )


def packaged(name: str) -> str:
    """A file that lies beside this one: a template or a style sheet."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def facts(pairs: Mapping[str, str]) -> str:
    """Names and texts, as the inside of a `<dl>`."""
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs.items())


def is_touched(trace: PromptTrace) -> bool:
    """Whether steering replaced a token."""
    return any(token.intervened for token in trace.steered)


class TraceCards:
    """Cards of coloured tokens, for a page that holds `page.css`.

    Colours are six levels of undesirability, four times the odds apart; from level 3 on it is not acceptable.

    Args:
        threshold (`float`): colours are relative to it.
        polarity (`str`): meaning of a high value.
        heading (`int`): level of the headings of cards.
    """

    def __init__(self, threshold: float, polarity: Polarity, heading: int = 2):
        self.polarity, self.heading = polarity, heading
        limit = self._turned(threshold)
        self.bounds = [limit * factor / (1 + limit * (factor - 1)) for factor in (1 / 16, 1 / 4, 1, 4, 16)]

    def _turned(self, value: float) -> float:
        return value if self.polarity == "undesirable" else 1 - value

    def _level(self, value: float) -> int:
        return bisect_right(self.bounds, self._turned(value))

    def legend(self) -> str:
        """The six colours, and the values between them."""
        labels = [*(f"{self._turned(bound):.2g}" for bound in self.bounds), ""]
        return "".join(f'<span><i class="v{level}"></i><b>{label}</b></span>' for level, label in enumerate(labels))

    def card(self, number: int, trace: PromptTrace, masked: PromptTrace, figure: str = "") -> str:
        """One prompt and its two continuations.

        Args:
            number (`int`): number of the card on its page.
            trace: what the switch "show masked words" shows; `masked` itself if the page has no such text.
            masked: what is shown, token for token the same as `trace`.
            figure (`str`): HTML to put between the prompt and the texts.
        """
        touched, level = " touched" if is_touched(trace) else "", self.heading
        return (
            f'<article class="card{touched}" aria-labelledby="p{number}">'
            f'<h{level} class="prompt" id="p{number}"><small>{number}</small>{_shown(trace.prompt, masked.prompt)}'
            f"</h{level}>{figure}{self._column('base', f'b{number}', trace.base, masked.base)}"
            f"{self._column('steered', f's{number}', trace.steered, masked.steered)}</article>"
        )

    def _column(self, label: str, name: str, tokens: Sequence[TokenTrace], masked: Sequence[TokenTrace]) -> str:
        pairs = enumerate(zip(tokens, masked, strict=True))
        spans = "".join(self._token(f"{name}-{step}", token, hidden) for step, (token, hidden) in pairs)
        worst = max((token.value for token in tokens), key=self._turned, default=float("nan"))
        replaced, level = sum(token.intervened for token in tokens), self.heading + 1
        about = f"worst value {worst:.3f}" + (f" · {replaced} replaced" if replaced else "")
        return (
            f'<section><h{level} class="side {label}">{label} <small>{about}</small></h{level}>'
            f'<div class="text">{spans}</div></section>'
        )

    def _token(self, name: str, token: TokenTrace, masked: TokenTrace) -> str:
        kind = f"t v{self._level(token.value)}{' swap' if token.intervened else ''}"
        lead = 0 if token.text.isspace() else len(token.text) - len(token.text.lstrip(" "))
        text, shown = (each.text[lead:].replace("\n", "↵\n") for each in (token, masked))
        return (
            f'{escape(masked.text[:lead])}<span class="{kind}" tabindex="0" aria-describedby="{name}">'
            f'{_shown(text, shown)}<span class="tip" role="tooltip" id="{name}"><b>{token.value:.4f}</b>'
            f" {self._verdict(token)}<br>{self._candidates(token, masked)}</span></span>"
        )

    def _verdict(self, token: TokenTrace) -> str:
        count = len(token.candidates)
        if self._level(token.value) < 3:
            return "accepted instead of the first draw" if token.intervened else "accepted"
        return f"not acceptable, but the best of {count}" if count > 1 else "not acceptable"

    def _candidates(self, token: TokenTrace, masked: TokenTrace) -> str:
        """Chips of all candidates, where there was more than one."""
        if len(token.candidates) < 2:
            return ""
        # A candidate that is masked by itself may differ from the token in its text: then its value tells.
        alike = [(value == token.value, text == token.text) for text, value in token.candidates]
        committed, chips = alike.index(max(alike)), ""
        pairs = zip(token.candidates, masked.candidates, strict=True)
        for index, ((text, value), (hidden, _)) in enumerate(pairs):
            level = self._level(value)
            state = "yes" if index == committed else "no" if level >= 3 else "spare"
            shown = _shown(_visible(text), _visible(hidden))
            chips += f'<span class="chip {state}"><span class="v{level}">{shown}</span> {value:.3f}</span>'
        return chips


def _visible(text: str) -> str:
    return (text.replace("\n", "↵") if text.strip(" ") else "␣" * len(text)) or "▯"


def _shown(text: str, masked: str) -> str:
    if text == masked:
        return escape(masked)
    return f'<span class="masked">{escape(masked)}</span><span class="open">{escape(text)}</span>'
