"""What a `LogitsProcessor` cannot see: the last forward's feature, cache, mask and positions."""

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from hf_value_steer.backbone.features import FINAL, Features, Layer, points_of, require_readable
from hf_value_steer.backbone.points import feature_point, on_call
from hf_value_steer.errors import ScoringError, UnsupportedError
from hf_value_steer.generation.attention import padding_of, tidied
from hf_value_steer.generation.kernels import BY_TOKEN
from hf_value_steer.generation.lookahead import LookaheadCache
from hf_value_steer.hosts.transformers import CACHE, cache_of, holds_text, length_of, stage_of_generate


@dataclass
class Decoded:
    """The forward whose scores are being processed; a logits processor gets it from [`DecodeTap.read`].

    Args:
        features ([`Features`]): of the last token, `(rows, width)` by layer.
        cache: the cache after the forward.
        cache_argument (`str`): under which name the forward took it.
        arguments (`dict`): of the forward, by name.
        prefill (`bool`): whether the forward read a prompt, or the last part of one.
        model: what ran it: the model that the tap was made for, or a shadow of it.
    """

    features: Features
    cache: Cache
    cache_argument: str
    arguments: dict[str, Any]
    prefill: bool
    model: PreTrainedModel

    def continuation_inputs(self) -> dict[str, Any]:
        """Mask and positions of the token that comes next, in the form in which `generate` keeps them."""
        mask = padding_of(self.arguments.get("attention_mask"), length_of(self.cache) or 0)
        positions = self.arguments.get("position_ids")
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        if positions is not None:
            positions = positions[..., -1:] + 1
        kept = {key: value for key, value in self.arguments.items() if not isinstance(value, torch.Tensor | Cache)}
        types = {name: self.arguments[name][:, -1:] for name in BY_TOKEN if self.arguments.get(name) is not None}
        inputs = {**kept, **types, "attention_mask": mask, "position_ids": positions, self.cache_argument: self.cache}
        return tidied(inputs, len(self.features[FINAL]))


class _Seen(threading.local):
    """What the last forward of one thread has left: the hooks of a [`DecodeTap`] write it, its [`read`] takes it."""

    watching = False
    cache: weakref.ref[Cache] | None = None
    model: weakref.ref[Any] | None = None
    cache_argument = CACHE
    arguments: dict[str, Any] | None = None
    features: Features | None = None
    prefill = False
    unnamed = 0  # tokens that are in the cache and not part of `input_ids`: of `inputs_embeds`, or of an earlier text


class _Followed:
    """Watchers on the feature of a model, whose output embedding may be replaced at any time.

    [`DecodeTap`] makes one, and calls [`follow`] before every forward.
    """

    def __init__(self, model: PreTrainedModel, layers: Iterable[Layer], watch: Callable[[Layer, Tensor], None]):
        self.model, self.watcher = weakref.ref(model), partial(watch, FINAL)
        self.point = feature_point(model)
        self.leave = self.point.attach(self.watcher)
        points = points_of(model, [layer for layer in layers if layer != FINAL])
        self.leave_layers = [point.attach(partial(watch, layer)) for layer, point in points.items()]

    def end(self) -> None:
        """Watch no more."""
        for leave in (self.leave, *self.leave_layers):
            leave()

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is the model or a shadow of it, which has its weights, and no copy."""
        own = self.model()
        return own is not None and next(own.parameters(), None) is next(model.parameters(), None)

    def follow(self) -> None:
        """Be where the feature passes now."""
        model = self.model()
        if model is not None and (point := feature_point(model)) != self.point:
            self.leave()
            self.point, self.leave = point, point.attach(self.watcher)


class DecodeTap:
    """Remembers the last ordinary forward of a model (no look-ahead) in each thread, until it is read.

    A logits processor makes one for its model, and calls [`read`] each time it is called. The hooks on the model hold
    no reference to the tap, and are taken off when it is gone, so that an inline `logits_processor=[...]` leaves
    nothing behind.

    Args:
        model: that will generate.
        layers: whose states are kept, beside what the output embedding consumes.
    """

    def __init__(self, model: PreTrainedModel, layers: Iterable[Layer] = ()):
        seen = self._seen = _Seen()

        def on_forward(running: nn.Module, arguments: dict[str, Any]) -> None:
            followed.follow()
            cache = cache_of(arguments)
            seen.watching = followed.is_of(running) and not isinstance(cache, LookaheadCache)
            seen.features = Features() if seen.watching else seen.features
            if seen.watching:
                stage = stage_of_generate()
                seen.prefill = cache is not None and (stage in ("prompt", "chunk") if stage else not holds_text(cache))
                # `generate` holds the cache while processors are called. A strong reference would hold it after that.
                seen.arguments = {name: value for name, value in arguments.items() if value is not cache}
                seen.cache, seen.model = None if cache is None else weakref.ref(cache), weakref.ref(running)
                seen.cache_argument = next((name for name, value in arguments.items() if value is cache), CACHE)

        def on_state(layer: Layer, state: Tensor) -> None:
            if seen.watching and seen.features is not None:
                seen.features[layer] = require_readable(layer, state)

        followed = _Followed(model, layers, on_state)
        weakref.finalize(self, on_call(model, on_forward))
        weakref.finalize(self, followed.end)

    def read(self, input_ids: Tensor) -> Decoded:
        """The forward that made the scores of `input_ids` `(rows, length)`; it is forgotten here.

        Raises:
            ScoringError: if the last forward of this thread is not that one (speculative decoding, classifier-free
                guidance), or had no cache.
        """
        features, arguments, prefill = self._seen.features, self._seen.arguments, self._seen.prefill
        self._seen.features = self._seen.arguments = None
        cache = None if self._seen.cache is None else self._seen.cache()
        model = None if self._seen.model is None else self._seen.model()
        if not features or FINAL not in features or arguments is None or cache is None or model is None:
            raise ScoringError(
                "No forward pass with a cache was seen before this logits processor was called: generate with the "
                "model that the processor was made for, and with `use_cache=True`."
            )
        held, feature = length_of(cache), features[FINAL]
        if prefill:
            self._seen.unnamed = max((held or 0) - input_ids.shape[1], 0)
        cached = input_ids.shape[1] if held is None else held - self._seen.unnamed
        if len(feature) != len(input_ids) or cached != input_ids.shape[1] or (feature.shape[1] > 1 and not prefill):
            raise ScoringError(
                f"The last forward pass left a cache of {cached} tokens for {len(feature)} rows, but the scores "
                f"are for {tuple(input_ids.shape)} tokens: value steering cannot follow this decoding method."
            )
        last = features.each(lambda state: state[:, -1])
        return Decoded(last, cache, self._seen.cache_argument, arguments, prefill, model)


def refuse_watching(processors: Iterable[Any]) -> None:
    """Raise an `UnsupportedError` if one of these has a tap, beside a method that decides which tokens are kept.

    The last forward of the model may be a look-ahead there, or a part of a forward.
    """
    for each in processors:
        if isinstance(getattr(each, "tap", None), DecodeTap):
            raise UnsupportedError(
                f"{type(each).__name__} cannot be used beside a method that decides which tokens are kept: pass its "
                "config in the list of `value_steer`."
            )
