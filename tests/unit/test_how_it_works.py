"""docs/how-it-works.md names functions that are there."""

import importlib
import re
from operator import attrgetter
from pathlib import Path


ROOT = Path(__file__).parents[2]


def test_every_box_names_a_function():
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    named = re.findall(r"([\w/]+\.py): ([A-Z_a-z.]+)", text)
    assert len(named) > 50
    for path, name in named:
        if path.startswith("vllm/"):  # which may not be installed
            source = (ROOT / "hf_value_steer" / path).read_text(encoding="utf-8")
            assert all(f" {part}" in source for part in name.split(".")), (path, name)
        else:
            attrgetter(name)(importlib.import_module(f"hf_value_steer.{path[:-3].replace('/', '.')}"))


def test_every_file_that_is_named_is_there():
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    for path in re.findall(r"`(\w+/[\w/]+\.py)", text):
        assert (ROOT / path).exists() or (ROOT / "hf_value_steer" / path).exists(), path
