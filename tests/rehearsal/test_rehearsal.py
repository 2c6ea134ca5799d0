"""A fixed tenth of the grid, no mixed device, and a budget of waits: `python -m tests.rehearsal` runs all of it."""

import numpy as np
import pytest
import torch

from tests.rehearsal.__main__ import STEPS, rows
from tests.rehearsal.fake_cuda import SYNCS, FakeCuda, OnCuda
from tests.rehearsal.grid import cases, rehearse


# Waits in a step, at most: those of docs/synchronisations.md.
BUDGET = {
    "plain `generate`": 2,
    "abstention": 4,
    "vectors": 2,
    "guidance": 7,
    "filter, lazy, nothing rejected": 3,
    "filter, lazy, all rejected": 17,
    "filter, eager": 2,
    "filter at a layer, lazy, nothing rejected": 3,
    "filter at a layer, lazy, all rejected": 17,
    "filter at a layer, eager": 2,
}


@pytest.mark.parametrize("case", cases()[::10], ids=str)
def test_no_device_is_mixed(case):
    rehearse(case)


def test_waits_stay_within_their_budget():
    found = {name: counted.total() / STEPS for name, counted in rows()}
    for name, waits in found.items():
        budget = next(most for start, most in BUDGET.items() if name.startswith(start))
        assert waits <= budget, f"{name}: {waits} waits in a step"
    assert found["plain `generate`"] > 0
    assert found["filter, lazy, nothing rejected, rollback"] == found["filter, lazy, nothing rejected"]
    without_cost = "filter at a layer, eager, masked, static cache"
    assert found[without_cost] <= found["plain `generate`, static cache"]


def test_the_disguise_finds_what_a_gpu_would():
    there, here = FakeCuda(torch.arange(4.0)), torch.arange(4.0)
    with OnCuda():
        with pytest.raises(RuntimeError, match="of tensors on cuda:0 and on the CPU"):
            there + here
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            np.asarray(there.numpy())
        SYNCS.clear()
        assert there.device.type == "cuda" and (there + here.to(there.device)).sum().item() == 12.0
        assert SYNCS.total() == 2
        assert torch.zeros(2, device="cuda").device.type == "cuda" and torch.zeros(2).device.type == "cpu"
        with pytest.raises(RuntimeError, match="FlashAttention does not take torch.float32"):
            torch.ops.aten._scaled_dot_product_flash_attention(*[FakeCuda(torch.ones(1, 1, 2, 8))] * 3)
