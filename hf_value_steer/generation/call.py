"""One steered call, as methods see it when they are bound to it."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_value_steer.configuration.methods import SteeringConfig
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.prepared import PreparedModel
from hf_value_steer.generation.scorer import Scorer, bind, layers_read, load_head


@dataclass
class Call:
    """One steered `generate` call, as methods see it when they are bound to it.

    Args:
        prepared: a shadow of the backbone, which belongs to this call.
        config: the prepared generation config.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): prompt.
        model_kwargs: what `generate` prepared for the model's forward.
        asked (`dict`): everything that the call asks for, by name of the method.
        stops: which rows were ended, when and why; methods note it.
        contexts: what a method enters here is left when the call ends.
        tokenizer (*optional*): of the model.
    """

    prepared: PreparedModel
    config: GenerationConfig
    input_ids: Tensor
    model_kwargs: dict[str, Any]
    asked: Mapping[str, Any]
    stops: Stops
    contexts: ExitStack
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The shadow itself."""
        return self.prepared.model

    @property
    def rows(self) -> int:
        """Rows of the returned batch."""
        return len(self.input_ids)

    @property
    def device(self) -> torch.device:
        """Where tokens are."""
        return self.input_ids.device

    def bind(self, config: SteeringConfig) -> Scorer:
        """The head that a config names, loaded and bound to this call."""
        head = load_head(config, self.model)
        return bind(config, head, self.rows, self.device, layers_read(head, self.model))
