"""What a `LogitsProcessor` cannot see: the last forward's feature, cache, mask and positions."""

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from hf_value_steer.generation.lookahead import LookaheadCache
from hf_value_steer.hosts.transformers import CACHE, cache_of, holds_text, stage_of_generate
from hf_value_steer.points import feature_point, on_call


@dataclass
class Decoded:
    """The forward whose scores are being processed.

    Args:
        feature (`torch.FloatTensor` of shape `(rows, width)`): of the last token.
        cache: the cache after the forward.
        arguments (`dict`): of the forward, by name.
        prefill (`bool`): whether the forward read a prompt, or the last part of one.
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
    cache: weakref.ref[Cache] | None = None
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
                stage = stage_of_generate()
                seen.prefill = cache is not None and (stage in ("prompt", "chunk") if stage else not holds_text(cache))
                # The cache is what `generate` holds while processors are called, and it is not to be held any longer.
                seen.arguments = {name: value for name, value in arguments.items() if value is not cache}
                seen.cache = None if cache is None else weakref.ref(cache)

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
        cache = None if self._seen.cache is None else self._seen.cache()
        if feature is None or arguments is None or cache is None:
            raise RuntimeError(
                "No forward pass with a cache was seen before this logits processor was called: generate with the "
                "model that the processor was made for, and with `use_cache=True`."
            )
        if prefill:
            embedded = arguments.get("inputs_embeds") is not None
            self._seen.prompt_embeds = cache.get_seq_length() - input_ids.shape[1] if embedded else 0
        cached = cache.get_seq_length() - self._seen.prompt_embeds
        if len(feature) != len(input_ids) or cached != input_ids.shape[1] or (feature.shape[1] > 1 and not prefill):
            raise RuntimeError(
                f"The last forward pass left a cache of {cached} tokens for {len(feature)} rows, but the scores "
                f"are for {tuple(input_ids.shape)} tokens: value steering cannot follow this decoding method."
            )
        return Decoded(feature[:, -1], cache, arguments, prefill)
