import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from hf_value_steer.files import writing as files
from hf_value_steer.files.writing import claim, write_atomically
from hf_value_steer.training.shards import Collection, TensorFile, write_tensors


TENSORS = {
    "bf16": torch.randn(5, 3).bfloat16(),
    "half": torch.randn(5, 3).half(),
    "float": torch.randn(5),
    "flags": torch.tensor([True, False, True, True, False]),
    "ids": torch.arange(10, dtype=torch.int32).view(5, 2),
    "offsets": torch.arange(5),
    "none": torch.empty(0, 3),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_read_by_offset(tmp_path, name):
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    file, expected = TensorFile(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")[name]
    assert torch.equal(file.read(name), expected) and file.read(name).dtype == expected.dtype
    last = min(3, len(expected))
    assert torch.equal(file.read(name, 0, last), expected[:last])
    assert torch.equal(file.read(name, last), expected[last:])
    assert torch.equal(file.read(name, last, last), expected[last:last])
    file.verify()


def test_equal_tensors_make_equal_files(tmp_path):
    for name in ("a", "b"):
        write_tensors(tmp_path / name, dict(TENSORS))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("damage", ["empty", "header", "truncated"])
def test_damaged_files_are_named(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "header": b"\xff" * 40, "truncated": content[:-1]}[damage])
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged: delete it"):
        TensorFile(path)


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        TensorFile(path).verify()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, call):
    path = tmp_path / "x"
    write_atomically(path, b"before")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(OSError, match="could not be written .No space left") as error:
        write_atomically(path, b"after")
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_claimed_once(tmp_path):
    claim(tmp_path / "what.json", {"seed": 1})
    claim(tmp_path / "what.json", {"seed": 1})
    with pytest.raises(ValueError, match="was made with seed = 1, now it is 2"):
        claim(tmp_path / "what.json", {"seed": 2})
    claim(tmp_path / "deep" / "what.json", {"seed": 1, "how": {"top_p": 0.9, "model": {"layer": 3}}})
    with pytest.raises(ValueError, match=r"was made with how\.model\.layer = 3, now it is 4: delete"):
        claim(tmp_path / "deep" / "what.json", {"seed": 1, "how": {"top_p": 0.9, "model": {"layer": 4}}})
    with pytest.raises(ValueError, match=r"with how\.top_k = None, now it is 5"):
        claim(tmp_path / "deep" / "what.json", {"seed": 1, "how": {"top_p": 0.9, "top_k": 5, "model": {"layer": 3}}})


def test_what_is_no_collection_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no collection\.json"):
        Collection(tmp_path)
    (tmp_path / "collection.json").write_text(json.dumps({"format": "else"}))
    with pytest.raises(ValueError, match="has the format 'else'"):
        Collection(tmp_path)
