"""Exact attention of K candidates over one prefix, read once and without a mask.

The queries of a row's K candidates, and of the heads that share a key head, are folded into the query length: one
non-causal attention over the prefix, which also returns the logarithm of its softmax denominator. Each candidate's own
key is merged in afterwards, as FlashAttention merges its blocks (arXiv 2307.08691, section 2.2).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from hf_value_steer.errors import ScoringError
from hf_value_steer.generation.lookahead import ExpandedLayer, LookaheadCache
from hf_value_steer.hosts.transformers import attention_of, set_attention


ATTENTION = "value_steer_shared_prefix"
HARMLESS_TENSORS = frozenset({"position_ids", "cache_position"})
# The cache of the forward: `transformers` does not hand it to attention functions.
_active: ContextVar[LookaheadCache] = ContextVar("lookahead of the forward that is running")


class SharedPrefixLayer(ExpandedLayer):
    """Hands the model the candidates' own keys and values alone; `shared_prefix_attention` reads the prefix itself."""

    attended = False

    def borrow(self, keys: Tensor, values: Tensor, span: tuple[int, int], _rows: Tensor | None) -> None:
        # Of all rows, so that these are views: `attend_prefix` goes through the rows one by one.
        self.prefix_keys, self.prefix_values = keys[:, :, slice(*span)], values[:, :, slice(*span)]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        return key_states, value_states


@contextmanager
def shared_prefix(model: PreTrainedModel, lookahead: LookaheadCache) -> Iterator[None]:
    """Let `model`, a shadow, attend by `shared_prefix_attention` inside the `with` block.

    Raises:
        ScoringError: if a layer did not, and so saw no prefix at all.
    """
    config = model.config.get_text_config(decoder=True)
    implementation, token = attention_of(config), _active.set(lookahead)
    set_attention(config, ATTENTION)
    try:
        yield
    finally:
        set_attention(config, implementation)
        _active.reset(token)
    layers = [layer for layer in lookahead.attention if isinstance(layer, SharedPrefixLayer)]
    if not all(layer.attended or (lookahead.partial and not layer.ran) for layer in layers):
        raise ScoringError(f'{type(model).__name__} has an attention of its own; pass lookahead="expanded".')


def shared_prefix_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for `AttentionInterface`, for candidates along the batch dimension.

    Args:
        query (`torch.FloatTensor` of shape `(rows * K, heads, 1, dim)`).
        key, value (`torch.FloatTensor` of shape `(rows * K, key_heads, 1, dim)`): the candidates' own, as the cache
            returned them.
        attention_mask: has to be `None`.
        scaling (`float`, *optional*): factor of the scores; `dim ** -0.5` by default.

    Returns:
        `(rows * K, 1, heads, dim)` and `None`.

    Raises:
        ScoringError: for anything that would make the result differ from the model's own attention.
    """
    lookahead = _active.get()
    layer = _layer_of(lookahead, key, value)
    unknown = [name for name, extra in kwargs.items() if isinstance(extra, Tensor) and name not in HARMLESS_TENSORS]
    if kwargs.get("softcap") is not None:
        unknown.append("softcap")
    if (kwargs.get("sliding_window") or torch.inf) <= layer.prefix_length:
        unknown.append("sliding_window")
    if attention_mask is not None or unknown:
        raise ScoringError(
            f"Shared-prefix attention does not know {', '.join(unknown) or 'the mask of this model'}; pass "
            'lookahead="expanded".'
        )
    layer.attended = True
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    count, heads, key_heads = lookahead.count, query.shape[1], key.shape[1]
    # (rows * K, heads, 1, dim) -> (rows, key_heads, K, group, dim)
    queries = query.reshape(-1, count, key_heads, heads // key_heads, query.shape[-1]).transpose(1, 2)
    own_keys, own_values = (
        states.reshape(-1, count, *states.shape[1:]).transpose(1, 2).float() for states in (key, value)
    )
    output, log_denominator = attend_prefix(queries.flatten(2, 3), lookahead, layer, scale)
    own_scores = (queries.float() * own_keys).sum(dim=-1, keepdim=True) * scale
    share = torch.sigmoid(own_scores - log_denominator.view(own_scores.shape))
    merged = torch.lerp(output.view(*share.shape[:-1], -1).float(), own_values, share)
    return merged.to(value.dtype).transpose(1, 2).reshape(len(query), 1, heads, -1), None


def _layer_of(lookahead: LookaheadCache, key: Tensor, value: Tensor) -> SharedPrefixLayer:
    for layer in lookahead.attention:
        if layer.keys is key and layer.values is value and isinstance(layer, SharedPrefixLayer):
            return layer
    raise ScoringError('This model changes keys or values after they were cached; pass lookahead="expanded".')


def attend_prefix(
    queries: Tensor, lookahead: LookaheadCache, layer: SharedPrefixLayer, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of queries `(rows, key_heads, length, dim)` over the prefixes, none of which is copied.

    Returns:
        `(output, log_denominator)` of shapes `(rows, key_heads, length, value_dim)` and `(rows, key_heads, length)`.
    """
    starts = [max(padding - layer.offset, 0) for padding in lookahead.padding]
    if lookahead.rows is None and not any(starts):
        return attend(queries, layer.prefix_keys, layer.prefix_values, scale)
    parts = [
        attend(
            queries[i : i + 1],
            layer.prefix_keys[row : row + 1, :, start:],
            layer.prefix_values[row : row + 1, :, start:],
            scale,
        )
        for i, (row, start) in enumerate(zip(lookahead.row_numbers, starts, strict=True))
    ]
    outputs, log_denominators = zip(*parts, strict=True)
    return torch.cat(outputs), torch.cat(log_denominators)


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Non-causal attention `(rows, heads, length, dim)` with the logarithm of the softmax denominator, float32.

    By the `flash_attn` package if it is installed, else by PyTorch's FlashAttention-2 or its CPU twin, and where
    neither kernel takes the shapes or the dtype by plain matrix products.
    """
    queries, keys = queries.to(values.dtype), keys.to(values.dtype)  # under autocast they may be of others
    fused = queries.shape[-1] == values.shape[-1] and keys.shape[-2] > 0
    if fused and queries.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, scale=scale)  # type: ignore[no-any-return]
    half = queries.dtype in (torch.float16, torch.bfloat16) and queries.shape[-1] % 8 == 0 and queries.shape[-1] <= 256
    if fused and half and queries.device.type == "cuda":
        return _attend_cuda(queries, keys, values, scale)
    scores = (queries @ keys.mT).float() * scale
    log_denominator = scores.logsumexp(dim=-1)
    return (scores - log_denominator[..., None]).exp().to(values.dtype) @ values, log_denominator


def _attend_cuda(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if is_flash_attn_2_available():
        from flash_attn import flash_attn_func

        states = (queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        output, log_denominator, _ = flash_attn_func(*states, softmax_scale=scale, return_attn_probs=True)
        return output.transpose(1, 2), log_denominator
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    output, log_denominator, *_ = flash(queries, keys, values, scale=scale)
    return output, log_denominator


AttentionInterface.register(ATTENTION, shared_prefix_attention)
