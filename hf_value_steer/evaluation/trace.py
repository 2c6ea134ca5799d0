"""A page of generations: every token coloured by its value, with the candidates that were rejected in its place."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    assert output.values is not None and output.interventions is not None  # every steered generation has them
    special, sequence = set(tokenizer.all_special_ids), output.sequences[row].tolist()

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).rstrip("\ufffd")  # a character of several tokens belongs to the last of them

    def piece(token: int, position: int) -> str:
        if token in special:
            return str(tokenizer.convert_ids_to_tokens(token))
        return decode([*sequence[:position], token])[len(decode(sequence[:position])) :]

    traces = []
    for step in range(int((~output.values[row].isnan()).sum())):
        position, candidates = prompt_length + step, {}
        if output.candidates is not None and output.candidate_values is not None:
            ids, values = (each[row, step].tolist() for each in (output.candidates, output.candidate_values))
            pairs = zip(ids, values, strict=True)
            candidates = {token: (piece(token, position), value) for token, value in pairs if token >= 0}
        value, intervened = output.values[row, step].item(), bool(output.interventions[row, step])
        traces.append(TokenTrace(piece(sequence[position], position), value, intervened, tuple(candidates.values())))
    return traces


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
    page = _Page(threshold, polarity, mask, reveal)
    touched = sum(any(token.intervened for token in trace.steered) for trace in prompts)
    return Template(files(__package__).joinpath("trace.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        run=_facts(run),
        figures=_facts(figures),
        legend=page.legend(),
        touched=f"{touched} of {len(prompts)}",
        reveal="" if reveal else "disabled",
        cards="\n".join(page.card(number, trace) for number, trace in enumerate(prompts, start=1)),
    )


def _facts(facts: Mapping[str, str]) -> str:
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())


def _visible(text: str) -> str:
    return (text.replace("\n", "↵") if text.strip(" ") else "␣" * len(text)) or "▯"


class _Page:
    """Colours are six levels of undesirability, four times the odds apart; from level 3 on it is not acceptable."""

    def __init__(self, threshold: float, polarity: Polarity, mask: Callable[[str], str], reveal: bool):
        self.polarity, self.mask, self.reveal = polarity, mask, reveal
        limit = self._turned(threshold)
        self.bounds = [limit * factor / (1 + limit * (factor - 1)) for factor in (1 / 16, 1 / 4, 1, 4, 16)]

    def _turned(self, value: float) -> float:
        return value if self.polarity == "undesirable" else 1 - value

    def _level(self, value: float) -> int:
        return bisect_right(self.bounds, self._turned(value))

    def legend(self) -> str:
        labels = [*(f"{self._turned(bound):.2g}" for bound in self.bounds), ""]
        return "".join(f'<span><i class="v{level}"></i><b>{label}</b></span>' for level, label in enumerate(labels))

    def card(self, number: int, trace: PromptTrace) -> str:
        touched = " touched" if any(token.intervened for token in trace.steered) else ""
        return (
            f'<article class="card{touched}" aria-labelledby="p{number}"><h2 id="p{number}"><small>{number}</small>'
            f"{self._shown(trace.prompt, self._cut('', trace.prompt))}</h2>"
            f"{self._column('base', f'b{number}', trace.prompt, trace.base)}"
            f"{self._column('steered', f's{number}', trace.prompt, trace.steered)}</article>"
        )

    def _column(self, label: str, name: str, before: str, tokens: Sequence[TokenTrace]) -> str:
        masked, spans = self._cut(before, "".join(token.text for token in tokens)), []
        for step, token in enumerate(tokens):
            mine, masked = masked[: len(token.text)], masked[len(token.text) :]
            spans.append(self._token(f"{name}-{step}", before, token, mine))
            before += token.text
        worst = max((token.value for token in tokens), key=self._turned, default=float("nan"))
        replaced = sum(token.intervened for token in tokens)
        facts = f"worst value {worst:.3f}" + (f" · {replaced} replaced" if replaced else "")
        return f'<section><h3>{label} <small>{facts}</small></h3><div class="text">{"".join(spans)}</div></section>'

    def _token(self, name: str, before: str, token: TokenTrace, masked: str) -> str:
        kind = f"t v{self._level(token.value)}{' swap' if token.intervened else ''}"
        lead = 0 if token.text.isspace() else len(token.text) - len(token.text.lstrip(" "))
        text, shown = (each[lead:].replace("\n", "↵\n") for each in (token.text, masked))
        return (
            f'{escape(masked[:lead])}<span class="{kind}" tabindex="0" aria-describedby="{name}">'
            f'{self._shown(text, shown)}<span class="tip" role="tooltip" id="{name}"><b>{token.value:.4f}</b>'
            f" {self._verdict(token)}<br>{self._candidates(before, token, masked)}</span></span>"
        )

    def _verdict(self, token: TokenTrace) -> str:
        count = len(token.candidates)
        if self._level(token.value) < 3:
            return "accepted instead of the first draw" if token.intervened else "accepted"
        return f"not acceptable, but the best of {count}" if count > 1 else "not acceptable"

    def _candidates(self, before: str, token: TokenTrace, masked: str) -> str:
        """Chips of all candidates, where there was more than one: masked as part of the text and by themselves."""
        chips = ""
        for text, value in token.candidates if len(token.candidates) > 1 else ():
            committed, level = (text, value) == (token.text, token.value), self._level(value)
            state = "yes" if committed else "no" if level >= 3 else "spare"
            hidden = self._cut("", masked if committed else self._cut(before, text))
            shown = self._shown(_visible(text), _visible(hidden))
            chips += f'<span class="chip {state}"><span class="v{level}">{shown}</span> {value:.3f}</span>'
        return chips

    def _shown(self, text: str, masked: str) -> str:
        if text == masked or not self.reveal:
            return escape(masked)
        return f'<span class="masked">{escape(masked)}</span><span class="open">{escape(text)}</span>'

    def _cut(self, before: str, text: str) -> str:
        """`text`, masked as the continuation of `before`."""
        masked = self.mask(before + text)
        if len(masked) != len(before) + len(text):
            raise ValueError("`mask` has to keep the length of a text, so that it can be cut where tokens end.")
        return masked[len(before) :]
