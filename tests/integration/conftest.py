import pytest


@pytest.fixture(scope="module")
def judge(world):
    """The word list of a module's world, as a judge."""
    return f"lexicon:{world / 'bad.txt'}"
