"""Tokens of some rows that were forwarded over the cache of the text, but are not part of the text.

The engine makes them. Then a step, or the rewriting of tokens, puts them into the live cache or drops them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_value_steer.backbone.features import FINAL, Features
from hf_value_steer.generation.forwards import Reached
from hf_value_steer.generation.kernels import Kernel
from hf_value_steer.generation.lookahead import LookaheadCache, pick
from hf_value_steer.generation.state import State


@dataclass
class Branch:
    """Some rows with a borrowed prefix and tokens of their own; what the two kinds below have in common.

    Args:
        reached: features and logits of the tokens.
        cache: the prefix, and the keys, values and states of the tokens.
    """

    reached: Reached
    cache: LookaheadCache


class Alternatives(Branch):
    """K candidates of each row, all at the position after its text.

    Made by [`Engine.look_ahead`]. A step reads the features, and commits one candidate of each row: with
    [`Engine.append`] if the live cache does not hold a token for this position yet, else with [`replace`].

    Args:
        features ([`Features`]): of the candidates, `(rows, K, width)` by layer.
        kernel: how they were forwarded.
    """

    def __init__(self, reached: Reached, cache: LookaheadCache, features: Features, kernel: Kernel):
        super().__init__(reached, cache)
        self.features, self.kernel = features, kernel

    def chosen(self, columns: Tensor) -> Reached:
        """Feature, logits and states of candidate `columns[row]` of every row, at one position."""
        reached, logits = self.reached, self.reached.logits
        if logits is not None:
            shape = self.features[FINAL].shape[:2]
            logits = pick(logits.reshape(*shape, -1), columns)
        return replace(
            reached,
            features=self.features.each(lambda states: pick(states, columns)),
            hidden_states=_each(reached.hidden_states, lambda states: self.kernel.pick_hidden(states, columns)),
            attentions=_each(reached.attentions, lambda weights: self.kernel.pick_attention(weights, columns)),
            logits=logits,
            handed_on=None if reached.handed_on is None else pick(reached.handed_on, columns),
        )

    def replace(self, keep: Tensor, columns: Tensor) -> None:
        """Put candidate `columns[row]` in the place of the live cache's last token, in rows where `keep` is true."""
        self.cache.replace(keep, columns)


class Chain(Branch):
    """Tokens of one row that follow one another, after an earlier part of its text.

    Made by [`Engine.chain`]. The rewriting of tokens reads what they have left, and puts them in the place of the last
    tokens of the row.

    Args:
        row (`int`): of the batch.
    """

    def __init__(self, reached: Reached, cache: LookaheadCache, row: int):
        super().__init__(reached, cache)
        self.row = row

    @property
    def logits(self) -> Tensor:
        """Logits after each token, `(tokens, vocab)`, raw and float32."""
        assert self.reached.logits is not None  # all of them are computed
        return self.reached.logits[0].float()

    def hidden_states(self, place: int) -> tuple[Tensor, ...]:
        """Hidden states of the token at `place`, `(1, width)` for each layer; empty if nobody asked for them."""
        return tuple(states[0, place : place + 1] for states in self.reached.hidden_states or ())

    def put_last(self, state: State) -> None:
        """Write what the last token has left into `state`, from which the row goes on."""
        last = len(self.logits) - 1
        pairs = [(state.logits, self.logits[last])]
        pairs += [(mine, self.reached.features[layer][0, last]) for layer, mine in state.features.items()]
        pairs += zip(state.hidden_states or (), self.hidden_states(last), strict=True)
        for mine, own in pairs:
            mine[self.row] = own.to(mine)

    def overwrite(self) -> None:
        """Put the tokens in the place of as many tokens at the end of the live cache."""
        # `replace` asks which candidate each row keeps: a chain has none to choose from.
        nothing = torch.zeros(1, dtype=torch.long)
        self.cache.replace(torch.ones(1, dtype=torch.bool), nothing)


def _each(states: tuple[Tensor, ...] | None, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...] | None:
    return None if states is None else tuple(map(function, states))
