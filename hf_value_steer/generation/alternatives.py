"""Candidates that were forwarded over the cache of the text, but are not part of the text."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from hf_value_steer.backbone.features import FINAL, Features
from hf_value_steer.generation.forwards import Reached
from hf_value_steer.generation.kernels import Kernel
from hf_value_steer.generation.lookahead import LookaheadCache, pick


@dataclass
class Alternatives:
    """K candidates of each row, all at the position after its text.

    Made by [`Engine.look_ahead`]. A step reads the features, and lets rows go on with one of their candidates.

    Args:
        reached: features and logits of the candidates.
        cache: the prefix, and their keys, values and states.
        features ([`Features`]): of the candidates, `(rows, K, width)` by layer.
        kernel: how they were forwarded.
    """

    reached: Reached
    cache: LookaheadCache
    features: Features
    kernel: Kernel

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


def _each(states: tuple[Tensor, ...] | None, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...] | None:
    return None if states is None else tuple(map(function, states))
