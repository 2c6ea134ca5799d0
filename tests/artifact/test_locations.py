"""Where artefacts and backbones are: revisions, subfolders and caches of a Hub, and folders, misspelt ones too."""

import copy
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_value_steer import GuidanceModule, GuidanceModuleConfig, SteeringVectors, ValueHead, ValueSteerForCausalLM
from hf_value_steer.calibration import Calibration
from hf_value_steer.errors import ArtefactError
from hf_value_steer.files import reading
from tests.families import build, random_head


class Hub:
    """A cache that holds some repositories."""

    def __init__(self, folder):
        self.folder = folder

    def add(self, repository, save, revision="main", subfolder=""):
        root = self.folder / f"models--{repository.replace('/', '--')}"
        commit = hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()
        save(root / "snapshots" / commit / subfolder)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / revision).write_text(commit)


def same(model, other):
    return torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)


@pytest.fixture(scope="module")
def versions():
    return {"main": build("llama"), "v2": build("llama", seed=2)}


@pytest.fixture
def remote(tmp_path, versions):
    remote = Hub(tmp_path / "cache")
    head = random_head(versions["main"])
    head.calibration = Calibration.from_scores([0.1, 0.2, 0.4])
    for revision, model in versions.items():
        remote.add("org/backbone", model.save_pretrained, revision)
        remote.add("org/many", model.save_pretrained, revision, "deep/inside")
    remote.add("org/head", head.save_pretrained)
    return remote


def load(remote, *args, **kwargs):
    return ValueSteerForCausalLM.from_pretrained(*args, cache_dir=remote.folder, local_files_only=True, **kwargs)


@pytest.mark.parametrize(
    ("repository", "place", "expected"),
    [
        ("org/backbone", {}, "main"),
        ("org/backbone", {"revision": "v2"}, "v2"),
        ("org/many", {"subfolder": "deep/inside"}, "main"),
        ("org/many", {"subfolder": "deep/inside", "revision": "v2"}, "v2"),
    ],
)
def test_what_is_saved_by_reference_comes_back_as_it_was(remote, versions, tmp_path, repository, place, expected):
    model = load(remote, repository, value_head="org/head", **place)
    assert same(model, versions[expected]) and model.value_head.calibration.n == 3
    for count in range(2):  # what was loaded is saved again
        folder = tmp_path / f"saved {count}"
        model.save_pretrained(folder)
        record = json.loads((folder / "config.json").read_text())
        found = {name: record.get(f"backbone_{name}") for name in ("revision", "subfolder")}
        assert record["backbone"] == repository and {k: v for k, v in found.items() if v is not None} == place
        model = load(remote, folder)
        assert same(model, versions[expected])
    by_class = AutoModelForCausalLM.from_pretrained(folder, cache_dir=remote.folder, local_files_only=True)
    assert same(by_class, versions[expected])


@pytest.mark.parametrize("place", [{}, {"revision": "v2"}, {"subfolder": "here"}])
def test_a_saved_model_on_the_hub_with_its_backbone_inside(remote, versions, tmp_path, place):
    model = ValueSteerForCausalLM(versions["v2"], random_head(versions["v2"]))
    remote.add("org/whole", lambda folder: model.save_pretrained(folder, save_backbone=True), **place)
    loaded = load(remote, "org/whole", **place)
    assert same(loaded, versions["v2"])
    loaded.save_pretrained(tmp_path / "reference")
    again = load(remote, tmp_path / "reference")
    assert same(again, versions["v2"]) and type(again.backbone) is type(versions["v2"])


def test_an_older_reference_to_a_backbone_inside_a_saved_model(versions, tmp_path):
    model = ValueSteerForCausalLM(versions["v2"], random_head(versions["v2"]))
    model.save_pretrained(tmp_path / "whole", save_backbone=True)
    ValueSteerForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "reference")
    path = tmp_path / "reference" / "config.json"
    record = json.loads(path.read_text())
    assert record.pop("backbone_subfolder") == "backbone"
    path.write_text(json.dumps(record))
    again = ValueSteerForCausalLM.from_pretrained(tmp_path / "reference")
    assert same(again, versions["v2"]) and type(again.backbone) is type(versions["v2"])


def test_a_place_in_a_repository_is_not_that_of_another_backbone(versions, remote, tmp_path):
    model = load(remote, "org/backbone", value_head="org/head", revision="v2")
    versions["main"].save_pretrained(tmp_path / "other")
    model.backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()).get("backbone_revision") is None


ACCESS = {"token": "hf_x", "proxies": {"https": "p"}, "force_download": True, "local_files_only": True}


def test_what_says_how_to_reach_the_hub_reaches_every_file(remote, versions, monkeypatch):
    """`revision` and `subfolder` do not: they are of the repository that is named first."""
    real, asked = reading.cached_file, {}

    def look_up(repository, name, _raise_exceptions_for_missing_entries, **location):
        asked[repository, name] = location
        return real(repository, name, **{**location, "proxies": None, "force_download": False})

    def backbone(repository, **kwargs):
        asked[repository, "backbone"] = kwargs
        return versions["v2"]

    monkeypatch.setattr(reading, "cached_file", look_up)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", backbone)
    everywhere = {**ACCESS, "cache_dir": remote.folder}
    place, of_backbone = {"revision": "v2", "subfolder": "deep/inside"}, {"dtype": torch.float32, "device_map": "cpu"}
    ValueSteerForCausalLM.from_pretrained("org/many", "org/head", **everywhere, **place, **of_backbone)
    assert asked == {
        ("org/many", "config.json"): everywhere | place,
        ("org/many", "backbone"): everywhere | place | of_backbone | {"config": None},
        **{("org/head", name): everywhere for name in ("config.json", "model.safetensors", "calibration.json")},
    }


def test_a_config_that_is_given_is_that_of_the_backbone(remote, versions):
    config = copy.deepcopy(versions["main"].config)
    config.rms_norm_eps = 0.5
    model = load(remote, "org/backbone", value_head="org/head", config=config)
    assert model.backbone.config.rms_norm_eps == model.config.rms_norm_eps == 0.5


@pytest.mark.parametrize("place", [{"revision": "v2"}, {"subfolder": "a/b"}, {"revision": "v2", "subfolder": "a"}])
def test_artefacts_come_from_their_place_with_all_that_belongs_to_them(remote, versions, place):
    torch.manual_seed(0)
    where = place | {"cache_dir": remote.folder, "local_files_only": True}
    head = random_head(versions["main"])
    head.calibration = Calibration.from_scores([0.1, 0.2])
    module = GuidanceModule(GuidanceModuleConfig(hidden_size=8, layer=0, value_width=4))
    vectors = SteeringVectors.from_tensors({0: torch.ones(4)})
    for artefact in (head, module, vectors):
        name = f"org/{type(artefact).__name__}"
        remote.add(name, artefact.save_pretrained, **place)
        loaded = type(artefact).from_pretrained(name, **where)
        assert loaded.fingerprint() == artefact.fingerprint() and loaded.name_or_path == name
        with pytest.raises((OSError, ArtefactError), match=name):
            type(artefact).from_pretrained(name, cache_dir=remote.folder, local_files_only=True)
    assert ValueHead.from_pretrained("org/ValueHead", **where).calibration == head.calibration


def test_a_head_in_several_files(versions, tmp_path):
    head = random_head(versions["main"])
    head.save_pretrained(tmp_path, max_shard_size="3KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert ValueHead.from_pretrained(tmp_path).fingerprint() == head.fingerprint()
    sorted(tmp_path.glob("model-*"))[0].unlink()
    with pytest.raises(ArtefactError, match="there is no model-00001"):
        ValueHead.from_pretrained(tmp_path)


LOADERS = {
    "head": ValueHead.from_pretrained,
    "module": GuidanceModule.from_pretrained,
    "vectors": SteeringVectors.from_pretrained,
    "backbone": ValueSteerForCausalLM.from_pretrained,
}
MISSPELT = {
    "./saved/smolln2-head": "saved/smollm2-head",
    "saved/smollm2-haed": "saved/smollm2-head",
    "saved/smollm2_head": "saved/smollm2-head",
    "./svaed/smollm2-head": "saved/smollm2-head",
    "../here/saved/smollm2-heads": "../here/saved/smollm2-head",
    "~/saved/smollm2-head": "saved/smollm2-head",
    "savd": None,
    "/no/such/folder": None,
    "a/b/c": None,
    "~nobody-of-this-name/head": None,
    "saved\\smollm2-head": None,
}


@pytest.fixture
def nothing_is_asked(tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / "saved" / "smollm2-head").mkdir(parents=True)
    (here / "saved" / "smollm2-head" / "config.json").write_text("{}")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    asked = []
    monkeypatch.setattr(reading, "cached_file", lambda *args, **_: asked.append(args))
    return asked


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("location", MISSPELT)
def test_a_misspelt_folder_is_named_without_asking_the_hub(nothing_is_asked, kind, location):
    if location == "savd":
        Path("saved/config.json").write_text("{}")
    hint = MISSPELT[location]
    expected = re.escape(f"did you mean '{hint}'?") if hint and not location.startswith("~") else "no such folder here"
    with pytest.raises(OSError, match=expected) as caught:
        LOADERS[kind](location)
    assert repr(location) in str(caught.value) and not nothing_is_asked


@pytest.mark.parametrize("location", ["org/head", "saved/smollm3-head", "saved/qwen-head", "smollm2-head", "gpt2"])
@pytest.mark.parametrize("kind", LOADERS)
def test_what_may_be_on_the_hub_is_looked_for_there(nothing_is_asked, kind, location):
    with pytest.raises((ValueError, OSError)):
        LOADERS[kind](location)
    assert nothing_is_asked[0][0] == location


def test_a_revision_says_that_the_hub_is_meant(nothing_is_asked):
    with pytest.raises(FileNotFoundError, match="pass its `revision`"):
        ValueHead.from_pretrained("saved/smollm2-heads")
    with pytest.raises(ArtefactError):
        ValueHead.from_pretrained("saved/smollm2-heads", revision="main")
    assert nothing_is_asked


def test_a_saved_model_whose_backbone_has_moved(versions, tmp_path):
    versions["main"].save_pretrained(tmp_path / "backbone")
    head = random_head(versions["main"])
    model = ValueSteerForCausalLM(AutoModelForCausalLM.from_pretrained(tmp_path / "backbone"), head)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "backbone").rename(tmp_path / "backbones")
    with pytest.raises(FileNotFoundError, match=f"No backbone at .* did you mean '{tmp_path}/backbones'"):
        ValueSteerForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_file_is_no_folder(versions, tmp_path):
    random_head(versions["main"]).save_pretrained(tmp_path)
    for load_from in LOADERS.values():
        with pytest.raises(NotADirectoryError, match="is a file: pass the folder"):
            load_from(tmp_path / "config.json")
