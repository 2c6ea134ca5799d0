"""What is bound to in transformers: checked against what is installed, and said when it is gone."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import GenerationMixin
from transformers.cache_utils import DynamicSlidingWindowLayer

from hf_value_steer.doctor.checks import check_host
from hf_value_steer.generation import validation
from hf_value_steer.generation.validation import refuse_model
from hf_value_steer.hosts import versions
from hf_value_steer.hosts.transformers import CACHE, cache_name, cache_of, differences_of_transformers, holds_text
from tests.families import build, prompts
from tests.tiny_models import build_tiny


PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_all_that_is_bound_to_is_there():
    assert differences_of_transformers() == []
    assert check_host(None).status == "ok"


def test_what_is_gone_is_named(monkeypatch):
    monkeypatch.setattr(GenerationMixin, "_prefill", lambda self, input_ids, more: (input_ids, more))
    monkeypatch.delattr(GenerationMixin, "_optimize_model_for_decode")
    monkeypatch.setattr(DynamicSlidingWindowLayer, "crop", lambda self, count: count)
    check = check_host(None)
    assert check.status == "FAIL"
    for said in (
        "_prefill generation_config",
        "_prefill demands more",
        "_optimize_model_for_decode",
        "crop tokens_to",
    ):
        assert said in check.detail


def test_the_range_is_the_one_of_the_package():
    declared = next(line for line in PROJECT["dependencies"] if line.startswith("transformers"))
    assert SpecifierSet(declared.removeprefix("transformers")) == SpecifierSet(versions.SUPPORTED)
    versions.refuse_other_transformers()


@pytest.mark.parametrize("found", ["4.57.6", "5.15.1", "5.16.1", "5.25.0", "5.25.0.dev0", "6.0.0"])
def test_another_version_is_refused_by_name(found, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda _package: found)
    with pytest.raises(ImportError, match=f"needs transformers>=5.17,<5.25, found {found}: .*pip install"):
        versions.refuse_other_transformers()


@pytest.mark.parametrize("found", ["5.17.0", "5.19.0", "5.24.0", "5.24.1"])
def test_supported_versions_pass(found, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda _package: found)
    versions.refuse_other_transformers()


def test_oldest_python_and_classifiers_agree():
    assert PROJECT["requires-python"] == ">=3.11"
    python = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert python == ["3.11"]
    assert version("transformers") == transformers.__version__


def test_the_cache_is_found_under_any_name():
    cache = build("llama").generate(**prompts(1), max_new_tokens=2, return_dict_in_generate=True)[CACHE]
    for name in ("past_key_values", "cache_params", "cache", "memory"):
        assert cache_of({"input_ids": 1, name: cache}) is cache
    assert cache_of({"input_ids": 1, CACHE: None}) is None
    assert cache_name({CACHE: cache}) == cache_name({}) == CACHE
    assert cache_name({"cache_params": cache}) == "cache_params"


@pytest.mark.parametrize("family", ["mamba", "falcon_h1", "gemma2"])
def test_whether_a_cache_holds_text(family):
    model = build_tiny(family)
    seen = []
    hook = model.register_forward_pre_hook(lambda *call: seen.append(holds_text(cache_of(call[2]))), with_kwargs=True)
    model.generate(**prompts(1), do_sample=False, max_new_tokens=3)
    hook.remove()
    assert seen == [False, True, True]


@pytest.mark.parametrize("family", ["big_bird", "git", "megatron-bert", "rembert", "roformer"])
def test_types_that_an_older_version_computes_wrongly_are_refused_by_name(family, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(model.config, "model_type", family)
    monkeypatch.setattr(validation, "VERSION", Version("5.17.0"))
    with pytest.raises(ValueError, match=f"'{family}' needs transformers 5.18, this is 5.17.0"):
        refuse_model(model)
    monkeypatch.setattr(validation, "VERSION", Version("5.18.0"))
    refuse_model(model)
