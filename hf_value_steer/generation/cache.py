"""A look at the next token that leaves the cache as it is.

A `LookaheadCache` borrows the prefix of a live cache (views, never K copies) and keeps the candidates' own keys and
values beside it. The live cache learns of a candidate only when it is committed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class LookaheadLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: a borrowed prefix of `(rows, heads, prefix, dim)` and the candidates' own `(rows, heads, K, dim)`."""

    def __init__(self, keys: Tensor, values: Tensor, sequence_length: int):
        super().__init__()
        self.prefix_keys, self.prefix_values = keys, values
        self.sequence_length = sequence_length
        self.is_initialized = True

    @property
    def prefix_length(self) -> int:
        return self.prefix_keys.shape[-2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prefix is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        keys = torch.cat([self.prefix_keys, key_states], dim=-2)
        return keys, torch.cat([self.prefix_values, value_states], dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.prefix_length + query_length, self.sequence_length - self.prefix_length

    def get_seq_length(self) -> int:
        return self.sequence_length

    def get_max_length(self) -> int:
        return -1


class LookaheadCache(Cache):  # type: ignore[misc]
    """Cache for one forward of K candidates a row, all at the position after the first `length` tokens.

    Args:
        cache (`transformers.Cache`): the live cache.
        windows (`list`): sliding window of each layer, `None` where it sees everything.
        rows (`torch.LongTensor`, *optional*): the rows to look ahead in, whose natural sample the cache already holds
            and the candidates must not see. Without it: all rows, and no natural sample.
    """

    def __init__(self, cache: Cache, windows: Sequence[int | None], rows: Tensor | None = None):
        self.live, self.rows = cache, rows
        length = cache.get_seq_length() - (rows is not None)
        borrowed = [self._borrow(layer, window, length) for layer, window in zip(cache.layers, windows, strict=True)]
        super().__init__(layers=borrowed)

    def _borrow(self, layer: DynamicLayer, window: int | None, length: int) -> LookaheadLayer:
        end = layer.keys.shape[-2] - (self.rows is not None)
        start = 0 if window is None else max(end - window + 1, 0)
        keys, values = (select_rows(states[:, :, start:end], self.rows) for states in (layer.keys, layer.values))
        return LookaheadLayer(keys, values, length)

    def append(self, columns: Tensor) -> None:
        """Add candidate `columns[row]` of every row to the live cache, as an ordinary step would have."""
        for layer, live in zip(self.layers, self.live.layers, strict=True):
            live.update(pick(layer.keys, columns), pick(layer.values, columns))

    def replace(self, keep: Tensor, columns: Tensor) -> None:
        """Overwrite the live cache's last slot with candidate `columns[i]`, for those looked-at rows that `keep`s."""
        rows = torch.arange(len(keep), device=keep.device) if self.rows is None else self.rows
        for layer, live in zip(self.layers, self.live.layers, strict=True):
            live.keys[rows[keep], :, -1] = pick(layer.keys, columns)[keep, :, 0]
            live.values[rows[keep], :, -1] = pick(layer.values, columns)[keep, :, 0]


def select_rows(states: Tensor, rows: Tensor | None) -> Tensor:
    """`states[rows]` along the first dimension, as a view where the rows are one."""
    if rows is None:
        return states
    if len(rows) == 1:
        return states[int(rows) : int(rows) + 1]
    return states.index_select(0, rows.to(states.device))


def pick(states: Tensor, columns: Tensor) -> Tensor:
    """Entry `columns[row]` along the second to last dimension of `(rows, ..., K, dim)`, that dimension kept."""
    columns = columns.to(states.device)
    return states[torch.arange(len(columns), device=states.device), ..., columns, :].unsqueeze(-2)


def settle(cache: Cache, remove: int = 0) -> None:
    """End a step: drop `remove` tokens from the end and what has left the windows."""
    cache.crop(-remove)


def end_recording(cache: Cache) -> None:
    """Give sliding layers back their ordinary behaviour."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = False
