"""What the stages of training read: tokens with their states and labels, and texts with what is to be avoided."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_value_steer.svgt.states import States, join
from hf_value_steer.training.prompts import Formatter
from hf_value_steer.training.targets import Targets


RISE = 0.5  # of the judge's score, at a token that is to be avoided


class LabelledStates(Dataset[dict[str, Tensor]]):
    """States and labels of some rows of a collection, one item a row; for the first two stages."""

    def __init__(self, states: States, targets: Targets, rows: Sequence[int]):
        self.states, self.targets, self.rows = states, targets, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        states = self.states.response(row)
        labels = self.targets.row(row)[1][-len(states) :]  # some targets have one for the prompt's last token, too
        return {"states": states, "prompt_states": self.states.prompt(row), "labels": labels}


def join_states(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of `ValueGuidanceModule.forward`'s arguments."""
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


class Responses(Dataset[dict[str, Tensor]]):
    """Texts for the third stage: of each step, which of the likely next tokens the judge dislikes."""

    def __init__(self, targets: Targets, rows: Sequence[int]):
        self.targets, self.rows = targets, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, collection, labels = self.rows[index], self.targets.collection, self.targets.labels[0]
        tokens = collection.read("tokens", row).long()
        safe = self.targets.responses[row] <= 0.5
        item = {
            "row": torch.tensor(row),
            "tokens": tokens,
            "natural": (safe & collection.rows.natural[row]).expand(len(tokens)),
        }
        if "next" in labels.kinds:
            rises = labels.read("next", row) - labels.read("prefixes", row)[:, None]
            following = collection.read("next_tokens", row).long()
            # What may follow a token is to be avoided where the next one is predicted; nothing is known of the first.
            avoided = torch.full_like(following, -1)
            avoided[1:] = following.masked_fill(rises <= RISE, -1)[:-1]
            item["avoided"] = avoided
        return item


class ResponseBatch:
    """Collates [`Responses`]: inputs as in [`join`], and `(rows, tokens, ...)` of the responses."""

    def __init__(self, targets: Targets, formatter: Formatter):
        self.collection, self.formatter = targets.collection, formatter

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        rows = torch.stack([item["row"] for item in items])
        prompts = [self.collection.prompts[int(prompt)] for prompt in self.collection.rows.prompt[rows]]
        batch = join(self.formatter, prompts, [item["tokens"] for item in items])
        for name, padding in (("natural", 0), ("avoided", -1)):
            if name in items[0]:
                columns = [item[name] for item in items]
                batch[name] = nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=padding)
        return batch
