"""What is found out about weights once, and what a config names and is loaded once."""

import gc
import os
import shutil
import weakref

import pytest
import torch
from torch import nn

from hf_value_steer import ArtefactError, ValueFilterConfig, ValueHead
from hf_value_steer.backbone.parts import fingerprint
from hf_value_steer.backbone.shadow import shadow
from hf_value_steer.backbone.weights import until_weights_change
from hf_value_steer.files.kept import MOST, load_once
from hf_value_steer.generation import scorer
from hf_value_steer.generation.scorer import load_head
from tests.families import build, random_head


@pytest.fixture
def asked():
    """A question about a model that counts how often it is asked."""
    count = []

    @until_weights_change
    def question(model):
        count.append(model)
        return len(count)

    return question


def in_place(model):
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0


def through_data(model):
    model.lm_head.weight.data.mul_(2.0)


def data_replaced(model):
    model.lm_head.weight.data = model.lm_head.weight.data.clone()


def parameter_replaced(model):
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach().clone())


def resized(model):
    model.resize_token_embeddings(105)


def loaded(model):
    model.load_state_dict(build("llama", seed=3).state_dict())


def another_dtype(model):
    model.to(torch.bfloat16)


CHANGES = [in_place, through_data, data_replaced, parameter_replaced, resized, loaded, another_dtype]


@pytest.mark.parametrize("change", CHANGES)
def test_an_answer_holds_until_the_weights_change(asked, change):
    model = build("llama")
    assert [asked(model), asked(model), asked(shadow(model))] == [1, 1, 1]
    change(model)
    assert [asked(model), asked(shadow(model))] == [2, 2]


def test_answers_of_two_models_are_kept_apart(asked):
    one, other = build("llama"), build("llama")
    assert [asked(one), asked(other), asked(one)] == [1, 2, 1]


def test_an_answer_keeps_no_model_alive():
    question = until_weights_change(lambda model: 1)
    model = build("llama")
    question(model)
    gone = [weakref.ref(part) for part in (model, model.lm_head, model.lm_head.weight)]
    del model
    gc.collect()
    assert [each() for each in gone] == [None] * 3


@pytest.mark.parametrize("change", [in_place, through_data, resized, loaded])
def test_a_fingerprint_is_asked_again(change):
    model = build("llama")
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_the_finiteness_of_a_head_is_asked_again():
    head = random_head(build("llama"))
    head.require_finite()
    head.net[0].weight.data.fill_(torch.nan)
    with pytest.raises(ArtefactError, match="NaN or infinite"):
        head.require_finite()


# What a config names.


def test_a_head_by_name_is_loaded_once_until_its_files_change(tmp_path, monkeypatch):
    model, loads = build("llama"), []
    head = random_head(model)
    head.save_pretrained(tmp_path)
    real = ValueHead.from_pretrained.__func__
    monkeypatch.setattr(
        scorer.ValueHead, "from_pretrained", classmethod(lambda cls, *args: loads.append(args) or real(cls, *args))
    )
    config = ValueFilterConfig(value_head=str(tmp_path))
    first = load_head(config, model)
    assert load_head(config, model) is first and len(loads) == 1
    with torch.no_grad():
        head.net[0].weight.add_(1.0)
    head.save_pretrained(tmp_path)
    assert load_head(config, model) is not first and len(loads) == 2


def test_the_things_that_were_asked_for_last_are_kept():
    loads = []
    for _ in range(2):
        for number in [0, *range(MOST)]:
            load_once(loads.append, f"org/{number}")
    assert len(loads) == MOST
    load_once(loads.append, "org/another")
    load_once(loads.append, "org/0")
    assert len(loads) == MOST + 2


def test_another_head_behind_the_same_name_is_loaded(tmp_path):
    model, loaded = build("llama"), []
    for name, shift in (("a", 0.0), ("b", 1.0)):
        head = random_head(model)
        with torch.no_grad():
            head.net[0].bias.add_(shift)
        head.save_pretrained(tmp_path / name)
    for file in (tmp_path / "a").iterdir():  # as rsync and archives leave it
        shutil.copystat(file, tmp_path / "b" / file.name)
    for name in ("a", "b"):
        (tmp_path / "current").unlink(missing_ok=True)
        os.symlink(tmp_path / name, tmp_path / "current")
        loaded.append(load_head(ValueFilterConfig(value_head=str(tmp_path / "current")), model))
    assert not torch.equal(loaded[0].net[0].bias, loaded[1].net[0].bias)
