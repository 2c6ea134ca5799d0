import errno
import json
import os
import pickle
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_value_steer.errors import ArtefactError
from hf_value_steer.files import writing as files
from hf_value_steer.files.writing import claim, refuse_other, write_atomically, write_json
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.prompts import write_prompts
from hf_value_steer.training.shards import FORMAT, Collection, TensorFile, shard_path, write_tensors


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


ENTRY = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
META = {"sha256": "0" * 64}


def plant(header, data=b"\0" * 64, length=None):
    """The bytes of a safetensors file with this header, which may be no JSON, and may lie about its length."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(**changes):
    return {"__metadata__": META, "a": {**ENTRY, **changes}}


PLANTS = {
    "empty": b"",
    "four bytes": b"1234",
    "noise": b"\xff" * 40,
    "no JSON": plant(b"{"),
    "no UTF-8": plant(b'{"\xff": 1}'),
    "NaN": plant(b'{"a": NaN}'),
    "list": plant([1]),
    "number": plant(b"7"),
    "deep list": plant(b"[" * 200_000),
    "deep value": plant(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "header of 2**62 bytes": plant(tensor(), length=2**62),
    "header of 2**64 - 1 bytes": plant(tensor(), length=2**64 - 1),
    "header beyond the file": plant(tensor(), length=10**6),
    "entry is a number": plant({"__metadata__": META, "a": 3}),
    "entry lacks its shape": plant({"__metadata__": META, "a": {"dtype": "F32", "data_offsets": [0, 64]}}),
    "shape is a text": plant(tensor(shape="44")),
    "shape of floats": plant(tensor(shape=[4.0, 4.0])),
    "huge shape": plant(tensor(shape=[10**12, 4])),
    "huge shape and offsets": plant(tensor(shape=[2**60], data_offsets=[0, 2**62])),
    "shape that overflows": plant(tensor(shape=[2**40, 2**40])),
    "no rows, but huge": plant(tensor(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), b""),
    "a single number": plant(tensor(shape=[], data_offsets=[0, 4]), b"\0" * 4),
    "negative shape": plant(tensor(shape=[-4, -4])),
    "negative offsets": plant(tensor(data_offsets=[-64, 0])),
    "unknown dtype": plant(tensor(dtype="X9")),
    "complex": plant(tensor(dtype="C64", shape=[8])),
    "two in one place": plant({**tensor(), "b": ENTRY}),
    "a hole": plant(tensor(shape=[8], data_offsets=[32, 64])),
    "a byte too much": plant(tensor(), b"\0" * 65),
    "a byte too few": plant(tensor(), b"\0" * 63),
    "no metadata": plant({"a": ENTRY}),
    "no digest": plant({"__metadata__": {}, "a": ENTRY}),
    "metadata is a list": plant({"__metadata__": [1], "a": ENTRY}),
    "digest is a number": plant({"__metadata__": {"sha256": 3}, "a": ENTRY}),
}


@pytest.mark.parametrize("damage", PLANTS)
def test_damaged_files_are_named(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    path.write_bytes(PLANTS[damage])
    with pytest.raises(ArtefactError, match=r"x\.safetensors is damaged: delete it and run .* again \(.+\)\.$"):
        TensorFile(path)


def test_the_plants_are_good_but_for_what_is_planted(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(plant(tensor()))
    assert TensorFile(path).read("a").shape == (4, 4)


def test_files_of_other_headers_are_read_or_refused(tmp_path):
    """Whatever a few wrong bytes make of a header: what is read is in the file."""
    path, draw, refused = tmp_path / "x.safetensors", random.Random(0), 0
    write_tensors(path, TENSORS)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for _ in range(2000):
        content = bytearray(good)
        for _ in range(draw.choice([1, 1, 2, 5])):
            content[draw.randrange(header)] = draw.randrange(256)
        path.write_bytes(content)
        try:
            file = TensorFile(path)
            assert sum(file.read(name).nbytes for name in file.tensors) == len(good) - header
        except ArtefactError:
            refused += 1
    assert 1000 < refused < 2000


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(ArtefactError, match=f"{tmp_path} is damaged: .*it is a folder"):
        TensorFile(tmp_path)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (("words",), "it holds no 'words', only "),
        (("half", 3, 6), "it holds 5 rows of 'half', where 3 to 6 are asked for"),
        (("half", -1, 2), "it holds 5 rows of 'half', where -1 to 2 are asked for"),
        (("half", 3, 2), "it holds 5 rows of 'half', where 3 to 2 are asked for"),
        (("none", 0, 1), "it holds 0 rows of 'none', where 0 to 1 are asked for"),
    ],
)
def test_what_a_file_does_not_hold_is_not_read(tmp_path, read, message):
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    with pytest.raises(ArtefactError, match=rf"x\.safetensors is damaged: .*{message}"):
        TensorFile(tmp_path / "x.safetensors").read(*read)


def test_a_file_that_was_cut_since_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    file, content = TensorFile(path), path.read_bytes()
    path.write_bytes(content[:-1])
    last = max(file.tensors, key=lambda name: file.tensors[name].offset)
    with pytest.raises(ArtefactError, match=f"it ends before the end of '{last}'"):
        file.read(last)


def test_open_files_take_neither_descriptors_nor_mappings(tmp_path):
    """Of collections of many hundreds of shards, read by workers too: what is kept is small and can be pickled."""
    for index in range(40):
        write_tensors(tmp_path / f"{index}", TENSORS)
    descriptors = len(os.listdir("/proc/self/fd"))
    files = [TensorFile(tmp_path / f"{index}") for index in range(40)]
    rows = [file.read("half", 1, 2) for file in files]
    assert len(os.listdir("/proc/self/fd")) == descriptors and len(rows) == 40
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert torch.equal(pickle.loads(pickle.dumps(files[0])).read("ids"), TENSORS["ids"])


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match="is damaged: .*its content is not that of its digest"):
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


@pytest.mark.parametrize("content", ["", "[1]", "[" * 100_000], ids=["empty", "a list", "deep"])
def test_a_record_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "what.json").write_text(content)
    for check in (claim, refuse_other):
        with pytest.raises(ArtefactError, match=r"what\.json is no record of what was done: .*delete it"):
            check(tmp_path / "what.json", {"seed": 1})


FACTS = {"backbone": "b", "backbone_fingerprint": "f", "chat_template": "none", "feature_dtype": "float32"}
MANIFEST = {"format": FORMAT, "hidden_size": 3, "shards": 2, **FACTS}
SHARD = {
    "features": torch.randn(5, 3),
    "tokens": torch.arange(5, dtype=torch.int32),
    "offsets": torch.tensor([0, 2, 5]),
    "prompts": torch.tensor([0, 1]),
    "natural": torch.tensor([True, True]),
}


@pytest.fixture
def collection(tmp_path):
    """A folder with a collection of two shards."""
    write_prompts([Prompt("one"), Prompt("two")], tmp_path / "prompts.jsonl")
    write_json(tmp_path / "collection.json", MANIFEST)
    for index in range(2):
        write_tensors(shard_path(tmp_path, index), SHARD)
    return tmp_path


def test_a_collection_is_read(collection):
    (collection / "shards" / "00000.safetensors.7.tmp").touch()  # left by a kill
    write_tensors(shard_path(collection, 2), SHARD)  # of a longer one
    read = Collection(collection)
    assert len(read.rows) == 4 and [read.length(row) for row in range(4)] == [2, 3, 2, 3]
    assert torch.equal(read.read("features", 3), SHARD["features"][2:]) and len(read.prompts) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no record of what was done: Expecting value.*Delete it and run `collect` again"),
        (b"\xff\xfe", "is no record of what was done: "),
        (b"[" * 100_000, "is no record of what was done: RecursionError"),
        (b"[1]", "is no record of what was done: it should hold a JSON object, but holds a list"),
        (b"7", "but holds a int"),
        ({}, "has the format None, expected"),
        ({"format": "else"}, "has the format 'else', expected"),
        ({"format": FORMAT}, "lacks backbone, .*hidden_size, shards: delete it and run `collect` again"),
        ({**MANIFEST, "shards": "2"}, "`shards` of .* is '2', expected a whole number of at least 1"),
        ({**MANIFEST, "shards": True}, "`shards` of .* is True"),
        ({**MANIFEST, "shards": 2.0}, "`shards` of .* is 2.0"),
        ({**MANIFEST, "shards": None}, "`shards` of .* is None"),
        ({**MANIFEST, "shards": [2]}, "`shards` of .* is .2."),
        ({**MANIFEST, "shards": -1}, "`shards` of .* is -1"),
        ({**MANIFEST, "shards": 0}, "`shards` of .* is 0"),
        ({**MANIFEST, "shards": 3}, "1 of 3 shards of .* are missing: wait for `collect`, or run it again"),
        ({**MANIFEST, "shards": 10**12}, "999999999998 of 1000000000000 shards of .* are missing"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(collection, content, message):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (collection / "collection.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=message) as caught:
        Collection(collection)
    assert str(collection) in str(caught.value)


def test_what_is_no_collection_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match=r"there is no collection\.json"):
        Collection(tmp_path)


def test_missing_prompts_are_named(collection):
    (collection / "prompts.jsonl").unlink()
    with pytest.raises(ArtefactError, match=r"prompts\.jsonl is missing: run `collect` again"):
        _ = Collection(collection).prompts


@pytest.mark.parametrize("shard", ["damaged", "a folder", "of something else"])
def test_a_collection_names_the_shard_that_is_damaged(collection, shard):
    path = shard_path(collection, 1)
    path.unlink()
    match shard:
        case "damaged":
            path.write_bytes(b"")
        case "a folder":
            path.mkdir()
        case _:
            write_tensors(path, {"responses": torch.zeros(2)})
    with pytest.raises(ArtefactError, match=r"00001\.safetensors is damaged: delete it"):
        _ = Collection(collection).rows


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": torch.tensor([0.0, 2.0, 5.0])},
        {"offsets": torch.tensor([0, 2, 5], dtype=torch.int32)},
        {"offsets": torch.tensor([[0, 2, 5]])},
        {"offsets": torch.tensor([0, 6, 5])},
        {"offsets": torch.tensor([1, 2, 5])},
        {"offsets": torch.tensor([0, 2, 9])},
        {"offsets": torch.tensor([], dtype=torch.int64)},
        {"offsets": torch.tensor([0, 5])},
        {"prompts": torch.tensor([0, -1])},
        {"prompts": torch.tensor([0, 1, 1])},
        {"natural": torch.tensor([1, 1])},
        {"tokens": torch.arange(4)},
    ],
)
def test_rows_that_do_not_fit_together_are_refused(collection, change):
    write_tensors(shard_path(collection, 1), {**SHARD, **change})
    with pytest.raises(ArtefactError, match=r"00001\.safetensors is damaged: .*'natural' are not those of rows of"):
        _ = Collection(collection).rows
