"""What stands beside the text: tokens of a few rows that were forwarded over its cache and are not part of it.

They are dropped, or take their place in the live cache. The engine makes them, a step or the loop commits them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_value_steer.generation.forwards import Reached
from hf_value_steer.generation.kernels import Kernel
from hf_value_steer.generation.lookahead import LookaheadCache, pick
from hf_value_steer.generation.state import State


@dataclass
class Branch:
    """Some rows with a borrowed prefix and tokens of their own.

    Args:
        reached: what their forward has left.
        cache: the prefix, and the keys, values and states of the tokens.
    """

    reached: Reached
    cache: LookaheadCache


class Alternatives(Branch):
    """K candidates of each row, all at the position after its text.

    Args:
        features (`torch.FloatTensor` of shape `(rows, K, width)`): of the candidates.
        kernel: how they were forwarded.
    """

    def __init__(self, reached: Reached, cache: LookaheadCache, features: Tensor, kernel: Kernel):
        super().__init__(reached, cache)
        self.features, self.kernel = features, kernel

    def chosen(self, columns: Tensor) -> Reached:
        """What candidate `columns[row]` of every row has left, at one position."""
        reached, logits = self.reached, self.reached.logits
        if logits is not None:
            logits = pick(logits.reshape(*self.features.shape[:2], -1), columns)
        return replace(
            reached,
            feature=pick(self.features, columns),
            hidden_states=_each(reached.hidden_states, lambda states: self.kernel.pick_hidden(states, columns)),
            attentions=_each(reached.attentions, lambda weights: self.kernel.pick_attention(weights, columns)),
            logits=logits,
        )

    def append(self, columns: Tensor) -> None:
        """Add candidate `columns[row]` of every row to the live cache, which is one token shorter."""
        self.cache.append(columns)

    def replace(self, keep: Tensor, columns: Tensor) -> None:
        """Put candidate `columns[row]` in the place of the last token in the live cache, in rows that `keep` it."""
        self.cache.replace(keep, columns)


class Chain(Branch):
    """The last tokens of one row, as they would be after an earlier part of its text.

    Args:
        row (`int`): of the batch.
    """

    def __init__(self, reached: Reached, cache: LookaheadCache, row: int):
        super().__init__(reached, cache)
        self.row = row

    @property
    def logits(self) -> Tensor:
        """After each of its tokens, `(tokens, vocab)`, raw and float32."""
        assert self.reached.logits is not None  # all of them are computed
        return self.reached.logits[0].float()

    def hidden_states(self, place: int) -> tuple[Tensor, ...]:
        """Of one of its tokens, `(1, width)` each; empty where they are not asked for."""
        return tuple(states[0, place : place + 1] for states in self.reached.hidden_states or ())

    def put_last(self, state: State) -> None:
        """Let the row go on from the last of its tokens."""
        last = len(self.logits) - 1
        pairs = [(state.logits, self.logits[last]), (state.feature, self.reached.feature[0, last])]
        pairs += zip(state.hidden_states or (), self.hidden_states(last), strict=True)
        for mine, own in pairs:
            mine[self.row] = own.to(mine)

    def overwrite(self) -> None:
        """Put them in the place of as many tokens at the end of the live cache."""
        nothing = torch.zeros(1, dtype=torch.long)
        self.cache.replace(torch.ones(1, dtype=torch.bool), nothing)


def _each(states: tuple[Tensor, ...] | None, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...] | None:
    return None if states is None else tuple(map(function, states))
