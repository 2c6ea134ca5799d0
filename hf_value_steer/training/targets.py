"""From judges' scores to what the head should say of each token."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_value_steer.choices import Target
from hf_value_steer.training.label import Labels
from hf_value_steer.training.shards import Collection


_NEEDS = {
    "response": "responses",
    "prefix": "prefixes",
    "hazard": "prefixes",
    "onset": "completes",
    "risk": "next",
}

_SAID = {
    "prefixes": "scores of prefixes (`prefixes`)",
    "completes": "scores of prefixes (`prefixes`), and which tokens complete a word",
    "next": "scores of prefixes and of next tokens (`next_tokens`, `prefixes`)",
}


def check_target(kind: Target, prefixes: bool, next_tokens: int) -> None:
    """Raise a `ValueError` if a target reads what `label` and `collect` will not have left."""
    if _NEEDS[kind] != "responses" and not prefixes:
        raise ValueError(f"`target` {kind!r} needs `prefixes: true` in section 'label'.")
    if _NEEDS[kind] == "next" and not next_tokens:
        raise ValueError(f"`target` {kind!r} needs `next_tokens` above 0 in section 'collect'.")


class Targets:
    """Targets of a collection's tokens, all in [0, 1]; NaN where a token has none.

    Args:
        collection: the generations.
        judges (sequence of `str`): whose labels. Those of one judge are `(tokens,)`, those of A judges `(tokens, A)`.
        kind (`str`): `"response"`, the score of the whole response, for the prompt's last token and all that follow
            (arXiv 2605.14746, 2604.18419); `"prefix"`, the score of the text up to the token; `"hazard"`, how far the
            score rises at the token, or is bound to rise after it, see [`hazard`]; `"onset"`, whether the token
            completes the first word after which the score is above one half, see [`onset`]; `"risk"`, how far it rises
            at the next token on average, whatever that will be: for methods that act before it.

    Raises:
        ValueError: if a judge's labels do not reach so far.
    """

    def __init__(self, collection: Collection, judges: Sequence[str], kind: Target):
        self.collection, self.kind = collection, kind
        self.labels = [Labels(collection, judge) for judge in judges]
        self.responses = _side_by_side([labels.responses() for labels in self.labels])
        self.known: dict[int, Tensor] = {}
        if any(_NEEDS[kind] not in labels.kinds for labels in self.labels):
            raise ValueError(f'target="{kind}" needs {_SAID[_NEEDS[kind]]}: collect and label again with them.')

    def of(self, row: int) -> Tensor:
        """The targets of a row, `(tokens,)` or `(tokens, A)`; of `"response"` with the prompt's last token."""
        if self.kind == "response":
            return self.responses[row].expand(self.collection.length(row) + 1, *self.responses.shape[1:])
        if row not in self.known:
            self.known[row] = _side_by_side([self._of_tokens(labels, row) for labels in self.labels])
        return self.known[row]

    def generated(self, row: int) -> Tensor:
        """Targets of the new tokens alone, without that of the prompt's last token, which some kinds have."""
        return self.of(row)[-self.collection.length(row) :]

    def positive(self, rows: Sequence[int]) -> Tensor:
        """Whether each judge scores the whole text above one half, `(rows, A)`."""
        return (self.responses[list(rows)] > 0.5).view(len(rows), len(self.labels))

    def hard_negatives(self, row: int) -> Tensor:
        """Which tokens complete a forced word that a judge accepts, of the shape of [`of`]. For `"onset"`.

        Those of older collections, which do not know what was forced, are none.
        """
        targets, collection = self.of(row), self.collection
        if "forced" not in collection.shards[int(collection.rows.shard[row])].tensors:
            return torch.zeros_like(targets, dtype=torch.bool)
        ends = collection.read("forced", row) & self.labels[0].read("completes", row)
        return (targets == 0) & ends.view(-1, *[1] * (targets.dim() - 1))

    def _of_tokens(self, labels: Labels, row: int) -> Tensor:
        prefixes = labels.read("prefixes", row)
        if self.kind == "prefix":
            return prefixes
        if self.kind == "onset":
            return onset(prefixes, labels.read("completes", row))
        if self.kind == "risk":
            rises = (labels.read("next", row) - prefixes[:, None]).clamp(min=0)
            return (rises * self.collection.read("next_probabilities", row).float()).sum(dim=-1).clamp(max=1)
        if "next" not in labels.kinds:
            return hazard(prefixes)
        following = (self.collection.read(name, row) for name in ("tokens", "next_tokens", "next_probabilities"))
        return expected_hazard(prefixes, labels.read("next", row), *following)


def onset(prefixes: Tensor, completes: Tensor) -> Tensor:
    """1 at the token that completes the first word after which the score is above one half, 0 before, then NaN.

    It can only be told from what has been written, so a head for it detects, and does not predict: use it with
    `rollback`. Behind it there is no target: what comes after a first such word is seldom generated by a filter. The
    last token of a text has none either, if the score is above one half there and the word may have gone on.

    Args:
        prefixes (`torch.FloatTensor` of shape `(tokens,)`): score of the text up to each token.
        completes (`torch.BoolTensor` of shape `(tokens,)`): whether a word may end at each token.
    """
    found = (prefixes > 0.5) & completes
    targets = found.float()
    unknown = found.cumsum(0) - found.long() > 0
    unknown[-1:] |= (prefixes > 0.5)[-1:] & ~completes[-1:]
    return targets.masked_fill(unknown, torch.nan)


class TargetRows(Dataset[dict[str, Tensor]]):
    """Some rows of a collection with their targets, one item a row, read when asked for."""

    def __init__(self, targets: Targets, rows: Sequence[int]):
        self.targets, self.rows = targets, rows

    def __len__(self) -> int:
        return len(self.rows)


def _side_by_side(columns: list[Tensor]) -> Tensor:
    """One column as it is, several as `(..., A)`."""
    return columns[0] if len(columns) == 1 else torch.stack(columns, dim=-1)


def hazard(prefixes: Tensor, horizon: int = 2) -> Tensor:
    """How far the judge's score rises at a token or within the next `horizon` tokens, `(tokens,)`."""
    rises = prefixes.diff(prepend=prefixes.new_zeros(1)).clamp(min=0)
    later = [torch.nn.functional.pad(rises[ahead:], (0, min(ahead, len(rises)))) for ahead in range(horizon + 1)]
    return torch.stack(later).amax(dim=0)


def expected_hazard(
    prefixes: Tensor, following: Tensor, tokens: Tensor, next_tokens: Tensor, next_probabilities: Tensor
) -> Tensor:
    """How far the score rises at a token, or is bound to rise after it, `(tokens,)`.

    Backwards from the end: the larger of the rise at the token, and the square of the hazard that the model's own next
    tokens carry on average. Squared, because a risk that another draw may avoid is no reason to act yet. A filter has
    to act before a token after which there is no other.

    Args:
        prefixes (`torch.FloatTensor` of shape `(tokens,)`): score of the text up to each token.
        following (`torch.FloatTensor` of shape `(tokens, next_tokens)`): score with a likely next token, too.
        tokens (`torch.IntTensor` of shape `(tokens,)`).
        next_tokens, next_probabilities (of shape `(tokens, next_tokens)`): the likely next tokens.
    """
    hazards = prefixes.diff(prepend=prefixes.new_zeros(1)).clamp(min=0)
    rises = (following - prefixes[:, None]).clamp(min=0)
    probabilities = next_probabilities.float()
    for step in reversed(range(len(tokens))):
        if step + 1 < len(tokens):  # what the drawn token leads to is known better than its own rise
            rises[step, next_tokens[step] == tokens[step + 1]] = hazards[step + 1]
        risk = (probabilities[step] * rises[step]).sum()
        hazards[step] = torch.maximum(hazards[step], risk.square())
    return hazards
