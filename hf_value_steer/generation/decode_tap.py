"""What a `LogitsProcessor` cannot see: the last forward's feature, cache, mask and positions."""

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from hf_value_steer.generation.lookahead import LookaheadCache
from hf_value_steer.hosts.transformers import CACHE, cache_of, holds_text
from hf_value_steer.points import feature_point, on_call


@dataclass
class Decoded:
    """The forward whose scores are being processed.

    Args:
        feature (`torch.FloatTensor` of shape `(rows, width)`): of the last token.
        cache: the cache after the forward.
        arguments (`dict`): of the forward, by name.
        prefill (`bool`): whether the forward started a new text (its cache was empty).
    """

    feature: Tensor
    cache: Cache
    arguments: dict[str, Any]
    prefill: bool

    def continuation_inputs(self) -> dict[str, Any]:
        """Mask and positions of the token that comes next, in the form in which `generate` keeps them."""
        mask, positions = self.arguments.get("attention_mask"), self.arguments.get("position_ids")
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        if positions is not None:
            positions = positions[:, -1:] + 1
        kept = {key: value for key, value in self.arguments.items() if not isinstance(value, torch.Tensor | Cache)}
        return {**kept, "attention_mask": mask, "position_ids": positions, CACHE: self.cache}


class _Seen(threading.local):
    """What the forwards of one thread have left behind."""

    watching = False
    arguments: dict[str, Any] | None = None
    feature: Tensor | None = None
    prefill = False
    prompt_embeds = 0  # prompt length that was given as `inputs_embeds` and is not part of `input_ids`


class DecodeTap:
    """Remembers the last ordinary forward of a model (no look-ahead) in each thread, until it is read.

    The model's modules hold no reference to the tap, so that an inline `logits_processor=[...]` leaves nothing behind.
    """

    def __init__(self, model: PreTrainedModel):
        seen = self._seen = _Seen()

        def on_forward(arguments: dict[str, Any]) -> None:
            cache = cache_of(arguments)
            seen.watching = not isinstance(cache, LookaheadCache)
            if seen.watching:
                seen.arguments, seen.prefill = arguments, cache is not None and not holds_text(cache)

        def on_feature(feature: Tensor) -> None:
            if seen.watching:
                seen.feature = feature

        for remove in (on_call(model, on_forward), feature_point(model).attach(on_feature)):
            weakref.finalize(self, remove)

    def read(self, input_ids: Tensor) -> Decoded:
        """The forward that made the scores of `input_ids` `(rows, length)`; it is forgotten here.

        Raises:
            RuntimeError: if the last forward of this thread is not that one (speculative decoding, classifier-free
                guidance), or had no cache.
        """
        feature, arguments, prefill = self._seen.feature, self._seen.arguments, self._seen.prefill
        self._seen.feature = self._seen.arguments = None
        cache = None if arguments is None else cache_of(arguments)
        if feature is None or arguments is None or cache is None:
            raise RuntimeError(
                "No forward pass with a cache was seen before this logits processor was called: generate with the "
                "model that the processor was made for, and with `use_cache=True`."
            )
        if prefill:
            embeds = arguments.get("inputs_embeds")
            self._seen.prompt_embeds = 0 if embeds is None else embeds.shape[1] - input_ids.shape[1]
        cached = cache.get_seq_length() - self._seen.prompt_embeds
        if len(feature) != len(input_ids) or cached != input_ids.shape[1] or (feature.shape[1] > 1 and not prefill):
            raise RuntimeError(
                f"The last forward pass left a cache of {cached} tokens for {len(feature)} rows, but the scores "
                f"are for {tuple(input_ids.shape)} tokens: value steering cannot follow this decoding method."
            )
        return Decoded(feature[:, -1], cache, arguments, prefill)
