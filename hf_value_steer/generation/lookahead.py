"""The cache of a forward that looks at K candidates a row and leaves the live cache as it is.

The prefix is borrowed: views of the live cache, never K copies. The candidates' own keys and values lie beside it, and
the live cache learns of a candidate only when it is committed. Candidates stand either along the query dimension,
`(rows, K)` tokens, or along the batch dimension, `(rows * K, 1)` tokens: the latter is an ordinary decoding step.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from hf_value_steer.generation.cache import LiveCache, States, recurrent_states


class LookaheadLayer(CacheLayerMixin):  # type: ignore[misc]
    """A borrowed prefix of `(rows, heads, prefix, dim)` and the candidates' own keys and values.

    Candidates stand along the query dimension: own states of `(rows, heads, K, dim)`.
    """

    copies_rows = True  # whether a look-ahead in several rows needs their prefixes side by side

    def __init__(self, keys: Tensor, values: Tensor, sequence_length: int, is_sliding: bool):
        super().__init__()
        self.prefix_keys, self.prefix_values = keys, values
        self.sequence_length, self.is_sliding = sequence_length, is_sliding
        self.is_initialized = True

    @property
    def prefix_length(self) -> int:
        return self.prefix_keys.shape[-2]

    @property
    def offset(self) -> int:
        """Position in the text at which the prefix begins."""
        return self.sequence_length - self.prefix_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prefix is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        keys, values = self.visible_prefix()
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def visible_prefix(self) -> tuple[Tensor, Tensor]:
        """The prefix in the shape that the own states need."""
        return self.prefix_keys, self.prefix_values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.prefix_length + query_length, self.offset

    def get_seq_length(self) -> int:
        return self.sequence_length

    def get_max_length(self) -> int:
        return -1

    def own(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(rows, heads, 1, dim)` of candidate `columns[row]` of every row."""
        return pick(self.keys, columns), pick(self.values, columns)


class ExpandedLayer(LookaheadLayer):
    """Candidates stand along the batch dimension; the prefix of one layer at a time is repeated for them."""

    def visible_prefix(self) -> tuple[Tensor, Tensor]:
        repeats = self.keys.shape[0] // self.prefix_keys.shape[0]
        return self.prefix_keys.repeat_interleave(repeats, 0), self.prefix_values.repeat_interleave(repeats, 0)

    def own(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        return pick_row(self.keys, columns), pick_row(self.values, columns)


class RecurrentLayer(LinearAttentionLayer):  # type: ignore[misc]
    """Recurrent states before the step, each row's repeated for its candidates along the batch dimension."""

    def __init__(self, live: LinearAttentionLayer, states: States, index: Tensor):
        super().__init__(number_of_states=live.number_of_states)
        self.dtype, self.device = live.dtype, live.device
        for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "conv_kernel_size"):
            setattr(self, name, copy.copy(getattr(live, name)))
        self.has_previous_state = copy.copy(live.has_previous_state)
        for (kind, i), state in states.items():
            getattr(self, kind)[i] = state[index.to(state.device)]

    def own_states(self, columns: Tensor) -> States:
        """Recurrent states `(rows, ...)` of candidate `columns[row]` of every row."""
        return {name: pick_row(state, columns) for name, state in recurrent_states(self).items()}


class HybridLayer(RecurrentLayer, CacheLayerMixin):  # type: ignore[misc]
    """Recurrent states, and keys and values, in one layer."""

    def __init__(self, live: LinearAttentionLayer, states: States, index: Tensor, attention: LookaheadLayer):
        RecurrentLayer.__init__(self, live, states, index)
        self.attention, self.is_sliding = attention, attention.is_sliding
        self.is_initialized = True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.attention.update(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.attention.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.attention.get_seq_length()

    def get_max_length(self) -> int:
        return -1


class LookaheadCache(Cache):  # type: ignore[misc]
    """Cache for one forward of K candidates a row, all at the position after the text so far.

    Args:
        live ([`LiveCache`]): the cache of the text.
        count (`int`): K.
        kind (`type`): class of the layers that hold keys and values.
        rows (`torch.LongTensor`, *optional*): the rows to look ahead in, whose natural sample the live cache already
            holds and the candidates must not see. Without it: all rows, and no natural sample.

    Attributes:
        padding (`list` of `int`): number of padded positions to the left of each looked-at row's text, for kernels
            that need it.
    """

    def __init__(
        self, live: LiveCache, count: int, kind: type[LookaheadLayer] = LookaheadLayer, rows: Tensor | None = None
    ):
        self.live, self.count, self.kind, self.rows = live, count, kind, rows
        self.padding: list[int] = []
        super().__init__(layers=[self._borrow(index) for index in range(len(live.cache.layers))])

    def _borrow(self, index: int) -> Any:
        layer = self.live.cache.layers[index]
        attention = self._attention(layer, self.live.windows[index]) if isinstance(layer, CacheLayerMixin) else None
        if not isinstance(layer, LinearAttentionLayer):
            return attention
        states = self.live.before[index]
        batch = next(iter(states.values())).shape[0] if states else 0
        rows = torch.arange(batch) if self.rows is None else self.rows
        repeated = rows.repeat_interleave(self.count)
        if attention is None:
            return RecurrentLayer(layer, states, repeated)
        return HybridLayer(layer, states, repeated, attention)

    def _attention(self, layer: CacheLayerMixin, window: int | None) -> LookaheadLayer:
        end = self.live.last_slot(layer) + (self.rows is None)
        start = 0 if window is None else max(end - window + 1, 0)
        keys, values = layer.keys[:, :, start:end], layer.values[:, :, start:end]
        if self.kind.copies_rows:
            keys, values = select_rows(keys, self.rows), select_rows(values, self.rows)
        is_sliding = window is not None or layer.is_sliding
        return self.kind(keys, values, self.live.length - (self.rows is not None), is_sliding)

    def append(self, columns: Tensor) -> None:
        """Add candidate `columns[row]` of every row to the live cache, as an ordinary step would have."""
        everything = torch.ones_like(columns, dtype=torch.bool)
        for index, layer in enumerate(self.layers):
            attention = attention_of(layer)
            if attention is not None:
                self.live.cache.update(*attention.own(columns), index)
            self._replace_states(index, layer, everything, columns)
        self.live.advance()

    def replace(self, keep: Tensor, columns: Tensor) -> None:
        """Overwrite the live cache's last token with candidate `columns[i]`, for those looked-at rows that `keep`s."""
        for index, layer in enumerate(self.layers):
            attention = attention_of(layer)
            if attention is not None:
                keys, values = (states[keep.to(states.device)] for states in attention.own(columns))
                self.live.overwrite_last(index, self._rows(keep)[keep].to(keys.device), keys, values)
            self._replace_states(index, layer, keep, columns)

    def _replace_states(self, index: int, layer: Any, keep: Tensor, columns: Tensor) -> None:
        if isinstance(layer, RecurrentLayer):
            states = {name: state[keep.to(state.device)] for name, state in layer.own_states(columns).items()}
            self.live.overwrite_states(index, self._rows(keep)[keep], states)

    def _rows(self, keep: Tensor) -> Tensor:
        return torch.arange(len(keep), device=keep.device) if self.rows is None else self.rows


def attention_of(layer: Any) -> LookaheadLayer | None:
    """The part of a layer that holds keys and values, if it has one."""
    if isinstance(layer, HybridLayer):
        return layer.attention
    return layer if isinstance(layer, LookaheadLayer) else None


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


def pick_row(states: Tensor, columns: Tensor) -> Tensor:
    """Entry `columns[row]` of each row's K entries along the first dimension of `(rows * K, ...)`."""
    count = states.shape[0] // len(columns)
    return states[torch.arange(len(columns), device=states.device) * count + columns.to(states.device)]
