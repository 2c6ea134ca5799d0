"""The head as a file: saved, loaded, copied, exchanged with value-steer, and refused when it is broken."""

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hf_value_steer import ValueHead, ValueHeadConfig
from hf_value_steer.errors import ArtefactError


@pytest.fixture
def head():
    torch.manual_seed(0)
    return ValueHead(ValueHeadConfig(hidden_size=16, attribute="toxicity", backbone="org/base", threshold=0.3))


@pytest.fixture
def folder(head, tmp_path):
    head.save_pretrained(tmp_path / "head")
    return tmp_path / "head"


FEATURES = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


def same(a, b):
    return torch.equal(a(FEATURES).value, b(FEATURES).value)


def test_round_trips(head, folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    assert same(head, ValueHead.from_pretrained(folder))
    assert same(head, AutoModel.from_pretrained(folder))
    assert type(AutoConfig.from_pretrained(folder)) is ValueHeadConfig
    assert same(head, copy.deepcopy(head)) and same(head, copy.copy(head))
    assert same(head, pickle.loads(pickle.dumps(head)))
    again = ValueHead.from_pretrained(folder).config
    assert (again.attribute, again.backbone, again.threshold) == ("toxicity", "org/base", 0.3)


def test_the_config_file_holds_nothing_else(folder):
    keys = set(json.loads((folder / "config.json").read_text()))
    assert keys == {
        "architecture", "architectures", "attribute", "backbone", "backbone_fingerprint", "backbone_revision",
        "chat_template", "dtype", "feature_dtype", "hidden_size", "library_version", "model_type", "polarity",
        "schema_version", "threshold", "training", "transformers_version",
    }  # fmt: skip


def test_an_edited_card_is_not_overwritten(head, folder):
    (folder / "README.md").write_text("mine")
    head.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    "cast",
    [
        lambda head, _: head.half(),
        lambda head, _: head.to(torch.bfloat16),
        lambda head, _: torch.nn.Sequential(head).half()[0],
        lambda _, folder: ValueHead.from_pretrained(folder, dtype=torch.bfloat16),
        lambda _, folder: ValueHead.from_pretrained(folder, dtype="auto", device_map="cpu"),
    ],
)
def test_float32_whatever_is_asked_for(head, folder, cast):
    weights = {name: weight.clone() for name, weight in head.state_dict().items()}
    loaded = cast(head, folder)
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, weights[name])


def test_float32_under_autocast_and_for_half_features(head):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(FEATURES).logits, head(FEATURES).logits.float())
        assert head(FEATURES).value.dtype == torch.float32
    assert head(FEATURES.half()).value.dtype == torch.float32


def test_shapes_values_and_loss(head):
    out = head(FEATURES, labels=torch.ones(3, 5))
    assert out.logits.shape == out.value.shape == (3, 5)
    torch.testing.assert_close(out.value, torch.sigmoid(out.logits))
    torch.testing.assert_close(out.loss, -out.value.log().mean())
    assert head(FEATURES).loss is None


def test_infinite_logits_are_no_values(head):
    with torch.no_grad():
        head.net[-1].weight.fill_(torch.inf)
    assert head(FEATURES).value.isnan().all()


def test_other_widths_are_refused(head):
    with pytest.raises(ValueError, match="has width 8, but this value head has hidden_size=16"):
        head(torch.zeros(2, 8))


def break_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_corrupt(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def break_pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def break_without_config(folder):
    (folder / "config.json").unlink()


def break_missing(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["net.4.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["net.0.bias"] = torch.zeros(17)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["net.2.bias"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_config_key(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "treshold": 0.2}))


def break_model_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))


BROKEN = {
    break_truncated: "incomplete|invalid|SafetensorError|header",
    break_corrupt: "header|invalid|large",
    break_pickled: "model.safetensors",
    break_without_config: "is no value head: config.json is missing",
    break_missing: "missing_keys",
    break_shape: "size mismatch|mismatched",
    break_nan: "NaN or infinite weights in net.2.bias",
    break_config_key: "did you mean `threshold`",
    break_model_type: "not of model_type hvs_value_head",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_broken_folders_are_refused(folder, damage):
    damage(folder)
    with pytest.raises(Exception, match=BROKEN[damage]):
        ValueHead.from_pretrained(folder)


peer = pytest.importorskip("value_steer.value_probe")
train_probe = pytest.importorskip("value_steer.train_probe")


def test_reads_what_value_steer_writes_and_writes_the_same_bytes(tmp_path):
    torch.manual_seed(3)
    theirs = peer.ValueHead(16)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    weights, sidecar = train_probe.save_probe_checkpoint(
        str(tmp_path / "a" / "value_head.bin"), theirs, threshold=0.37, meta={"epochs": 3, "note": "ä"}
    )
    ours = ValueHead.from_value_steer(weights, hidden_size=16)
    assert ours.config.threshold == 0.37 and ours.config.training == {"epochs": 3, "note": "ä"}
    torch.testing.assert_close(ours(FEATURES).value, theirs.p(FEATURES), rtol=0, atol=0)
    written = ours.save_value_steer(tmp_path / "b" / "value_head.bin")
    for mine, original in zip(written, (weights, sidecar), strict=True):
        assert Path(mine).read_bytes() == Path(original).read_bytes()
    back = peer.load_value_head(written[0], 16, device="cpu")
    torch.testing.assert_close(back.p(FEATURES), ours(FEATURES).value, rtol=0, atol=0)


def test_a_bin_without_sidecar(head, tmp_path):
    torch.save(head.net.state_dict(), tmp_path / "head.bin")
    loaded = ValueHead.from_value_steer(tmp_path / "head.bin", polarity="desirable", threshold=0.6)
    assert same(head, loaded) and loaded.config.polarity == "desirable" and loaded.config.threshold == 0.6


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_foreign_bins_are_refused_and_not_executed(head, tmp_path, capsys):
    path = tmp_path / "head.bin"
    torch.save(head.state_dict(), path)
    with pytest.raises(ValueError, match="is no value-steer head: expected keys"):
        ValueHead.from_value_steer(path)
    torch.save(head.net.state_dict(), path)
    with pytest.raises(ValueError, match="`hidden_size` is 8, but the weights in .* have width 16"):
        ValueHead.from_value_steer(path, hidden_size=8)
    buffer = io.BytesIO()
    pickle.dump(Payload(), buffer, protocol=2)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ArtefactError, match="head.bin: this pickle .* is not executed"):
        ValueHead.from_value_steer(path)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="value-steer knows only mlp heads"):
        ValueHead(ValueHeadConfig(hidden_size=4, architecture="linear")).save_value_steer(path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match=f"No value head at '{tmp_path}/misspelt'"):
        ValueHead.from_pretrained(tmp_path / "misspelt")
