"""The cache of a forward beside the text, of K candidates a row.

The prefix is borrowed: views of the live cache, never K copies. The tokens' own keys and values lie beside it, and the
live cache learns of them only when they are committed. Candidates stand either along the query dimension, `(rows, K)`
tokens, or along the batch dimension, `(rows * K, 1)` tokens: the latter is an ordinary decoding step.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from hf_value_steer.generation.cache import LiveCache, States, recurrent_states


class LookaheadLayer(CacheLayerMixin):  # type: ignore[misc]
    """A borrowed prefix of `(rows, heads, prefix, dim)` and the candidates' own keys and values.

    Candidates stand along the query dimension: own states of `(rows, heads, K, dim)`. The model calls [`update`] in
    the forward; [`LookaheadCache`] reads [`own`] when a candidate is kept.
    """

    def __init__(self, keys: Tensor, values: Tensor, span: tuple[int, int], sequence_length: int, rows: Tensor | None):
        super().__init__()
        self.borrow(keys, values, span, rows)
        self.sequence_length = sequence_length
        self.is_initialized = True

    @property
    def ran(self) -> bool:
        """Whether the forward has reached this layer; a layer that it has not reached has nothing to commit."""
        return self.keys is not None

    def borrow(self, keys: Tensor, values: Tensor, span: tuple[int, int], rows: Tensor | None) -> None:
        """Take slots `span` of the live `(batch, heads, slots, dim)` for `rows` (all if `None`)."""
        self.prefix_keys = select_rows(keys[:, :, slice(*span)], rows)
        self.prefix_values = select_rows(values[:, :, slice(*span)], rows)

    @property
    def prefix_length(self) -> int:
        return self.prefix_keys.shape[-2]

    @property
    def offset(self) -> int:
        """Position in the text at which the prefix begins."""
        return self.sequence_length - self.prefix_length

    def visible(self, padding_mask: Tensor) -> Tensor:
        """Which slots of the prefix are text, `(rows, prefix)`; the mask is 0 where the text so far is padding."""
        return padding_mask[:, padding_mask.shape[1] - self.prefix_length :].bool()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prefix is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        keys, values = self.visible_prefix()
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def visible_prefix(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix, repeated K times where candidates stand along the batch dimension."""
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


class WholeLayer(LookaheadLayer):
    """The whole buffer of a static layer, empty slots too, so that a compiled graph always sees the same shapes."""

    def borrow(self, keys: Tensor, values: Tensor, span: tuple[int, int], _rows: Tensor | None) -> None:
        self.prefix_keys, self.prefix_values, self.span = keys, values, span

    def visible(self, padding_mask: Tensor) -> Tensor:
        start, end = self.span
        mask = padding_mask.new_zeros(len(padding_mask), self.prefix_length, dtype=torch.bool)
        mask[:, start:end] = padding_mask[:, padding_mask.shape[1] - (end - start) :].bool()
        return mask


class RecurrentLayer(LinearAttentionLayer):  # type: ignore[misc]
    """Recurrent states before the step, each row's repeated for its candidates along the batch dimension."""

    def __init__(self, live: LinearAttentionLayer, states: States, index: Tensor):
        super().__init__(number_of_states=live.number_of_states)
        self.dtype, self.device = live.dtype, live.device
        self.is_conv_states_initialized = copy.copy(live.is_conv_states_initialized)
        self.is_recurrent_states_initialized = copy.copy(live.is_recurrent_states_initialized)
        self.conv_kernel_size = copy.copy(live.conv_kernel_size)
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

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.attention.update(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.attention.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.attention.get_seq_length()


class LookaheadCache(Cache):  # type: ignore[misc]
    """Cache for one forward of K candidates a row, all at the position after the text so far.

    The engine makes one for each such forward, and gives it to the model instead of the live cache. A branch commits
    what is kept with [`append`] or [`replace`].

    Args:
        live ([`LiveCache`]): the cache of the text.
        count (`int`): K.
        kind (`type`): class of the layers that hold keys and values.
        rows (`torch.LongTensor`, *optional*): the rows to look ahead in, whose last token (the natural sample) is not
            seen; all, in which every token is, if left out.

    Attributes:
        on_commit (`Callable`, *optional*): told which rows `(n,)` of the batch go on with which of the `rows * K`
            candidates, `(n,)`.
        attention (`list` of [`LookaheadLayer`]): the layers, or parts of them, that hold keys and values.
        length (`int`): tokens of the text before the candidates.
        partial (`bool`): whether the forward ends at some layer: there is nothing to commit above it.
        row_numbers, padding (`list` of `int`): each looked-at row, and the number of padded positions to the left of
            its text, for kernels that need them.
    """

    def __init__(
        self,
        live: LiveCache,
        count: int,
        kind: type[LookaheadLayer] = LookaheadLayer,
        rows: Tensor | None = None,
    ):
        self.live, self.count, self.kind, self.rows = live, count, kind, rows
        self.hidden = int(rows is not None)
        self.length = live.length - self.hidden
        self.on_commit: Callable[[Tensor, Tensor], None] | None = None
        self.partial = False
        self.row_numbers: list[int] = []
        self.padding: list[int] = []
        super().__init__(layers=[self._borrow(index) for index in range(len(live.cache.layers))])
        self.attention = [layer for layer in map(attention_of, self.layers) if layer is not None]

    def _borrow(self, index: int) -> Any:
        layer = self.live.cache.layers[index]
        attention = self._attention(index, layer) if isinstance(layer, CacheLayerMixin) else None
        if not isinstance(layer, LinearAttentionLayer):
            return layer if attention is None else attention  # a layer without any state is used as it is
        states = self.live.before[index]
        batch = next(iter(states.values())).shape[0] if states else 0
        rows = torch.arange(batch) if self.rows is None else self.rows
        repeated = rows.repeat_interleave(self.count)
        if attention is None:
            return RecurrentLayer(layer, states, repeated)
        return HybridLayer(layer, states, repeated, attention)

    def _attention(self, index: int, layer: CacheLayerMixin) -> LookaheadLayer:
        window, (keys, values) = self.live.windows[index], self.live.held(index)
        end = self.live.last_slot(layer) + 1 - self.hidden + keys.shape[2] - layer.keys.shape[2]
        start = 0 if window is None else max(end - window + 1, 0)
        borrowed = self.kind(keys, values, (start, end), self.length, self.rows)
        borrowed.is_sliding = window is not None or layer.is_sliding
        return borrowed

    def keep_rows(self, rows: Tensor) -> None:
        """Forget the candidates of all rows but these, after a forward of all of them."""
        for layer in self.attention:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def append_states(self, columns: Tensor) -> None:
        """Add candidate `columns[row]` of every row to the recurrent states of the live cache.

        Where the forward has ended at a layer, the states above it are what they were.
        """
        everything = torch.ones_like(columns, dtype=torch.bool)
        for index, layer in enumerate(self.layers):
            self._replace_states(index, layer, everything, columns)

    def append_slots(self, columns: Tensor) -> None:
        """Add its keys and values, in the layers that the forward has reached; it is part of the text from now on."""
        for index, layer in enumerate(self.layers):
            attention = attention_of(layer)
            if attention is not None and attention.ran:
                self.live.cache.update(*attention.own(columns), index)
        self._tell(torch.ones_like(columns, dtype=torch.bool), columns)
        self.live.advance()

    def replace(self, keep: Tensor, columns: Tensor) -> None:
        """Overwrite the last token of the live cache with our own ones.

        Args:
            keep (`torch.BoolTensor` of shape `(rows,)`): in which of the looked-at rows.
            columns (`torch.LongTensor` of shape `(rows,)`): the candidate that each row goes on with.
        """
        for index, layer in enumerate(self.layers):
            attention = attention_of(layer)
            if attention is not None and attention.ran:
                keys, values = (states[keep.to(states.device)] for states in attention.own(columns))
                self.live.overwrite_last(index, self._rows(keep)[keep].to(keys.device), keys, values)
            self._replace_states(index, layer, keep, columns)
        self._tell(keep, columns)

    def _tell(self, keep: Tensor, columns: Tensor) -> None:
        if self.on_commit is not None:
            chosen = torch.arange(len(columns), device=columns.device) * self.count + columns
            self.on_commit(self._rows(keep)[keep], chosen[keep])

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
        row = int(rows)
        return states[row : row + 1]
    return states.index_select(0, rows.to(states.device))


def pick(states: Tensor, columns: Tensor) -> Tensor:
    """Entry `columns[row]` along the second to last dimension of `(rows, ..., K, dim)`, that dimension kept."""
    columns = columns.to(states.device)
    return states[torch.arange(len(columns), device=states.device), ..., columns, :].unsqueeze(-2)


def pick_row(states: Tensor, columns: Tensor) -> Tensor:
    """Entry `columns[row]` of each row's K entries along the first dimension of `(rows * K, ...)`."""
    count = states.shape[0] // len(columns)
    return states[torch.arange(len(columns), device=states.device) * count + columns.to(states.device)]
