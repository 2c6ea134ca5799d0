"""The cache of one row alone, which goes back and on while the other rows of the batch wait.

Full-attention layers are views of the live cache: the row's own slots are overwritten in place, and put back if the
search fails. Of a sliding window, and of recurrent states, the row has a copy until it is kept.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer, LinearAttentionLayer

from hf_value_steer.generation.cache import LiveCache, States, recurrent_states
from hf_value_steer.generation.lookahead import RecurrentLayer, select_rows


class RowLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one row, in slots that are there already. The model calls [`update`] in each forward.

    Args:
        keys, values (`torch.FloatTensor` of shape `(1, heads, slots, dim)`): where they are written.
        length (`int`): tokens of the text.
        window (`int`, *optional*): how many tokens a token sees, itself included.
        held (`int`): how many tokens the slots hold: the last ones of the text.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int, window: int | None, held: int):
        super().__init__()
        self.key_slots, self.value_slots = keys, values
        self.offset, self.window, self.is_sliding = length - held, window, window is not None
        self.is_initialized = True
        self.go_to(length)

    def go_to(self, length: int) -> None:
        """Hold a text of so many tokens."""
        self.length, held = length, length - self.offset
        self.keys, self.values = self.key_slots[:, :, :held], self.value_slots[:, :, :held]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the slots are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        count, before = key_states.shape[-2], self.length
        self.go_to(before + count)
        self.keys[:, :, -count:], self.values[:, :, -count:] = key_states, value_states
        seen = self._before(before) + count
        return self.keys[:, :, -seen:], self.values[:, :, -seen:]

    def _before(self, length: int) -> int:
        """How many of so many tokens the next one sees."""
        return length if self.window is None else min(length, self.window - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        before = self._before(self.length)
        return before + query_length, self.length - before

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class RowHybridLayer(RecurrentLayer, RowLayer):
    """Recurrent states, and keys and values, in one layer."""

    def __init__(self, live: LinearAttentionLayer, states: States, row: Tensor, *slots: Any):
        RecurrentLayer.__init__(self, live, states, row)
        RowLayer.__init__(self, *slots)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return RowLayer.update(self, key_states, value_states)


class RowCache(LiveCache):
    """The cache of one row of a live cache. It begins with the text of the row as it is.

    A search calls [`take_back`]; the engine writes what comes instead. In the end [`keep`] or [`undo`] is called.

    Args:
        live ([`LiveCache`]): of the batch, between two steps.
        row (`int`): of the batch.
    """

    def __init__(self, live: LiveCache, row: int):
        self.live, self.row, self.windows, self.back = live, torch.tensor([row]), live.windows, live.back
        self.length, self.dropped = live.length, {}
        self.pasts = deque([[_of_row(states, self.row) for states in past] for past in live.pasts])
        self.cache = Cache(layers=[self._borrow(index, layer) for index, layer in enumerate(live.cache.layers)])
        slots = slice(max(self.length - live.back - 1, 0), self.length)
        shared = [layer for layer in self.cache.layers if isinstance(layer, RowLayer) and layer.offset == 0]
        self.before_search = [
            (states[:, :, slots], states[:, :, slots].clone())
            for layer in shared
            for states in (layer.key_slots, layer.value_slots)
        ]

    def _borrow(self, index: int, layer: Any) -> Any:
        before = self.live.before[index]  # as long as a state is: a recording convolution holds more than it needs
        states = {name: state[..., -before[name].shape[-1] :] for name, state in recurrent_states(layer).items()}
        states = _of_row(states, self.row)
        recurrent, first = isinstance(layer, LinearAttentionLayer), torch.zeros(1, dtype=torch.long)
        if not isinstance(layer, CacheLayerMixin):
            return RecurrentLayer(layer, states, first) if recurrent else layer  # the latter has no state
        keys, values = self.live.held(index)
        count = self.live.last_slot(layer) + 1 + keys.shape[2] - layer.keys.shape[2]
        keys, values = select_rows(keys, self.row), select_rows(values, self.row)
        window = self.windows[index]
        if isinstance(layer, DynamicSlidingWindowLayer):  # chunks have one, too, of which the config does not speak
            keys, values, window = keys.clone(), values.clone(), layer.sliding_window
        slots = (keys, values, self.length, window, count)
        return (
            RowHybridLayer(layer, states, torch.zeros(1, dtype=torch.long), *slots) if recurrent else RowLayer(*slots)
        )

    def take_back(self) -> None:
        """Take back the last token."""
        self.length -= 1
        states = self.pasts.pop()
        for index, layer in enumerate(self.cache.layers):
            if isinstance(layer, RowLayer):
                layer.go_to(self.length)
            self.overwrite_states(index, slice(None), states[index])

    def settle(self) -> None:
        """Nothing leaves a window: there are slots enough."""

    def undo(self) -> None:
        """Leave the live cache as it was."""
        for slots, before in self.before_search:
            slots.copy_(before)

    def keep(self) -> None:
        """Let the live cache hold the text of this row, which is as long as that of the others."""
        for past, mine in zip(reversed(self.live.pasts), reversed(self.pasts), strict=False):
            for states, own in zip(past, mine, strict=True):
                for name, state in states.items():
                    state[self.row] = own[name].to(state)
        for index, (layer, mine) in enumerate(zip(self.live.cache.layers, self.cache.layers, strict=True)):
            self.live.overwrite_states(index, self.row, recurrent_states(mine))
            if isinstance(layer, DynamicSlidingWindowLayer):
                held = layer.keys.shape[2]
                self.live.overwrite_last(index, self.row, mine.keys[:, :, -held:], mine.values[:, :, -held:])
                for slots, own_slots in zip(self.live.dropped.get(index, ()), (mine.keys, mine.values), strict=False):
                    end = own_slots.shape[2] - held
                    slots[self.row] = own_slots[:, :, end - slots.shape[2] : end].to(slots)


def _of_row(states: States, row: Tensor) -> States:
    return {name: state[row.to(state.device)] for name, state in states.items()}
