"""Every file that is damaged, or of something else, gives one error that names it; nothing is loaded by halves."""

import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_value_steer import GuidanceModule, GuidanceModuleConfig, SteeringVectors, ValueHead, ValueHeadConfig
from hf_value_steer.activation.interop import vectors_from_file
from hf_value_steer.calibration import Calibration
from hf_value_steer.errors import ArtefactError
from hf_value_steer.files.schema import SCHEMA
from tests.golden_vectors import FOLDER, raw_vectors


CONFIG, WEIGHTS, CALIBRATION = "config.json", "model.safetensors", "calibration.json"
VECTORS, TENSORS = "steering_vectors.json", "steering_vectors.safetensors"
BIN, SIDECAR = "head.bin", "head.bin.meta.json"
DEEP = "[" * 100_000 + "]" * 100_000
DEEPISH = '{"a": ' * 400 + "1" + "}" * 400  # which can be read, but not copied


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One folder of each kind, undamaged."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("originals")
    head = ValueHead(ValueHeadConfig(hidden_size=8, attribute="toxicity", threshold=0.3))
    head.calibration = Calibration.from_scores([0.1, 0.2, 0.4], groups=["a", "b", "a"])
    head.save_pretrained(root / "head")
    GuidanceModule(GuidanceModuleConfig(hidden_size=8, layer=0, value_width=4)).save_pretrained(root / "module")
    SteeringVectors.from_tensors(raw_vectors(), provenance={"by": "hand"}).save_pretrained(root / "vectors")
    head.save_value_steer(root / "peer" / BIN)
    (root / "import").mkdir()
    save_file({f"direction.{layer}": row for layer, row in raw_vectors().items()}, root / "import" / "v.safetensors")
    shutil.copy(FOLDER / "repeng.gguf", root / "import")
    return root


@pytest.fixture
def folders(originals, tmp_path):
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return tmp_path


def text(name, content):
    def damage(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def fields(name, **changes):
    """Some fields of a JSON file otherwise; those that are `...` are taken out."""

    def damage(folder):
        record = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in record.items() if value is not ...}
        (folder / name).write_text(json.dumps(kept))

    return damage


def tensors(name, change):
    def damage(folder):
        state = load_file(folder / name)
        change(state)
        save_file(state, folder / name, metadata={"format": "pt"})

    return damage


def to(name, dtype):
    return lambda state: state.update({name: state[name].to(dtype)})


def header(name, **entry):
    """A file whose header tells of something else than its bytes hold."""

    def damage(folder):
        content = (folder / name).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        record = json.loads(content[8 : 8 + size])
        record[next(key for key in record if key != "__metadata__")].update(entry)
        written = json.dumps(record).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(written)) + written + content[8 + size :])

    return damage


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


HUGE = 1_000_000  # a head so wide takes 4,000,000,000,000 bytes

HEADS = {
    "config: empty": (text(CONFIG, ""), CONFIG),
    "config: no JSON": (text(CONFIG, "{hidden_size: 8"), CONFIG),
    "config: no text": (text(CONFIG, b"\xff\xfe\x00"), CONFIG),
    "config: a list": (text(CONFIG, "[]"), "should hold a JSON object, but holds a list"),
    "config: a number": (text(CONFIG, "8"), "should hold a JSON object, but holds a int"),
    "config: null": (text(CONFIG, "null"), "should hold a JSON object"),
    "config: deep": (text(CONFIG, DEEP), "RecursionError"),
    "config: deep inside": (text(CONFIG, f'{{"training": {DEEP}}}'), "RecursionError"),
    "config: rather deep": (text(CONFIG, f'{{"model_type": "hvs_value_head", "training": {DEEPISH}}}'), CONFIG),
    "config: gone": (lambda folder: (folder / CONFIG).unlink(), "config.json is missing"),
    "config: of another": (fields(CONFIG, model_type="llama"), "not of model_type"),
    "config: of no type": (fields(CONFIG, model_type=...), "not of model_type"),
    "config: a type of a type": (fields(CONFIG, model_type=["llama"]), "not of model_type"),
    "config: width is text": (fields(CONFIG, hidden_size="8"), "hidden_size"),
    "config: width is null": (fields(CONFIG, hidden_size=None), "hidden_size"),
    "config: width is gone": (fields(CONFIG, hidden_size=...), "hidden_size"),
    "config: width is 0": (fields(CONFIG, hidden_size=0), "hidden_size"),
    "config: width is negative": (fields(CONFIG, hidden_size=-8), "hidden_size"),
    "config: width is another": (fields(CONFIG, hidden_size=9), r"net.0.bias of shape \(8,\) instead of \(9,\)"),
    "config: width is huge": (fields(CONFIG, hidden_size=HUGE), "mismatched_keys"),
    "config: width is beyond": (fields(CONFIG, hidden_size=10**30), CONFIG),
    "config: threshold": (fields(CONFIG, threshold="0.3"), "threshold"),
    "config: attributes": (fields(CONFIG, attributes=[1, 2]), "config.json"),
    "config: architecture": (fields(CONFIG, architecture="linear"), "unexpected_keys"),
    "config: dtype": (fields(CONFIG, dtype="float99"), CONFIG),
    "config: key": (fields(CONFIG, treshold=0.3), "did you mean `threshold`"),
    "config: self": (fields(CONFIG, self=1), CONFIG),
    "config: newer": (fields(CONFIG, schema_version=SCHEMA + 1), "upgrade with `pip install"),
    "weights: empty": (text(WEIGHTS, ""), WEIGHTS),
    "weights: truncated": (cut(WEIGHTS, -9), WEIGHTS),
    "weights: half a header": (cut(WEIGHTS, 20), WEIGHTS),
    "weights: noise": (text(WEIGHTS, b"\xff" * 64), WEIGHTS),
    "weights: HTML": (text(WEIGHTS, "<!DOCTYPE html><title>404</title>"), WEIGHTS),
    "weights: a header of exabytes": (text(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"), WEIGHTS),
    "weights: a huge shape": (header(WEIGHTS, shape=[HUGE, HUGE]), WEIGHTS),
    "weights: huge offsets": (header(WEIGHTS, data_offsets=[0, 4 * HUGE**2], shape=[HUGE, HUGE]), WEIGHTS),
    "weights: an unknown dtype": (header(WEIGHTS, dtype="X7"), WEIGHTS),
    "weights: gone": (lambda folder: (folder / WEIGHTS).unlink(), "there is no model.safetensors"),
    "weights: pickled": (pickled, "pickles are not read"),
    "weights: complex": (tensors(WEIGHTS, to("net.0.weight", torch.complex64)), "'net.0.weight' is of C64"),
    "weights: integers": (tensors(WEIGHTS, to("net.2.bias", torch.int64)), "'net.2.bias' is of I64"),
    "weights: booleans": (tensors(WEIGHTS, to("net.4.bias", torch.bool)), "'net.4.bias' is of BOOL"),
    "weights: one is missing": (tensors(WEIGHTS, lambda state: state.pop("net.4.bias")), "missing_keys net.4.bias"),
    "weights: one too many": (tensors(WEIGHTS, lambda state: state.update(x=torch.ones(1))), "unexpected_keys x"),
    "weights: transposed": (
        tensors(WEIGHTS, lambda state: state.update({"net.4.weight": torch.ones(8, 1)})),
        r"net.4.weight of shape \(8, 1\) instead of \(1, 8\)",
    ),
    "weights: NaN": (tensors(WEIGHTS, lambda state: state["net.2.bias"].fill_(torch.nan)), "NaN or infinite"),
    "weights: beyond float32": (
        tensors(WEIGHTS, lambda state: state.update({"net.2.bias": torch.full((8,), 1e300, dtype=torch.float64)})),
        "NaN or infinite",
    ),
    "index: of what is not there": (
        lambda folder: (pickled(folder), text(f"{WEIGHTS}.index.json", '{"weight_map": {"x": "y"}}')(folder)),
        "there is no y",
    ),
    "index: no map": (
        lambda folder: (pickled(folder), text(f"{WEIGHTS}.index.json", "{}")(folder)),
        "index.json",
    ),
    "calibration: empty": (text(CALIBRATION, ""), CALIBRATION),
    "calibration: a list": (text(CALIBRATION, "[1]"), CALIBRATION),
    "calibration: deep": (text(CALIBRATION, DEEP), CALIBRATION),
    "calibration: no scores": (fields(CALIBRATION, scores=...), "scores is missing"),
    "calibration: a score": (fields(CALIBRATION, scores=0.3), CALIBRATION),
    "calibration: a table": (fields(CALIBRATION, scores=[[0.1, 0.2]]), CALIBRATION),
    "calibration: ragged": (fields(CALIBRATION, scores=[[0.1], [0.2, 0.3]]), CALIBRATION),
    "calibration: words": (fields(CALIBRATION, scores=["low", "high"]), CALIBRATION),
    "calibration: beyond floats": (fields(CALIBRATION, scores=[10**400]), CALIBRATION),
    "calibration: groups": (fields(CALIBRATION, groups=["a"]), CALIBRATION),
    "calibration: group": (fields(CALIBRATION, groups={"a": {}}), CALIBRATION),
    "calibration: mode": (fields(CALIBRATION, mode=["marginal"]), CALIBRATION),
    "calibration: fingerprint": (fields(CALIBRATION, head_fingerprint=7), "head_fingerprint"),
    "calibration: sampling": (fields(CALIBRATION, sampling="top-p"), "sampling"),
}


def refused(load, expected):
    with pytest.raises(ArtefactError, match=expected) as caught:
        load()
    assert len(str(caught.value)) < 1200 and "weights_only=False" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("damage", HEADS)
def test_damaged_heads(folders, damage):
    change, expected = HEADS[damage]
    change(folders / "head")
    assert str(folders / "head") in refused(lambda: ValueHead.from_pretrained(folders / "head"), expected)


@pytest.mark.parametrize("damage", ["config: width is text", "config: key", "weights: integers", "weights: truncated"])
def test_damaged_heads_by_the_auto_class(folders, damage):
    HEADS[damage][0](folders / "head")
    assert str(folders / "head") in refused(lambda: AutoModel.from_pretrained(folders / "head"), HEADS[damage][1])


def test_a_wrong_argument_is_no_damage(folders):
    for wrong in ({"device_map": "nonsense"}, {"hidden_size": "wide"}):
        with pytest.raises(Exception, match=next(iter(wrong))) as caught:
            ValueHead.from_pretrained(folders / "head", **wrong)
        assert not isinstance(caught.value, ArtefactError)


MODULES = {
    "config: a list": (text(CONFIG, "[]"), "should hold a JSON object"),
    "config: of a head": (fields(CONFIG, model_type="hvs_value_head"), "not of model_type hvs_value_guidance"),
    "config: layer is text": (fields(CONFIG, layer="0"), "layer"),
    "config: step is infinite": (fields(CONFIG, step=float("inf")), "`step` has to be a finite number"),
    "config: dropout is NaN": (fields(CONFIG, dropout=float("nan")), "dropout"),
    "config: bridges are many": (fields(CONFIG, num_bridges=10**12), "generator.seeds of shape"),
    "config: width is huge": (fields(CONFIG, value_width=10**6 * 4), "mismatched_keys"),
    "config: unconditional": (fields(CONFIG, conditional=False), "unexpected_keys conditional"),
    "weights: truncated": (cut(WEIGHTS, 3000), WEIGHTS),
    "weights: complex": (tensors(WEIGHTS, to("generator.seeds", torch.complex64)), "'generator.seeds' is of C64"),
    "weights: one is missing": (tensors(WEIGHTS, lambda state: state.pop("generator.raw_gate")), "missing_keys"),
}


@pytest.mark.parametrize("damage", MODULES)
def test_damaged_guidance_modules(folders, damage):
    change, expected = MODULES[damage]
    change(folders / "module")
    refused(lambda: GuidanceModule.from_pretrained(folders / "module"), expected)


STEERING = {
    "document: no JSON": (text(VECTORS, "layers"), VECTORS),
    "document: a list": (text(VECTORS, "[]"), VECTORS),
    "document: deep": (text(VECTORS, DEEP), VECTORS),
    "document: gone": (lambda folder: (folder / VECTORS).unlink(), "there is no steering_vectors.json"),
    "document: format": (fields(VECTORS, format="other"), "format is 'other'"),
    "document: no layers": (fields(VECTORS, layers=...), "`layers` is 'missing'"),
    "document: layers are a number": (fields(VECTORS, layers=2), "`layers` is 2"),
    "document: layers are words": (fields(VECTORS, layers=["0", "1"]), "have to be integers"),
    "document: layers are fractions": (fields(VECTORS, layers=[0.0, 1.0]), "have to be integers"),
    "document: layers are many": (fields(VECTORS, layers=list(range(9))), "names 9 layers"),
    "document: layers turn back": (fields(VECTORS, layers=[1, 0]), "ascending"),
    "document: no provenance": (fields(VECTORS, provenance=...), "provenance"),
    "document: provenance": (fields(VECTORS, provenance=[1]), "provenance"),
    "document: depth": (fields(VECTORS, num_layers="2"), "num_layers"),
    "tensors: gone": (lambda folder: (folder / TENSORS).unlink(), "there is no steering_vectors.safetensors"),
    "tensors: empty": (text(TENSORS, ""), TENSORS),
    "tensors: truncated": (cut(TENSORS, -1), TENSORS),
    "tensors: huge": (header(TENSORS, shape=[HUGE, HUGE]), TENSORS),
    "tensors: integers": (tensors(TENSORS, to("strengths", torch.int32)), "'strengths' is of I32"),
    "tensors: complex": (tensors(TENSORS, to("directions", torch.complex64)), "'directions' is of C64"),
    "tensors: one too many": (tensors(TENSORS, lambda state: state.update(x=torch.ones(2))), "expected directions"),
    "tensors: one is missing": (tensors(TENSORS, lambda state: state.pop("strengths")), "expected directions"),
    "tensors: flat": (tensors(TENSORS, lambda state: state.update(directions=torch.ones(2))), r"shape \(2,\)"),
    "tensors: NaN": (tensors(TENSORS, lambda state: state["strengths"].fill_(torch.nan)), "NaN or infinite"),
    "tensors: lengths": (tensors(TENSORS, lambda state: state["directions"].mul_(2)), "norm 1"),
}


@pytest.mark.parametrize("damage", STEERING)
def test_damaged_steering_vectors(folders, damage):
    change, expected = STEERING[damage]
    change(folders / "vectors")
    refused(lambda: SteeringVectors.from_pretrained(folders / "vectors"), expected)


def saved(change):
    def damage(folder):
        torch.save(change(torch.load(folder / BIN)), folder / BIN)

    return damage


def stretched(state):
    """A million times a million numbers that are one and the same, and take four bytes."""
    shapes = {name: tuple(HUGE if size > 1 else 1 for size in entry.shape) for name, entry in state.items()}
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


PEERS = {
    "bin: empty": (text(BIN, ""), BIN),
    "bin: truncated": (cut(BIN, 900), BIN),
    "bin: noise": (text(BIN, b"\x80\x02" + bytes(range(256))), BIN),
    "bin: a list": (saved(lambda state: list(state.values())), "expected keys .* got a list"),
    "bin: a tensor": (saved(lambda state: state["0.weight"]), "got a Tensor"),
    "bin: other keys": (saved(lambda state: {1: torch.ones(2), **state}), "expected keys"),
    "bin: numbers": (saved(lambda state: {**state, "0.bias": 3.0}), "0.bias should be dense tensors"),
    "bin: complex": (saved(lambda state: {**state, "0.bias": state["0.bias"].cfloat()}), "floating-point numbers"),
    "bin: integers": (saved(lambda state: {**state, "4.bias": state["4.bias"].long()}), "floating-point numbers"),
    "bin: sparse": (saved(lambda state: {**state, "4.weight": state["4.weight"].to_sparse()}), "dense tensors"),
    "bin: flat": (saved(lambda state: {**state, "4.weight": torch.ones(())}), "has shape"),
    "bin: narrow": (saved(lambda state: {**state, "0.weight": torch.ones(8, 7)}), r"0.weight has shape \(8, 7\)"),
    "bin: huge": (saved(stretched), "does not fit into a file of"),
    "bin: NaN": (saved(lambda state: {**state, "4.bias": torch.tensor([torch.nan])}), "NaN or infinite"),
    "sidecar: no JSON": (text(SIDECAR, "threshold"), SIDECAR),
    "sidecar: a list": (text(SIDECAR, "[]"), SIDECAR),
    "sidecar: deep": (text(SIDECAR, DEEP), SIDECAR),
    "sidecar: empty": (text(SIDECAR, "{}"), "feature_spec, meta, threshold is missing"),
    "sidecar: no threshold": (fields(SIDECAR, threshold=...), "threshold is missing"),
    "sidecar: threshold": (fields(SIDECAR, threshold=3), "`threshold` has to be"),
    "sidecar: meta": (fields(SIDECAR, meta=[1]), "meta should be a JSON object"),
    "sidecar: feature": (fields(SIDECAR, feature_spec={"layer": 3}), "feature_spec"),
}


@pytest.mark.parametrize("damage", PEERS)
def test_damaged_heads_of_value_steer(folders, damage):
    change, expected = PEERS[damage]
    change(folders / "peer")
    assert BIN in refused(lambda: ValueHead.from_value_steer(folders / "peer" / BIN), expected)


IMPORTS = {
    "v.safetensors": {
        "empty": (text("v.safetensors", ""), "v.safetensors"),
        "truncated": (cut("v.safetensors", -4), "v.safetensors"),
        "a table": (tensors("v.safetensors", lambda s: s.update({"direction.0": torch.ones(2, 16)})), r"\(2, 16\)"),
        "a number": (tensors("v.safetensors", lambda s: s.update({"direction.0": torch.ones(())})), "one width"),
        "widths": (tensors("v.safetensors", lambda s: s.update({"direction.0": torch.ones(3)})), "one width"),
        "integers": (tensors("v.safetensors", to("direction.1", torch.int8)), "torch.int8"),
        "complex": (tensors("v.safetensors", to("direction.1", torch.complex64)), "torch.complex64"),
        "zero": (tensors("v.safetensors", lambda s: s["direction.1"].zero_()), "are zero"),
        "names": (tensors("v.safetensors", lambda s: s.update({"norm": torch.ones(32)})), r"named direction\.LAYER"),
    },
    "repeng.gguf": {
        "empty": (text("repeng.gguf", ""), "repeng.gguf"),
        "truncated": (cut("repeng.gguf", 200), "repeng.gguf"),
        "half its tensors": (cut("repeng.gguf", -100), "repeng.gguf"),
        "noise": (text("repeng.gguf", b"GGUF" + b"\xff" * 64), "repeng.gguf"),
    },
}


@pytest.mark.parametrize(("file", "damage"), [(file, damage) for file in IMPORTS for damage in IMPORTS[file]])
def test_damaged_vectors_of_other_libraries(folders, file, damage):
    change, expected = IMPORTS[file][damage]
    change(folders / "import")
    assert file in refused(lambda: vectors_from_file(folders / "import" / file), expected)


def test_files_that_are_not_there(folders):
    for load in (vectors_from_file, ValueHead.from_value_steer, Calibration.load):
        with pytest.raises(OSError, match="nothing"):
            load(folders / "nothing.safetensors")


def whole_head(folder):
    head = ValueHead.from_pretrained(folder)
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in head.state_dict().values())


LOADERS = {
    "head": ([CONFIG, WEIGHTS, CALIBRATION], whole_head),
    "module": ([CONFIG, WEIGHTS], GuidanceModule.from_pretrained),
    "vectors": ([VECTORS, TENSORS], SteeringVectors.from_pretrained),
    "peer": ([BIN, SIDECAR], lambda folder: ValueHead.from_value_steer(folder / BIN)),
    "import": (["v.safetensors"], lambda folder: vectors_from_file(folder / "v.safetensors")),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_whatever_byte_is_another_it_loads_whole_or_is_refused(folders, kind):
    names, load = LOADERS[kind]
    chance = random.Random(f"bytes of a {kind}")
    load(folders / kind)
    for _ in range(60):
        path: Path = folders / kind / chance.choice(names)
        before = path.read_bytes()
        content = bytearray(before)
        end = chance.choice([64, len(content)])  # headers are short, and more is at stake there
        for _ in range(chance.choice([1, 1, 4])):
            content[chance.randrange(min(end, len(content)))] = chance.randrange(256)
        path.write_bytes(content)
        try:
            load(folders / kind)
        except (ArtefactError, OSError) as error:
            assert kind in str(error)
        path.write_bytes(before)
