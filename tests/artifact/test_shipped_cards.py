"""The cards in model_cards/ are what the code makes of the heads beside them and of what was measured."""

import json
from pathlib import Path

import pytest

from hf_value_steer import ValueHead
from hf_value_steer.cards.head import renew_card


ROOT = Path(__file__).parents[2]
HEADS = [path.parent for path in sorted((ROOT / "model_cards").glob("*/calibration.json"))]


@pytest.mark.parametrize("folder", HEADS, ids=lambda folder: folder.name)
def test_a_card_says_what_would_be_said_today(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "benchmarks" / "results" / f"{folder.name}.json").read_text(encoding="utf-8"))
    assert renew_card(ValueHead.from_pretrained(folder).facts(), card, measured) == card


def test_there_are_heads():
    assert len(HEADS) == 4
