"""What a `LogitsProcessor` cannot see: the last forward's feature, cache, mask and positions."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from hf_value_steer.backbone import output_embedding
from hf_value_steer.generation.lookahead import LookaheadCache


class DecodeTap:
    """Hooks that remember the last ordinary forward of a model (no look-ahead), for as long as the tap lives.

    The hooks hold the tap weakly, so that an inline `logits_processor=[...]` leaves nothing behind on the model.

    Attributes:
        feature (`torch.FloatTensor` of shape `(rows, positions, width)`): what the output embedding consumed.
        cache (`transformers.Cache`): the cache after the forward.
        inputs (`dict`): the forward's keyword arguments.
        prefill (`bool`): whether the forward started a new text (its cache was empty).
    """

    def __init__(self, model: PreTrainedModel):
        self.watching = False
        self.inputs: dict[str, Any] = {}
        self.prefill = False
        self.prompt_embeds = 0
        self.feature: Tensor | None = None
        self.cache: Cache | None = None
        tap = weakref.proxy(self)

        def before(_model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tap._before(kwargs)

        def at_head(_head: nn.Module, args: tuple[Tensor]) -> None:
            tap._at_head(args[0])

        def after(_model: nn.Module, _args: tuple[Any, ...], output: ModelOutput) -> None:
            tap._after(output)

        handles = (
            model.register_forward_pre_hook(before, with_kwargs=True),
            output_embedding(model).register_forward_pre_hook(at_head),
            model.register_forward_hook(after),
        )
        for handle in handles:
            weakref.finalize(self, handle.remove)

    def _before(self, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self.watching = not isinstance(cache, LookaheadCache)
        if not self.watching:
            return
        self.prefill = cache is None or cache.get_seq_length() == 0
        self.inputs = kwargs

    def _at_head(self, feature: Tensor) -> None:
        if self.watching:
            self.feature = feature

    def _after(self, output: ModelOutput) -> None:
        if self.watching:
            self.cache = output.get("past_key_values")

    def read(self, input_ids: Tensor) -> Tensor:
        """The feature of the last token of `input_ids`, `(rows, width)`.

        Raises:
            RuntimeError: if the last forward is not the one whose scores are being processed (speculative decoding,
                classifier-free guidance), or left no cache.
        """
        if self.feature is None or self.cache is None:
            raise RuntimeError(
                "No forward pass with a cache was seen before this logits processor was called: generate with the "
                "model that the processor was made for, and with `use_cache=True`."
            )
        positions = self.feature.shape[1]
        cached = self.cache.get_seq_length() - self._embedded(input_ids)
        if len(self.feature) != len(input_ids) or cached != input_ids.shape[1] or (positions > 1 and not self.prefill):
            raise RuntimeError(
                f"The last forward pass left a cache of {cached} tokens for {len(self.feature)} rows, but the scores "
                f"are for {tuple(input_ids.shape)} tokens: value steering cannot follow this decoding method."
            )
        return self.feature[:, -1]

    def _embedded(self, input_ids: Tensor) -> int:
        """Prompt length that was given as `inputs_embeds` and is not part of `input_ids`."""
        if self.prefill:
            embeds = self.inputs.get("inputs_embeds")
            self.prompt_embeds = 0 if embeds is None else embeds.shape[1] - input_ids.shape[1]
        return self.prompt_embeds

    def continuation_inputs(self) -> dict[str, Any]:
        """Mask and positions of the token that comes next, in the form in which `generate` keeps them."""
        mask, positions = self.inputs.get("attention_mask"), self.inputs.get("position_ids")
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        if positions is not None:
            positions = positions[:, -1:] + 1
        kept = {key: value for key, value in self.inputs.items() if not isinstance(value, torch.Tensor)}
        return {**kept, "attention_mask": mask, "position_ids": positions, "past_key_values": self.cache}
