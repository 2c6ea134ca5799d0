"""A third of the verified model types, with the kernel that `auto` takes; `python -m tests.matrix` tries them all."""

import re
from pathlib import Path

import pytest
from packaging.version import Version
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_value_steer.generation.families import (
    AT_DEPTH,
    MASKED,
    NEEDS,
    SHARED_PREFIX,
    SHARED_PREFIX_SINCE,
    VERIFIED,
    WITH_IMAGES,
)
from hf_value_steer.generation.kernels import KERNELS
from hf_value_steer.hosts.transformers import VERSION
from tests.matrix import check, expectation, usable_prompts
from tests.tiny_models import MODEL_TYPES, build_tiny, tiny_config


PAGE = Path("docs/families.md").read_text()
THIRD = [name for name in MODEL_TYPES if name in VERIFIED][::3]


@pytest.mark.parametrize("model_type", THIRD)
@pytest.mark.filterwarnings("ignore")
def test_identity_and_oracle(model_type):
    needed = NEEDS.get(model_type)
    if needed and VERSION < Version(needed):
        pytest.skip(f"{model_type}: before {needed}, transformers itself computes it wrongly, and it is refused")
    model = build_tiny(model_type)
    inputs, _ = usable_prompts(model)
    expected = expectation(model, inputs)
    caches = re.search(rf"^\| {model_type} \|.*\| ([a-z, ]+) \| [a-z ]+ \|$", PAGE, re.M).group(1).split(", ")
    for cache, evaluation in zip(caches, ("lazy", "eager", "lazy"), strict=False):
        assert check(model, inputs, cache, "auto", evaluation, expected) is None, (cache, evaluation)


def test_the_page_and_the_list_agree():
    every = re.findall(r"^\| ([\w-]+) \| (yes)? ?\| (yes)? ?\| (yes)? ?\|", PAGE, re.M)
    rows = [row for row in every if row[0] in CONFIG_MAPPING]
    absent = {row[0] for row in every} - {row[0] for row in rows}  # from this version of transformers
    listed = {tiny_config(name).get_text_config(decoder=True).model_type: kernels for name, *kernels in rows}
    assert set(listed) == VERIFIED - absent - WITH_IMAGES
    families = (SHARED_PREFIX, MASKED, VERIFIED)
    for name, kernels in listed.items():
        expected = [bool(kernel) for kernel in kernels]
        expected[0] &= VERSION >= Version(SHARED_PREFIX_SINCE.get(name, "0"))
        assert [name in family for family in families] == expected, name
    assert len(KERNELS) == len(families) and len(rows) >= 45


def test_the_page_of_layers_and_the_list_agree():
    page = Path("docs/depth.md").read_text()
    judged = re.search(r"^\*\*Judged at the head's layer, \d+ types\*\*: (.*)\.$", page, re.M).group(1)
    assert set(re.findall(r"`([^`]+)`", judged)) == AT_DEPTH and len(AT_DEPTH) >= 125


def test_refused_types_have_a_reason():
    refused = dict(re.findall(r"^\| ([\w-]+) \| ([^|]+) \|$", PAGE, re.M))
    refused.pop("refused")
    assert all(len(reason) > 10 for reason in refused.values())
    assert AutoConfig.for_model("mpt").model_type in refused and not set(refused) & VERIFIED
