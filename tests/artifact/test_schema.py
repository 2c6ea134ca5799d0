"""What was saved before still loads, what a newer version saved is refused, and nobody else claims our model types."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import CONFIG_MAPPING_NAMES

from hf_value_steer import (
    GuidanceModule,
    GuidanceModuleConfig,
    ValueFilterConfig,
    ValueHead,
    ValueHeadConfig,
    ValueSteerForCausalLM,
)
from hf_value_steer.files.schema import SCHEMA
from tests.families import build, random_head


SHIPPED = sorted(path.parent for path in Path("model_cards").glob("*/config.json"))


def rewrite(folder, **changes):
    path = folder / "config.json"
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


@pytest.fixture
def saved(tmp_path):
    """Folders of a head, a guidance module and a wrapper, by the model type that they had before."""
    model = build("llama")
    model.save_pretrained(tmp_path / "backbone")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    ValueHead(ValueHeadConfig(hidden_size=32)).save_pretrained(tmp_path / "value_head")
    GuidanceModule(GuidanceModuleConfig(hidden_size=32, layer=0)).save_pretrained(tmp_path / "value_guidance")
    ValueSteerForCausalLM(model, random_head(model)).save_pretrained(tmp_path / "value_steer")
    return {name: tmp_path / name for name in ("value_head", "value_guidance", "value_steer")}


CLASSES = {
    "value_head": (ValueHead, AutoModel),
    "value_guidance": (GuidanceModule, AutoModel),
    "value_steer": (ValueSteerForCausalLM, AutoModelForCausalLM),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_files_name_a_type_of_ours_and_a_schema(saved, kind):
    record = json.loads((saved[kind] / "config.json").read_text())
    assert record["model_type"] == f"hvs_{kind}" and record["schema_version"] == SCHEMA
    assert not {record["model_type"], kind} & set(CONFIG_MAPPING_NAMES)


@pytest.mark.parametrize("kind", CLASSES)
def test_old_files_load_in_every_way_and_are_saved_as_new_ones(saved, kind, tmp_path, caplog):
    own, auto = CLASSES[kind]
    folder = saved[kind]
    rewrite(folder, model_type=kind, schema_version=None)
    if kind == "value_steer":
        rewrite(folder / "value_head", model_type="value_head", schema_version=None)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is own.config_class and config.model_type == f"hvs_{kind}"
    for cls in (own, auto):
        again = cls.from_pretrained(folder)
        assert type(again) is own and again.config.schema_version == SCHEMA
    assert "instantiate a model of type" not in caplog.text
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == f"hvs_{kind}"


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("version", [SCHEMA + 1, 0, "2", 2.5, True])
def test_a_schema_that_is_not_known_is_refused(saved, kind, version):
    rewrite(saved[kind], schema_version=version)
    for cls in CLASSES[kind]:
        with pytest.raises(Exception, match="schema_version"):
            cls.from_pretrained(saved[kind])


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_what_was_shipped_loads(folder):
    artefact = AutoModel.from_pretrained(folder)
    assert type(artefact) in (ValueHead, GuidanceModule)
    if isinstance(artefact, ValueHead):
        assert artefact(torch.zeros(1, artefact.config.hidden_size)).value.isfinite().all()
        ValueFilterConfig(value_head=artefact, threshold=0.5)


def test_a_config_of_another_library_is_no_head(saved):
    rewrite(saved["value_head"], model_type="llama")
    with pytest.raises(ValueError, match="not of model_type hvs_value_head"):
        ValueHead.from_pretrained(saved["value_head"])
