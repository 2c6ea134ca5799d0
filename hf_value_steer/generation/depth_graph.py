"""An eager step at a layer in one graph: the candidates below it, the choice, and what was chosen above it.

The two halves are two calls of the model inside one function, which `torch.compile` makes one graph of. In the first,
the layers above do not run; in the second, those below do not, and hand on the state of what was chosen.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from transformers import CompileConfig

from hf_value_steer.backbone.features import FINAL, Features, Layer
from hf_value_steer.backbone.points import standing_in
from hf_value_steer.generation.compiled import Kept, compiled
from hf_value_steer.generation.depth import AtDepth, HandedOn
from hf_value_steer.generation.forwards import Reached, leave, require_all
from hf_value_steer.generation.lookahead import pick
from hf_value_steer.generation.state import Choose, Chosen


class _Border:
    """Which half runs, and what passes between the halves."""

    def __init__(self) -> None:
        self.below, self.handed_on = True, HandedOn()

    def lower(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer below the one at which tokens are judged."""
        return forward(*args, **kwargs) if self.below else self.handed_on.output

    def last(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer at which tokens are judged."""
        return self.handed_on.record(forward, *args, **kwargs) if self.below else self.handed_on.output

    def upper(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer above."""
        return self.handed_on.output if self.below else forward(*args, **kwargs)

    def final(self, state: Tensor) -> Tensor:
        """What the output embedding is shown, of the tokens that go on to it."""
        return leave(state) if self.below else state


def _step(
    model: Any,
    border: _Border,
    kept: Mapping[Layer, Kept],
    choose: Choose,
    below: dict[str, Any],
    above: dict[str, Any],
) -> tuple[Tensor, Features, Chosen]:
    border.below = True
    model(**below)
    features = Features(
        {layer: each.state for layer, each in kept.items() if layer != FINAL and each.state is not None}
    )
    chosen = choose(features)
    border.handed_on = border.handed_on.with_state(pick(border.handed_on.state, chosen.slots))
    border.below = False
    logits = model(**{**above, "input_ids": chosen.tokens[:, None]}).logits
    border.handed_on = HandedOn()
    read = Features({layer: each.state for layer, each in kept.items() if each.state is not None})
    return logits, Features({**read, **features.each(lambda state: pick(state, chosen.slots))}), chosen


class DepthGraph:
    """Eager steps at a layer, compiled. The engine makes one where plain `generate` compiles its step, and calls it.

    Args:
        parts: where the forward is parted.
        config: how plain `generate` would compile.
    """

    def __init__(self, parts: AtDepth, config: CompileConfig):
        self.parts, self.function = parts, compiled(_step, config)

    def __call__(self, choose: Choose, below: dict[str, Any], above: dict[str, Any]) -> tuple[Reached, Chosen]:
        """Forward candidates up to the layer, and what is chosen among them to the logits.

        Args:
            choose: names a candidate of each row by the features of all, `(rows, K, width)`; a part of the graph.
            below: arguments of a forward of the candidates `(rows, K)`.
            above: arguments of a forward of one token a row, whichever: the chosen ones take its place.
        """
        parts, border = self.parts, _Border()
        kept = {layer: Kept() for layer in parts.points}
        with ExitStack() as stack:
            stack.enter_context(standing_in(parts.lower, border.lower))
            stack.enter_context(standing_in([parts.last], border.last))
            stack.enter_context(standing_in(parts.upper, border.upper))
            stack.enter_context(parts.final.shown_to(border.final))
            for layer, point in parts.points.items():
                stack.enter_context(point.shown_to(kept[layer]))
            inputs = ({**each, "return_dict": True} for each in (below, above))
            logits, read, chosen = self.function(parts.model, border, kept, choose, *inputs)
        # A CUDA graph writes its next result into the same memory.
        features = require_all(read.each(Tensor.clone))
        return Reached(features, logits=logits.clone()), chosen.each(Tensor.clone)
