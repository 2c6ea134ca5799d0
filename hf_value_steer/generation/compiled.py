"""Forwards of one shape, compiled where plain `generate` compiles its decoding step, that return the feature, too.

Plain `generate` compiles `model.__call__`, and a graph compiled there would not know of our hook. So these are
functions of their own, kept on the model as plain `generate` keeps its own, and compiled once for all generations. The
ordinary step and the look-ahead are two functions because two shapes of one function would make its graph a dynamic
one, which CUDA graphs cannot capture.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_value_steer.backbone import intercept_feature


Forward = Callable[[dict[str, Any]], tuple[ModelOutput, Tensor]]


class CompiledForwards:
    """`model(**inputs)` under `torch.compile`, for static caches.

    Attributes:
        step, look_ahead: from the forward's arguments to the model's output and the feature, `(rows, positions,
            width)`, which no later replay of a graph overwrites.
    """

    def __init__(self, model: PreTrainedModel, config: CompileConfig):
        self.model, self.config = model, config
        features: list[Tensor] = []

        def forward_step(inputs: dict[str, Any]) -> tuple[ModelOutput, Tensor]:
            outputs = model(**inputs, return_dict=True)
            return outputs, features.pop()

        def forward_look_ahead(inputs: dict[str, Any]) -> tuple[ModelOutput, Tensor]:
            outputs = model(**inputs, return_dict=True)
            return outputs, features.pop()

        self.keep = features.append
        self.step = self._compile(forward_step)
        self.look_ahead = self._compile(forward_look_ahead)

    def _compile(self, function: Forward) -> Forward:
        compiled = torch.compile(function, **self.config.to_dict())

        def forward(inputs: dict[str, Any]) -> tuple[ModelOutput, Tensor]:
            with intercept_feature(self.model, self.keep):
                outputs, feature = compiled(inputs)
            return outputs, feature.clone()

        return forward


def compiled_forwards(
    model: PreTrainedModel, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> CompiledForwards | None:
    """The compiled forwards if plain `generate` would compile with these arguments, else `None`."""
    if not model._valid_auto_compile_criteria(model_kwargs, config):
        return None
    compile_config = config.compile_config or model._default_compile_config()
    compiled: CompiledForwards | None = vars(model).get("_value_steer_compiled")
    if compiled is None or compiled.config != compile_config:
        compiled = CompiledForwards(model, compile_config)
        model._value_steer_compiled = compiled
    return compiled
