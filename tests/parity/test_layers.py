"""Heads on any layers, and over time, against the cache-free oracle: every committed token and every value.

python -m tests.layers [--whole]
"""

import pytest

from tests.layers import GRID, examine, sampled


@pytest.mark.parametrize("case", sampled(GRID), ids=str)
def test_every_token_and_value_is_the_oracles(case):
    assert examine(case) > 0
