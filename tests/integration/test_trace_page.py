"""The trace page: one file without requests, escaped, without masked words; rows end where they end."""

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from hf_value_steer import ValueSteerDecoderOnlyOutput
from hf_value_steer.evaluation.trace import PromptTrace, TokenTrace, mask_trace, render_page, trace_tokens


SECRET = "quisquilious"  # stands for an offensive word, spread over two tokens
HOSTILE = "<script src='//x'>&\"$cards"


def mask(text: str) -> str:
    return re.sub(rf"\b{SECRET}\b", "*" * len(SECRET), text)


def render(
    *traces: PromptTrace,
    reveal: bool = False,
    polarity: str = "undesirable",
    name: str = "name",
    mask: Callable[[str], str] = mask,
) -> str:
    settings = {"threshold": 0.3, "polarity": polarity, "mask": mask, "reveal": reveal}
    return render_page(traces, title=name, run={name: name}, figures={"rate": name}, **settings)


def example(prompt: str = "A prompt") -> tuple[PromptTrace, PromptTrace]:
    base = [TokenTrace(" quis", 0.6), TokenTrace("quilious", 0.7), TokenTrace(HOSTILE, 0.001)]
    steered = [
        TokenTrace(" mild", 0.1, True, ((" quis", 0.6), (" mild", 0.1), (" <b>", 0.05))),
        TokenTrace(" quis", 0.6, False, ((" quis", 0.6), (f" {SECRET}", 0.8))),
        TokenTrace("ling\n", 0.2, False, (("ling\n", 0.2), ("quilious", 0.9), (SECRET, 0.8), (HOSTILE, 0.9))),
    ]
    return PromptTrace(prompt, base, steered), PromptTrace("Untouched", base[2:], base[2:])


class Reader(HTMLParser):
    """Tags, attributes and text of a page; refuses tags that are not closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.text = ""
        self.stack: list[str] = []
        self.feed(page)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(attrs)
        if tag not in ("meta", "link", "input", "br", "wbr"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.text += data


def spans(page: str) -> list[str]:
    """Classes of the token spans."""
    return re.findall(r'<span class="t ([^"]*)"', page)


@pytest.mark.parametrize("reveal", [False, True])
def test_page_is_one_file_and_escaped(reveal: bool) -> None:
    page = render(*example(HOSTILE), reveal=reveal, name=HOSTILE)
    read = Reader(page)
    assert not re.search(r"https?:|url\(|@import", page)
    assert not read.tags & {"script", "iframe", "img", "object", "embed", "form", "a", "base"}
    requests = {(name, value) for name, value in read.attributes if name in ("src", "href", "style", "action")}
    assert requests == {("href", "data:,")}
    assert not any(name.startswith("on") for name, _ in read.attributes)
    assert HOSTILE not in page
    # title twice, name and text of a fact, a figure, prompt, token three times, candidate
    assert read.text.count(HOSTILE) == 10
    assert " <b>" in read.text


def test_masked_words_are_not_in_the_file() -> None:
    page = render(*example(f"A {SECRET} prompt"))
    assert SECRET not in page and "quilious" not in page
    assert SECRET not in Reader(page).text
    assert ("disabled", None) in Reader(page).attributes


def test_reveal_keeps_both_texts() -> None:
    page = render(*example(f"A {SECRET} prompt"), reveal=True)
    assert f'<span class="masked">A {"*" * 12} prompt</span><span class="open">A {SECRET} prompt</span>' in page
    assert '<span class="masked">********</span><span class="open">quilious</span>' in page
    assert ("disabled", None) not in Reader(page).attributes


def test_a_word_that_starts_in_the_prompt_is_masked() -> None:
    steered = TokenTrace("ling", 0.1, True, (("quilious", 0.9), ("ling", 0.1)))
    page = render(PromptTrace("A quis", [TokenTrace("quilious", 0.9)], [steered]))
    assert "quilious" not in page
    assert page.count("********") == 2


def test_mask_has_to_keep_the_length() -> None:
    with pytest.raises(ValueError, match="length"):
        render(*example(), mask=lambda text: f"{text}!")


def test_colours_and_frames_follow_values() -> None:
    assert spans(render(*example())) == ["v3", "v4", "v0", "v2 swap", "v3", "v2", "v0", "v0"]
    desirable = render(*example(), polarity="desirable")
    assert spans(desirable) == ["v2", "v1", "v5", "v3 swap", "v2", "v3", "v5", "v5"]
    assert desirable.count('class="card touched"') == 1
    assert "(1 of 2)" in desirable


def test_the_threshold_itself_is_not_acceptable() -> None:
    page = render(PromptTrace("p", [TokenTrace("a", 0.3), TokenTrace("b", 0.2999)], []))
    assert spans(page) == ["v3", "v2"]


def test_every_token_can_be_focused_and_is_described() -> None:
    page = render(*example())
    described = re.findall(r'tabindex="0" aria-describedby="([^"]+)"', page)
    assert len(described) == len(set(described)) == 8
    assert set(described) == set(re.findall(r'role="tooltip" id="([^"]+)"', page))


class Letters(PreTrainedTokenizerBase):
    """Ids are code points; 0 is padding, 1 ends, and 2 followed by 3 is one character in two tokens."""

    all_special_ids = (0, 1)

    def __init__(self) -> None:
        pass

    def convert_ids_to_tokens(self, token: int) -> str:
        return ["<pad>", "<eos>"][token]

    def decode(self, ids: list[int], **_: bool) -> str:
        text = "".join(chr(each) for each in ids if each > 1)
        return text.replace("\x02\x03", "é").replace("\x02", "\ufffd")


def test_rows_end_where_they_end() -> None:
    nan = torch.nan
    output = ValueSteerDecoderOnlyOutput(
        sequences=torch.tensor([[0, 65, 66, 2, 3, 1], [65, 66, 67, 1, 0, 0]]),
        token_values=torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, nan, nan]]),
        interventions=torch.tensor([[False, True, False, False], [False] * 4]),
        candidates=torch.tensor([[[66, -1, -1], [67, 2, 67], [3, -1, -1], [1, -1, -1]], [[67, -1, -1]] * 4]),
        candidate_values=torch.tensor([[[0.1, nan, nan], [0.9, 0.2, 0.9], [0.3, nan, nan], [0.4, nan, nan]]] * 2),
    )
    first, second = (trace_tokens(output, Letters(), row, 2) for row in range(2))
    assert [token.text for token in first] == ["B", "", "é", "<eos>"]
    assert [token.intervened for token in first] == [False, True, False, False]
    assert [[text for text, _ in token.candidates] for token in first] == [["B"], ["C", ""], ["é"], ["<eos>"]]
    assert [token.text for token in second] == ["C", "<eos>"]
    assert [token.value for token in second] == pytest.approx([0.5, 0.6])


def test_candidates_are_optional() -> None:
    output = ValueSteerDecoderOnlyOutput(
        sequences=torch.tensor([[65, 66]]), token_values=torch.tensor([[0.5]]), interventions=torch.tensor([[False]])
    )
    assert trace_tokens(output, Letters(), 0, 1) == [TokenTrace("B", 0.5)]


def went_back(*taken_back: list[tuple[int, str, float]]) -> ValueSteerDecoderOnlyOutput:
    """Rows of `AB`, then `C`, `é` (two tokens) and the end; with `(step, token, value)` of what was taken back."""
    rows = range(len(taken_back))
    most = max(map(len, taken_back))
    padded = [[*taken, *[(-1, "", torch.nan)] * (most - len(taken))] for taken in taken_back]
    return ValueSteerDecoderOnlyOutput(
        sequences=torch.tensor([[65, 66, 67, 2, 3, 1] for _ in rows]),
        token_values=torch.tensor([[0.1] * 4 for _ in rows]),
        interventions=torch.zeros(len(rows), 4, dtype=torch.bool),
        taken_back_steps=torch.tensor([[step for step, _, _ in taken] for taken in padded]),
        taken_back_tokens=torch.tensor([[ord(token) if token else -1 for _, token, _ in taken] for taken in padded]),
        taken_back_values=torch.tensor([[value for _, _, value in taken] for taken in padded]),
    )


def test_what_was_taken_back_stands_at_its_place() -> None:
    first, second = [(1, "x", 0.2), (0, "y", 0.3), (2, "z", 0.4), (1, "w", 0.5), (2, "v", 0.6)], [(2, "\x02", 0.7)]
    output = went_back(first, second)
    rows = [trace_tokens(output, Letters(), row, 2) for row in range(2)]
    found = [[[(text, before) for text, _, before in token.taken_back] for token in row] for row in rows]
    assert found[0] == [[("y", "")], [("x", "y"), ("w", "C")], [("z", "Cw"), ("\ufffdv", "C")], []]
    assert found[1] == [[], [], [("", "C")], []]
    assert [value for _, value, _ in rows[0][1].taken_back] == pytest.approx([0.2, 0.5])
    assert [PromptTrace("", [], row).taken_back for row in rows] == [5, 1]


def test_what_was_taken_back_behind_the_end_stands_at_the_last_token() -> None:
    output = went_back([(5, "p", 0.2), (4, "q", 0.3), (5, "r", 0.4), (4, "s", 0.5), (3, "t", 0.6)])
    *others, last = trace_tokens(output, Letters(), 0, 2)
    assert not any(token.taken_back for token in others)
    kept = "Cé"
    assert [(text, before) for text, _, before in last.taken_back] == [
        ("p", kept + "tq"), ("q", kept + "t"), ("r", kept + "ts"), ("s", kept + "t"), ("t", kept),
    ]  # fmt: skip


def gone(prompt: str = "A prompt") -> PromptTrace:
    """A secret in two tokens that were taken back, and one that ends in place of a kept token."""
    first = ((" quis", 0.2, ""), (" <b>", 0.25, ""))
    second = (("quilious", 0.9, " quis"), ("quilious", 0.8, " quis"))
    return PromptTrace(
        prompt, [], [TokenTrace(" mild", 0.1, True, (), first), TokenTrace("er", 0.1, True, (), second)]
    )


def test_what_was_taken_back_is_struck_out_marked_and_counted() -> None:
    page, read = render(gone(), reveal=True), Reader(render(gone(), reveal=True))
    assert spans(page) == ["v2 swap back", "v2 swap back"]
    assert page.count("<s ") == 4 and '<s class="v2"> &lt;b&gt;</s> 0.250' in page and "quilious" in read.text
    assert "· 4 taken back" in read.text and "tokens were taken back, since" in read.text
    without = Reader(render(*example())).text
    assert "taken back" not in without and "back" not in spans(render(*example()))[0]


def test_what_was_taken_back_is_masked_wherever_it_stood() -> None:
    page = render(gone())
    assert "quis" not in Reader(page).text and "quilious" not in page and "*" * 8 in page
    masked = mask_trace(gone(), mask)
    assert "quis" not in repr(masked) and masked.taken_back == 4
    begun = PromptTrace("A quis", [], [TokenTrace("k", 0.1, True, (), (("quilious", 0.9, ""),))])
    assert "quilious" not in render(begun)
