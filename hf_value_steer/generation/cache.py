"""The cache of the text, and how to undo and overwrite steps in every kind of cache layer of `transformers`.

Keys and values grow by one slot a token: a step is undone by dropping the slot. Recurrent states (convolutions, state
spaces, linear attention) are overwritten by each step: a step is undone by putting back a copy of what was before.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation.block_cache import BlockLayer
from hf_value_steer.hosts.transformers import DummyLayer, holds_text


SUPPORTED_LAYERS = (
    BlockLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
    *((DummyLayer,) if DummyLayer else ()),
)
# Convolution and recurrent states of one layer, by name and index within the layer.
States = dict[tuple[str, int], Tensor]


def recurrent_states(layer: Any) -> States:
    """The recurrent states that a layer holds; none for a layer of keys and values, or one that holds nothing."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return {}
    kinds = {"conv_states": layer.conv_states, "recurrent_states": layer.recurrent_states}
    return {(kind, i): state for kind, states in kinds.items() for i, state in states.items() if state is not None}


def sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each decoder layer in tokens, `None` where everything is seen."""
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind in ("sliding_attention", "hybrid_sliding") else None for kind in kinds]


def make_room(cache: Cache, config: PreTrainedConfig) -> None:
    """Give an empty static cache one more slot: the last token is forwarded, too, before it is committed."""
    static = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
    if static and not holds_text(cache):
        length = max(layer.max_cache_len for layer in static) + 1
        cache.layers = StaticCache(config.get_text_config(decoder=True), max_cache_len=length).layers


class LiveCache:
    """The cache of the text so far.

    The engine calls [`remember`] and [`advance`] around each step, and then [`settle`], or at the end [`remove_last`].
    A look-ahead reads the layers, and writes what is kept with [`overwrite_last`] and [`overwrite_states`].

    Args:
        cache (`transformers.Cache`): a cache with one slot a token, all rows in step.
        config (`PreTrainedConfig`): config of the model, for the sliding windows.
        back (`int`): how many tokens may be taken back, beside the last one. Sliding windows keep so many slots more,
            and recurrent layers so many copies of their states.

    Attributes:
        pasts (`deque`): by layer the recurrent states before each of the last tokens; the last one, or the last
            `1 + back`.
        dropped (`dict`): by layer the slots that have left its window last, as many as may be taken back.
    """

    def __init__(self, cache: Cache, config: PreTrainedConfig, back: int = 0):
        self.cache, self.back = cache, back
        self.windows = sliding_windows(config)
        self.pasts = deque[list[States]](maxlen=1 + back)
        self.dropped: dict[int, tuple[Tensor, Tensor]] = {}
        self.measure()

    @property
    def before(self) -> list[States]:
        """The recurrent states before the last token, by layer."""
        return self.pasts[-1]

    def measure(self) -> None:
        """Learn how many tokens the cache holds; recurrent states alone do not tell."""
        has_slots = any(isinstance(layer, CacheLayerMixin) for layer in self.cache.layers)
        self.length = int(self.cache.get_seq_length()) if has_slots else 0

    def start(self, max_length: int | None = None) -> None:
        """The prompt is in: from now on each step can be undone.

        Args:
            max_length (`int`, *optional*): of the text.
        """
        self.measure()
        if self.back:
            self._refuse_going_back(max_length)
        for layer in self._sliding():  # else they drop the slots that leave the window in the forward itself
            layer.activate_past_recording()

    def _refuse_going_back(self, max_length: int | None) -> None:
        """Raise an `UnsupportedError` if a layer may overwrite what was before the tokens that are taken back."""
        for layer in self.cache.layers:
            if isinstance(layer, StaticSlidingWindowLayer) and (
                max_length is None or max_length > layer.max_cache_len
            ):
                raise UnsupportedError(
                    f"Tokens cannot be taken back in a cache with a {type(layer).__name__} of {layer.max_cache_len} "
                    'tokens, since the text may get longer: pass cache_implementation="dynamic", or `rollback=0`.'
                )

    def remember(self) -> None:
        """Begin a step: keep the recurrent states, which the step overwrites."""
        self.pasts.append(
            [{name: state.clone() for name, state in recurrent_states(layer).items()} for layer in self.cache.layers]
        )

    def advance(self) -> None:
        """Every row has taken in one token."""
        self.length += 1

    def last_slot(self, layer: CacheLayerMixin) -> int:
        """Index, along its dimension of slots, at which `layer` holds the last token."""
        held = min(self.length, layer.max_cache_len) if isinstance(layer, StaticLayer) else layer.keys.shape[-2]
        return int(held) - 1

    def settle(self) -> None:
        """End a step: drop what has left the windows, and remember as much of it as may be taken back."""
        for index, layer in enumerate(self.cache.layers):
            if isinstance(layer, DynamicSlidingWindowLayer):
                if self.back:
                    self._keep_what_leaves(index, layer)
                layer.crop(0)

    def _keep_what_leaves(self, index: int, layer: DynamicSlidingWindowLayer) -> None:
        leaving = max(layer.keys.shape[2] - layer.sliding_window + 1, 0)
        keys, values = layer.keys[:, :, :leaving], layer.values[:, :, :leaving]
        if index in self.dropped:
            dropped_keys, dropped_values = self.dropped[index]
            keys, values = torch.cat([dropped_keys, keys], dim=2), torch.cat([dropped_values, values], dim=2)
        first = max(keys.shape[2] - self.back, 0)
        self.dropped[index] = keys[:, :, first:], values[:, :, first:]

    def held(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of layer `index`, `(batch, heads, slots, dim)`, with what its window has dropped last."""
        layer = self.cache.layers[index]
        if index not in self.dropped:
            return layer.keys, layer.values
        keys, values = self.dropped[index]
        return torch.cat([keys, layer.keys], dim=2), torch.cat([values, layer.values], dim=2)

    def remove_last(self, count: int = 1) -> None:
        """Undo the last steps, and give the layers back their ordinary behaviour."""
        for index, layer in enumerate(self.cache.layers):
            if index in self.dropped:
                layer.keys, layer.values = self.held(index)
            if isinstance(layer, CacheLayerMixin):
                _remove_last_slots(layer, count)
            self.overwrite_states(index, slice(None), self.pasts[-count][index])
        self.dropped.clear()
        for layer in self._sliding():
            layer.crop(0)
            layer.record_past = False
        self.length -= count

    def overwrite_last(self, index: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put other keys and values `(rows, heads, n, dim)` into the last n slots of some rows of layer `index`."""
        layer = self.cache.layers[index]
        end = self.last_slot(layer) + 1
        slots = slice(end - keys.shape[2], end)
        layer.keys[rows, :, slots] = keys.to(layer.keys)
        layer.values[rows, :, slots] = values.to(layer.values)

    def overwrite_states(self, index: int, rows: Tensor | slice, states: States) -> None:
        """Put other recurrent states `(rows, ...)` into some rows of layer `index`."""
        for name, state in recurrent_states(self.cache.layers[index]).items():
            # A recording convolution holds more than it needs: its end is the state.
            state[..., -states[name].shape[-1] :][rows] = states[name].to(state)

    def _sliding(self) -> Iterator[DynamicSlidingWindowLayer]:
        return (layer for layer in self.cache.layers if isinstance(layer, DynamicSlidingWindowLayer))


def _remove_last_slots(layer: CacheLayerMixin, count: int) -> None:
    if isinstance(layer, DynamicSlidingWindowLayer):
        DynamicSlidingWindowLayer.crop(layer, -count)
    elif isinstance(layer, DynamicLayer):
        DynamicLayer.crop(layer, -count)
    elif isinstance(layer, StaticSlidingWindowLayer) and layer.cumulative_length_int > layer.max_cache_len:
        # A full window shifts to the left at each step. Shifted back, its first slot is one that no later step reads.
        layer.keys.copy_(layer.keys.roll(1, dims=-2))
        layer.values.copy_(layer.values.roll(1, dims=-2))
        layer.cumulative_length_int -= 1
    else:
        layer.cumulative_length.sub_(count)
        if isinstance(layer, StaticSlidingWindowLayer):
            layer.cumulative_length_int -= count
