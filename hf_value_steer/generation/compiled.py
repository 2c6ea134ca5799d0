"""Forwards of one shape, compiled where plain `generate` compiles its decoding step, that return the feature, too.

Plain `generate` compiles `model.__call__`, whose graph returns no feature. So these are functions of their own. They
are compiled once for all models and calls: which model it is, the graph learns from its arguments. The ordinary step
and the look-ahead are two functions because two shapes of one function would make its graph a dynamic one, which CUDA
graphs cannot capture.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_value_steer.backbone.features import Features
from hf_value_steer.errors import ScoringError
from hf_value_steer.generation.forwards import Forwards, Points, Reached, Undivided


class Kept:
    """A watcher of a point that keeps the last state that passed it; a compiled function returns that state."""

    state: Tensor | None = None

    def __call__(self, state: Tensor) -> None:
        self.state = state


_States = tuple[Tensor | None, ...]
_Function = Callable[[PreTrainedModel, Sequence[Kept], dict[str, Any]], tuple[ModelOutput, _States]]


def _step(model: PreTrainedModel, kept: Sequence[Kept], inputs: dict[str, Any]) -> tuple[ModelOutput, _States]:
    outputs = model(**{**inputs, "return_dict": True})
    return outputs, tuple(each.state for each in kept)


def _look_ahead(model: PreTrainedModel, kept: Sequence[Kept], inputs: dict[str, Any]) -> tuple[ModelOutput, _States]:
    outputs = model(**{**inputs, "return_dict": True})
    return outputs, tuple(each.state for each in kept)


class Compiled(Undivided):
    """`model(**inputs)` under `torch.compile`, for static caches.

    The engine calls [`run_to`] with the arguments of a forward, and gets feature and logits of every position.

    Args:
        model: a shadow, which belongs to one call.
        function: a compiled one, which returns the output of the model and the feature.
    """

    def __init__(self, model: PreTrainedModel, function: _Function):
        super().__init__(model)
        self.function = function

    def run_to(self, points: Points, inputs: dict[str, Any]) -> Reached:
        kept = [Kept() for _ in points]
        with ExitStack() as stack:
            for point, watcher in zip(points.values(), kept, strict=True):
                stack.enter_context(point.shown_to(watcher))
            outputs, states = self.function(self.model, kept, inputs)
        # A CUDA graph writes its next result, that of a look-ahead say, into the same memory.
        read = {layer: state.clone() for layer, state in zip(points, states, strict=True) if state is not None}
        if len(read) < len(points):
            raise ScoringError("A state passed where it cannot be watched, in a compiled step.")
        logits = outputs.logits.clone()
        return Reached(Features(read), outputs.get("hidden_states"), outputs.get("attentions"), self, logits)


# Compiled functions, by the config and the function that was compiled, for all models and calls.
_made: list[tuple[CompileConfig, Callable[..., Any], Callable[..., Any]]] = []


def compiled(function: Callable[..., Any], config: CompileConfig) -> Callable[..., Any]:
    """`function` under `torch.compile`, the same one whenever it is asked for."""
    for made, own, graph in _made:
        if own is function and made == config:
            return graph
    graph = torch.compile(function, **config.to_dict())
    _made.append((config, function, graph))
    return graph


def compiled_forwards(model: PreTrainedModel, config: CompileConfig) -> tuple[Forwards, Forwards]:
    """The ordinary step and the look-ahead, compiled."""
    return Compiled(model, compiled(_step, config)), Compiled(model, compiled(_look_ahead, config))
