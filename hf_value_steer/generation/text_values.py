"""Values of texts by a judge of text, which a filter asks about candidates before they are forwarded."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_value_steer.backbone.parts import vocabulary_size
from hf_value_steer.errors import ScoringError
from hf_value_steer.files.kept import load_once
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.state import Draw
from hf_value_steer.judges.in_the_loop import TextJudge
from hf_value_steer.judges.prompt import Prompt


class TextValues:
    """Asks a judge about the texts of one call.

    Args:
        judge: is asked.
        call: whose prompts are no part of the texts.

    Attributes:
        seconds (`float`): that this has taken so far.
    """

    def __init__(self, judge: TextJudge, call: Call):
        self.judge, self.begin, self.seconds = judge, call.input_ids.shape[1], 0.0
        self.tokenizer = judge.tokenizer or call.tokenizer or _tokenizer_of(call)
        if len(self.tokenizer) > (size := vocabulary_size(call.model)):
            raise ValueError(
                f"The tokenizer of the judge of text has {len(self.tokenizer)} tokens, and the model {size}: pass the "
                "tokenizer of this model."
            )
        self.prompts = [Prompt(text) for text in self.tokenizer.batch_decode(call.input_ids, skip_special_tokens=True)]

    def __call__(
        self, draw: Draw, rows: Tensor, numbers: Sequence[int], since: Tensor, tokens: Tensor, asked: Tensor
    ) -> Tensor:
        """Values `(n, K)` of some rows with candidates at their end, NaN where nobody asks.

        Args:
            draw: what the step starts from.
            rows (`torch.LongTensor` of shape `(n,)`): in `draw`.
            numbers (sequence of `int`): of these rows in the batch.
            since (`torch.LongTensor` of shape `(n,)`): how many new tokens at the beginning are not shown.
            tokens (`torch.LongTensor` of shape `(n, K)`): candidates.
            asked (`torch.BoolTensor` of shape `(n, K)`): which of them matter.

        Raises:
            ScoringError: if the judge fails, or does not answer with numbers in [0, 1].
        """
        begun, places = time.perf_counter(), asked.nonzero().tolist()
        values = torch.full(tokens.shape, torch.nan)
        if not places:  # a row without another candidate, of which nobody has to be asked
            return values.to(tokens.device)
        written, candidates = draw.input_ids[rows, self.begin :].tolist(), tokens.tolist()
        hidden = since.tolist()
        ids = [[*written[index][hidden[index] :], candidates[index][column]] for index, column in places]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        pairs = [(numbers[place[0]], text.rstrip("\ufffd")) for place, text in zip(places, texts, strict=True)]
        answers = self._ask(list(dict.fromkeys(pairs)), draw.step)
        for (index, column), pair in zip(places, pairs, strict=True):
            values[index, column] = answers[pair]
        self.seconds += time.perf_counter() - begun
        return values.to(tokens.device)

    def _ask(self, pairs: Sequence[tuple[int, str]], step: int) -> dict[tuple[int, str], float]:
        """What the judge says of texts of rows, all of them different."""
        try:
            answers = self.judge([self.prompts[number] for number, _ in pairs], [text for _, text in pairs])
        except Exception as error:  # the judge may be the user's
            raise ScoringError(
                f"The judge of text failed at new token {step}: {str(error).rstrip('.')}. The generation was stopped; "
                "the token was not emitted."
            ) from error
        return dict(zip(pairs, answers.tolist(), strict=True))


def _tokenizer_of(call: Call) -> PreTrainedTokenizerBase:
    name = call.model.name_or_path
    try:
        return load_once(AutoTokenizer.from_pretrained, name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"A judge of text needs the tokenizer, and there is none at {name!r}: pass `tokenizer=` to `generate` of "
            "an enabled model, or to the TextJudge."
        ) from error
