"""Forwards of one shape, compiled where plain `generate` compiles its decoding step, that return the feature, too.

Plain `generate` compiles `model.__call__`, whose graph returns no feature. So these are functions of their own. They
are compiled once for all models and calls: which model it is, the graph learns from its arguments. The ordinary step
and the look-ahead are two functions because two shapes of one function would make its graph a dynamic one, which CUDA
graphs cannot capture.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_value_steer.backbone.features import Features
from hf_value_steer.errors import ScoringError
from hf_value_steer.generation.forwards import Forwards, Points, Reached, Undivided
from hf_value_steer.hosts.transformers import compile_config


class _Kept:
    """A watcher of a point that keeps the last state that passed it; a compiled function returns that state."""

    state: Tensor | None = None

    def __call__(self, state: Tensor) -> None:
        self.state = state


_States = tuple[Tensor | None, ...]
_Function = Callable[[PreTrainedModel, Sequence[_Kept], dict[str, Any]], tuple[ModelOutput, _States]]


def _step(model: PreTrainedModel, kept: Sequence[_Kept], inputs: dict[str, Any]) -> tuple[ModelOutput, _States]:
    outputs = model(**{**inputs, "return_dict": True})
    return outputs, tuple(each.state for each in kept)


def _look_ahead(model: PreTrainedModel, kept: Sequence[_Kept], inputs: dict[str, Any]) -> tuple[ModelOutput, _States]:
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
        kept = [_Kept() for _ in points]
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


@dataclass(frozen=True)
class _Made:
    """Two functions, compiled with one config; [`compiled_forwards`] uses them for all models and calls."""

    config: CompileConfig
    step: _Function
    look_ahead: _Function


_made: list[_Made] = []


def compiled_forwards(
    model: PreTrainedModel, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> tuple[Forwards, Forwards] | None:
    """The compiled step and look-ahead if plain `generate` would compile with these arguments, else `None`."""
    wanted = compile_config(model, config, model_kwargs)
    if wanted is None:
        return None
    made = next((each for each in _made if each.config == wanted), None)
    if made is None:
        step, look_ahead = (torch.compile(each, **wanted.to_dict()) for each in (_step, _look_ahead))
        _made.append(made := _Made(wanted, step, look_ahead))
    return Compiled(model, made.step), Compiled(model, made.look_ahead)
