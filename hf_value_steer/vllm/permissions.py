"""What requests forbid, of the tokens that steering may insert.

vLLM's sampler forbids tokens (`min_tokens`, `allowed_token_ids`, `bad_words`, a bias of `-inf`, the user's processors)
and then narrows the sampling, in place: what is permitted is read in between.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor


# From tokens to their scores `(1, tokens)`, as in [`~hf_value_steer.policy.may_insert`].
Permitted = Callable[[Sequence[int]], Tensor]


class Permissions:
    """The permissions of the last draw of a sampler."""

    def __init__(self) -> None:
        self.columns: dict[int, int] = {}

    def watch(self, tokens: Iterable[int]) -> None:
        """Keep the scores of these tokens, too, from the next draw on."""
        for token in tokens:
            self.columns.setdefault(token, len(self.columns))

    def read(self, scores: Tensor) -> None:
        """Take in the scores `(rows, vocab)` of a draw, where everything that forbids tokens was applied."""
        self.scores = scores[:, list(self.columns)]

    def of(self, row: int) -> Permitted:
        """Those of one row of the last draw."""
        scores, columns = self.scores, self.columns
        return lambda tokens: scores[row, [columns[token] for token in tokens]][None]
