"""Forwards of one shape, compiled where plain `generate` compiles its decoding step, that return the feature, too.

Plain `generate` compiles `model.__call__`, whose graph returns no feature. So these are functions of their own. They
are compiled once for all models and calls: which model it is, the graph learns from its arguments. The ordinary step
and the look-ahead are two functions because two shapes of one function would make its graph a dynamic one, which CUDA
graphs cannot capture.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_value_steer.backbone.points import feature_point
from hf_value_steer.errors import ScoringError
from hf_value_steer.hosts.transformers import compile_config


class _Kept:
    """A watcher that keeps the state that passed last."""

    state: Tensor | None = None

    def __call__(self, state: Tensor) -> None:
        self.state = state


Forward = Callable[[PreTrainedModel, dict[str, Any]], tuple[ModelOutput, Tensor]]
_Function = Callable[[PreTrainedModel, _Kept, dict[str, Any]], tuple[ModelOutput, Tensor | None]]


def _step(model: PreTrainedModel, kept: _Kept, inputs: dict[str, Any]) -> tuple[ModelOutput, Tensor | None]:
    outputs = model(**inputs, return_dict=True)
    return outputs, kept.state


def _look_ahead(model: PreTrainedModel, kept: _Kept, inputs: dict[str, Any]) -> tuple[ModelOutput, Tensor | None]:
    outputs = model(**inputs, return_dict=True)
    return outputs, kept.state


class CompiledForwards:
    """`model(**inputs)` under `torch.compile`, for static caches.

    Attributes:
        step, look_ahead: from a model and its forward's arguments to its output and the feature, `(rows, positions,
            width)`, which no later replay of a graph overwrites.
    """

    def __init__(self, config: CompileConfig):
        self.config = config
        self.step, self.look_ahead = self._compile(_step), self._compile(_look_ahead)

    def _compile(self, function: _Function) -> Forward:
        compiled = torch.compile(function, **self.config.to_dict())

        def forward(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[ModelOutput, Tensor]:
            kept = _Kept()
            detach = feature_point(model).attach(kept)
            try:
                outputs, feature = compiled(model, kept, inputs)
            finally:
                detach()
            if feature is None:
                raise ScoringError("The output embedding was called where it cannot be watched, in a compiled step.")
            return outputs, feature.clone()

        return forward


_made: list[CompiledForwards] = []


def compiled_forwards(
    model: PreTrainedModel, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> CompiledForwards | None:
    """The compiled forwards if plain `generate` would compile with these arguments, else `None`."""
    wanted = compile_config(model, config, model_kwargs)
    if wanted is None:
        return None
    for forwards in _made:
        if forwards.config == wanted:
            return forwards
    _made.append(CompiledForwards(wanted))
    return _made[-1]
