"""Which of the tokens that steering may insert are forbidden by their request.

vLLM's sampler forbids tokens (`min_tokens`, `allowed_token_ids`, `bad_words`, a bias of `-inf`, the user's processors)
and then narrows the sampling (temperature, top-k, top-p), in the same tensor. So the scores are read in between.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor


# From tokens to their scores `(1, tokens)`, as in [`~hf_value_steer.policy.may_insert`].
Permitted = Callable[[Sequence[int]], Tensor]


class Permissions:
    """The permissions of the last draw of a sampler.

    The runner calls [`watch`] for each new request, and the sampler calls [`read`] in each draw. Then the runner asks
    with [`of`] whether it may insert a token.
    """

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
        """The permissions of one row of the last draw; they stay as they are when the next one is read."""
        scores, columns = self.scores, self.columns
        return lambda tokens: scores[row, [columns[token] for token in tokens]][None]
