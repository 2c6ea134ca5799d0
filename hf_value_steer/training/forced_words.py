"""Words that a model rarely says by itself, drawn so that they fit where they are forced in."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_value_steer.progress import progress


ROWS = 64  # in one forward pass


class ForcedWords:
    """Words as token ids, with a space or without, in small and capital letters, of which likely ones are drawn more.

    A form's weight is the root of its probability: that of its first piece at the place, times that of its other
    pieces after the first, without context.

    Args:
        model, tokenizer: the backbone.
        words: at least one.

    Raises:
        ValueError: if there is none.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]):
        if not words or not all(map(str.strip, words)):
            raise ValueError("There is no word to force in: `force_words` is empty, or holds an empty one.")
        forms = dict.fromkeys(form for word in words for form in _forms(word))
        self.ids: list[list[int]] = tokenizer(list(forms), add_special_tokens=False)["input_ids"]
        self.first = torch.tensor([ids[0] for ids in self.ids], device=model.device)
        order = sorted(range(len(self.ids)), key=lambda form: len(self.ids[form]))  # like lengths: little padding
        batches = progress(range(0, len(order), ROWS), "words to force", "batch")
        rest = torch.cat([_rest(model, [self.ids[form] for form in order[at : at + ROWS]]) for at in batches])
        self.rest = rest[torch.tensor(order, device=model.device).argsort()]

    def draw(self, logits: Tensor) -> list[int]:
        """Pieces of a word that begins where the model has these `logits` `(vocabulary,)` for the next token."""
        likely = logits[self.first] + self.rest
        return list(self.ids[int(torch.multinomial((likely / 2).softmax(-1), 1))])


def _forms(word: str) -> tuple[str, ...]:
    return f" {word}", f" {word.capitalize()}", f" {word.upper()}", word


@torch.no_grad()
def _rest(model: PreTrainedModel, ids: list[list[int]]) -> Tensor:
    """Log probability of the pieces of each word after its first, `(words,)`."""
    rows = [torch.tensor(word, device=model.device) for word in ids]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    later = tokens[:, 1:]
    logits = model(tokens.clamp(min=0), use_cache=False).logits[:, :-1].float()
    found = logits.log_softmax(-1).gather(2, later.clamp(min=0)[:, :, None]).squeeze(2)
    return torch.where(later >= 0, found, 0.0).sum(dim=1)
