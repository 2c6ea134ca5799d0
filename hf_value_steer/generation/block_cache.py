"""A cache that grows in blocks instead of being copied at every step."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


BLOCK = 256


class BlockLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values as views of buffers of `(rows, heads, capacity, dim)`, which grow by `BLOCK` tokens.

    `DynamicLayer` copies all it holds at every step. Here a step writes its own slot, a crop shortens the view, and
    anything else that replaces `keys` and `values` (reordering, selecting rows) makes the next step start new buffers.
    Two copies of a layer that share storage must not both grow. The model calls [`update`] in each forward.
    """

    keys: Tensor
    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._buffers = (self.keys, self.values)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add `(rows, heads, new, dim)` keys and values; returns views of all, `(rows, heads, length, dim)`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_buffer, value_buffer = self._buffers
        self.keys, key_buffer = _extend(self.keys, key_buffer, key_states)
        self.values, value_buffer = _extend(self.values, value_buffer, value_states)
        self._buffers = (key_buffer, value_buffer)
        return self.keys, self.values


def _extend(held: Tensor, buffer: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """`held` followed by `new` along the second to last dimension, as a view of a buffer; and that buffer."""
    length = held.shape[-2]
    end = length + new.shape[-2]
    # Whoever replaces `keys` and `values` knows nothing of the buffer: then it does not hold them any more.
    is_view = held.data_ptr() == buffer.data_ptr() and held.stride() == buffer.stride()
    if not is_view or end > buffer.shape[-2]:
        buffer = new.new_empty(*new.shape[:-2], -(-end // BLOCK) * BLOCK, new.shape[-1])
        buffer[..., :length, :] = held
    buffer[..., length:end, :] = new
    return buffer[..., :end, :], buffer


class BlockCache(DynamicCache):  # type: ignore[misc]
    r"""A `DynamicCache` whose full-attention layers grow in blocks: the same results, without a copy of the whole
    prefix at every step. For plain and steered `generate`, most useful after long prompts.

    ```python
    out = model.generate(**inputs, cache=BlockCache(model.config))  # transformers < 5.24: `past_key_values=`
    ```

    Args:
        config (`PreTrainedConfig`): config of the model. Sliding and recurrent layers are those of `DynamicCache`.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.layers: list[CacheLayerMixin] = [
            BlockLayer() if type(layer) is DynamicLayer else layer for layer in self.layers
        ]
