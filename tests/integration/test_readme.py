"""What the README shows works, and what it names exists."""

import re
from pathlib import Path

import pytest

import hf_value_steer
from examples.smollm2 import cache_folder


README = Path("README.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("smollm2")
def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 14
    exec(code.replace('".cache/', f'"{cache_folder()}/'), {})
    assert capsys.readouterr().out.startswith("He looked at me and said")


def test_every_public_name_is_in_the_table():
    table = README[README.index("| | |") : README.index("Sampling and greedy")]
    assert set(re.findall(r"`(\w+)`", table)) >= set(hf_value_steer.__all__)
