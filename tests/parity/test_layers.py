"""A fixed tenth of the grid of `python -m tests.layers`: every committed token and every value is the oracle's."""

import pytest

from tests.layers import SAMPLE, examine, expected


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_every_token_and_value_is_the_oracles(case):
    examine(case)


@pytest.mark.parametrize("family", ["llama", "jamba"])
def test_the_oracle_intervenes(family):
    assert sum(map(sum, expected(family, (1,), "none", 5)[2])) > 10
