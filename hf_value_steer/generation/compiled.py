"""The ordinary decoding step, compiled where plain `generate` compiles it, with the feature among its results."""

from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_value_steer.backbone import intercept_feature


class CompiledForward:
    """`model(**inputs)` under `torch.compile`, for static caches.

    Plain `generate` compiles `model.__call__`, and a graph compiled there would not know of our hook. So this is a
    function of its own, kept on the model as plain `generate` keeps its own, and compiled once for all generations.
    """

    def __init__(self, model: PreTrainedModel, config: CompileConfig):
        self.model, self.config = model, config
        self.features: dict[str, Tensor] = {}

        def call(inputs: dict[str, Any]) -> tuple[ModelOutput, Tensor]:
            outputs = model(**inputs, return_dict=True)
            return outputs, self.features["last"]

        self._call = torch.compile(call, **config.to_dict())

    def __call__(self, inputs: dict[str, Any]) -> tuple[ModelOutput, Tensor]:
        """The model's output, and the feature `(rows, 1, width)`, which no later replay of the graph overwrites."""
        with intercept_feature(self.model, self._keep):
            outputs, feature = self._call(inputs)
        self.features.clear()
        return outputs, feature.clone()

    def _keep(self, feature: Tensor) -> None:
        self.features["last"] = feature


def compiled_forward(
    model: PreTrainedModel, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> CompiledForward | None:
    """The compiled step if plain `generate` would compile with these arguments, else `None`."""
    if not model._valid_auto_compile_criteria(model_kwargs, config):
        return None
    compile_config = config.compile_config or model._default_compile_config()
    compiled: CompiledForward | None = vars(model).get("_value_steer_forward")
    if compiled is None or compiled.config != compile_config:
        compiled = CompiledForward(model, compile_config)
        model._value_steer_forward = compiled
    return compiled
