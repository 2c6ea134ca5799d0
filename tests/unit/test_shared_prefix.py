"""Attention over a shared prefix equals attention under a 4-D mask, and copies no prefix."""

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig

from hf_value_steer.generation.block_cache import BlockCache
from hf_value_steer.generation.cache import LiveCache
from hf_value_steer.generation.lookahead import LookaheadCache
from hf_value_steer.generation.shared_prefix import SharedPrefixLayer, _active, attend, shared_prefix_attention


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(queries, keys, values, own_keys, own_values, padding):
    """SDPA in float64 with candidates along the query dimension, all of `(rows, heads, ..., dim)`."""
    groups, count, prefix = queries.shape[1] // keys.shape[1], queries.shape[2], keys.shape[2]
    visible = torch.arange(prefix) >= torch.tensor(padding)[:, None]
    mask = torch.cat(
        [visible[:, None, None].expand(-1, 1, count, -1), torch.eye(count).bool().expand(len(padding), 1, -1, -1)], -1
    )
    keys, values = torch.cat([keys, own_keys], 2), torch.cat([values, own_values], 2)
    keys, values = (states.double().repeat_interleave(groups, 1) for states in (keys, values))
    return F.scaled_dot_product_attention(queries.double(), keys, values, attn_mask=mask)


def along_batch(states):
    """`(rows, heads, K, dim)` to `(rows * K, heads, 1, dim)`."""
    return states.transpose(1, 2).flatten(0, 1).unsqueeze(2)


def compare(groups, dim, prefix, padding, dtype=torch.float32, rows=None, cache=None):
    key_heads, count, batch = 2, 5, len(padding)
    keys, values = (random(batch, key_heads, prefix, dim, seed=seed, dtype=dtype) for seed in (1, 2))
    cache = DynamicCache() if cache is None else cache
    cache.update(keys, values, 0)
    live = LiveCache(cache, LlamaConfig(num_hidden_layers=1))
    chosen = torch.arange(batch) if rows is None else torch.tensor(rows)
    if rows is not None:
        cache.update(keys[:, :, :1], values[:, :, :1], 0)  # the natural sample, which nobody may see
        live.advance()
    lookahead = LookaheadCache(live, count, SharedPrefixLayer, None if rows is None else chosen)
    lookahead.row_numbers = chosen.tolist()
    lookahead.padding = [padding[row] for row in chosen]
    queries = random(len(chosen), key_heads * groups, count, dim, seed=3, dtype=dtype)
    own = [random(len(chosen), key_heads, count, dim, seed=seed, dtype=dtype) for seed in (4, 5)]
    token = _active.set(lookahead)
    key, value = lookahead.update(*map(along_batch, own), 0)
    output, _ = shared_prefix_attention(None, along_batch(queries), key, value, None)
    _active.reset(token)
    expected = reference(queries, keys[chosen], values[chosen], *own, lookahead.padding)
    return output.double(), along_batch(expected).transpose(1, 2), lookahead


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("prefix", [1, 7, 600])
def test_it_equals_masked_attention(groups, dim, prefix):
    output, expected, _ = compare(groups, dim, prefix, [0, 0])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


def test_left_padding_and_long_prefixes():
    output, expected, _ = compare(4, 64, 8192, [0, 8191, 5000])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [[1], [0, 2], [2, 1]])
def test_rows_are_indexed_not_copied(rows):
    output, expected, lookahead = compare(2, 64, 40, [0, 9, 30], rows=rows)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)
    prefix = lookahead.layers[0].prefix_keys
    assert prefix.data_ptr() == lookahead.live.cache.layers[0].keys.data_ptr() and prefix.shape[2] == 40


def test_views_of_a_block_cache():
    config = LlamaConfig(num_hidden_layers=1)
    output, expected, _ = compare(2, 64, 300, [0, 17], cache=BlockCache(config), rows=[1])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_kernel(dtype):
    output, expected, _ = compare(3, 64, 500, [0, 100], dtype=dtype)
    torch.testing.assert_close(output, expected, rtol=0, atol={torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype])


def test_the_fallback_is_exact_too():
    queries, keys, values = random(2, 3, 4, 24), random(2, 3, 9, 24, seed=1), random(2, 3, 9, 16, seed=2)
    output, log_denominator = attend(queries, keys, values, 0.3)
    scores = queries @ keys.mT * 0.3
    torch.testing.assert_close(output, scores.softmax(-1) @ values)
    torch.testing.assert_close(log_denominator, scores.logsumexp(-1))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"attention_mask": torch.zeros(1)}, "the mask of this model"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"softcap": 30.0}, "softcap"),
    ],
)
def test_what_it_does_not_know_stops_the_generation(extra, message):
    cache = DynamicCache()
    cache.update(random(1, 2, 3, 8), random(1, 2, 3, 8), 0)
    lookahead = LookaheadCache(LiveCache(cache, LlamaConfig(num_hidden_layers=1)), 2, SharedPrefixLayer)
    lookahead.padding = [0]
    token = _active.set(lookahead)
    key, value = lookahead.update(random(2, 2, 1, 8), random(2, 2, 1, 8), 0)
    arguments = {"attention_mask": None, **extra}
    with pytest.raises(RuntimeError, match=message):
        shared_prefix_attention(None, random(2, 4, 1, 8), key, value, **arguments)
    with pytest.raises(RuntimeError, match="changes keys or values"):
        shared_prefix_attention(None, random(2, 4, 1, 8), key.clone(), value, None)
    _active.reset(token)
