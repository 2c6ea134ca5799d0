"""What docs/security.md says was measured stands on the cards."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[2]


def test_its_numbers_are_those_of_the_cards():
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    cards = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "model_cards").glob("*/README.md"))
    cards = cards.replace("\N{MULTIPLICATION SIGN}", "x")
    measured = re.findall(r"x?[\d.]+(?: %)? \[[\d., ]+\]", page)
    assert len(measured) > 10
    assert [each for each in measured if each not in cards] == []
    (threshold,) = re.findall(r"final state \((0\.\d+)\)", page)
    assert f"Default threshold: {threshold}." in cards
