"""A look-ahead borrows the live cache and leaves it alone until something is committed."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from hf_value_steer.generation.cache import LiveCache
from hf_value_steer.generation.lookahead import LookaheadCache, pick


def filled(rows=3, length=5):
    cache = DynamicCache()
    states = torch.randn(rows, 2, length, 4, generator=torch.Generator().manual_seed(0))
    cache.update(states, states + 10, 0)
    return cache


def look(cache, count=3, window=None, rows=None, **kind):
    live = LiveCache(cache, LlamaConfig(num_hidden_layers=1))
    live.windows = [window]
    return LookaheadCache(live, count, rows=rows, **kind)


def test_the_prefix_of_one_row_is_a_view():
    cache = filled()
    lookahead = look(cache, rows=torch.tensor([1]))
    layer = lookahead.layers[0]
    assert layer.prefix_keys.data_ptr() == cache.layers[0].keys[1].data_ptr()
    assert layer.prefix_length == 4 and lookahead.get_seq_length() == 4


def test_without_rows_the_whole_cache_is_the_prefix():
    lookahead = look(filled())
    assert lookahead.layers[0].prefix_length == 5 and lookahead.get_seq_length() == 5
    assert lookahead.get_mask_sizes(3, 0) == (8, 0)


def test_a_window_limits_the_prefix():
    lookahead = look(filled(), window=4, rows=torch.tensor([0, 2]))
    assert torch.equal(lookahead.layers[0].prefix_keys, filled().layers[0].keys[[0, 2], :, 1:4])
    assert lookahead.get_mask_sizes(2, 0) == (5, 1)


def test_updating_and_replacing():
    cache, rows = filled(), torch.tensor([0, 2])
    before = cache.layers[0].keys.clone()
    lookahead = look(cache, rows=rows)
    own = torch.full((2, 2, 3, 4), 7.0) + torch.arange(3)[:, None]
    keys, values = lookahead.update(own, -own, 0)
    assert keys.shape == (2, 2, 7, 4) and torch.equal(values[:, :, 4:], -own)
    assert torch.equal(cache.layers[0].keys, before)
    lookahead.replace(torch.tensor([False, True]), torch.tensor([0, 2]))
    assert torch.equal(cache.layers[0].keys[:2], before[:2])
    assert torch.equal(cache.layers[0].keys[2, :, :4], before[2, :, :4])
    assert (cache.layers[0].keys[2, :, 4] == 9.0).all() and (cache.layers[0].values[2, :, 4] == -9.0).all()


def test_appending():
    cache = filled(rows=2)
    lookahead = look(cache)
    own = torch.zeros(2, 2, 3, 4) + torch.arange(3)[:, None]
    lookahead.update(own, own, 0)
    lookahead.append_slots(torch.tensor([2, 1]))
    assert cache.get_seq_length() == 6
    assert cache.layers[0].keys[:, 0, 5, 0].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("middle", [(), (3,), (3, 4)])
def test_pick(middle):
    states = torch.arange(2 * 5 * 6).view(2, 5, 6).float()
    states = states.view(2, *[1] * len(middle), 5, 6).expand(2, *middle, 5, 6)
    picked = pick(states, torch.tensor([4, 1]))
    assert picked.shape == (2, *middle, 1, 6)
    assert torch.equal(picked[1].flatten()[:6], states[1].reshape(-1, 5, 6)[0, 1])


@pytest.mark.parametrize("commit", ["append", "replace"])
def test_layers_that_the_forward_did_not_come_to_have_nothing_to_commit(commit):
    cache = filled()
    states = torch.ones(3, 2, 5, 4)
    cache.update(states, states, 1)
    rows = None if commit == "append" else torch.arange(3)
    lookahead = LookaheadCache(LiveCache(cache, LlamaConfig(num_hidden_layers=2)), 2, rows=rows)
    lookahead.update(torch.full((3, 2, 2, 4), 7.0), torch.zeros(3, 2, 2, 4), 0)
    assert [layer.ran for layer in lookahead.attention] == [True, False]
    columns = torch.zeros(3, dtype=torch.long)
    if commit == "append":
        lookahead.append_slots(columns)
    else:
        lookahead.replace(torch.ones(3, dtype=torch.bool), columns)
    assert (cache.layers[0].keys[:, :, -1] == 7.0).all()
    assert torch.equal(cache.layers[1].keys, states)
