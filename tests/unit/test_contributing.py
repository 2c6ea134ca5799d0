"""CONTRIBUTING.md names files that are there, and its method is one."""

import re
from pathlib import Path

import torch

from tests.steer import accepting, steer


ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_what_it_names_is_there():
    spans = (each.replace("\n", "") for each in re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```", "", TEXT)))
    paths = {span.partition(":")[0] for span in spans if re.match(r"[\w/]+\.(py|md)\b|(tests|docs)/", span)}
    found = {path for path in paths if (ROOT / path).exists() or (ROOT / "hf_value_steer" / path).exists()}
    assert len(paths) > 20
    assert {path for path in paths - found if "NAME" not in path} == set()


def test_its_method_works_alone_and_beside_a_filter(llama):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(code, names := {})
    plain = steer(llama).sequences[:, -10:]
    for others in ([], [accepting(llama)]):
        steered = steer(llama, [names["Prescription"](token=7, step=2), *others]).sequences[:, -10:]
        assert (steered[:, 2] == 7).all() and torch.equal(steered[:, :2], plain[:, :2])
        assert not torch.equal(steered, plain)
