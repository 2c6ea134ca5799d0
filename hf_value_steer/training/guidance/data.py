"""What the stages of training read: tokens with their states and labels, and texts with what is to be avoided."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_value_steer.training.guidance.states import States
from hf_value_steer.training.prompts import Formatter, join
from hf_value_steer.training.targets import TargetRows, Targets


RISE = 0.5  # of the judge's score, at a token that is to be avoided


class LabelledStates(TargetRows):
    """States and labels of some rows of a collection; for the first two stages."""

    def __init__(self, states: States, targets: Targets, rows: Sequence[int]):
        super().__init__(targets, rows)
        self.states = states

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        states = self.states.response(row)
        return {"states": states, "prompt_states": self.states.prompt(row), "labels": self.targets.generated(row)}


def join_states(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of `GuidanceModule.forward`'s arguments."""
    pad = nn.utils.rnn.pad_sequence
    prompts = [item["prompt_states"] for item in items]
    mask = pad([torch.ones(len(prompt), dtype=torch.bool) for prompt in prompts], batch_first=True)
    labels = pad([item["labels"].float() for item in items], batch_first=True, padding_value=torch.nan)
    states = pad([item["states"] for item in items], batch_first=True)
    return {
        "states": states,
        "prompt_states": pad(prompts, batch_first=True),
        "prompt_mask": mask,
        "labels": labels,
    }


class Responses(TargetRows):
    """Texts for the third stage: of each step, which of the likely next tokens the judge dislikes.

    Args:
        targets: of the kind `"hazard"`.
        rows: of the collection.
    """

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, collection = self.rows[index], self.targets.collection
        tokens = collection.read("tokens", row).long()
        safe = self.targets.responses[row] <= 0.5
        known, rises = judged_next(self.targets, row, tokens)
        return {
            "row": torch.tensor(row),
            "tokens": tokens,
            "natural": (safe & collection.rows.natural[row]).expand(len(tokens)),
            "known": known,
            "rises": rises,
        }


def judged_next(targets: Targets, row: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the judge read at each step of a row: token ids, -1 for none, and whether they are to be avoided.

    The last column is the token that was drawn; `(tokens, n)` both.
    """
    labels = targets.labels[0]
    prefixes, bad = labels.read("prefixes", row), targets.of(row) > RISE
    # A text that offends already cannot rise any more: what the judge says of the next token then means nothing.
    offends = (prefixes > RISE).roll(1)
    offends[0] = False
    known, rises = tokens.masked_fill(offends & ~bad, -1)[:, None], bad[:, None]
    if "next" in labels.kinds:
        # What may follow a token is next at the step after it; of the first step nothing is known.
        following, scores = targets.collection.read("next_tokens", row).long(), labels.read("next", row)
        following, risen = (each.roll(1, dims=0) for each in (following, scores - prefixes[:, None] > RISE))
        following[offends] = following[0] = -1
        known, rises = torch.cat([following, known], dim=1), torch.cat([risen, rises], dim=1)
    return known, rises


def disliked_tokens(targets: Targets, rows: Sequence[int], vocabulary: int) -> Tensor:
    """Tokens that the judge mostly disliked where it read them in these rows, `(vocab,)`."""
    seen, bad = torch.zeros(vocabulary), torch.zeros(vocabulary)
    for row in rows:
        known, rises = judged_next(targets, row, targets.collection.read("tokens", row).long())
        there = known >= 0
        seen.index_add_(0, known[there], torch.ones(int(there.sum())))
        bad.index_add_(0, known[there], rises[there].float())
    return bad > seen / 2


class ResponseBatch:
    """Collates [`Responses`]: inputs as in [`join`], and `(rows, tokens, ...)` of the responses."""

    def __init__(self, targets: Targets, formatter: Formatter):
        self.collection, self.formatter = targets.collection, formatter

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        rows = torch.stack([item["row"] for item in items])
        prompts = [self.collection.prompts[int(prompt)] for prompt in self.collection.rows.prompt[rows]]
        batch = join(self.formatter, prompts, [item["tokens"] for item in items])
        for name, padding in (("natural", 0), ("known", -1), ("rises", 0)):
            columns = [item[name] for item in items]
            batch[name] = nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=padding)
        return batch
